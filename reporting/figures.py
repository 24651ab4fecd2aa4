"""The figures: curves against training step, and pivot metrics against K. They draw tables and compute nothing new."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from reporting import style
from reporting.layout import Curve, Layout, curves, split
from reporting.options import Metric, PivotMetric
from reporting.published import legend

Limits = Mapping[Metric, tuple[float, float]]

MAX_COLUMNS = 5
DECADE = 10.0  # the ratio of values from which an axis is logarithmic
THREE_DECADES = 1000  # limits that are so far apart ask for a logarithmic axis
START, STEEP = 0.25, 3.0  # the share of the steps that is the start, and how much more than the rest it may span
BESIDE, ALL_BESIDE = 3.0, 12.0  # points between curves at one K, and at most between the first and the last
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "linestyle": (0, (3, 2)), "linewidth": 1, "alpha": 0.7}
HOLLOW_POINT: dict[str, Any] = {"markerfacecolor": "white", "linestyle": "none", "markersize": 8}
OVER_STEPS = {
    "min": "lowest over training",
    "max": "highest over training",
    "mean": "mean over training",
    "median": "median over training",
    "first": "first evaluation",
    "last": "last evaluation",
}


def curves_figure(
    table: pd.DataFrame,
    metrics: Sequence[Metric],
    layout: Layout,
    ylims: Limits,
    panel: tuple[float, float] = (2.7, 2.5),
) -> Figure:
    """Draw means over seeds with their 95% bands against the step: a row for each metric, a panel for each K.

    The panels of a row share their y axis. `table` is that of `aggregate.curves`; `panel` the panels' size in inches.
    """
    titles = list(split(table, [layout.particles]))
    chunks = [titles[start : start + MAX_COLUMNS] for start in range(0, len(titles), MAX_COLUMNS)]
    rows = [
        (metric, scene, in_logarithms(metric, part), chunk)
        for metric in metrics
        for scene, part in split(table[table["metric"] == str(metric)], layout.scenes).items()
        for chunk in chunks
    ]
    fig, axes = _grid(len(rows), len(chunks[0]), panel)
    for i, (metric, scene, part, chunk) in enumerate(rows):
        line = axes[i]
        cells = split(part, [layout.particles])
        for ax, title in zip(line, chunk, strict=False):
            fit_axis(ax, "y", metric, without_start(metric, part), ylims)
            if title in cells:
                draw_curves(ax, cells[title], layout)
            if i == 0 or scene or len(chunks) > 1:
                ax.set_title(", ".join(filter(None, [scene, title])))
            style.set_step_axis(ax, part["step"].max())
            ax.tick_params(which="both", labelleft=ax is line[0], labelbottom=i == len(rows) - 1 or len(chunks) > 1)
        for ax in line[len(chunk) :]:
            ax.set_axis_off()
        line[0].set_ylabel(style.tall_label(metric.name, metric.split))
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    draw_legend(fig, [curve.handle() for curve in curves(table, layout)])
    return fig


def draw_curves(ax: Axes, table: pd.DataFrame, layout: Layout) -> None:
    """Draw means and bands into axes that have their limits; markers stand at other steps for each curve."""
    for curve in curves(table, layout):
        _draw_curve(ax, curve)


def _draw_curve(ax: Axes, curve: Curve) -> None:
    rows = curve.table.sort_values("step")
    every = max(1, len(rows) // 6)
    colour, marker = curve.look
    ax.plot(
        rows["step"],
        rows["mean"],
        color=colour,
        linestyle=curve.line,
        marker=marker,
        markevery=(curve.place % every, every),
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=curve.label,
    )
    band = rows[rows["low"].notna()]
    # The band of two seeds is nine times as wide as they are apart.
    alpha = 0.06 if band["n"].max() == 2 else 0.14
    ax.fill_between(band["step"], band["low"], band["high"], color=colour, alpha=alpha, linewidth=0)


def together_figure(table: pd.DataFrame, metric: Metric, layout: Layout, ylims: Limits) -> Figure:
    """Draw a metric's means over seeds with their 95% bands against the step, every K in one panel, by line style.

    Estimators have colours; the other keys have a panel for each combination of theirs, and panels of one scene share
    their y axis. `table` is that of `aggregate.curves`.
    """
    lines = particle_lines(table, layout)
    only = next(iter(lines)) if len(lines) == 1 else ""
    panels = [
        (", ".join(filter(None, [scene, title, only])), part, whole)
        for scene, whole in split(in_logarithms(metric, table), layout.scenes).items()
        for title, part in split(whole, layout.series[1:]).items()
    ]
    columns = min(3, len(panels))
    fig, axes = _grid(-(-len(panels) // columns), columns, (4.3, 3.6) if columns < 3 else (3.6, 3.2))
    for ax, (title, part, whole) in zip(axes.flat, panels, strict=False):
        fit_axis(ax, "y", metric, without_start(metric, whole), ylims)
        for curve in curves(part, layout):
            for name, rows in split(curve.table, [layout.particles]).items():
                label = ", ".join(filter(None, [curve.name, name]))
                _draw_curve(ax, replace(curve, table=rows, label=label, line=lines[name]))
        style.set_step_axis(ax, table["step"].max())
        ax.set(xlabel="training step", title=title)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"{style.axis_label(metric.name)}, {metric.split}")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    estimators = {curve.name: replace(curve, label=curve.name, line="-").handle() for curve in curves(table, layout)}
    of_k = [Line2D([], [], color="#555555", linestyle=line, label=name) for name, line in lines.items() if name]
    draw_legend(fig, [*estimators.values(), *(of_k if len(of_k) > 1 else [])])
    return fig


def particle_lines(table: pd.DataFrame, layout: Layout) -> dict[str, Any]:
    """Return the line style of each K, by the titles of `split`: the largest has the solid one."""
    names = list(split(table, [layout.particles]))
    return {name: style.LINES[place % len(style.LINES)] for place, name in enumerate(reversed(names))}


def without_start(metric: Metric, table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that an axis of curves has to show: where training begins with a steep fall or rise, the rest.

    The start is a quarter of the steps. It is steep where with it the means span more than three times as much; on a
    logarithmic axis it never is.
    """
    rest = table[table["step"] >= START * table["step"].max()]
    if rest.empty or style.is_logarithmic(metric.name, table["mean"].to_numpy(), DECADE):
        return table
    spans = np.ptp(table["mean"]), np.ptp(rest["mean"])
    return rest if spans[0] > STEEP * spans[1] > 0 else table


