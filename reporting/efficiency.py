"""What a training step costs against K: time and memory, how both grow, and how they grew in published code."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reporting import style
from reporting.asymptotics import fit_slope
from reporting.figures import HOLLOW, fit_axis, in_logarithms
from reporting.gradient_figures import GUIDE, NONE, QUIET, slope_text
from reporting.layout import Layout, curves, split
from reporting.options import Metric, PivotMetric

TIME, MEDIAN, MEMORY = "time/step_ms", "time/step_ms_median", "memory/step_mb"
CPU, ON_GPU = "time/step_cpu_ms", "time/on_gpu"
METRICS = {name: PivotMetric("last", Metric("train", name)) for name in (TIME, MEDIAN, CPU, MEMORY, ON_GPU)}
SHOWN = (TIME, MEMORY)
LARGE = 10.0  # exponents are fitted from the greatest K / LARGE on: below, much of a step costs the same at any K
LEAST_POINTS = 3
DISTURBED = 0.8  # of its time a step has the processor to itself, at least, where nothing else takes it
POWERS = (1, 2)  # of K, drawn as guides
COLUMNS = ["scene", "estimator", "metric", "K", "value", "exponent", "low", "high", "n", "from", "factor", "published"]
FITTED = (
    f"Exponents: least squares of the logarithm against log K over the last decade of K (at least {LEAST_POINTS} of "
    "them), with 95% Student intervals of n - 2 degrees of freedom"
)


class Published(NamedTuple):
    """By which factor memory grew from one K to another in published code, and the settings of that measurement."""

    source: str
    settings: dict[str, object]
    k: tuple[int, int]
    factors: dict[str, float]


PUBLISHED = Published(
    "the code of Liévin et al. 2020, one-layer sigmoid belief network",
    {"task": "efficiency", "model": "sbn", "model.latents": "200", "batch_size": 24},
    (2506, 5000),
    {"ovis-gamma1": 2.0, "vimco-arithmetic": 3.5},
)


def published_factors(runs: pd.DataFrame) -> dict[str, float]:
    """Return the published growth of memory by estimator where all runs have its settings, else nothing."""
    alike = all(column in runs and (runs[column] == value).all() for column, value in PUBLISHED.settings.items())
    return PUBLISHED.factors if len(runs) and alike else {}


def growths(table: pd.DataFrame, published: dict[str, float], layout: Layout) -> pd.DataFrame:
    """Return how time and memory grow: a row for each scene, estimator and metric.

    K and value: the greatest K and what a step costs there. exponent, low, high: the fitted power of K and its 95%
    interval, over the n K of the last decade, at least three. factor: by how much it grew from K = `from`, the one
    before. published: that factor in published code. `table` is that of `aggregate.measured_pivot`.
    """
    rows = []
    for metric in SHOWN:
        for scene, part in split(table[table["metric"] == str(METRICS[metric])], layout.scenes).items():
            for curve in curves(part, layout):
                k, cost = _points(curve.table, layout)
                if not len(k):
                    continue
                large = (k >= k[-1] / LARGE) | (np.arange(len(k)) >= len(k) - LEAST_POINTS)
                before, factor = (k[-2], cost[-1] / cost[-2]) if len(k) > 1 else (np.nan, np.nan)
                theirs = published.get(curve.name) if metric == MEMORY and (before, k[-1]) == PUBLISHED.k else None
                fitted = *fit_slope(k[large], cost[large]), int(large.sum())
                rows.append((scene, curve.label, metric, k[-1], cost[-1], *fitted, before, factor, theirs))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"published": float})


def _points(table: pd.DataFrame, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the K of a curve in order, and its means there."""
    rows = table[table["mean"] > 0].sort_values(str(layout.particles))
    return rows[layout.particles].astype(float).to_numpy(), rows["mean"].to_numpy()


