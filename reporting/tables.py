"""The tables: CSV files, and the pivot as people read it, in HTML and in LaTeX."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from reporting import style
from reporting.aggregate import varied
from reporting.layout import split

STATISTICS = ("sd", "se", "low", "high", "n")


def runs_table(runs: pd.DataFrame, numbers: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row a run: id, state, last step, error, the keys, whatever else varies, and the run's numbers."""
    first = [column for column in ("state", "last_step", "error") if column in runs]
    others = [column for column in varied(runs) if column not in (*first, *keys)]
    return runs[[*first, *keys, *others]].join(numbers).rename_axis("id").reset_index()


def pivot_table(summary: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row a cell of the keys; for each metric its mean over seeds, then `<metric> sd`, `se`, `low`, `high`, `n`.

    `summary` is the table of `aggregate.pivot`.
    """
    by_metric = summary.set_index([*keys, "metric"])
    parts = []
    for metric in by_metric.index.unique("metric"):
        part = by_metric.xs(metric, level="metric")[["mean", *STATISTICS]]
        names = {"mean": metric, **{statistic: f"{metric} {statistic}" for statistic in STATISTICS}}
        parts.append(part.rename(columns=names))
    table = pd.concat(parts, axis=1) if parts else pd.DataFrame(columns=list(keys))
    counts = [column for column in table if str(column).endswith(" n")]
    return table.astype(dict.fromkeys(counts, "Int64")).sort_index().reset_index()


class Cell(NamedTuple):
    """One mean of the pivot, with its standard error (NaN where one seed), n, and whether it is its column's best."""

    mean: float
    se: float
    n: int
    best: bool


class Pivot(NamedTuple):
    """The pivot laid out for reading: row keys, then for each metric a column for each K."""

    keys: list[str]
    columns: list[tuple[str, list[str]]]
    rows: list[tuple[list[str], list[Cell | None]]]


def lay_out(summary: pd.DataFrame, keys: Sequence[str], particles: str | None, scenes: Sequence[str]) -> Pivot:
    """Lay a pivot out. The best of a column is sought among the rows of one scene, a task, data set or model."""
    row_keys = [key for key in keys if key != particles]
    best = _best(summary, [*scenes, *([particles] if particles else [])])
    columns, cells = [], {}
    for metric in summary["metric"].cat.categories:
        parts = split(summary[summary["metric"] == metric], [particles])
        columns.append((str(metric), list(parts)))
        for title, rows in parts.items():
            for index, row in rows.iterrows():
                place = (tuple(row[row_keys]), metric, title)
                cells[place] = Cell(row["mean"], row["se"], row["n"], index in best)
    names = summary[row_keys].drop_duplicates().sort_values(row_keys) if row_keys else pd.DataFrame(index=[0])
    rows_out = [
        ([str(value) for value in name], [cells.get((tuple(name), metric, k)) for metric, ks in columns for k in ks])
        for name in names.itertuples(index=False, name=None)
    ]
    return Pivot(row_keys, columns, rows_out)


def _best(summary: pd.DataFrame, within: Sequence[str]) -> set[Any]:
    """Return the rows of the best means: where a metric has a better side, of two rows or more."""
    found = set()
    for _, rows in summary.groupby([*within, "metric"], observed=True):
        aggregation, _, name = str(rows["metric"].iloc[0]).split(":")
        better = style.describe(name).better or {"min": "lower", "max": "higher"}.get(aggregation)
        if better and len(rows) > 1:
            found.add(rows["mean"].idxmin() if better == "lower" else rows["mean"].idxmax())
    return found


def digits(mean: float, se: float) -> tuple[str, str, int]:
    """Return mean and standard error in as many digits as the error warrants, and the power of ten to multiply by.

    >>> digits(0.012345, 0.00056)
    ('0.01235', '0.00056', 0)
    >>> digits(1.234e-8, float("nan"))
    ('1.234', '', -8)
    """
    exponent = math.floor(math.log10(abs(mean))) if mean else 0
    exponent = 0 if -4 < exponent < 5 else exponent
    mean, se = mean / 10.0**exponent, se / 10.0**exponent
    if not se > 0:
        return f"{mean:.4g}", "" if math.isnan(se) else "0", exponent
    decimals = max(0, 1 - math.floor(math.log10(se)))
    return f"{mean:.{decimals}f}", f"{se:.{decimals}f}", exponent


def pivot_html(pivot: Pivot) -> str:
    """Return the pivot as an HTML table: mean and standard error, n where it differs, the best in bold."""
    most = max((cell.n for _, cells in pivot.rows for cell in cells if cell), default=0)
    metric_row = "".join(f'<th colspan="{len(ks)}">{html.escape(metric)}</th>' for metric, ks in pivot.columns)
    keys = "".join(f'<th rowspan="2" class="key">{html.escape(key)}</th>' for key in pivot.keys)
    particles = "".join(f"<th>{html.escape(k)}</th>" for _, ks in pivot.columns for k in ks)
    body = []
    for names, cells in pivot.rows:
        heads = "".join(f'<th class="key">{html.escape(name)}</th>' for name in names)
        body.append(f"<tr>{heads}{''.join(_cell_html(cell, most) for cell in cells)}</tr>")
    return (
        f'<table class="pivot"><thead><tr>{keys}{metric_row}</tr><tr>{particles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _cell_html(cell: Cell | None, most: int) -> str:
    if cell is None:
        return '<td class="none">–</td>'
    mean, se, exponent = digits(cell.mean, cell.se)
    text = f"<b>{mean}</b>" if cell.best else mean
    text += f' <span class="se">± {se}</span>' if se else ""
    text += f" ×10<sup>{exponent}</sup>" if exponent else ""
    text += f' <span class="n">n={cell.n}</span>' if cell.n < most else ""
    return f"<td>{text}</td>"


def pivot_latex(pivot: Pivot, caption: str) -> str:
    """Return the pivot as a LaTeX table (package booktabs)."""
    width = sum(len(ks) for _, ks in pivot.columns)
    metrics = [f"\\multicolumn{{{len(ks)}}}{{c}}{{{_escape(metric)}}}" for metric, ks in pivot.columns]
    particles = [_escape(k) for _, ks in pivot.columns for k in ks]
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_escape(caption)}}}",
        f"\\begin{{tabular}}{{{'l' * len(pivot.keys)}{'r' * width}}}",
        "\\toprule",
        " & ".join([*([""] * len(pivot.keys)), *metrics]) + " \\\\",
        " & ".join([*map(_escape, pivot.keys), *particles]) + " \\\\",
        "\\midrule",
        *(" & ".join([*map(_escape, names), *map(_cell_latex, cells)]) + " \\\\" for names, cells in pivot.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell_latex(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    mean, se, exponent = digits(cell.mean, cell.se)
    mean = f"\\mathbf{{{mean}}}" if cell.best else mean
    text = mean + (f" \\pm {se}" if se else "")
    return f"$({text}) \\cdot 10^{{{exponent}}}$" if exponent else f"${text}$"


def _escape(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
