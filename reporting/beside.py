"""A row of panels, a metric each, with the curves of all runs: for studies of many estimators without a K."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from reporting import style
from reporting.figures import Limits, draw_curves, draw_legend, fit_axis, in_logarithms, without_start
from reporting.layout import Layout, curves, split
from reporting.options import Metric


def beside_figure(table: pd.DataFrame, metrics: Sequence[Metric], layout: Layout, ylims: Limits) -> Figure:
    """Draw means over seeds with their 95% bands against the step: a column for each metric, a row for each scene.

    `table` is that of `aggregate.curves`.
    """
    scenes = split(table, layout.scenes)
    fig = Figure(figsize=(3.9 * len(metrics), 3.3 * len(scenes) + 1.0), layout="constrained")
    axes = fig.subplots(len(scenes), len(metrics), squeeze=False)
    for line, (scene, whole) in zip(axes, scenes.items(), strict=True):
        for ax, metric in zip(line, metrics, strict=True):
            part = in_logarithms(metric, whole[whole["metric"] == str(metric)])
            if len(part):
                fit_axis(ax, "y", metric, without_start(metric, part), ylims)
                draw_curves(ax, part, layout)
                style.set_step_axis(ax, part["step"].max())
            ax.set(xlabel="training step", ylabel=f"{style.axis_label(metric.name)}, {metric.split}", title=scene)
    draw_legend(fig, [curve.handle() for curve in curves(table, layout)])
    return fig
