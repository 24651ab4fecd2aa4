"""How everything looks: the metrics' names and units, the estimators' colours and markers, fonts, and axes."""

import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from reporting.aggregate import natural

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "ytick.minor.width": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "pdf.fonttype": 42,
    "svg.hashsalt": "estlab",
}

LINES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))


class MetricStyle(NamedTuple):
    """A metric's words: `better` is "lower", "higher" or empty where neither is."""

    label: str
    unit: str = ""
    better: str = ""


METRICS = {
    "loss/L_k": MetricStyle("importance-weighted bound", "nats", "higher"),
    "loss/elbo": MetricStyle("ELBO", "nats", "higher"),
    "loss/nll": MetricStyle("negative log-likelihood of x given z", "nats", "lower"),
    "loss/kl": MetricStyle("KL(q | prior)", "nats"),
    "loss/kl_q_p": MetricStyle("KL(q | posterior)", "nats", "lower"),
    "loss/ess": MetricStyle("evaluation ESS", "particles", "higher"),
    "grads/snr": MetricStyle("gradient SNR", "", "higher"),
    "grads/dsnr": MetricStyle("gradient directional SNR", "", "higher"),
    "grads/variance": MetricStyle("gradient variance", "", "lower"),
    "grads/magnitude": MetricStyle("gradient magnitude"),
    "grads/bias": MetricStyle("gradient bias", "", "lower"),
    "gmm/posterior_mse": MetricStyle("posterior error", "L2 norm", "lower"),
    "gmm/prior_mse": MetricStyle("prior error", "L2 norm", "lower"),
    "gaussian_toy/mse_A": MetricStyle("mean squared error of A", "", "lower"),
    "gaussian_toy/mse_b": MetricStyle("mean squared error of b", "", "lower"),
    "gaussian_toy/mse_mu": MetricStyle("mean squared error of mu", "", "lower"),
    "active_units/au": MetricStyle("active units", "", "higher"),
}

# One look for each estimator, in every figure of every report. Hues go by family; markers tell neighbours apart.
PALETTE = {
    "ovis-gamma1": ("#0072b2", "o"),
    "ovis-gamma0.5": ("#00427a", "d"),
    "ovis-gamma0": ("#56b4e9", "s"),
    "ovis-S5-exclusive": ("#8fd3bd", "<"),
    "ovis-S10-exclusive": ("#009e73", "^"),
    "ovis-S20-exclusive": ("#00573f", ">"),
    "ovis-S10": ("#6b8e23", "h"),
    "wake-wake": ("#cc79a7", "v"),
    "wake-sleep": ("#8e3a6b", "<"),
    "tvo-part5-beta2": ("#d55e00", "P"),
    "vimco-arithmetic": ("#e69f00", "D"),
    "vimco-geometric": ("#8c6510", "d"),
    "reinforce": ("#333333", "X"),
    "reinforce-baseline": ("#8a8a8a", ">"),
    "pathwise-iwae": ("#5e4fa2", "p"),
    "pathwise-vae": ("#a79bd8", "H"),
    "stl": ("#a6341b", "h"),
    "dreg": ("#e2735c", "8"),
}
SPARE_COLOURS = ("#117a8b", "#b5a642", "#9c5fb5", "#7a3b12", "#4d7fff", "#c2185b", "#5b7553", "#ff8f6b", "#3b3b7a")
SPARE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "d", "p", "h")


class Look(NamedTuple):
    """A colour and a marker."""

    colour: str
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Give each name its colour and marker, no two the same.

    The palette's own keep theirs always. Any other name begins at a place of its own among the spare looks, which its
    hash says, and takes the first that is free, a free colour first.
    """
    names = sorted(set(names), key=natural)
    found = {name: Look(*PALETTE[name]) for name in names if name in PALETTE}
    spares = [Look(colour, marker) for marker in SPARE_MARKERS for colour in SPARE_COLOURS]
    for name in names:
        if name not in found:
            start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(spares)
            ring = spares[start:] + spares[:start]
            colours = {look.colour for look in found.values()}
            free = [look for look in ring if look not in found.values()] or ring
            found[name] = next((look for look in free if look.colour not in colours), free[0])
    return {name: found[name] for name in names}


def describe(name: str) -> MetricStyle:
    """Return a metric's words; a name that has none is its own label."""
    if name in METRICS:
        return METRICS[name]
    group, _, last = name.partition("/")
    if group == "snr" and last.startswith("p"):
        return MetricStyle(f"gradient SNR, {last[1:]}th percentile", "", "higher")
    return MetricStyle(name, "nats" if group == "loss" else "")


def axis_label(name: str) -> str:
    """Return a metric's label with its unit."""
    style = describe(name)
    return f"{style.label} ({style.unit})" if style.unit else style.label


def tall_label(name: str, split: str) -> str:
    """Return a metric's label in short lines, its unit and split in the last."""
    style = describe(name)
    return f"{textwrap.fill(style.label, 20, break_on_hyphens=False)}\n({', '.join(filter(None, [style.unit, split]))})"


def is_logarithmic(name: str, values: np.ndarray, spread: float) -> bool:
    """Whether an axis of these values is logarithmic: all above 0, max / min >= `spread`, and no loss."""
    values = values[np.isfinite(values)]
    if name.startswith(("loss/", "active_units/")) or values.size == 0 or values.min() <= 0:
        return False
    return bool(values.max() >= spread * values.min())


def limits(logarithmic: bool, centres: np.ndarray, edges: np.ndarray, room: float) -> tuple[float, float]:
    """Return the limits of an axis that show the means, and of their intervals up to `room` ranges of the means beyond.

    With two seeds an interval is nine times as wide as their difference; whole, it would flatten everything else.
    """
    if logarithmic:
        centres, edges = np.log10(centres), np.log10(edges[edges > 0])
    low, high = centres.min(), centres.max()
    spread = (high - low) or (0.3 if logarithmic else 0.1 * abs(high) or 1.0)
    edges = np.clip(edges, low - room * spread, high + room * spread)
    low, high = min([low, *edges]), max([high, *edges])
    pad = 0.05 * max(high - low, spread)
    low, high = low - pad, high + pad
    return (10**low, 10**high) if logarithmic else (low, high)


def set_logarithmic(axis: Axis, low: float, high: float) -> None:
    """Number an axis of few decades by 1, 2, 5, and one of less than a decade by every digit."""
    if high < 1000 * low and low > 1e-4:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else range(1, 10)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())


def set_step_axis(ax: Axes, last: int) -> None:
    """Write steps as 20k or 1M, from 0 to the last."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))


def set_particles_axis(ax: Axes, particles: Sequence[float]) -> None:
    """Have a logarithmic x axis with a tick at each K."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(particles)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.margins(x=0.08)
