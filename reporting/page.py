"""index.html: the figures with captions, the pivot, and the state of every job, in one page that needs no other."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from reporting import style
from reporting.figures import OVER_STEPS
from reporting.load import Job, states
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


class Content(NamedTuple):
    """What a page shows; `runs` is the table of runs.csv."""

    title: str
    description: str
    caption: str
    jobs: Sequence[Job]
    runs: pd.DataFrame
    drawings: Sequence[Drawing]
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


def curves_caption(metrics: Sequence[Metric], table: pd.DataFrame, ema: float, unfinished: int) -> str:
    """Describe a figure of curves."""
    words = [f"{_capital(style.describe(name).label)} ({split})" for split, name in metrics]
    what = f"{', '.join(words)} against training step."
    smoothed = f"Each run smoothed by an exponential moving average of {ema:g}." if ema else ""
    partial = f"Unfinished runs included: {unfinished}." if unfinished else ""
    measured = MEASURED if (table["low"].notna() & (table["n"] == 1)).any() else ""
    alone = measured and table["n"].max() == 1
    lines = "Lines are runs, one seed each." if alone else BANDS.format(seeds=seeds(table))
    return " ".join(filter(None, [what, lines, measured, smoothed, partial]))


def pivot_caption(metrics: Sequence[PivotMetric], table: pd.DataFrame, published: pd.DataFrame) -> str:
    """Describe the figure of pivot metrics."""
    names = ", ".join(dict.fromkeys(style.describe(metric.metric.name).label for metric in metrics))
    theirs = f"Hollow: published by {'; '.join(published['source'].unique())}." if len(published) else ""
    what = f"{_capital(names)} of finished runs."
    return " ".join(filter(None, [what, BARS.format(seeds=seeds(table)), theirs]))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def render(content: Content) -> str:
    """Return the page."""
    unfinished = [job for job in content.jobs if job.state != "done"]
    parts = [
        f"<h1>{_text(content.title)}</h1>",
        _paragraph(content.description),
        _paragraph(content.caption),
        _tiles(content.jobs),
        _list("Warnings", content.warnings, "warnings"),
        "" if content.drawings or content.pivots else "<p class='empty'>No job has recorded anything yet.</p>",
        *(_figure(drawing) for drawing in content.drawings),
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
    tiles = {"jobs": len(jobs), **states(jobs)}
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
.aside { color: #777; font-size: 12px; }
h3 { font-size: 14px; margin: 18px 0 4px; } .tables { display: flex; flex-wrap: wrap; gap: 8px 48px; }
section a { margin-right: 14px; }
"""
