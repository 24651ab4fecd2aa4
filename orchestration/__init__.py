"""From an experiment file to finished run directories: jobs, their queue, and the processes that run them."""
