"""The league of estimators: what each declares, and what was measured of it at one K of one model."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import pandas as pd

from errors import UserError
from estimators import registry
from reporting import style
from reporting.layout import Layout, curves, split
from reporting.options import Metric, PivotMetric
from reporting.tables import escape_latex

TIME, WORK = "time/evaluation_ms", "time/work_normalised_variance"
BIAS_Z, VARIANCE = "grads/bias_z", "grads/variance"
# The columns of a league, each with its heading.
COLUMNS = {
    BIAS_Z: "bias, s.e.",
    "grads/bias": "bias",
    "grads/cosine": "cosine",
    VARIANCE: "variance",
    "grads/snr": "SNR",
    TIME: "ms",
    "memory/evaluation_mb": "MiB",
    WORK: f"variance {style.TIMES} s",
}
METRICS = {name: PivotMetric("last", Metric("train", name)) for name in COLUMNS}
# An objective whose text begins so is another one for each estimator: nothing is the best of them.
UNSHARED = "own "
# How the declarations begin of those whose mean is the gradient of their objective, exactly or in the limit.
FAITHFUL = ("unbiased", "exact", "consistent")
# The rms over parameters of (mean - true gradient) / s.e.: about 1 where there is no bias, and below this in 95% of the
# measurements whatever the correlation of the parameters (that of a single one is the widest).
UNBIASED = 2.0
# From here on an estimator that declares itself unbiased is held to be wrong: one in hundreds of the unbiased.
CONTRADICTED = 3.0


class Entry(NamedTuple):
    """One estimator in one scene; `values` has the measured columns, `errors` their standard errors where known.

    `number` is its own in all scenes of the report, `best` the columns in which it is the best of its objective.
    """

    label: str
    name: str
    look: style.Look
    objective: str
    declares: str
    values: Mapping[str, float]
    errors: Mapping[str, float]
    best: frozenset[str]
    number: int = 0


class League(NamedTuple):
    """The estimators at one K of one model, objective by objective, and the least work-normalised variance first."""

    scene: str
    columns: list[str]
    entries: list[Entry]


def leagues(table: pd.DataFrame, layout: Layout) -> list[League]:
    """Lay out a league for each scene and K; `table` is that of `aggregate.pivot`, of the metrics of `METRICS`."""
    found = []
    within = [*layout.scenes, layout.particles if layout.particles and table[layout.particles].nunique() > 1 else None]
    names = {str(metric): name for name, metric in METRICS.items()}
    table = table[table["metric"].isin(list(names))]
    for scene, part in split(table, within).items():
        entries = []
        for curve in curves(part, layout):
            rows = curve.table.assign(name=curve.table["metric"].astype(str).map(names)).set_index("name")
            values, errors = (
                {str(name): float(value) for name, value in rows[column].dropna().items()} for column in ("mean", "se")
            )
            entries.append(
                Entry(curve.label, curve.name, curve.look, *_declared(curve.name), values, errors, frozenset())
            )
        columns = [name for name in COLUMNS if any(name in entry.values for entry in entries)]
        if entries:
            found.append(League(scene, columns, _ranked(entries, columns)))
    return _numbered(found)


def _ranked(entries: Sequence[Entry], columns: Sequence[str]) -> list[Entry]:
    """Sort by objective, that of the most estimators first, and within one by work; mark the best of each."""
    first = next((name for name in (WORK, VARIANCE) if name in columns), "")
    of_objective: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.values.get(first, math.inf), entry.label)):
        of_objective.setdefault(entry.objective, []).append(entry)
    in_order = sorted(of_objective.values(), key=lambda group: (-len(group), group[0].objective))
    return [entry for group in in_order for entry in _marked(group, columns)]


def _marked(group: Sequence[Entry], columns: Sequence[str]) -> list[Entry]:
    rivals = competing(group, columns)
    best = {}
    for name in columns:
        better = style.describe(name).better
        values = [entry.values[name] for entry in rivals if name in entry.values]
        if better and len(values) > 1:
            best[name] = min(values) if better == "lower" else max(values)
    return [
        entry._replace(
            best=frozenset(name for name in best if entry.values.get(name) == best[name] and entry in rivals)
        )
        for entry in group
    ]


def _numbered(leagues: Sequence[League]) -> list[League]:
    """Number the estimators in order of the first league that each is in; all leagues share the numbers."""
    labels = list(dict.fromkeys(entry.label for league in leagues for entry in league.entries))
    return [
        league._replace(entries=[entry._replace(number=1 + labels.index(entry.label)) for entry in league.entries])
        for league in leagues
    ]


def by_objective(league: League) -> dict[str, list[Entry]]:
    """Return the entries of each objective, in order."""
    return {objective: list(entries) for objective, entries in groupby(league.entries, lambda entry: entry.objective)}


def competing(group: Sequence[Entry], columns: Sequence[str]) -> list[Entry]:
    """Return the entries of one objective that may be the best of it.

    One that declares a bias may not, however few replicates hide it. Where biases were measured, the others are those
    whose own was and was not found; a small gradient that is another objective's has a small variance, too.
    """
    if group[0].objective.startswith(UNSHARED):
        return []
    faithful = [entry for entry in group if not entry.declares or entry.declares.startswith(FAITHFUL)]
    return [entry for entry in faithful if not is_biased(entry) and (BIAS_Z in entry.values or BIAS_Z not in columns)]


def title_of(objective: str) -> str:
    """Return an objective as a heading.

    >>> title_of("L_K"), title_of("own Riemann sum"), title_of("")
    ('L_K', 'Riemann sum, each its own', 'objective unknown')
    """
    if objective.startswith(UNSHARED):
        return f"{objective.removeprefix(UNSHARED)}, each its own"
    return objective or "objective unknown"


def _declared(estimator: str) -> tuple[str, str]:
    """Return the objective and what is declared of an estimator, empty for an id that no family holds."""
    try:
        return registry.objective(estimator), registry.declares(estimator)
    except UserError:
        return "", ""


def is_biased(entry: Entry) -> bool:
    """Whether a bias was measured."""
    return entry.values.get(BIAS_Z, 0.0) > UNBIASED


def contradictions(found: Sequence[League]) -> list[str]:
    """Return a warning for each estimator that declares itself unbiased and was measured not to be."""
    return [
        ", ".join(filter(None, [league.scene, entry.label]))
        + f": declares {entry.declares!r}, but its mean is {entry.values[BIAS_Z]:.1f} standard errors off"
        for league in found
        for entry in league.entries
        if entry.declares.startswith("unbiased") and entry.values.get(BIAS_Z, 0.0) > CONTRADICTED
    ]


def league_table(found: Sequence[League]) -> pd.DataFrame:
    """Return one row for each scene and estimator: objective and what it declares, then values and standard errors."""
    rows = []
    for league in found:
        for entry in league.entries:
            row: dict[str, object] = {"scene": league.scene, "objective": title_of(entry.objective)}
            row |= {"number": entry.number, "estimator": entry.label, "declares": entry.declares}
            for name in league.columns:
                row[name] = entry.values.get(name)
                row[f"{name} se"] = entry.errors.get(name)
            rows.append(row)
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def league_html(league: League) -> str:
    """Return a league as an HTML table."""
    heads = "".join(f"<th>{html.escape(COLUMNS[name])}</th>" for name in league.columns)
    body = "".join(
        f'<tr><th class="objective" colspan="{3 + len(league.columns)}">{html.escape(title_of(objective))}</th></tr>'
        + "".join(_row_html(entry, league.columns) for entry in entries)
        for objective, entries in by_objective(league).items()
    )
    return (
        f'<table class="league"><thead><tr><th></th><th class="key">estimator</th>{heads}<th class="key">declares</th>'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def _row_html(entry: Entry, columns: Sequence[str]) -> str:
    cells = "".join(f"<td>{_cell_html(entry, name)}</td>" for name in columns)
    swatch = f'<span style="color:{entry.look.colour}">&#9679;</span>'
    return (
        f'<tr><td class="aside">{entry.number}</td><th class="key">{swatch} {html.escape(entry.label)}</th>{cells}'
        f'<td class="declares">{html.escape(entry.declares)}</td></tr>'
    )


def _cell_html(entry: Entry, name: str) -> str:
    if name not in entry.values:
        return '<span class="aside">&ndash;</span>'
    number, exponent = short(entry.values[name], entry.errors.get(name, math.nan))
    text = number + (f" &times; 10<sup>{exponent}</sup>" if exponent else "")
    if name == BIAS_Z and is_biased(entry):
        return f'<span class="biased">{text}</span>'
    return f"<b>{text}</b>" if name in entry.best else text


def short(value: float, se: float) -> tuple[str, int]:
    """Return a number in three digits, or fewer where its standard error warrants no more, and its power of ten.

    >>> short(0.012345, float("nan")), short(1.2345e-7, 2e-8)
    (('0.0123', 0), ('1.2', -7))
    """
    exponent = math.floor(math.log10(abs(value))) if value else 0
    power = 0 if -3 < exponent < 4 else exponent
    value, se = value / 10.0**power, se / 10.0**power
    decimals = max(0, 2 - (exponent - power))
    if se > 0:
        decimals = min(decimals, max(0, -math.floor(math.log10(se))))
    return f"{value:.{decimals}f}", power


def league_latex(league: League, caption: str) -> str:
    """Return a league as a LaTeX table."""
    heads = [escape_latex(COLUMNS[name]).replace(style.TIMES, "$\\times$") for name in league.columns]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape_latex(caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * len(league.columns)}p{{0.25\\linewidth}}}}",
        "\\toprule",
        " & ".join(["estimator", *heads, "declares"]) + " \\\\",
        *(
            line
            for objective, entries in by_objective(league).items()
            for line in (
                "\\midrule",
                f"\\multicolumn{{{2 + len(league.columns)}}}{{l}}{{{escape_latex(title_of(objective))}}} \\\\",
                *(_row_latex(entry, league.columns) for entry in entries),
            )
        ),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row_latex(entry: Entry, columns: Sequence[str]) -> str:
    cells = [escape_latex(entry.label), *(_cell_latex(entry, name) for name in columns), escape_latex(entry.declares)]
    return " & ".join(cells) + " \\\\"


def _cell_latex(entry: Entry, name: str) -> str:
    if name not in entry.values:
        return "--"
    number, exponent = short(entry.values[name], entry.errors.get(name, math.nan))
    text = f"\\mathbf{{{number}}}" if name in entry.best else number
    power = f" \\cdot 10^{{{exponent}}}" if exponent else ""
    return f"${text}{power}$"
