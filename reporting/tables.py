"""The tables: CSV files, and the pivot as people read it, in HTML and in LaTeX."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from reporting import style
from reporting.aggregate import varied
from reporting.layout import Layout, split

STATISTICS = ("sd", "se", "low", "high", "n")


def runs_table(runs: pd.DataFrame, numbers: pd.DataFrame, keys: Mapping[str, str]) -> pd.DataFrame:
    """One row a run: id, state, last step, error, the keys, whatever else varies, and the run's numbers."""
    first = [column for column in ("state", "last_step", "error") if column in runs]
    others = [column for column in varied(runs) if column not in (*first, *keys, *keys.values())]
    return runs[[*first, *keys, *others]].join(numbers).rename_axis("id").reset_index()


def pivot_table(summary: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row a cell of the keys; for each metric its mean over seeds, then `<metric> sd`, `se`, `low`, `high`, `n`.

    `summary` is the table of `aggregate.pivot`.
    """
    by_metric = summary.set_index([*keys, "metric"])
    parts = []
    for metric in by_metric.index.unique("metric"):
        part = by_metric.xs(metric, level="metric")[["mean", *STATISTICS]]
        parts.append(part.set_axis([metric, *(f"{metric} {statistic}" for statistic in STATISTICS)], axis=1))
    table = pd.concat(parts, axis=1) if parts else pd.DataFrame(columns=list(keys))
    counts = [column for column in table if str(column).endswith(" n")]
    return table.astype(dict.fromkeys(counts, "Int64")).sort_index().reset_index()


class Cell(NamedTuple):
    """A mean over seeds, its standard error (NaN where n = 1), whether it is its column's best, the published value.

    The published value is a text, which says what in its settings is unlike ours.
    """

    mean: float
    se: float
    n: int
    best: bool
    published: str | None


class Pivot(NamedTuple):
    """One metric's pivot laid out for reading: a row for each cell of `keys`, a column for each K."""

    metric: str
    keys: list[str]
    columns: list[str]
    rows: list[tuple[list[str], list[Cell | None]]]


def lay_out(summary: pd.DataFrame, keys: Sequence[str], layout: Layout, published: pd.DataFrame) -> list[Pivot]:
    """Lay the pivot out, a table for each metric; keys that are the same in all rows are left out where others are not.

    The best of a column is sought among the rows of one scene (task, data set, model).
    """
    row_keys = [key for key in keys if key != layout.particles]
    row_keys = [key for key in row_keys if summary[key].nunique() > 1] or row_keys[-1:]
    best = _best(summary, [*layout.scenes, *([layout.particles] if layout.particles else [])])
    series = list(layout.series)
    theirs = {}
    for _, row in published.iterrows():
        unlike = f" ({row['unlike']})" if row.get("unlike") else ""
        theirs[row["metric"], *row[series], row["iw"]] = f"{row['value']:g}{unlike}"
    pivots = []
    for metric in summary["metric"].unique():
        of_metric = summary[summary["metric"] == metric]
        columns = split(of_metric, [layout.particles])
        cells = {}
        for title, part in columns.items():
            for index, row in part.iterrows():
                known = theirs.get((metric, *row[series], row.get(layout.particles)))
                cells[tuple(row[row_keys]), title] = Cell(row["mean"], row["se"], row["n"], index in best, known)
        names = of_metric[row_keys].drop_duplicates().itertuples(index=False, name=None) if row_keys else [()]
        rows = [(list(map(str, name)), [cells.get((tuple(name), title)) for title in columns]) for name in names]
        pivots.append(Pivot(str(metric), row_keys, list(columns), rows))
    return pivots


def _best(summary: pd.DataFrame, within: Sequence[str]) -> set[Any]:
    """Return the rows of the best means: where a metric has a better side, of two rows or more."""
    found = set()
    for _, rows in summary.groupby([*within, "metric"], observed=True):
        aggregation, _, name = str(rows["metric"].iloc[0]).split(":")
        better = style.describe(name).better or {"min": "lower", "max": "higher"}.get(aggregation)
        if better and len(rows) > 1:
            best = rows["mean"].min() if better == "lower" else rows["mean"].max()
            found.update(rows.index[rows["mean"] == best])
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
    """Return a pivot as an HTML table: mean and standard error, n where seeds are missing, the best in bold."""
    most = max(cell.n for _, cells in pivot.rows for cell in cells if cell)
    heads = [f'<th class="key">{html.escape(key)}</th>' for key in pivot.keys]
    heads += [f"<th>{html.escape(title)}</th>" for title in pivot.columns]
    body = []
    for names, cells in pivot.rows:
        keys = "".join(f'<th class="key">{html.escape(name)}</th>' for name in names)
        body.append(f"<tr>{keys}{''.join(_cell_html(cell, most) for cell in cells)}</tr>")
    return f'<table class="pivot"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _cell_html(cell: Cell | None, most: int) -> str:
    if cell is None:
        return '<td class="aside">&ndash;</td>'
    mean, se, exponent = digits(cell.mean, cell.se)
    text = f"<b>{mean}</b>" if cell.best else mean
    text += f' <span class="aside">&plusmn; {se}</span>' if se else ""
    if exponent:
        text = f"{f'({text})' if se else text} &times; 10<sup>{exponent}</sup>"
    text += f' <span class="aside">n={cell.n}</span>' if cell.n < most else ""
    text += (
        f'<br><span class="aside">published {html.escape(cell.published)}</span>' if cell.published is not None else ""
    )
    return f"<td>{text}</td>"


def pivot_latex(pivot: Pivot, caption: str) -> str:
    """Return a pivot as a LaTeX table."""
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape_latex(caption)}}}",
        f"\\begin{{tabular}}{{{'l' * len(pivot.keys)}{'r' * len(pivot.columns)}}}",
        "\\toprule",
        " & ".join(map(escape_latex, [*pivot.keys, *pivot.columns])) + " \\\\",
        "\\midrule",
        *(" & ".join([*map(escape_latex, names), *map(_cell_latex, cells)]) + " \\\\" for names, cells in pivot.rows),
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
    if exponent:
        text = f"{f'({text})' if se else text} \\cdot 10^{{{exponent}}}"
    return f"${text}$"


def escape_latex(text: str) -> str:
    """Return a text with what LaTeX would take for its own escaped."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
