"""Figures of DiCE's studies: derivatives against the number of samples, and learners' returns beside the published."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reporting import style
from reporting.figures import draw_legend, errors_of, fit_axis, in_logarithms
from reporting.gradient_figures import GUIDE, QUIET
from reporting.layout import Layout, curves, split
from reporting.options import Metric
from reporting.published import legend

COLUMNS = 3


def samples_figure(table: pd.DataFrame, metrics: Sequence[Metric], layout: Layout) -> Figure:
    """Draw metrics against the number of samples, a panel each: means over seeds with 95% intervals.

    Errors have logarithmic axes and a guide of N^-1/2; correlations run up to 1. `table` is that of `aggregate.curves`,
    whose steps count samples.
    """
    rows = -(-len(metrics) // COLUMNS)
    fig = Figure(figsize=(3.3 * min(COLUMNS, len(metrics)), 2.9 * rows + 0.6), layout="constrained")
    axes = fig.subplots(rows, min(COLUMNS, len(metrics)), squeeze=False)
    count = len(layout.looks) or 1
    for ax, metric in zip(axes.flat, metrics, strict=False):
        part = table[table["metric"] == str(metric)]
        is_error = metric.name.endswith("/error")
        part = in_logarithms(metric, part, spread=1.0) if is_error else part
        for curve in curves(part, layout):
            rows_of = curve.table.sort_values("step")
            # Side by side, so that every interval shows.
            samples = rows_of["step"].astype(float) * 1.06 ** (curve.place - (count - 1) / 2)
            colour, marker = curve.look
            ax.plot(samples, rows_of["mean"], color=colour, marker=marker, linestyle=curve.line, label=curve.label)
            ax.errorbar(samples, rows_of["mean"], yerr=errors_of(rows_of), fmt="none", ecolor=colour, elinewidth=0.9)
        ax.set_xscale("log")
        ax.set(xlabel="samples", title=style.describe(metric.name).label)
        if is_error:
            level = _draw_root(ax, part)
            fit_axis(ax, "y", metric, part, {}, [level], spread=1.0)
            ax.set_ylabel("distance from the exact one / its norm")
        else:
            ax.set_ylim(min(0.0, float(part["mean"].min()) - 0.05), 1.03)
            ax.set_ylabel("correlation with the exact one")
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    guide = Line2D([], [], label="$N^{-1/2}$", **GUIDE)
    draw_legend(fig, [*(curve.handle() for curve in curves(table, layout)), guide])
    return fig


def _draw_root(ax: Axes, table: pd.DataFrame) -> float:
    """Draw a guide that falls as the root of the number of samples, below the curves; return its end."""
    steps = np.array(sorted(table["step"].unique()), float)
    low = table.groupby("step")["mean"].min()
    level = 0.6 * float((low * np.sqrt(low.index.to_numpy(float))).min())
    ax.plot(steps, level / np.sqrt(steps), label="N^-1/2", **GUIDE)
    return float(level / np.sqrt(steps[-1]))


def samples_caption(table: pd.DataFrame) -> str:
    """Describe the figure of samples."""
    return (
        "Estimates of derivatives by DiCE against the number of samples, beside the exact ones: the distance over the "
        f"exact one's norm, and the correlation of the elements. {_seeds(table)} Grey: the slope of N^-1/2."
    )


def returns_figure(table: pd.DataFrame, metric: Metric, layout: Layout, published: pd.DataFrame) -> Figure:
    """Draw returns against the iteration, a panel for each combination of the keys but the first.

    Hollow marks beyond the end are published values. Means over seeds have 95% bands; panels share their axes.
    `published` has the columns value and the series' keys.
    """
    panels = split(table, [*layout.scenes, *layout.series[1:]])
    fig = Figure(figsize=(max(4.2 * len(panels), 5.2), 3.9), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    last = int(table["step"].max())
    for ax, (title, part) in zip(axes, panels.items(), strict=True):
        for curve in curves(part, layout):
            rows = curve.table.sort_values("step")
            colour, marker = curve.look
            every = max(1, len(rows) // 6)
            ax.plot(
                rows["step"], rows["mean"], color=colour, marker=marker, label=curve.name, markersize=4.5,
                markevery=(curve.place * every // 5, every), markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
            band = rows[rows["low"].notna()]
            ax.fill_between(band["step"], band["low"], band["high"], color=colour, alpha=0.15, linewidth=0)
            for value in curve.of(published)["value"]:
                ax.plot(
                    [1.03 * last], [value], marker=marker, color=colour, markerfacecolor="white", markersize=7,
                    linestyle="none", clip_on=False, label=f"{curve.name}, published",
                )  # fmt: skip
        fit_axis(ax, "y", metric, table, {}, published["value"])
        ax.set(xlabel="iteration", title=title, xlim=(0, 1.06 * last))
    axes[0].set_ylabel(style.axis_label(metric.name))
    names = {curve.name: replace(curve, label=curve.name, line="-").handle() for curve in curves(table, layout)}
    handles = list(names.values())
    if len(published):
        hollow = {"markerfacecolor": "white", "linestyle": "none", "markersize": 7}
        handles.append(Line2D([], [], marker="o", color=QUIET, label=legend(published), **hollow))  # type: ignore[arg-type]
    draw_legend(fig, handles)
    return fig


def returns_caption(table: pd.DataFrame, published: pd.DataFrame) -> str:
    """Describe the figure of returns."""
    sources = "; ".join(dict.fromkeys(published["source"])) if len(published) else ""
    theirs = f" Hollow: {sources}." if sources else ""
    return f"Both players' mean return a round against the iteration. {_seeds(table)}{theirs}"


def _seeds(table: pd.DataFrame) -> str:
    most = int(table["n"].max()) if len(table) else 0
    return "One seed." if most < 2 else f"Means and 95% intervals over up to {most} seeds."
