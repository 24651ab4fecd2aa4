"""How everything looks: the metrics' names and units, the estimators' colours and markers, fonts, and axes."""

import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
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

TIMES = "\N{MULTIPLICATION SIGN}"
LINES = (
    "-",
    (0, (4, 1.5)),
    (0, (1.2, 1.2)),
    (0, (5, 1.2, 1.2, 1.2)),
    (0, (8, 2)),
    (0, (5, 1.2, 1.2, 1.2, 1.2, 1.2)),
)


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
    "loss/neg_elbo": MetricStyle("negative ELBO", "nats", "lower"),
    "loss/objective": MetricStyle("the method's own loss", "nats", "lower"),
    "toy/loss": MetricStyle("expected cost", "", "lower"),
    "toy/p": MetricStyle("p"),
    "toy/variance": MetricStyle("gradient variance", "", "lower"),
    "policy/value": MetricStyle("value of the policy", "", "higher"),
    "policy/regret": MetricStyle("regret", "", "lower"),
    "grads/probs_variance": MetricStyle("gradient variance, by probabilities", "", "lower"),
    "grads/probs_bias": MetricStyle("squared gradient bias, by probabilities", "", "lower"),
    "grads/snr": MetricStyle("gradient SNR", "", "higher"),
    "grads/dsnr": MetricStyle("gradient directional SNR", "", "higher"),
    "grads/variance": MetricStyle("gradient variance", "", "lower"),
    "grads/magnitude": MetricStyle("gradient magnitude"),
    "grads/bias": MetricStyle("gradient bias", "", "lower"),
    "grads/bias_z": MetricStyle("gradient bias", "standard errors"),
    "grads/cosine": MetricStyle("cosine with the true gradient", "", "higher"),
    "time/evaluation_ms": MetricStyle("time an evaluation", "ms", "lower"),
    "memory/evaluation_mb": MetricStyle("memory an evaluation", "MiB", "lower"),
    "time/step_ms": MetricStyle("time a training step", "ms", "lower"),
    "time/step_ms_median": MetricStyle("median time a training step", "ms", "lower"),
    "memory/step_mb": MetricStyle("memory a training step", "MiB", "lower"),
    "memory/resident_mb": MetricStyle("resident memory of the process", "MiB", "lower"),
    "memory/standing_mb": MetricStyle("memory between training steps", "MiB", "lower"),
    "time/work_normalised_variance": MetricStyle("work-normalised variance", f"variance {TIMES} s", "lower"),
    "gmm/posterior_mse": MetricStyle("posterior error", "L2 norm", "lower"),
    "gmm/prior_mse": MetricStyle("prior error", "L2 norm", "lower"),
    "gaussian_toy/mse_A": MetricStyle("mean squared error of A", "", "lower"),
    "gaussian_toy/mse_b": MetricStyle("mean squared error of b", "", "lower"),
    "gaussian_toy/mse_mu": MetricStyle("mean squared error of mu", "", "lower"),
    "loss/expectation": MetricStyle("exact expectation of the loss", "", "lower"),
    "top_k/gap": MetricStyle("gap to the optimum", "", "lower"),
    "path/hamming": MetricStyle("Hamming distance to the path", "cells", "lower"),
    "path/excess_cost": MetricStyle("excess cost of the path", "share", "lower"),
    "path/optimal": MetricStyle("paths as cheap as the cheapest", "share", "higher"),
    "path/cost_correlation": MetricStyle("correlation with the true costs", "", "higher"),
    "active_units/au": MetricStyle("active units", "", "higher"),
    "gradient/error": MetricStyle("error of the gradient", "of its norm", "lower"),
    "hessian/error": MetricStyle("error of the Hessian", "of its norm", "lower"),
    "third/error": MetricStyle("error of the third derivative", "of its norm", "lower"),
    "gradient/correlation": MetricStyle("correlation of the gradient", "", "higher"),
    "hessian/correlation": MetricStyle("correlation of the Hessian", "", "higher"),
    "third/correlation": MetricStyle("correlation of the third derivative", "", "higher"),
    "game/return": MetricStyle("return a round", "", "higher"),
    "game/final_return": MetricStyle("return a round, last 20 iterations", "", "higher"),
    "game/exact_return": MetricStyle("exact discounted return a round", "", "higher"),
    "cooperation/start": MetricStyle("P(cooperate), first round"),
    "cooperation/CC": MetricStyle("P(cooperate) after both did"),
    "cooperation/CD": MetricStyle("P(cooperate) after the other defected"),
    "cooperation/DC": MetricStyle("P(cooperate) after defecting alone"),
    "cooperation/DD": MetricStyle("P(cooperate) after both defected"),
    "penalty/variance": MetricStyle("variance of the penalty's gradient", "", "lower"),
    "language/reward": MetricStyle("adjectives a sentence", "reward", "higher"),
    "language/kl": MetricStyle("KL from the original", "nats", "lower"),
    "language/grammatical": MetricStyle("grammatical sentences", "share", "higher"),
}