def short_of_memory(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that failed for want of memory."""
    failed = runs["state"].isin(("failed", "aborted"))
    return runs[failed & runs["error"].fillna("").str.contains("out of GPU memory|out of memory|t allocate memory")]


def devices(table: pd.DataFrame) -> set[str]:
    """Return where the steps ran: "CPU", "GPU", or both; nothing where it was not recorded."""
    means = table.loc[table["metric"] == str(METRICS[ON_GPU]), "mean"]
    return {"GPU" for mean in means if mean > 0} | {"CPU" for mean in means if mean < 1}


def warnings(table: pd.DataFrame) -> list[str]:
    """Return a line where times are compared that do not compare, and one where other work took the processor."""
    found = []
    if len(devices(table)) > 1:
        found.append("efficiency: some steps ran on a GPU, others on a CPU; keep these in roots of their own")
    of = {name: table.loc[table["metric"] == str(METRICS[name]), "mean"].to_numpy() for name in (TIME, CPU, ON_GPU)}
    if len({len(means) for means in of.values()}) == 1:
        disturbed = int(((of[CPU] < DISTURBED * of[TIME]) & (of[ON_GPU] == 0)).sum())
        if disturbed:
            found.append(
                f"efficiency: in {disturbed} of {len(of[TIME])} cells even the fastest step waited for the processor: "
                "these times are too long; measure with --processes 1 on a machine that does nothing else"
            )
    return found


def efficiency_figure(table: pd.DataFrame, grown: pd.DataFrame, layout: Layout, short: pd.DataFrame) -> Figure:
    """Draw milliseconds and MiB of a step against K, both axes logarithmic, a row for each scene.

    Points are the least times, bars reach up to the medians. Hollow: from our memory at the published K before the
    last, where the published growth leads. Crosses at the upper edge: jobs that found too little memory. The legend is
    a table: the exponents, and the factors of memory beside the published. `grown` is the table of `growths`, `short`
    that of `short_of_memory`.
    """
    scenes = split(table, layout.scenes)
    handles = {curve.label: curve.handle() for curve in curves(table, layout)}
    lines = len(scenes) * len(handles) if len(scenes) > 1 else len(handles)
    fig = Figure(figsize=(8.4, 3.3 * len(scenes) + 0.19 * (lines + 1) + 0.3), layout="constrained")
    axes = fig.subplots(len(scenes), len(SHOWN), squeeze=False)
    particles = sorted(table[layout.particles].astype(float).unique())
    failed = split(short, layout.scenes) if len(short) else {}
    for line, (scene, part) in zip(axes, scenes.items(), strict=True):
        of_scene = grown[grown["scene"] == scene]
        for ax, metric in zip(line, SHOWN, strict=True):
            _draw_costs(ax, metric, part, of_scene, layout)
            style.set_particles_axis(ax, particles)
            ax.tick_params(axis="x", labelrotation=45 if len(particles) > 7 else 0)
            ax.set(xlabel="number of particles K", ylabel=style.axis_label(metric), title=scene)
            _draw_guides(ax, part[part["metric"] == str(METRICS[metric])], layout)
        for curve in curves(failed[scene], layout) if scene in failed else ():
            k, edge = curve.table[layout.particles].astype(float), line[-1].get_xaxis_transform()
            line[-1].plot(
                k, [1.0] * len(k), transform=edge, marker="x", markersize=7, linestyle="none", clip_on=False,
                color=curve.look.colour, label=f"{curve.label}, out of memory",
            )  # fmt: skip
    _draw_table(fig, handles, grown)
    return fig


def _draw_costs(ax: Axes, metric: str, table: pd.DataFrame, grown: pd.DataFrame, layout: Layout) -> None:
    part = in_logarithms(METRICS[metric].metric, table[table["metric"] == str(METRICS[metric])], spread=1.0)
    medians = table[table["metric"] == str(METRICS[MEDIAN])] if metric == TIME else table.iloc[:0]
    median_of = {
        curve.label: dict(zip(*_points(curve.table, layout), strict=True)) for curve in curves(medians, layout)
    }
    theirs = grown[(grown["metric"] == metric) & grown["published"].notna()].set_index("estimator")
    led = theirs["value"] / theirs["factor"] * theirs["published"]
    for curve in curves(part, layout):
        k, cost = _points(curve.table, layout)
        colour, marker = curve.look
        size = 8.0 - 4.0 * curve.place / max(1, len(layout.looks) - 1)  # where curves coincide, all markers show
        ax.plot(k, cost, color=colour, marker=marker, markersize=size, linestyle=curve.line, label=curve.label)
        if known := median_of.get(curve.label):
            upper = [known.get(each, least) for each, least in zip(k, cost, strict=True)]
            ax.vlines(k, cost, upper, color=colour, linewidth=1, label=f"{curve.label}, median")
        if curve.label in led.index:
            row = theirs.loc[curve.label]
            ax.plot(
                [row["from"], row["K"]], [row["value"] / row["factor"], led[curve.label]], marker=marker, color=colour,
                label=f"{curve.label}, published growth", markevery=[1], **HOLLOW,
            )  # fmt: skip
    if len(part):
        fit_axis(ax, "y", METRICS[metric].metric, part, {}, [*medians["mean"], *led], 1.0, room=1.0)


def _draw_guides(ax: Axes, table: pd.DataFrame, layout: Layout) -> None:
    """Draw powers of K from below the curves at the middle K up to the last, or to the panel's upper edge."""
    particles = sorted(table[layout.particles].astype(float).unique())
    if len(particles) < 2:
        return
    first, last = particles[(len(particles) - 1) // 2], particles[-1]
    low, high = ax.get_ylim()
    start = max(low, 0.6 * float(table.loc[table[layout.particles].astype(float) == first, "mean"].min()))
    for power in POWERS:
        end = min(last, first * (high / start) ** (1 / power))
        ax.plot([first, end], [start, start * (end / first) ** power], label=f"K^{power}", **GUIDE)
        ax.annotate(
            "$K$" if power == 1 else f"$K^{power}$", (end, start * (end / first) ** power), xytext=(3, 1),
            textcoords="offset points", color=QUIET, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def table_of(grown: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows, a row for each scene and estimator: costs at the greatest K, exponents, factors."""
    has_published = grown["published"].notna().any()
    heads = ["K", "ms", "MiB", "time as K^", "memory as K^", "memory grew"]
    heads += ["published"] if has_published else []
    rows = []
    for (scene, estimator), part in grown.groupby(["scene", "estimator"], sort=False):
        cells = part.set_index("metric").reindex(SHOWN)
        grew = cells.loc[MEMORY].to_dict()
        texts = [f"{cells['K'].max():,.0f}", *(_number(value, "{:.3g}") for value in cells["value"])]
        texts += [slope_text(*row) for row in cells[["exponent", "low", "high"]].itertuples(index=False)]
        texts.append(_number(grew["factor"], f"{style.TIMES}{{:.2f}} from K = {grew['from']:,.0f}"))
        texts += [_number(grew["published"], f"{style.TIMES}{{:.1f}}")] if has_published else []
        rows.append([", ".join(filter(None, [str(scene), str(estimator)])), *texts])
    return ["estimator", *heads], rows


def _number(value: float, form: str) -> str:
    return NONE if np.isnan(value) else form.format(value)


def _draw_table(fig: Figure, handles: dict[str, Line2D], grown: pd.DataFrame) -> None:
    """Write the table as a legend: its columns are the legend's, the first with the lines."""
    heads, rows = table_of(grown)
    wanted = [column for column in range(len(heads)) if heads[column] not in ("K", "ms", "MiB")]
    labels = grown[["scene", "estimator"]].drop_duplicates()["estimator"]
    keys: list[Line2D] = []
    for column in wanted:
        head = Line2D([], [], marker="o", color="#555555", **HOLLOW) if heads[column] == "published" else _blank("")
        head.set_label("exponents [95%]" if column == 0 else heads[column])
        keys.append(head)
        for label, row in zip(labels, rows, strict=True):
            key = Line2D([], []) if column == 0 else _blank(row[column])
            if column == 0:
                key.update_from(handles[label])
                key.set_label(row[0] or "all runs")
            keys.append(key)
    legend = fig.legend(handles=keys, loc="outside lower center", ncols=len(wanted), columnspacing=0.6)
    for text in legend.get_texts()[:: len(rows) + 1]:
        text.set_color(QUIET)


def _blank(label: str) -> Line2D:
    return Line2D([], [], linestyle="none", label=label)


def caption(table: pd.DataFrame, grown: pd.DataFrame, short: pd.DataFrame) -> str:
    """Describe the figure."""
    where = f" on a {' and a '.join(sorted(devices(table)))}" if devices(table) else ""
    theirs = f"Hollow: where memory would be had it grown as in {PUBLISHED.source}."
    return " ".join(
        filter(
            None,
            [
                f"Time and peak memory of a training step (loss, backward pass, optimizer){where} against the number "
                "of particles K, all axes logarithmic. Times are the least of many, bars reach up to their medians: "
                "long ones tell of other work on the machine. Memory is that of the tensors which a step makes, beside "
                "parameters and the optimizer's state. Grey: powers of K for the eye.",
                theirs if grown["published"].notna().any() else "",
                "Crosses: out of memory." if len(short) else "",
                f"{FITTED}.",
            ],
        )
    )
