"""The figures of gradient studies: metrics against K and their slopes, single gradients, parameters, leagues."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from reporting import style
from reporting.asymptotics import GUIDES
from reporting.figures import HOLLOW, MAX_COLUMNS, draw_legend, errors_of, fit_axis, in_logarithms
from reporting.gradients import INDIVIDUAL, divided_by, right_signs
from reporting.layout import Layout, curves, split
from reporting.league import (
    BIAS_Z,
    TIME,
    UNBIASED,
    VARIANCE,
    WORK,
    Entry,
    League,
    by_objective,
    competing,
    is_biased,
    title_of,
)
from reporting.options import Metric, PivotMetric
from reporting.published import legend

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
BARS: dict[str, Any] = {"fmt": "none", "elinewidth": 1}
GUIDE: dict[str, Any] = {"color": "#9a9a9a", "linewidth": 0.9, "linestyle": (0, (2, 2)), "zorder": 1}
QUIET = "#777777"
ROW = 0.2  # inches of a row of text
KEPT = (0.005, 0.995)  # the quantiles of single gradients between which they are drawn
MAX_BINS = 60


def asymptotics_figure(
    table: pd.DataFrame, metrics: Sequence[PivotMetric], layout: Layout, published: pd.DataFrame, slopes: pd.DataFrame
) -> Figure:
    """Draw each metric against K, both axes logarithmic, with 95% intervals, guides, published values; below, slopes.

    `table` is that of `aggregate.pivot`, `published` has the columns metric, estimator, iw, value, and `slopes` is that
    of `asymptotics.slopes`. The rows of the table of slopes are the legend.
    """
    parts = [
        (metric, scene, part[part["mean"] > 0])
        for metric in metrics
        for scene, part in split(table[table["metric"] == str(metric)], layout.scenes).items()
    ]
    columns = min(2 if len(parts) == 4 else 3, len(parts))
    rows = -(-len(parts) // columns)
    all_curves = list(curves(table, layout))
    entries = 1 + len(all_curves) + (1 if len(published) else 0)
    height = 2.9 * rows
    fig = Figure(figsize=(max(4.1 * columns, 6.5), height + ROW * entries + 0.2), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=[height, ROW * entries + 0.2], squeeze=False)[:, 0]
    axes = upper.subplots(rows, columns, squeeze=False)
    particles = sorted(table[layout.particles].astype(float).unique())
    for ax, (metric, scene, part) in zip(axes.flat, parts, strict=False):
        theirs = published[published["metric"] == str(metric)]
        part = in_logarithms(metric.metric, part, theirs["value"], spread=1.0)
        for curve in curves(part, layout):
            points = curve.table.sort_values(str(layout.particles))
            k = points[layout.particles].astype(float)
            colour, marker = curve.look
            ax.plot(k, points["mean"], color=colour, marker=marker, linestyle=curve.line, label=curve.label)
            ax.errorbar(k, points["mean"], yerr=errors_of(points), ecolor=colour, **BARS)
            published_of = curve.of(theirs)
            if len(published_of):
                label = f"{curve.label}, published"
                ax.plot(published_of["iw"], published_of["value"], marker=marker, color=colour, label=label, **HOLLOW)
        if len(part):
            fit_axis(ax, "y", metric.metric, part, {}, theirs["value"], 1.0, room=1.0)
        style.set_particles_axis(ax, particles)
        for power in GUIDES.get(metric.metric.name, ()):
            _draw_guide(ax, part, power, layout)
        label = style.axis_label(metric.metric.name)
        ax.set(xlabel="number of particles K", ylabel=label, title=scene)
    for ax in axes.flat[len(parts) :]:
        ax.set_axis_off()
    handles = [(curve.handle(), curve.label) for curve in all_curves]
    _draw_slopes(lower.subplots(), handles, slopes, legend(published) if len(published) else "")
    return fig


def _draw_guide(ax: Axes, table: pd.DataFrame, power: float, layout: Layout) -> None:
    """Draw K^power from the middle of the values at the least K; one that leaves the panel would say nothing."""
    if table.empty or table[layout.particles].nunique() < 2:
        return
    k = table[layout.particles].astype(float)
    first, last = k.min(), k.max()
    start = float(np.exp(np.log(table["mean"][k == first]).mean()))
    end = start * (last / first) ** power
    low, high = ax.get_ylim()
    if low <= end <= high:
        ax.plot([first, last], [start, end], label=f"K^{power:g}", **GUIDE)
        text = {0.5: "$K^{1/2}$", -0.5: "$K^{-1/2}$"}.get(power, f"$K^{{{power:g}}}$")
        ax.annotate(
            text, (1, end), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", color=QUIET, fontsize=8.5,
        )  # fmt: skip


def _draw_slopes(ax: Axes, handles: Sequence[tuple[Line2D, str]], slopes: pd.DataFrame, published: str) -> None:
    """Write the table of slopes, a row for each curve with its line before it."""
    ax.set_axis_off()
    heads = list(slopes[["scene", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    rows = 1 + len(handles) + bool(published)
    ax.set(xlim=(0, 1), ylim=(rows - 0.5, -0.5))
    start, step = 0.30, 0.70 / max(len(heads), 1)
    cells = slopes.set_index(["scene", "metric", "estimator"])
    ax.text(start - 0.02, 0, "slope in K [95%]", ha="right", va="center", fontsize=8.5, color=QUIET)
    for column, (scene, metric) in enumerate(heads):
        title = ", ".join(filter(None, [style.describe(metric.split(":")[2]).label.removeprefix("gradient "), scene]))
        ax.text(start + step * (column + 0.5), 0, title, ha="center", va="center", fontsize=8.5, color=QUIET)
    for row, (handle, label) in enumerate(handles, start=1):
        _draw_key(ax, row, handle, label or "all runs")
        for column, head in enumerate(heads):
            if (*head, label) in cells.index:
                text = slope_text(*cells.loc[(*head, label), ["slope", "low", "high"]])
                ax.text(start + step * (column + 0.5), row, text, ha="center", va="center", fontsize=8.5)
    if published:
        _draw_key(ax, rows - 1, Line2D([], [], marker="o", color="#555555", **HOLLOW), published)


def _draw_key(ax: Axes, row: int, handle: Line2D, label: str) -> None:
    key = Line2D([0.0, 0.02, 0.04], [row] * 3, markevery=[1], clip_on=False)
    place = key.get_xdata(), key.get_ydata()
    key.update_from(handle)
    key.set_data(*place)
    key.set_markevery([1])
    ax.add_line(key)
    ax.text(0.052, row, label, va="center", fontsize=8.5)


def slope_text(slope: float, low: float, high: float) -> str:
    """Return a slope with its interval.

    >>> slope_text(-0.5, -0.52, -0.48), slope_text(-0.001, float("nan"), float("nan"))
    ('−0.50 [−0.52, −0.48]', '0.00')
    """
    if math.isnan(slope):
        return NONE
    text = f"{slope:z.2f}" if math.isnan(low) else f"{slope:z.2f} [{low:z.2f}, {high:z.2f}]"
    return text.replace("-", MINUS)


def distribution_figure(table: pd.DataFrame, layout: Layout) -> Figure:
    """Draw the densities of single gradients over the exact or mean one, a panel for each K, a row for each estimator.

    `table` is that of `gradients.distribution`. The axis is asinh: linear between -1 and 1, logarithmic beyond; the
    densities are those over the ratio, each scaled to its row. Beside a row stands the share above zero.
    """
    panels = [
        (", ".join(filter(None, [scene, title])), cell)
        for scene, part in split(table, layout.scenes).items()
        for title, cell in split(part, [layout.particles]).items()
    ]
    all_curves = list(curves(table, layout))
    columns = min(3 if len(panels) in (3, 5, 6) else MAX_COLUMNS - 1, len(panels))
    rows = -(-len(panels) // columns)
    size = (1.7 + 2.7 * columns, rows * (0.75 + 0.34 * len(all_curves)) + 0.3)
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True)
    edges = [drawn_range(ratios) for ratios in table["ratios"] if ratios.size]
    low = min([-1.0, *(low for low, _ in edges)])
    high = max([2.0, *(high for _, high in edges)])
    places = {curve.label: row for row, curve in enumerate(all_curves)}
    for ax, (title, cell) in zip(axes.flat, panels, strict=False):
        ax.set_xscale("asinh", linear_width=1.0)
        ax.axvline(0, color="#555555", linewidth=0.9, zorder=0)
        ax.axvline(1, **GUIDE)
        for curve in curves(cell, layout):
            ratios = np.concatenate([np.zeros(0), *curve.table["ratios"]])
            _draw_ridge(ax, ratios, places[curve.label], curve.look.colour, curve.label)
        ax.set(xlim=(low, high), ylim=(len(places) - 0.5, -0.75), title=title)
        ax.set_yticks(range(len(places)), list(places))
        ax.tick_params(axis="y", length=0, labelleft=bool(ax.get_subplotspec().is_first_col()))
        ax.spines["left"].set_visible(False)
        ax.grid(visible=False)
        _set_asinh_axis(ax, low, high)
        ax.text(1.02, -0.62, "right sign", transform=ax.get_yaxis_transform(), va="center", fontsize=7, color=QUIET)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(f"single gradient / {divided_by(table)}")
    return fig


def drawn_range(ratios: np.ndarray) -> tuple[float, float]:
    """Return the quantiles between which single gradients are drawn."""
    low, high = np.quantile(ratios, KEPT)
    return float(low), float(high)


def density(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of a histogram's outline, whose bins hold equally many gradients between the quantiles drawn.

    Its heights are densities over the ratio itself, whatever the axis: those along an asinh axis have two humps where
    a broad normal distribution has one.
    """
    num_bins = int(np.clip(len(ratios) // 20, 1, MAX_BINS))
    edges = np.unique(np.quantile(ratios, np.linspace(*KEPT, num_bins + 1)))
    if len(edges) < 2:
        width = 0.01 * max(1.0, abs(edges[0]))
        edges = np.array([edges[0] - width, edges[0] + width])
    heights, _ = np.histogram(ratios, edges, density=True)
    x, heights = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(heights, 2), [0.0]])
    zero = int(np.searchsorted(x, 0.0))
    if 0 < zero < len(x):  # a corner there, where the colour changes
        x, heights = np.insert(x, zero, 0.0), np.insert(heights, zero, heights[zero])
    return x, heights


