"""index.html: the figures with captions, the pivot, and the state of every job, in one page that needs no other."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from reporting import style
from reporting.asymptotics import common_factor
from reporting.efficiency import FITTED as GROWTH_FITTED
from reporting.efficiency import table_of
from reporting.figures import OVER_STEPS
from reporting.gradient_figures import KEPT, NONE, slope_text
from reporting.gradients import divided_by
from reporting.league import UNBIASED, League, league_html
from reporting.load import Job, distinct, states
from reporting.options import Metric, PivotMetric
from reporting.tables import Pivot, pivot_html

INTERVALS = (
    "95% intervals (Student's t over seeds; {seeds}), on logarithmic axes formed in logarithms, and cut at the panel's "
    "edge."
)
BANDS = f"Lines are means over seeds, bands their {INTERVALS}"
MEASURED = "A single run's band is the 95% interval of the measurement itself, where its error was recorded."
BARS = f"Points are means over seeds, bars their {INTERVALS}"


class Drawing(NamedTuple):
    """A figure on the page: the stem of its files' names, its width in inches, and its caption."""

    stem: str
    width: float
    caption: str


class Section(NamedTuple):
    """A section of tables: a note on what they say, and each table's title and HTML."""

    title: str
    note: str
    tables: Sequence[tuple[str, str]]


class Content(NamedTuple):
    """What a page shows; `runs` is the table of runs.csv."""

    title: str
    description: str
    caption: str
    jobs: Sequence[Job]
    runs: pd.DataFrame
    drawings: Sequence[Drawing]
    studies: Sequence[Section]
    pivots: Sequence[Pivot]
    warnings: Sequence[str]
    files: Sequence[str]


def seeds(table: pd.DataFrame) -> str:
    """Say over how many seeds the means of a table go."""
    low, high = int(table["n"].min()), int(table["n"].max())
    if high == 1:
        return "one seed each, so none is drawn"
    single = "; where there is one seed none is drawn" if low == 1 else ""
    return (f"n = {high}" if low == high else f"n = {low} to {high}") + single


def curves_caption(
    metrics: Sequence[Metric], table: pd.DataFrame, ema: float, unfinished: int, cut: Sequence[Metric] = ()
) -> str:
    """Describe a figure of curves; `cut` are the metrics whose axes leave out the start of training."""
    words = [f"{_capital(style.describe(name).label)} ({split})" for split, name in metrics]
    what = f"{', '.join(words)} against training step."
    smoothed = f"Each run smoothed by an exponential moving average of {ema:g}." if ema else ""
    partial = f"Unfinished runs included: {unfinished}." if unfinished else ""
    measured = MEASURED if (table["low"].notna() & (table["n"] == 1)).any() else ""
    alone = measured and table["n"].max() == 1
    lines = "Lines are runs, one seed each." if alone else BANDS.format(seeds=seeds(table))
    start = "The start of training lies outside the axes." if cut else ""
    if cut and len(metrics) > 1:
        names = ", ".join(dict.fromkeys(style.describe(metric.name).label for metric in cut))
        start = f"The start of training lies outside the axes of {names}."
    return " ".join(filter(None, [what, lines, measured, smoothed, start, partial]))


def pivot_caption(metrics: Sequence[PivotMetric], table: pd.DataFrame, published: pd.DataFrame) -> str:
    """Describe the figure of pivot metrics."""
    names = ", ".join(dict.fromkeys(style.describe(metric.metric.name).label for metric in metrics))
    theirs = f"Hollow: published by {'; '.join(published['source'].unique())}." if len(published) else ""
    what = f"{_capital(names)} of finished runs."
    return " ".join(filter(None, [what, BARS.format(seeds=seeds(table)), theirs]))


FITTED = (
    "least squares of the logarithm against log K, with 95% Student intervals of n - 2 degrees of freedom, n the "
    "number of K; wide where the points are no power law"
)


