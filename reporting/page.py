"""index.html: figures with their captions, the pivot, and the state of every job, in one page that needs nothing else."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from reporting import style
from reporting.load import Job, states
from reporting.options import Metric, PivotMetric

BAND = "Lines are means over seeds, bands their 95% intervals (Student's t over seeds; {seeds})."
BARS = "Points are means over seeds, bars their 95% intervals (Student's t over seeds; {seeds})."


class Drawing(NamedTuple):
    """A figure on the page: the stem of its files' names, and its caption."""

    stem: str
    caption: str


class Content(NamedTuple):
    """What a page shows. `pivot` is an HTML table, `runs` the table of runs.csv."""

    title: str
    description: str
    caption: str
    jobs: Sequence[Job]
    runs: pd.DataFrame
    drawings: Sequence[Drawing]
    pivot: str
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
    what = f"{'; '.join(words)}: against training step."
    smoothed = f"Each run smoothed by an exponential moving average of {ema:g}." if ema else ""
    partial = f"Includes {unfinished} runs that have not finished." if unfinished else ""
    return " ".join(filter(None, [what, BAND.format(seeds=seeds(table)), smoothed, partial]))


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
        "" if content.drawings or content.pivot else "<p class='empty'>No job has recorded anything yet.</p>",
        *(_figure(drawing) for drawing in content.drawings),
        _section("Pivot", f"<div class='wide'>{content.pivot}</div>{_paragraph(PIVOT_NOTE)}") if content.pivot else "",
        _jobs("Missing: not finished", unfinished, is_open=True),
        _runs(content.runs),
        _section("Files", " ".join(f"<a href='{_text(name)}'>{_text(name)}</a>" for name in content.files)),
    ]
    body = "\n".join(part for part in parts if part)
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{_text(content.title)}</title>"
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"


PIVOT_NOTE = (
    "Mean ± standard error over the seeds of finished runs; the best of each column in bold; n where seeds are missing. "
    "pivot.csv has standard deviations, 95% intervals and n."
)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>" if text else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _tiles(jobs: Sequence[Job]) -> str:
    tiles = {"jobs": len(jobs), **states(jobs)}
    return "<ul class='tiles'>" + "".join(
        f"<li class='{_text(name)}'><b>{count}</b> {_text(name)}</li>" for name, count in tiles.items()
    ) + "</ul>"


def _list(title: str, items: Sequence[str], kind: str) -> str:
    if not items:
        return ""
    rows = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<details class='{kind}' open><summary>{title} ({len(items)})</summary><ul>{rows}</ul></details>"


def _figure(drawing: Drawing) -> str:
    stem = _text(drawing.stem)
    return (
        f"<figure><a href='{stem}.pdf'><img src='{stem}.png' alt='{_text(drawing.caption)}'></a>"
        f"<figcaption>{_text(drawing.caption)} <a href='{stem}.pdf'>PDF</a></figcaption></figure>"
    )


def _jobs(title: str, jobs: Sequence[Job], is_open: bool) -> str:
    if not jobs:
        return ""
    rows = "".join(
        f"<tr><td><code>{_text(job.id)}</code></td><td class='{_text(job.state)}'>{_text(job.state)}</td>"
        f"<td>{_text(job.error)}</td></tr>"
        for job in jobs
    )
    table = f"<table><thead><tr><th>job</th><th>state</th><th>error</th></tr></thead><tbody>{rows}</tbody></table>"
    opened = " open" if is_open and len(jobs) <= 50 else ""
    return f"<details{opened}><summary>{_text(title)} ({len(jobs)})</summary><div class='wide'>{table}</div></details>"


def _runs(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    table = runs.to_html(index=False, border=0, na_rep="–", float_format=lambda value: f"{value:.4g}")
    return f"<details><summary>Runs ({len(runs)})</summary><div class='wide'>{table}</div></details>"


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
thead th { border-bottom: 1px solid #999; } .pivot thead th[colspan] { text-align: center; }
th.key, td:first-child { text-align: left; } .se, .n, .none { color: #777; } .n { font-size: 11px; }
section a { margin-right: 14px; }
"""