def _draw_ridge(ax: Axes, ratios: np.ndarray, row: int, colour: str, label: str) -> None:
    """Draw a histogram along the axis on its row, the part with the wrong sign pale, and the share of right signs."""
    ax.plot([0, 1], [row + 0.4] * 2, transform=ax.get_yaxis_transform(), color="#dddddd", linewidth=0.6, zorder=1)
    text = "no sign" if not ratios.size else f"{100 * right_signs(ratios):.1f}%"
    ax.text(1.02, row + 0.1, text, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5, color="#444444")
    if not ratios.size:
        return
    x, heights = density(ratios)
    y = row + 0.4 - 0.85 * heights / heights.max()
    for side, alpha in ((x <= 0, 0.25), (x >= 0, 0.75)):
        ax.fill_between(x, y, row + 0.4, where=side, color=colour, alpha=alpha, linewidth=0)
    ax.plot(x, y, color=colour, linewidth=0.9, label=label)


def _set_asinh_axis(ax: Axes, low: float, high: float) -> None:
    """Put ticks at 0, ±1 and powers of ten, as far apart as their labels need."""
    decades = max(1, math.ceil(math.log10(max(abs(low), abs(high), 10))))
    step = 1 + decades // 4
    powers = [10.0**power for power in range(0, decades + 1, step)]
    ticks = [-power for power in reversed(powers)] + [0.0] + powers
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", MINUS))