def asymptotics_caption(metrics: Sequence[PivotMetric], table: pd.DataFrame, published: pd.DataFrame) -> str:
    """Describe the figure of metrics against K."""
    names = ", ".join(dict.fromkeys(style.describe(metric.metric.name).label for metric in metrics))
    bars = "Bars are 95% intervals, of the measurement itself where there is one run, over seeds elsewhere."
    guides = "Grey: powers of K for the eye."
    theirs = f"Hollow: published by {'; '.join(published['source'].unique())}." if len(published) else ""
    what = f"{_capital(names)} against the number of particles K, both axes logarithmic."
    return " ".join(
        filter(None, [what, bars if table["low"].notna().any() else "", guides, theirs, f"Slopes: {FITTED}."])
    )


def distribution_caption(table: pd.DataFrame) -> str:
    """Describe the figure of single gradients; `table` is that of `gradients.distribution`."""
    low, high = KEPT
    count = sum(len(ratios) for ratios in table["ratios"])
    kept = f"Drawn are the quantiles {low:.1%} to {high:.1%} of each row; what lies beyond is clipped but counted."
    unsigned = int(table["unsigned"].sum())
    without = (
        f"Left out: {unsigned} of {int(table['parameters'].sum())} parameters, over all rows, whose gradient is zero "
        "or within two standard errors of it."
        if unsigned
        else ""
    )
    what = (
        "Distribution of single gradients, replicate by replicate and parameter by parameter, divided by the "
        f"{divided_by(table)} (dotted, 1; a mean is that over all replicates). Right of zero the sign is right; the "
        "percentage beside each row is the share of these. The axis is linear between -1 and 1 and logarithmic beyond; "
        "densities are those of the ratio, each scaled to its row."
    )
    return " ".join(filter(None, [what, kept, f"{count:,} gradients in all.", without]))


def individual_caption(table: pd.DataFrame) -> str:
    """Describe the figure of single parameters."""
    names = ", ".join(map(str, table["parameter"].unique()))
    return (
        f"SNR and variance of the gradient of single parameters ({names}) against K, both axes logarithmic. Bars are "
        "95% intervals, of the measurement itself where there is one run, over seeds elsewhere; those that reach "
        "zero end at the panel's edge."
    )


def frontier_caption(leagues: Sequence[League]) -> str:
    """Describe the figure of variance against time."""
    hollow = f"Hollow: a bias of more than {UNBIASED:g} standard errors."
    shaded = (
        f"Right: root mean square over parameters of bias / standard error; unbiased estimators lie about 1 and in the "
        f"shaded range, below {UNBIASED:g}, in 95% of measurements."
    )
    has_bias = any("grads/bias_z" in league.columns for league in leagues)
    return (
        "Gradient variance against time an evaluation (loss and backward), both axes logarithmic. Numbers are those of "
        f"the rows at the right and of the league, the same in all panels; within an objective the rows stand in order "
        f"of variance {style.TIMES} time. A line joins the estimators of one objective, without a bias, that no other "
        f"such beats in both (dark edges); dotted lines have equal variance {style.TIMES} time, in seconds. "
        + (f"{hollow} {shaded}" if has_bias else "")
    ).strip()


def league_section(leagues: Sequence[League]) -> Section:
    """Return the league's section of the page."""
    note = (
        "Estimators by the objective of q whose gradient they estimate, and in order of their work-normalised variance "
        f"(variance {style.TIMES} seconds of an evaluation); a variance says nothing across objectives, nor between "
        "two Riemann sums, for it goes with the size of the gradient. In bold the best of each column among the "
        "unbiased of an objective. Bias in standard errors: root mean square over parameters, about 1 where there "
        f"is none; in red above {UNBIASED:g}, which 5% of the unbiased exceed at most. league.csv has every digit."
    )
    names = {entry.name for league in leagues for entry in league.entries}
    if "nvil" in names:
        note += " nvil's running scale stands still in a study, where it is reinforce-baseline."
    if any(name.startswith("ovis-S") and name.endswith("-exclusive") for name in names):
        note += " ovis-S...-exclusive draws S particles beside its K."
    return Section("League", note, [(league.scene, league_html(league)) for league in leagues])


