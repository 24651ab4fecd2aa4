"""Write a report into its folder: CSV files, figures, page."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from orchestration.storage import write_atomically
from reporting import page, style, tables
from reporting.aggregate import with_keys
from reporting.analyse import GIVEN_UP, Results
from reporting.figures import curves_figure, pivot_figure
from reporting.layout import Layout, arrange
from reporting.options import Metric

MANIFEST = "manifest.txt"
# Dates and versions stay out, so that the same report is the same bytes.
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}


class Folder:
    """The report's folder. What an earlier report made and this one did not is removed; nothing else is.

    The files are held in memory until `finish`, so that an interrupt before leaves the earlier report as it is.
    """

    def __init__(self, path: Path):
        self.path = path
        self.made: dict[str, bytes] = {}
        self.warnings: list[str] = []
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._earlier = (path / MANIFEST).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            self._earlier = []
        except UnicodeDecodeError:
            self._earlier = []
            self.warnings.append(f"{path / MANIFEST}: no text; files of earlier reports may have stayed")

    def write(self, name: str, text: str) -> None:
        """Make a text file."""
        self.made[name] = text.encode()

    def write_csv(self, name: str, table: pd.DataFrame) -> None:
        """Make a table."""
        self.write(name, table.to_csv(index=False))

    def draw(self, stem: str, figure: Figure) -> None:
        """Make a figure as PNG and as PDF."""
        for kind, metadata in METADATA.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=170, metadata=metadata)
            self.made[f"{stem}.{kind}"] = buffer.getvalue()

    def finish(self) -> None:
        """Write every file, remove what the last report left behind, and remember what this one made."""
        for name, content in self.made.items():
            write_atomically(self.path / name, content)
        left = set(self._earlier) - set(self.made)
        for file in [file for file in self.path.iterdir() if file.name in left and file.is_file()]:
            file.unlink()
        write_atomically(self.path / MANIFEST, "".join(f"{name}\n" for name in sorted(self.made)).encode())


def write(results: Results, path: Path, title: str, description: str) -> list[str]:
    """Write the whole report; return its warnings. Raises OSError where the disk refuses."""
    folder, keys, layout = Folder(path), list(results.keys), arrange(results.runs, results.keys)
    runs = tables.runs_table(results.runs, results.numbers, results.keys)
    folder.write_csv("runs.csv", runs)
    folder.write_csv("curves.csv", _with_split(results.means))
    seeds = list(dict.fromkeys(["id", *keys, "seed"]))
    per_run = with_keys(results.values, results.runs, seeds[1:]).sort_values([*seeds, "metric", "step"])
    folder.write_csv("seeds.csv", _with_split(per_run[[*seeds, "metric", "step", "value"]]))
    folder.write_csv("pivot.csv", tables.pivot_table(results.summary, keys))
    with mpl.rc_context(style.RC):
        drawings = _draw(results, layout, folder)
    pivots = tables.lay_out(results.summary, keys, layout, results.published)
    if results.options.latex:
        captions = (f"{title}: {page.describe(pivot.metric)}. {results.options.caption}".strip() for pivot in pivots)
        folder.write("pivot.tex", "\n".join(map(tables.pivot_latex, pivots, captions)))
    warnings = [*results.warnings, *folder.warnings]
    caption = results.options.caption
    content = page.Content(
        title, description, caption, results.jobs, runs, drawings, pivots, warnings, list(folder.made)
    )
    folder.write("index.html", page.render(content))
    folder.finish()
    return warnings


def _with_split(table: pd.DataFrame) -> pd.DataFrame:
    """Put the split of `split:group/name` into a column of its own."""
    metrics = table["metric"].astype(str)
    parts = metrics.str.extract("^([^:]*):(.*)$")
    before = list(table.columns[: list(table.columns).index("metric")])
    return table.assign(split=parts[0], metric=parts[1])[[*before, "split", *table.columns[len(before) :]]]


def _draw(results: Results, layout: Layout, folder: Folder) -> list[page.Drawing]:
    """Draw each kind of figure that is asked for and has data; the pivot, the study's answer, comes first."""
    options, ylims = results.options, dict(results.options.ylims)
    unfinished = int((~results.runs["state"].isin(("done", *GIVEN_UP))).sum())
    drawings = []

    summary = results.summary
    reduced = [metric for metric in options.pivot_metrics if (summary["metric"] == str(metric)).any()]
    if reduced and "pivot" in options.figures:
        figure = pivot_figure(summary, reduced, layout, ylims, results.published)
        folder.draw("pivot", figure)
        caption = page.pivot_caption(reduced, summary, results.published)
        drawings.append(page.Drawing("pivot", figure.get_figwidth(), caption))

    def draw_curves(stem: str, metrics: Sequence[Metric], panel: tuple[float, float]) -> None:
        table = results.smoothed[results.smoothed["metric"].isin([str(metric) for metric in metrics])]
        figure = curves_figure(table, metrics, layout, ylims, panel)
        folder.draw(stem, figure)
        caption = page.curves_caption(metrics, table, options.ema, unfinished)
        drawings.append(page.Drawing(stem, figure.get_figwidth(), caption))

    if "curves" in options.figures:
        for metric in _with_curves(options.metrics, results.smoothed):
            draw_curves(f"curves-{_stem(metric)}", [metric], (2.7, 2.6))
    if "detailed" in options.figures and (detailed := _with_curves(options.detailed_metrics, results.smoothed)):
        draw_curves("detailed", detailed, (2.3, 1.7))
    return drawings


def _with_curves(metrics: Sequence[Metric], means: pd.DataFrame) -> list[Metric]:
    """Keep the metrics that were recorded at two steps or more; one point is no curve."""
    steps = means.groupby("metric", observed=True)["step"].nunique()
    return [metric for metric in metrics if steps.get(str(metric), 0) > 1]


def _stem(metric: Metric) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in str(metric))
