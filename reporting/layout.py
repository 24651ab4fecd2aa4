"""Which key of a report is told by what in its figures: panels, colours with markers, line styles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from reporting import style


@dataclass(frozen=True)
class Layout:
    """Keys that are the same in all runs are not told; `series` are those that tell one panel's curves apart.

    looks: of each value of the first of `series`. lines: of each combination of the rest.
    """

    scenes: tuple[str, ...]
    particles: str | None
    series: tuple[str, ...]
    looks: Mapping[str, style.Look]
    lines: Mapping[tuple, Any]


@dataclass(frozen=True)
class Curve:
    """One curve's rows of a table and how they are drawn; `name` is its estimator, `place` its number in the report.

    `cell` maps the keys of the layout's series to the curve's values.
    """

    table: pd.DataFrame
    cell: Mapping[str, Any]
    name: str
    label: str
    place: int
    look: style.Look
    line: Any

    def handle(self) -> Line2D:
        """Return its entry for a legend."""
        colour, marker = self.look
        return Line2D([], [], color=colour, marker=marker, linestyle=self.line, label=self.label)

    def of(self, published: pd.DataFrame) -> pd.DataFrame:
        """Return the published values of this curve."""
        ours = pd.Series(True, index=published.index)
        for key, value in self.cell.items():
            ours &= published[key].astype(object) == value
        return published[ours]


def arrange(runs: pd.DataFrame, keys: Mapping[str, str]) -> Layout:
    """Tell the keys apart: `keys` maps each, as the user wrote it, to its column of `runs`.

    K has panels or the x axis of its own, tasks, data sets and models, and options of theirs, have panels, the
    estimator (else the first of the rest) has colours and markers, the rest line styles. What the keys before it
    decide, as an estimator's tag where each has but one, is not told. Where no run has a model, nor with it an
    estimator, the options of the task are among the rest.
    """
    varying = [key for key in keys if runs[key].nunique() > 1]
    particles = next((key for key, column in keys.items() if column == "estimator.iw"), None)
    has_model = "model" not in runs or runs["model"].notna().any()
    sections = ("task", "dataset", "model") if has_model else ("dataset", "model")
    scenes = tuple(key for key in varying if keys[key] == "task" or keys[key].partition(".")[0] in sections)
    rest = [key for key in varying if key != particles and key not in scenes]
    colour = next((key for key, column in keys.items() if column == "estimator"), rest[0] if rest else None)
    dashed: list[str] = []
    for key in rest:
        if key != colour and runs.groupby([colour, *dashed], observed=True)[key].nunique().max() > 1:
            dashed.append(key)
    looks = style.looks(str(name) for name in runs[colour].cat.categories) if colour else {}
    combinations = runs[dashed].drop_duplicates().sort_values(dashed).itertuples(index=False) if dashed else []
    lines = {tuple(values): style.LINES[i % len(style.LINES)] for i, values in enumerate(combinations)}
    return Layout(scenes, particles, (colour, *dashed) if colour else (), looks, lines)


def curves(table: pd.DataFrame, layout: Layout) -> Iterator[Curve]:
    """Cut a table into its curves."""
    if not layout.series:
        yield Curve(table, {}, "", "", 0, style.Look("#0072b2", "o"), "-")
        return
    for (first, *rest), rows in table.groupby(list(layout.series), observed=True):
        name = str(first)
        label = ", ".join([name, *(f"{key} {value}" for key, value in zip(layout.series[1:], rest, strict=True))])
        line = layout.lines.get(tuple(rest), "-")
        cell = dict(zip(layout.series, (first, *rest), strict=True))
        yield Curve(rows, cell, name, label, list(layout.looks).index(name), layout.looks[name], line)


def split(table: pd.DataFrame, keys: Sequence[str | None]) -> dict[str, pd.DataFrame]:
    """Cut a table into parts by the values of some keys (None is no key), each under its title."""
    present = [key for key in keys if key]
    if not present:
        return {"": table}
    parts = table.groupby(present, observed=True)
    return {", ".join(map(_equation, present, values)): rows for values, rows in parts}


def _equation(key: str, value: Any) -> str:
    return f"{'K' if key.rpartition('.')[2] == 'iw' else key} = {value}"
