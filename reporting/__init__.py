"""From run directories to tables, figures and one page. Reads files only and never imports torch."""