def individual_figure(table: pd.DataFrame, layout: Layout) -> Figure:
    """Draw SNR and variance of single parameters against K with their 95% intervals, a small panel each.

    The intervals are mean -+ half width, not formed in logarithms: an SNR that is lost in noise reaches down to zero.
    `table` is that of `gradients.individual`.
    """
    scenes = split(table, layout.scenes)
    names = [name for name in table["parameter"].cat.categories if (table["parameter"] == name).any()]
    blocks = [names[start : start + MAX_COLUMNS] for start in range(0, len(names), MAX_COLUMNS)]
    lines = [(scene, block, metric) for scene in scenes for block in blocks for metric in INDIVIDUAL]
    columns = len(blocks[0])
    fig = Figure(figsize=(max(2.1 * columns + 0.5, 4.5), 1.75 * len(lines) + 0.8), layout="constrained")
    axes = fig.subplots(len(lines), columns, squeeze=False)
    particles = sorted(table[layout.particles].astype(float).unique()) if layout.particles else []
    for i, (scene, block, metric) in enumerate(lines):
        drawn = scenes[scene][scenes[scene]["metric"] == metric]
        drawn = drawn[(drawn["mean"] > 0) & drawn["parameter"].isin(names)]
        known = Metric("train", f"grads/{metric}")
        for ax, name in zip(axes[i], block, strict=False):
            part = drawn[drawn["parameter"] == name]
            for curve in curves(part, layout):
                points = curve.table.sort_values(str(layout.particles))
                k, colour = points[layout.particles].astype(float), curve.look.colour
                ax.plot(
                    k, points["mean"], color=colour, marker=curve.look.marker, linestyle=curve.line, markersize=3.5,
                    linewidth=1.2, label=curve.label,
                )  # fmt: skip
                ax.errorbar(k, points["mean"], yerr=errors_of(points), ecolor=colour, **BARS)
            if len(drawn):
                fit_axis(ax, "y", known, drawn, {}, (), 1.0, room=0.15)
            style.set_particles_axis(ax, particles)
            if metric == INDIVIDUAL[0]:
                ax.set_title(", ".join(filter(None, [scene, name])))
            ax.tick_params(which="both", labelleft=ax is axes[i][0], labelbottom=metric == INDIVIDUAL[-1])
        for ax in axes[i][len(block) :]:
            ax.set_axis_off()
        axes[i][0].set_ylabel(style.axis_label(known.name))
    for ax in axes[-1][: len(blocks[-1])]:
        ax.set_xlabel("number of particles K")
    draw_legend(fig, [curve.handle() for curve in curves(table, layout)])
    return fig


