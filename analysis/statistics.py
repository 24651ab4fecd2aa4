"""Mean, variance, SNR and DSNR of a gradient over replicates, each with its standard error.

Notation: g_ri is the gradient of replicate r for parameter i, R replicates, m_i and s_i^2 its mean and variance (R - 1)
over r, d_ri = g_ri - m_i. All is computed in float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PERCENTILES = (5, 25, 50, 75, 95)

# A relative spread of this many machine epsilons is rounding: a gradient that cannot vary, such as that of a category
# which no replicate draws when weights sum to one, comes out of sums with their rounding. The SNR that can be told from
# it is 200,000 in float32. Half precision has no room for as much.
_ROUNDING_EPSILONS = 256
_ROUNDING_LIMIT = 1e-3


@dataclass(frozen=True)
class GradientStatistics:
    """What the replicates of a gradient say, parameter by parameter and on average.

    Flat tensors of shape [parameters], in the gradients' dtype:

    - `mean`, `variance`, `snr` = abs(mean) / sqrt(variance); variance with R - 1;
    - `mean_se`, `variance_se`, `snr_se`: their standard errors, the last by the delta method;
    - `constant`: true where all replicates are equal (to rounding). There the variance is 0 and the SNR NaN.

    `averages` is what `summary` returns.
    """

    mean: Tensor
    variance: Tensor
    snr: Tensor
    mean_se: Tensor
    variance_se: Tensor
    snr_se: Tensor
    constant: Tensor
    num_replicates: int
    averages: dict[str, float]

    def summary(self) -> dict[str, float]:
        """Return the metrics by name.

        - `grads/snr`, `grads/variance`, `grads/magnitude`: means over the parameters of snr, variance and abs(mean);
        - `grads/dsnr`: mean over replicates of norm(g along the mean gradient) / norm(g across it), a replicate of
          zeros counting 0; infinite where a replicate has nothing across, as with one parameter, and heavy-tailed with
          two or three;
        - `snr/p5`, `p25`, `p50`, `p75`, `p95`: percentiles of snr over the parameters;
        - `grads/num_constant`: how many parameters are constant. They are left out of the averages and percentiles over
          parameters. All but this number are NaN where no parameter varies;
        - `grads/snr_se`, `grads/dsnr_se`, `grads/variance_se`, `grads/magnitude_se`: standard errors over replicates,
          by the influence of each replicate on the whole average, hence with the correlation between parameters. They
          hold for many replicates. Where the direction of the mean is lost in noise, `grads/dsnr_se` is too large, by
          up to a factor of 1.7.
        """
        return dict(self.averages)


class _Moments(NamedTuple):
    """First moments of the replicates seen so far; `squares` is the sum of squared distances from `mean`."""

    num: int
    mean: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor


def _moments(gradients: Tensor) -> _Moments:
    mean = gradients.mean(0)
    return _Moments(len(gradients), mean, (gradients - mean).square().sum(0), *torch.aminmax(gradients, dim=0))


def _merge(a: _Moments, b: _Moments) -> _Moments:
    """Merge the moments of two sets of replicates (Chan, Golub and LeVeque 1983)."""
    count = a.num + b.num
    distance = b.mean - a.mean
    return _Moments(
        count,
        a.mean + distance * (b.num / count),
        a.squares + b.squares + distance.square() * (a.num * b.num / count),
        torch.minimum(a.low, b.low),
        torch.maximum(a.high, b.high),
    )


def _all_moments(blocks: Iterable[Tensor]) -> _Moments:
    merged = None
    for block in blocks:
        merged = _moments(block) if merged is None else _merge(merged, _moments(block))
    if merged is None or merged.num < 2:
        raise ValueError("statistics over replicates need at least two replicates")
    return merged


def reduce_replicates(blocks: Callable[[], Iterator[Tensor]], dtype: torch.dtype) -> GradientStatistics:
    """Reduce replicates of a gradient that come in blocks.

    `blocks()` iterates over tensors of shape [replicates, parameters], the same at each call. It is called three times:
    distances need the final mean, and the standard error of the DSNR needs its derivative by that mean. Nothing of the
    size of a block is kept in between.
    """

    def doubles() -> Iterator[Tensor]:
        return (block.double() for block in blocks())

    count, mean, squares, low, high = _all_moments(doubles())
    rounding = min(_ROUNDING_EPSILONS * torch.finfo(dtype).eps, _ROUNDING_LIMIT)
    constant = high - low <= rounding * torch.maximum(low.abs(), high.abs())
    varies = ~constant
    variance = torch.where(varies, squares / (count - 1), 0.0)
    deviation = torch.where(varies, variance.sqrt(), 1.0)  # 1 where it only has to keep a quotient finite
    norm = mean.norm()
    direction = mean / norm

    # Influence of g_ri on m_i, s_i^2 and snr_i: d, d^2 - s^2 and sign(m) d / s - abs(m) (d^2 - s^2) / (2 s^3); that on
    # an average over parameters is the average of these. Terms that all replicates share are left out.
    share = varies.double() / varies.sum()
    sign = mean.sign() * _folding(mean / deviation * count**0.5)
    on_distance = torch.stack([direction, sign * share / deviation, sign * share], 1)
    on_square = torch.stack([torch.ones_like(mean), mean.abs() * share / (2 * deviation**3), share], 1)
    third, fourth, pull = (torch.zeros_like(mean) for _ in range(3))
    influences = []
    for block in doubles():
        distance = block - mean
        square = distance.square()
        third += (square * distance).sum(0)
        fourth += square.square().sum(0)
        along, snr_by_distance, magnitude_influence = (distance @ on_distance).unbind(1)
        square_norm, snr_by_square, variance_influence = (square @ on_square).unbind(1)
        across = (square_norm - along.square()).clamp(min=0).sqrt()
        ratio, slope = _along_over_across(norm + along, across)
        pull += slope @ distance - (slope @ along) * direction
        snr_influence = snr_by_distance - snr_by_square
        influences.append(torch.stack([snr_influence, variance_influence, magnitude_influence, ratio]))
    snr_influence, variance_influence, magnitude_influence, ratio = torch.cat(influences, 1)

    # A replicate enters the DSNR by its own ratio and, through the mean direction, by all ratios.
    pull /= count * norm
    dsnr_influence = ratio + torch.cat([(block - mean) @ pull for block in doubles()])

    snr = torch.where(varies, mean.abs() / deviation, torch.nan)
    skewness, kurtosis = third / count / deviation**3, fourth / count / deviation**4
    variance_of_square = fourth / count - variance.square() * (count - 3) / (count - 1)
    variance_of_snr = sign.square() - snr * sign * skewness + snr.square() * (kurtosis - 1) / 4
    averages = {
        "grads/snr": snr[varies].mean(),
        "grads/snr_se": _standard_error(snr_influence),
        "grads/dsnr": torch.where(varies.any(), ratio.mean(), torch.nan),
        "grads/dsnr_se": _standard_error(dsnr_influence),
        "grads/variance": variance[varies].mean(),
        "grads/variance_se": _standard_error(variance_influence),
        "grads/magnitude": mean[varies].abs().mean(),
        "grads/magnitude_se": _standard_error(magnitude_influence),
        "grads/num_constant": constant.sum(),
    }
    return GradientStatistics(
        mean=mean.to(dtype),
        variance=variance.to(dtype),
        snr=snr.to(dtype),
        mean_se=(variance / count).sqrt().to(dtype),
        variance_se=(variance_of_square / count).clamp(min=0).sqrt().to(dtype),
        snr_se=(variance_of_snr / count).clamp(min=0).sqrt().to(dtype),
        constant=constant,
        num_replicates=count,
        averages={name: float(value) for name, value in averages.items()} | _percentiles(snr[varies]),
    )


def _along_over_across(along: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Return abs(along) / across, 0 where both are 0, and its derivative as the mean gradient turns.

    When the mean m turns by e (orthogonal to it), `along` grows by g_across . e / norm(m) and the norm of g stays: the
    ratio grows by sign(along) (along^2 + across^2) / across^3 times that.
    """
    zero = (along == 0) & (across == 0)
    across = torch.where(zero, 1.0, across)
    return along.abs() / across, along.sign() * (along.square() + across.square()) / across**3


def _folding(z: Tensor) -> Tensor:
    """Return the slope of abs(mean) by the mean where that has come out at z of its standard errors: 1 at large z.

    Near zero abs is no straight line, and abs(mean) spreads less than the mean: by the standard deviation of abs(X) for
    X ~ N(u, 1), whose mean is sqrt(2/pi) exp(-u^2/2) + u erf(u/sqrt(2)) (the folded normal distribution; Leone, Nelson
    and Nottingham 1961). u^2 = z^2 - 1 takes the noise in z into account.
    """
    u = (z.square() - 1).clamp(min=0).sqrt()
    mean = (2 / math.pi) ** 0.5 * torch.exp(-u.square() / 2) + u * torch.erf(u / 2**0.5)
    return (1 + u.square() - mean.square()).clamp(min=0).sqrt()


def _standard_error(influence: Tensor) -> Tensor:
    return influence.std() / len(influence) ** 0.5


def _percentiles(snr: Tensor) -> dict[str, float]:
    # torch.quantile refuses more than 16 million elements.
    values = np.quantile(snr.cpu().numpy(), [p / 100 for p in PERCENTILES]) if len(snr) else [np.nan] * len(PERCENTILES)
    return {f"snr/p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
