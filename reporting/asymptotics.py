"""How metrics go with K: fitted slopes, and ours against published values. Pure functions of tables."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from reporting.layout import Layout, curves, split
from reporting.options import Metric, PivotMetric

METRICS = tuple(
    PivotMetric("last", Metric("train", f"grads/{name}")) for name in ("snr", "dsnr", "variance", "magnitude")
)
# The powers of K that theory has for a metric, drawn as guides: Rainforth et al. 2018, Theorem 1; Lievin et al. 2020.
GUIDES = {"grads/snr": (0.5, -0.5), "grads/dsnr": (0.5, -0.5), "grads/variance": (-1.0, -3.0)}
# Both are proportional to the size of the true gradient, and so to the one perturbation of the parameters.
SCALED = ("grads/snr", "grads/dsnr")
COMPARED = ["scene", "metric", "estimator", "K", "ours", "se", "published", "ratio", "scaled"]


def fit_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Return the slope of log y against log x and the ends of its 95% interval.

    Ordinary least squares, slope b = S_xy / S_xx on the logarithms, with the standard error
    sqrt(sum(residual^2) / ((n - 2) S_xx)) and Student's t for n - 2 degrees of freedom: the interval is wide where the
    points are no power law, whatever their measurement errors. NaN below two points, no interval below three.

    >>> slope, low, high = fit_slope(np.array([1.0, 10.0, 100.0]), np.array([5.0, 0.5, 0.05]))
    >>> round(slope, 9), round(high - low, 9)
    (-1.0, 0.0)
    """
    n = len(x)
    if n < 2 or np.ptp(x) == 0:
        return math.nan, math.nan, math.nan
    log_x, log_y = np.log(x) - np.log(x).mean(), np.log(y) - np.log(y).mean()
    slope = float(log_x @ log_y / (log_x @ log_x))
    if n < 3:
        return slope, math.nan, math.nan
    residual = log_y - slope * log_x
    se = math.sqrt(residual @ residual / ((n - 2) * (log_x @ log_x)))
    half = float(stdtrit(n - 2, 0.975)) * se
    return slope, slope - half, slope + half


def slopes(table: pd.DataFrame, metrics: Sequence[PivotMetric], layout: Layout) -> pd.DataFrame:
    """Return a row for each scene, estimator and metric: slope, low, high, and n, how many K it is fitted to.

    `table` is that of `aggregate.pivot`; means that are not above zero have no logarithm and are left out.
    """
    rows = []
    for metric in metrics:
        for scene, part in split(table[table["metric"] == str(metric)], layout.scenes).items():
            for curve in curves(part, layout):
                positive = curve.table[curve.table["mean"] > 0].sort_values(str(layout.particles))
                x, y = positive[layout.particles].astype(float).to_numpy(), positive["mean"].to_numpy()
                rows.append((scene, curve.label, str(metric), *fit_slope(x, y), len(x)))
    return pd.DataFrame(rows, columns=["scene", "estimator", "metric", "slope", "low", "high", "n"])


def compare(table: pd.DataFrame, published: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Return ours beside the published: a row for each published value whose cell is in `table`.

    `ratio` is ours / published. `scaled` is the ratio divided by the metric's common factor, the geometric mean of the
    metric's ratios over all estimators and K; only SNR and DSNR have one, for they scale with the perturbation drawn.
    """
    parts = [pd.DataFrame(columns=COMPARED[:-1])]
    for scene, part in split(table, layout.scenes).items():
        for curve in curves(part, layout):
            ours = curve.table.assign(metric=curve.table["metric"].astype(str), iw=curve.table[layout.particles])
            both = ours.merge(curve.of(published)[["metric", "iw", "value"]], on=["metric", "iw"])
            both = both.assign(scene=scene, estimator=curve.label, ratio=both["mean"] / both["value"])
            both = both.rename(columns={"iw": "K", "mean": "ours", "value": "published"})
            parts += [both[COMPARED[:-1]]] if len(both) else []
    found = pd.concat(parts[1:] or parts, ignore_index=True)
    scaled = found["metric"].str.endswith(tuple(f":{name}" for name in SCALED))
    factors = {metric: common_factor(part["ratio"]) for metric, part in found[scaled].groupby("metric")}
    found["scaled"] = found["ratio"] / found["metric"].map(factors).astype(float)
    order = {str(metric): place for place, metric in enumerate(published["metric"].unique())}
    return found.sort_values(["metric"], key=lambda names: names.map(order), kind="stable", ignore_index=True)


def common_factor(ratios: pd.Series) -> float:
    """Return the geometric mean of ratios, NaN where one is not above zero."""
    return float(np.exp(np.log(ratios).mean())) if (ratios > 0).all() else math.nan
