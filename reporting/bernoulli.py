"""The figure of task `bernoulli_toy`: the gradient's variance against p, and the exact curves behind the points."""

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from reporting.figures import draw_legend
from reporting.layout import Layout, curves, split

MEASURED, EXACT = "test:toy/variance", "test:toy/exact_variance"
ROUNDING = 1e-20  # DisARM has no variance at p = 1/2
THOUSAND = 1000  # the step of these metrics is 1000 p
CAPTION = (
    "Variance of a gradient by the logit of p, against p. Points are measured, with 95% intervals (over seeds, or of "
    "the measurement where there is one seed); lines are exact, by enumeration of the bits or by quantiles of the "
    "uniform, of those methods that draw nothing else. Where a variance is zero, a line has a gap."
)


def has_data(means: pd.DataFrame) -> bool:
    """Return whether the variance was measured; `means` is a table of `aggregate.curves`."""
    return bool((means["metric"] == MEASURED).any())


def variance_figure(means: pd.DataFrame, layout: Layout) -> Figure:
    """Draw the variance against p: estimators have colours, the other keys panels, which share the y axis.

    A variance of zero, or of rounding, is left out: a gap in the line, which no point shows.
    """
    is_shown = (means["metric"] == EXACT) | (means["metric"] == MEASURED) & (means["mean"] > ROUNDING)
    table = means[is_shown]
    panels = split(table, [*layout.scenes, *layout.series[1:]])
    fig = Figure(figsize=(max(4.5, 3.3 * len(panels)), 4.4), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, part) in zip(axes, panels.items(), strict=True):
        for curve in curves(part, layout):
            colour, marker = curve.look
            exact = curve.table[curve.table["metric"] == EXACT].sort_values("step")
            variances = exact["mean"].where(exact["mean"] > ROUNDING)
            ax.plot(exact["step"] / THOUSAND, variances, color=colour, linewidth=1.2, zorder=1)
            rows = curve.table[curve.table["metric"] == MEASURED].sort_values("step")
            known = rows[rows["low"].notna()]
            p, mean = known["step"] / THOUSAND, known["mean"]
            # No interval goes below a tenth of its mean: there is no zero on this axis.
            lengths = [mean - known["low"].clip(lower=mean / 10), known["high"] - mean]
            ax.errorbar(p, mean, lengths, fmt="none", ecolor=colour, elinewidth=0.8, zorder=2)
            ax.plot(
                rows["step"] / THOUSAND,
                rows["mean"],
                color=colour,
                marker=marker,
                linestyle="none",
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=3,
            )
        ax.set_yscale("log")
        ax.set(xlabel="p", xlim=(0, 1), title=title)
    axes[0].set_ylabel("variance of the gradient by the logit")
    handles = {curve.name: replace(curve, label=curve.name, line="-").handle() for curve in curves(table, layout)}
    draw_legend(fig, list(handles.values()))
    return fig