def frontier_figure(leagues: Sequence[League]) -> Figure:
    """Draw, for each league, variance against time an evaluation with its Pareto frontier, and beside it the bias.

    Points have the numbers of the rows beside them, which stand objective by objective, in order of variance x time.
    Each objective has a frontier of its own. Dotted are lines of equal variance x time. Hollow are estimators with a
    bias of more than two standard errors.
    """
    sizes = [max(3.2, ROW * (len(league.entries) + len(by_objective(league))) + 0.8) for league in leagues]
    fig = Figure(figsize=(10.5, sum(sizes) + 0.1), layout="constrained")
    axes = fig.subplots(len(leagues), 2, squeeze=False, width_ratios=[1.35, 1], height_ratios=sizes)
    for (left, right), league in zip(axes, leagues, strict=True):
        _draw_frontier(left, league)
        _draw_bias(right, league)
    fig.draw_without_rendering()
    for (left, _), league in zip(axes, leagues, strict=True):
        _number_points(left, _points(league))
    return fig


def _points(league: League) -> dict[int, tuple[float, float, Entry]]:
    """Return time and variance of each estimator that has both, under its number."""
    return {
        entry.number: (entry.values[TIME], entry.values[VARIANCE], entry)
        for entry in league.entries
        if entry.values.get(TIME, 0) > 0 and entry.values.get(VARIANCE, 0) > 0
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points than which none is better in both coordinates, in order of the first.

    >>> pareto([(1, 5), (2, 6), (3, 1), (1, 7)])
    [(1, 5), (3, 1)]
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _draw_frontier(ax: Axes, league: League) -> None:
    points = _points(league)
    ax.set(title=league.scene, xlabel=style.axis_label(TIME), ylabel=style.axis_label(VARIANCE))
    if not points:
        ax.text(0.5, 0.5, "no times recorded", ha="center", transform=ax.transAxes, color=QUIET)
        return
    times, variances = np.array([point[0] for point in points.values()]), np.array([p[1] for p in points.values()])
    limits = [style.limits(True, values, np.array([]), 0.0) for values in (times, variances)]
    ax.set(xscale="log", yscale="log", xlim=_wider(limits[0]), ylim=_wider(limits[1]))
    style.set_logarithmic(ax.xaxis, *ax.get_xlim())
    style.set_logarithmic(ax.yaxis, *ax.get_ylim())
    _draw_equal_work(ax)
    best = []
    for line, (objective, entries) in zip(cycle(style.LINES), by_objective(league).items(), strict=False):
        rivals = [entry.number for entry in competing(entries, league.columns) if entry.number in points]
        frontier = pareto([points[number][:2] for number in rivals]) if len(rivals) > 1 else []
        best += frontier
        x, y = np.array(frontier).reshape(-1, 2).T
        label = f"frontier of {title_of(objective)}"
        ax.step(x, y, where="post", color="#444444", linewidth=1, linestyle=line, zorder=2, label=label)
    for time, variance, entry in points.values():
        look, face = entry.look, "white" if is_biased(entry) else entry.look.colour
        edge = ("#111111", 1.5) if (time, variance) in best else (look.colour, 1.0)
        ax.plot(
            [time], [variance], color=look.colour, marker=look.marker, markersize=7, markerfacecolor=face,
            markeredgecolor=edge[0], markeredgewidth=edge[1], linestyle="none", zorder=3, label=entry.label,
        )  # fmt: skip
    lines = [
        line for line in ax.get_lines() if str(line.get_label()).startswith("frontier") and np.size(line.get_xdata())
    ]
    if lines:
        ax.legend(handles=lines, loc="best", fontsize=7.5, handlelength=3)


def _wider(limits: tuple[float, float]) -> tuple[float, float]:
    """Leave room for numbers at the edge."""
    return limits[0] / 1.15, limits[1] * 1.15


def _draw_equal_work(ax: Axes) -> None:
    """Draw lines of equal variance x time, each named where it leaves the panel, at the right or on top."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    powers = range(math.ceil(math.log10(left * bottom / 1e3)), math.floor(math.log10(right * top / 1e3)) + 1)
    for power in powers[:: 1 + len(powers) // 7]:
        work = 10.0**power * 1e3  # of milliseconds
        ax.plot([left, right], [work / left, work / right], color="#c4c4c4", linewidth=0.8, linestyle=":", zorder=1)
        style_of: dict[str, Any] = {"color": QUIET, "fontsize": 7.5, "annotation_clip": False}
        if bottom < work / right < top:
            ax.annotate(f"$10^{{{power}}}$", (right, work / right), (3, 0), textcoords="offset points", va="center",
                        **style_of)  # fmt: skip
        elif left < work / top < right:
            ax.annotate(f"$10^{{{power}}}$", (work / top, top), (0, 2), textcoords="offset points", ha="center",
                        **style_of)  # fmt: skip


def _number_points(ax: Axes, points: Mapping[int, tuple[float, float, Entry]]) -> None:
    """Write each point's number beside it where it covers neither a point nor another number.

    A number that is far from its point, or nearer to another, has a line to its own.
    """
    scale = ax.figure.get_figure(root=True).dpi / 72
    centres = {place: ax.transData.transform((time, variance)) for place, (time, variance, _) in points.items()}
    taken = [Bbox.from_extents(*(centre - 5 * scale), *(centre + 5 * scale)) for centre in centres.values()]
    for place, centre in centres.items():
        half = np.array([3.0 * len(str(place)) + 1, 4.5]) * scale
        others = np.array([other for key, other in centres.items() if key != place]).reshape(-1, 2)
        offset, box, is_clear = _free_place(centre, half, taken, others, ax.get_window_extent(), scale)
        taken.append(box)
        time, variance, _ = points[place]
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        number: Annotation = ax.annotate(
            str(place), (time, variance), offset, textcoords="offset points", ha="center",
            va="center", fontsize=8, color="#222222", arrowprops=None if is_clear else line, zorder=4,
        )  # fmt: skip
        number.set_in_layout(False)


def _free_place(
    centre: np.ndarray, half: np.ndarray, taken: Sequence[Bbox], others: np.ndarray, panel: Bbox, scale: float
) -> tuple[tuple[float, float], Bbox, bool]:
    """Return the offset in points and the box of a number near `centre`, and whether it is clear whose it is.

    Places are tried on rings about the point. Of the near ones the first that is clear is taken, else that which is the
    furthest from other points; where these are all taken, the first free one further out, and else the last of all.
    """
    near = []
    for radius in (9, 12, 16, 21, 27, 34, 42, 52, 64, 78, 94, 112, 132):
        for angle in np.radians(range(45, 405, 30)):
            offset = radius * np.array([math.cos(angle), math.sin(angle)])
            middle = centre + scale * offset
            box = Bbox.from_extents(*(middle - half), *(middle + half))
            found = (float(offset[0]), float(offset[1])), box
            inside = panel.x0 <= box.x0 and box.x1 <= panel.x1 and panel.y0 <= box.y0 and box.y1 <= panel.y1
            if not inside or any(box.overlaps(other) for other in taken):
                continue
            nearest = np.hypot(*(others - middle).T).min(initial=math.inf)
            if radius <= 12 and nearest > 1.5 * radius * scale:
                return *found, True
            near.append((nearest - radius * scale, found))
        if near and radius >= 12:
            return *max(near, key=lambda place: place[0])[1], False
    return *found, False


def _draw_bias(ax: Axes, league: League) -> None:
    """Draw the bias in standard errors by name, or where none was measured the work-normalised variance."""
    name = BIAS_Z if BIAS_Z in league.columns else WORK if WORK in league.columns else VARIANCE
    values = [entry.values.get(name, math.nan) for entry in league.entries]
    known = np.array([value for value in values if value > 0])
    if known.size:
        limits = style.limits(True, np.array([*known, *([0.5, 3.0] if name == BIAS_Z else [])]), np.array([]), 0.0)
        ax.set(xscale="log", xlim=_wider(limits))
        style.set_logarithmic(ax.xaxis, *ax.get_xlim())
        ax.xaxis.set_minor_formatter(NullFormatter())
    if name == BIAS_Z:
        ax.axvspan(ax.get_xlim()[0], UNBIASED, color="#e8efe9", zorder=0)
        ax.axvline(1, label="unbiased", **GUIDE)
    ticks: list[str] = []
    headings = []
    for objective, entries in by_objective(league).items():
        headings.append(len(ticks))
        ticks.append(title_of(objective))
        for entry in entries:
            look, face = entry.look, "white" if is_biased(entry) else entry.look.colour
            ax.plot(
                [entry.values.get(name, math.nan)], [len(ticks)], color=look.colour, marker=look.marker, markersize=7,
                markerfacecolor=face, linestyle="none", label=entry.label,
            )  # fmt: skip
            ticks.append(f"{entry.label}  {entry.number}")
    ax.set_yticks(range(len(ticks)), ticks)
    for row in headings:
        ax.get_yticklabels()[row].set(color=QUIET, style="italic")
    ax.set_ylim(len(ticks) - 0.4, -0.6)
    ax.set_xlabel(style.axis_label(name))
