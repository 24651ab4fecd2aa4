"""Write a report into its folder: CSV files, figures, page."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from orchestration.storage import write_atomically
from reporting import bernoulli, dice_figures, efficiency, league, page, style, tables
from reporting.aggregate import with_keys
from reporting.analyse import GIVEN_UP, Results
from reporting.asymptotics import compare, slopes
from reporting.beside import beside_figure
from reporting.figures import curves_figure, pivot_figure, together_figure, without_start
from reporting.gradient_figures import asymptotics_figure, distribution_figure, frontier_figure, individual_figure
from reporting.layout import Layout, arrange, split
from reporting.options import Metric, PivotMetric

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
    asked = {"league", "frontier"} & {*results.options.figures}
    leagues = league.leagues(results.measured, layout) if asked else []
    with mpl.rc_context(style.RC):
        drawings = _draw(results, layout, leagues, folder)
    studies = _studies(results, layout, leagues, title, folder)
    pivots = tables.lay_out(results.summary, keys, layout, results.published)
    if results.options.latex:
        captions = (f"{title}: {page.describe(pivot.metric)}. {results.options.caption}".strip() for pivot in pivots)
        folder.write("pivot.tex", "\n".join(map(tables.pivot_latex, pivots, captions)))
    warnings = [*results.warnings, *league.contradictions(leagues), *folder.warnings]
    caption = results.options.caption
    content = page.Content(
        title, description, caption, results.jobs, runs, drawings, studies, pivots, warnings, list(folder.made)
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


def _studies(
    results: Results, layout: Layout, leagues: Sequence[league.League], title: str, folder: Folder
) -> list[page.Section]:
    """Write the tables of the asymptotics and of the league; return their sections of the page."""
    options, sections = results.options, []
    if "league" in options.figures and leagues:
        folder.write_csv("league.csv", league.league_table(leagues))
        sections.append(page.league_section(leagues))
        if options.latex:
            captions = (", ".join(filter(None, [title, each.scene])) for each in leagues)
            folder.write("league.tex", "\n".join(map(league.league_latex, leagues, captions)))
    if len(grown := _grown(results, layout)):
        folder.write_csv("efficiency.csv", grown)
        sections.append(page.efficiency_section(grown))
    if _has_asymptotics(results, layout):
        fitted = slopes(results.measured, _reduced(results), layout)
        folder.write_csv("slopes.csv", fitted)
        sections.append(page.slopes_section(fitted))
        compared = compare(results.measured, results.published, layout)
        if len(compared):
            folder.write_csv("comparison.csv", compared)
            sections.append(page.comparison_section(compared))
    return sections


def _reduced(results: Results) -> list[PivotMetric]:
    """Return the pivot metrics that finished runs have."""
    summary = results.summary
    return [metric for metric in results.options.pivot_metrics if (summary["metric"] == str(metric)).any()]


def _has_asymptotics(results: Results, layout: Layout) -> bool:
    return "asymptotics" in results.options.figures and bool(layout.particles) and bool(_reduced(results))


def _grown(results: Results, layout: Layout) -> pd.DataFrame:
    """Return the table of the efficiency's growth, empty where it is not asked for."""
    if "efficiency" not in results.options.figures or not layout.particles:
        return pd.DataFrame(columns=efficiency.COLUMNS)
    done = results.runs[results.runs["state"] == "done"]
    return efficiency.growths(results.measured, efficiency.published_factors(done), layout)