def slopes_section(slopes: pd.DataFrame) -> Section:
    """Return the fitted slopes' section of the page."""
    tables = []
    for scene, part in slopes.groupby("scene", sort=False):
        metrics = list(part["metric"].unique())
        cells = part.set_index(["estimator", "metric"])
        rows = [
            [estimator, *(slope_text(*cells.loc[(estimator, metric), ["slope", "low", "high"]]) for metric in metrics)]
            for estimator in part["estimator"].unique()
        ]
        heads = ["estimator", *(style.describe(metric.split(":")[2]).label for metric in metrics)]
        tables.append((str(scene), _table(heads, rows)))
    return Section("Slopes in K", f"{_capital(FITTED)}.", tables)


def efficiency_section(grown: pd.DataFrame) -> Section:
    """Return the costs of a training step and their growth; `grown` is the table of `efficiency.growths`."""
    note = (
        "Time and peak memory of a training step at the greatest K, the power of K by which they grow, and the factor "
        f"by which memory grew from the K before. {GROWTH_FITTED}. efficiency.csv has every digit."
    )
    return Section("Growth in K", note, [("", _table(*table_of(grown)))])


def comparison_section(compared: pd.DataFrame) -> Section:
    """Return the section of ours beside the published."""
    tables = []
    for (scene, metric), part in compared.groupby(["scene", "metric"], sort=False):
        scaled = bool(part["scaled"].notna().any())
        factor = common_factor(part["ratio"]) if scaled else 1.0
        k = sorted(part["K"].unique())
        rows = []
        for estimator, cells in part.groupby("estimator", sort=False):
            by_k = cells.set_index("K")
            texts = [_ratio(by_k.loc[each], scaled) if each in by_k.index else NONE for each in k]
            rows.append([str(estimator), *texts])
        aside = f", common factor {factor:.3g}" if scaled else ""
        title = ", ".join(filter(None, [str(scene), style.describe(str(metric).split(":")[2]).label])) + aside
        tables.append((title, _table(["estimator", *(f"K = {each:g}" for each in k)], rows)))
    note = (
        "Ours / published, the ratio in front. SNR and directional SNR scale with the one perturbation drawn: their "
        "ratio is given after division by the one common factor, the geometric mean of the metric's ratios."
    )
    return Section("Ours and the published", note, tables)


def _ratio(cell: pd.Series, scaled: bool) -> str:
    ratio = cell["scaled"] if scaled else cell["ratio"]
    return f"{ratio:.3f} ({cell['ours']:.3g} / {cell['published']:.3g})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th class='key'>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f"<table class='pivot'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def render(content: Content) -> str:
    """Return the page."""
    unfinished = [job for job in distinct(content.jobs) if job.state != "done"]
    parts = [
        f"<h1>{_text(content.title)}</h1>",
        _paragraph(content.description),
        _paragraph(content.caption),
        _tiles(content.jobs),
        _list("Warnings", content.warnings, "warnings"),
        "" if content.drawings or content.pivots else "<p class='empty'>No job has recorded anything yet.</p>",
        *(_figure(drawing) for drawing in content.drawings),
        *map(_study, content.studies),
        _pivots(content.pivots),
        _jobs("Missing: not finished", unfinished, is_open=True),
        _runs(content.runs),
        _section("Files", " ".join(f"<a href='{_text(name)}'>{_text(name)}</a>" for name in content.files)),
    ]
    body = "\n".join(part for part in parts if part)
    return TEMPLATE.format(title=_text(content.title), css=CSS, body=body)


PIVOT_NOTE = (
    "Mean ± standard error over the seeds of finished runs; the best of each column in bold; n where seeds are "
    "missing. pivot.csv has standard deviations, 95% intervals and n."
)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>" if text else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _tiles(jobs: Sequence[Job]) -> str:
    tiles = {"jobs": len(distinct(jobs)), **states(jobs)}
    return (
        "<ul class='tiles'>"
        + "".join(f"<li class='{_text(name)}'><b>{count}</b> {_text(name)}</li>" for name, count in tiles.items())
        + "</ul>"
    )