def pivot_figure(
    table: pd.DataFrame, metrics: Sequence[PivotMetric], layout: Layout, ylims: Limits, published: pd.DataFrame
) -> Figure:
    """Draw each pivot metric, mean over seeds with 95% intervals: against K, or by name where there is but one K.

    `table` is that of `aggregate.pivot`; `published` has the columns metric, estimator, iw, value.
    """
    parts = [
        (metric, scene, part)
        for metric in metrics
        for scene, part in split(table[table["metric"] == str(metric)], layout.scenes).items()
    ]
    against_k = layout.particles is not None and table[layout.particles].nunique() > 1
    all_curves = list(curves(table, layout))
    labels = [curve.label for curve in all_curves]
    columns = 2 if len(parts) == 4 else min(3, len(parts))
    fig, axes = _grid(-(-len(parts) // columns), columns, (3.7, 3.1) if against_k else (3.6, 0.6 + 0.27 * len(labels)))
    for ax, (metric, scene, part) in zip(axes.flat, parts, strict=False):
        theirs = published[published["metric"] == str(metric)]
        spread = 1.0 if against_k else DECADE  # against K, power laws are what one looks for
        part = in_logarithms(metric.metric, part, theirs["value"], spread)
        if against_k:
            _draw_against_k(ax, part, theirs, layout)
            particles = sorted(table[layout.particles].astype(float).unique())
            style.set_particles_axis(ax, particles)
            ax.set_xlim(_around(particles))
            ax.set(xlabel="number of particles K", ylabel=style.axis_label(metric.metric.name))
        else:
            _draw_by_name(ax, part, theirs, layout, labels)
            ax.tick_params(labelleft=ax.get_subplotspec().is_first_col())
            ax.set_xlabel(style.axis_label(metric.metric.name))
            ax.xaxis.set_major_locator(MaxNLocator(5))
        fit_axis(ax, "y" if against_k else "x", metric.metric, part, ylims, theirs["value"], spread, room=1.0)
        ax.set_title(", ".join(filter(None, [scene, f"{OVER_STEPS[metric.aggregation]} ({metric.metric.split})"])))
    for ax in axes.flat[len(parts) :]:
        ax.set_axis_off()
    handles = [curve.handle() for curve in all_curves] if against_k else []
    if len(published):
        hollow = HOLLOW if against_k else HOLLOW_POINT
        handles.append(Line2D([], [], marker="o", color="#555555", label=legend(published), **hollow))
    draw_legend(fig, handles)
    return fig


def _draw_against_k(ax: Axes, table: pd.DataFrame, published: pd.DataFrame, layout: Layout) -> None:
    drawn = list(curves(table, layout))
    # Side by side at each K, where the bars of one would hide those of another.
    inches = np.linspace(-0.5, 0.5, len(drawn)) * min(BESIDE * (len(drawn) - 1), ALL_BESIDE) / 72
    for offset, curve in zip(inches, drawn, strict=True):
        rows = curve.table.sort_values(str(layout.particles))
        colour, marker = curve.look
        particles = rows[layout.particles].astype(float)
        beside = ax.transData + ScaledTranslation(offset, 0, ax.figure.dpi_scale_trans)
        ax.plot(
            particles,
            rows["mean"],
            color=colour,
            marker=marker,
            linestyle=curve.line,
            label=curve.label,
            transform=beside,
        )
        seeds = rows["n"] > 1
        errors = errors_of(rows[seeds])
        ax.errorbar(
            particles[seeds],
            rows["mean"][seeds],
            yerr=errors,
            fmt="none",
            ecolor=colour,
            elinewidth=1,
            transform=beside,
        )
        theirs = curve.of(published)
        if len(theirs):
            ax.plot(
                theirs["iw"],
                theirs["value"],
                marker=marker,
                color=colour,
                label=f"{curve.label}, published",
                transform=beside,
                **HOLLOW,
            )


def _draw_by_name(
    ax: Axes, table: pd.DataFrame, published: pd.DataFrame, layout: Layout, labels: Sequence[str]
) -> None:
    for curve in curves(table, layout):
        colour, marker = curve.look
        place = labels.index(curve.label)
        theirs = curve.of(published)
        ax.plot(
            theirs["value"],
            [place] * len(theirs),
            marker=marker,
            color=colour,
            label=f"{curve.label}, published",
            **HOLLOW_POINT,
        )
        ax.plot(curve.table["mean"], [place] * len(curve.table), color=colour, marker=marker, label=curve.label)
        seeds = curve.table[curve.table["n"] > 1]
        errors = errors_of(seeds)
        ax.errorbar(seeds["mean"], [place] * len(seeds), xerr=errors, fmt="none", ecolor=colour, elinewidth=1)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)


def _around(particles: Sequence[float]) -> tuple[float, float]:
    """Return the limits of a logarithmic axis with room at both ends."""
    room = max((max(particles) / min(particles)) ** 0.08, 1.1)
    return min(particles) / room, max(particles) * room


def errors_of(table: pd.DataFrame) -> list[Any]:
    """Return the lengths of the error bars of means, below and above."""
    return [table["mean"] - table["low"], table["high"] - table["mean"]]


def _grid(rows: int, columns: int, panel: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Return a figure of panels of this size, in inches, with room for a legend below."""
    fig = Figure(figsize=(max(panel[0] * columns, 4.5), panel[1] * rows + 0.8), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def in_logarithms(metric: Metric, table: pd.DataFrame, others: Any = (), spread: float = DECADE) -> pd.DataFrame:
    """Form the intervals of a logarithmic axis there, by the delta method: mean times exp(-+ half width / mean).

    To first order they are the same, and they stay above zero.
    """
    if not style.is_logarithmic(metric.name, np.array([*table["mean"], *others]), spread):
        return table
    factor = np.exp(((table["high"] - table["mean"]) / table["mean"]).clip(upper=50))
    return table.assign(low=table["mean"] / factor, high=table["mean"] * factor)


def fit_axis(
    ax: Axes,
    axis: str,
    metric: Metric,
    table: pd.DataFrame,
    fixed: Limits,
    others: Any = (),
    spread: float = DECADE,
    room: float = 0.35,
) -> None:
    """Set the scale and the limits of the value axis, `axis` being "x" or "y"."""
    centres = np.array([*table["mean"], *others])
    edges = table[["low", "high"]].dropna().to_numpy().ravel()
    given = fixed.get(metric)
    logarithmic = style.is_logarithmic(metric.name, centres, spread)
    if given is not None and 0 < THREE_DECADES * given[0] <= given[1]:
        # Few values would stand together at the end of a linear axis.
        logarithmic = style.is_logarithmic(metric.name, centres, 1)
    limits = given or style.limits(logarithmic, centres, edges, room)
    ax.set(**{f"{axis}lim": limits})
    if logarithmic and limits[0] > 0:
        (ax.set_yscale if axis == "y" else ax.set_xscale)("log", nonpositive="clip")
        style.set_logarithmic(ax.yaxis if axis == "y" else ax.xaxis, *limits)


def draw_legend(fig: Figure, handles: Sequence[Line2D]) -> None:
    """Put the legend below the panels, in one row where that fits."""
    named = [handle for handle in handles if handle.get_label()]
    if not named:
        return
    widths = [0.55 + 0.065 * len(str(handle.get_label())) for handle in named]
    fits = sum(widths) <= fig.get_figwidth()
    columns = len(named) if fits else max(1, int(fig.get_figwidth() / max(widths)))
    rows = -(-len(named) // columns)
    fig.legend(handles=named, loc="outside lower center", ncols=-(-len(named) // rows), handlelength=2.2)