def _draw(results: Results, layout: Layout, leagues: Sequence[league.League], folder: Folder) -> list[page.Drawing]:
    """Draw each kind of figure that is asked for and has data; the pivot, the study's answer, comes first."""
    options, ylims = results.options, dict(results.options.ylims)
    unfinished = int((~results.runs["state"].isin(("done", *GIVEN_UP))).sum())
    drawings = []

    summary = results.summary

    def draw(stem: str, figure: Figure, caption: str) -> None:
        folder.draw(stem, figure)
        drawings.append(page.Drawing(stem, figure.get_figwidth(), caption))

    reduced = _reduced(results)
    if reduced and "pivot" in options.figures:
        figure = pivot_figure(summary, reduced, layout, ylims, results.published)
        draw("pivot", figure, page.pivot_caption(reduced, summary, results.published))
    if _has_asymptotics(results, layout):
        shown = results.measured[results.measured["metric"].isin([str(metric) for metric in reduced])]
        fitted = slopes(shown, reduced, layout)
        figure = asymptotics_figure(shown, reduced, layout, results.published, fitted)
        draw("asymptotics", figure, page.asymptotics_caption(reduced, shown, results.published))
    if len(grown := _grown(results, layout)):
        short = efficiency.short_of_memory(results.runs)
        figure = efficiency.efficiency_figure(results.measured, grown, layout, short)
        draw("efficiency", figure, efficiency.caption(results.measured, grown, short))
    if "samples" in options.figures and (with_curves := _with_curves(options.metrics, results.means)):
        shown = results.means[results.means["metric"].isin([str(metric) for metric in with_curves])]
        draw("samples", dice_figures.samples_figure(shown, with_curves, layout), dice_figures.samples_caption(shown))
    if "returns" in options.figures and (with_curves := _with_curves(options.metrics, results.means)):
        shown = results.means[results.means["metric"] == str(with_curves[0])]
        figure = dice_figures.returns_figure(shown, with_curves[0], layout, results.published)
        draw("returns", figure, dice_figures.returns_caption(shown, results.published))
    if "against_p" in options.figures and bernoulli.has_data(results.means):
        draw("against_p", bernoulli.variance_figure(results.means, layout), bernoulli.CAPTION)
    if results.distribution is not None and len(results.distribution):
        draw(
            "distribution",
            distribution_figure(results.distribution, layout),
            page.distribution_caption(results.distribution),
        )
    if results.individual is not None and len(results.individual) and layout.particles:
        draw("individual", individual_figure(results.individual, layout), page.individual_caption(results.individual))
    if "frontier" in options.figures and leagues:
        draw("frontier", frontier_figure(leagues), page.frontier_caption(leagues))

    def draw_curves(stem: str, metrics: Sequence[Metric], panel: tuple[float, float] | None) -> None:
        table = results.smoothed[results.smoothed["metric"].isin([str(metric) for metric in metrics])]
        if panel:
            figure = curves_figure(table, metrics, layout, ylims, panel)
        else:
            figure = together_figure(table, metrics[0], layout, ylims)
        begun = [metric for metric in metrics if metric not in ylims and _starts_outside(metric, table, layout)]
        draw(stem, figure, page.curves_caption(metrics, table, options.ema, unfinished, begun))

    if "beside" in options.figures and (with_curves := _with_curves(options.metrics, results.smoothed)):
        table = results.smoothed[results.smoothed["metric"].isin([str(metric) for metric in with_curves])]
        begun = [metric for metric in with_curves if metric not in ylims and _starts_outside(metric, table, layout)]
        figure = beside_figure(table, with_curves, layout, ylims)
        draw("beside", figure, page.curves_caption(with_curves, table, options.ema, unfinished, begun))
    if "together" in options.figures:
        for metric in _with_curves(options.metrics, results.smoothed):
            draw_curves(f"together-{_stem(metric)}", [metric], None)
    if "curves" in options.figures:
        for metric in _with_curves(options.metrics, results.smoothed):
            draw_curves(f"curves-{_stem(metric)}", [metric], (2.7, 2.6))
    if "detailed" in options.figures and (detailed := _with_curves(options.detailed_metrics, results.smoothed)):
        draw_curves("detailed", detailed, (2.3, 1.7))
    return drawings


def _starts_outside(metric: Metric, means: pd.DataFrame, layout: Layout) -> bool:
    """Say whether the start of training lies outside some panel."""
    scenes = split(means[means["metric"] == str(metric)], layout.scenes).values()
    return any(len(without_start(metric, part)) < len(part) for part in scenes)


def _with_curves(metrics: Sequence[Metric], means: pd.DataFrame) -> list[Metric]:
    """Keep the metrics that were recorded at two steps or more; one point is no curve."""
    steps = means.groupby("metric", observed=True)["step"].nunique()
    return [metric for metric in metrics if steps.get(str(metric), 0) > 1]


def _stem(metric: Metric) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in str(metric))