def _list(title: str, items: Sequence[str], kind: str) -> str:
    if not items:
        return ""
    rows = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<details class='{kind}' open><summary>{title} ({len(items)})</summary><ul>{rows}</ul></details>"


def _figure(drawing: Drawing) -> str:
    stem = _text(drawing.stem)
    return (
        f"<figure><a href='{stem}.pdf'><img src='{stem}.png' width='{96 * drawing.width:.0f}' alt='{stem}'></a>"
        f"<figcaption>{_text(drawing.caption)} <a href='{stem}.pdf'>PDF</a></figcaption></figure>"
    )


def _study(section: Section) -> str:
    parts = (
        f"<div class='wide'>{f'<h3>{_text(title)}</h3>' if title else ''}{table}</div>"
        for title, table in section.tables
    )
    return _section(section.title, f"{_paragraph(section.note)}<div class='tables'>{''.join(parts)}</div>")


def _pivots(pivots: Sequence[Pivot]) -> str:
    if not pivots:
        return ""
    tables = (f"<div class='wide'><h3>{_text(describe(p.metric))}</h3>{pivot_html(p)}</div>" for p in pivots)
    return _section("Pivot", f"{_paragraph(PIVOT_NOTE)}<div class='tables'>{''.join(tables)}</div>")


def describe(pivot_metric: str) -> str:
    """Say in words what `aggregation:split:group/name` is."""
    aggregation, split, name = pivot_metric.split(":")
    return f"{_capital(style.axis_label(name))}, {OVER_STEPS[aggregation]}, {split}"


def _jobs(title: str, jobs: Sequence[Job], is_open: bool) -> str:
    if not jobs:
        return ""
    rows = "".join(
        f"<tr><td><code>{_text(job.id)}</code></td><td class='{_text(job.state)}'>{_text(job.state)}</td>"
        f"<td>{_text(job.error)}</td></tr>"
        for job in jobs
    )
    table = f"<table class='jobs'><tr><th>job</th><th>state</th><th>error</th></tr>{rows}</table>"
    opened = " open" if is_open and len(jobs) <= 50 else ""
    return f"<details{opened}><summary>{_text(title)} ({len(jobs)})</summary><div class='wide'>{table}</div></details>"


def _runs(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    table = runs.to_html(index=False, border=0, na_rep="", float_format=lambda value: f"{value:.4g}")
    return f"<details><summary>Runs ({len(runs)})</summary><div class='wide'>{table}</div></details>"


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
CSS = """
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; padding: 0; list-style: none; }
.tiles li { border: 1px solid #ddd; border-radius: 6px; padding: 4px 14px; }
.tiles b { font-size: 18px; margin-right: 2px; }
.done b, td.done { color: #00724d; } .failed b, .aborted b, td.failed, td.aborted { color: #b3261e; }
.running b, td.running { color: #0072b2; }
figure { margin: 28px 0; } figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: #555; font-size: 13.5px; max-width: 860px; margin: 6px auto 0; }
.wide { overflow-x: auto; } details { margin: 14px 0; } summary { cursor: pointer; font-weight: 600; }
.warnings { border-left: 4px solid #e69f00; padding: 4px 14px; background: #fff8e8; }
.empty { padding: 18px; background: #f4f4f4; border-radius: 6px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
thead th { border-bottom: 1px solid #999; }
th.key, th:first-child, td:first-child, .jobs th, .jobs td { text-align: left; }
.league td, .league th { vertical-align: top; } .league td.declares { white-space: normal; text-align: left;
  color: #555; font-size: 12px; min-width: 180px; max-width: 320px; } .league th.objective { text-align: left;
  font-style: italic; font-weight: normal; color: #555; padding-top: 10px; } .biased { color: #b3261e; }
.aside { color: #777; font-size: 12px; }
h3 { font-size: 14px; margin: 18px 0 4px; } .tables { display: flex; flex-wrap: wrap; gap: 8px 48px; }
section a { margin-right: 14px; }
"""