# One look for each estimator, in every figure of every report. Hues go by family; markers tell neighbours apart.
PALETTE = {
    "ovis-gamma1": ("#0072b2", "o"),
    "ovis-gamma0.5": ("#00427a", "d"),
    "ovis-gamma0": ("#56b4e9", "s"),
    "ovis-S1-exclusive": ("#b9e0c8", "s"),
    "ovis-S5-exclusive": ("#8fd3bd", "<"),
    "ovis-S10-exclusive": ("#009e73", "^"),
    "ovis-S20-exclusive": ("#00573f", ">"),
    "ovis-S50-exclusive": ("#003325", "p"),
    "ovis-S1": ("#9c5fb5", "P"),
    "ovis-S2": ("#b0bd3d", "s"),
    "ovis-S4": ("#92a52a", "v"),
    "ovis-S9": ("#7a9a1e", "P"),
    "ovis-S10": ("#6b8e23", "h"),
    "ovis-S20": ("#41571a", "D"),
    "ovis-S0.1": ("#d6d05a", "<"),
    "ovis-S0.2": ("#b8b234", "s"),
    "ovis-S0.3": ("#959020", "X"),
    "ovis-S0.5": ("#6e6a14", "^"),
    "ovis-S0.7": ("#45420a", "p"),
    "wake-wake": ("#cc79a7", "v"),
    "wake-sleep": ("#8e3a6b", "<"),
    "tvo-part5-beta2": ("#d55e00", "P"),
    "tvo-part2-config1": ("#d43d1a", "^"),
    "tvo-part5-config2": ("#f0704a", "v"),
    "tvo-part5-config1": ("#a0c030", "d"),
    "tvo-part5": ("#ff8f6b", ">"),
    "tvo-part5-right": ("#5b7553", ">"),
    "tvo-part5-beta2-trapz": ("#d4a5a5", "^"),
    "tvo-part5-linear-trapz": ("#6b4fff", "s"),
    "vimco-arithmetic": ("#e69f00", "D"),
    "vimco-geometric": ("#8c6510", "d"),
    "reinforce": ("#333333", "X"),
    "reinforce-baseline": ("#8a8a8a", ">"),
    "pathwise-iwae": ("#5e4fa2", "p"),
    "pathwise-vae": ("#a79bd8", "H"),
    "stl": ("#a6341b", "h"),
    "dreg": ("#e2735c", "8"),
    "rloo": ("#c2185b", "s"),
    "vargrad": ("#b5a642", "v"),
    "nvil": ("#7a3b12", "P"),
    "ovis-arithmetic-gamma1": ("#117a8b", ">"),
    "ovis-arithmetic-gamma0": ("#5fb8c4", "<"),
    "ovis-geometric-gamma1": ("#3b3b7a", "D"),
    "ovis-geometric-gamma0": ("#4d7fff", "p"),
    # Methods for single nodes are not in one figure with the bounds above.
    "score-function-moving-average": ("#8a8a8a", "s"),
    "score-function-batch-average": ("#c2185b", "D"),
    "expect": ("#000000", "X"),
    "gumbel-softmax": ("#e69f00", "^"),
    "straight-through-gumbel": ("#8c6510", "v"),
    "gumbel-rao": ("#b8b234", "<"),
    "reinmax": ("#a6341b", ">"),
    "arm": ("#56b4e9", "o"),
    "disarm": ("#0072b2", "s"),
    "arms": ("#00427a", "P"),
    "bit-flip": ("#4d7fff", "h"),
    "local-expectation": ("#009e73", "p"),
    "rao-blackwell": ("#00573f", "^"),
    "score-function-wor": ("#9c5fb5", "v"),
    "unordered-set": ("#5e4fa2", "P"),
    "muprop": ("#cc79a7", "<"),
    "double-cv": ("#8e3a6b", ">"),
    "rebar": ("#117a8b", "D"),
    "relax": ("#5fb8c4", "H"),
    "lax": ("#3b3b7a", "8"),
    "importance-sampling": ("#6e6a14", "d"),
    "rodeo": ("#b0bd3d", "X"),
    "measure-valued": ("#7a3b12", "p"),
    "reparameterization": ("#a79bd8", "D"),
    "infer": ("#5b7553", "s"),
    "imle": ("#1f6fb4", "o"),
    "aimle": ("#2e9e6b", "^"),
    "perturbed": ("#8756a8", "s"),
    "blackbox": ("#cf5b12", "v"),
    "straight-through": ("#dfa01a", "D"),
    "score-function": ("#2b2b2b", "X"),
    "exact": ("#959595", "p"),
    # Baselines of DiCE and of policies.
    "none": ("#4a4a4a", "X"),
    "moving-average": ("#e0a526", "v"),
    "batch-average": ("#0a6b7d", "D"),
    "value": ("#5b7553", "^"),
    "leave-one-out": ("#2a7fc0", "D"),
    "any-order": ("#23936a", "o"),
    "loaded": ("#cc4778", "^"),
    # Learners of the prisoner's dilemma.
    "naive": ("#505050", "s"),
    "lola-1": ("#e39b22", "o"),
    "lola-2": ("#25a074", "h"),
    "lola-3": ("#6a5bb0", "^"),
    # What a penalty of tokens is attributed to.
    "prefix": ("#1b66a8", "v"),
    "sequence": ("#dd6a1f", "D"),
    "off": ("#9a9a9a", "X"),
}
SPARE_COLOURS = ("#9c5fb5", "#5b7553", "#ff8f6b", "#d4a5a5", "#a0c030", "#6b4fff", "#005f73", "#e07be0", "#806040")
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
    """Number an axis of few decades by 1, 2, 5 (side by side, beyond 50 times, by 1, 3, which have more room), one of
    less than a decade by every digit, a short one by halves too.
    """
    if high < 1000 * low and low > 1e-4:
        halves = np.arange(1, 10, 0.5).tolist()
        digits = [1, 3] if isinstance(axis, XAxis) and high > 50 * low else [1, 2, 5]
        axis.set_major_locator(LogLocator(subs=digits if high > 8 * low else halves[:: 1 if high < 3 * low else 2]))
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
