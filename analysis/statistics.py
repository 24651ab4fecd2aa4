"""Mean, variance, SNR and DSNR of a gradient over replicates, each with its standard error.

Notation: g_ri is the gradient of replicate r for parameter i, R replicates, m_i and s_i^2 its mean and variance (R - 1)
over r, d_ri = g_ri - m_i. All is computed in float64.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
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


class Oracle(NamedTuple):
    """What the mean gradient of a loss is compared with.

    gradient: flat, [parameters], of the loss: minus that of the objective.
    se: its standard errors, zeros where it is exact.
    method: "enumerated", "closed form", "quadrature" or "reference".
    """

    gradient: Tensor
    se: Tensor
    method: str


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

        Where there is an oracle, constant parameters included:

        - `grads/bias`: mean over the parameters of abs(mean - oracle). Noise alone makes it positive;
        - `grads/bias_z`: root mean square over the parameters of (mean - oracle) / standard error, of those whose
          standard error (the oracle's included) is not 0: about 1 where there is no bias, and NaN without any;
        - `grads/cosine`: of the angle between the mean and the oracle, NaN where one of them is 0;
        - `grads/bias_se`, `grads/cosine_se`: by the influence of each replicate, and of the oracle's errors, which
          count as independent of one another.
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


def reduce_replicates(
    blocks: Callable[[], Iterator[Tensor]], dtype: torch.dtype, oracle: Oracle | None = None
) -> GradientStatistics:
    """Reduce replicates of a gradient that come in blocks.

    `blocks()` iterates over tensors of shape [replicates, parameters], the same at each call. It is called three times:
    distances need the final mean, and the standard error of the DSNR needs its derivative by that mean. Nothing of the
    size of a block is kept in between.
    """
    (statistics,) = reduce_together(lambda: (block.unsqueeze(0) for block in blocks()), dtype, [oracle])
    return statistics


def reduce_together(
    blocks: Callable[[], Iterator[Tensor]], dtype: torch.dtype, oracles: Sequence[Oracle | None]
) -> list[GradientStatistics]:
    """Reduce blocks [estimators, replicates, parameters] as `reduce_replicates` does, with one oracle an estimator."""
    reductions = [_reduce(dtype, oracle) for oracle in oracles]
    for reduction in reductions:
        next(reduction)
    for _ in range(_PASSES - 1):
        for block in blocks():
            for reduction, gradients in zip(reductions, block, strict=True):
                reduction.send(gradients.double())
        for reduction in reductions:
            reduction.send(None)
    for block in blocks():
        for reduction, gradients in zip(reductions, block, strict=True):
            reduction.send(gradients.double())
    return [_returned(reduction) for reduction in reductions]


_PASSES = 3
_Reduction = Generator[None, Tensor | None, GradientStatistics]


def _returned(reduction: _Reduction) -> GradientStatistics:
    try:
        reduction.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a reduction makes as many passes as there are")


def _reduce(dtype: torch.dtype, oracle: Oracle | None) -> _Reduction:
    """Be sent the blocks of each pass, then None, and return the statistics at the end of the last pass."""
    moments = None
    while (block := (yield)) is not None:
        moments = _moments(block) if moments is None else _merge(moments, _moments(block))
    if moments is None or moments.num < 2:
        raise ValueError("statistics over replicates need at least two replicates")
    count, mean, squares, low, high = moments
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
    comparison = None if oracle is None else _Comparison.of(mean, (variance / count).sqrt(), oracle)
    influences, oracle_influences = [], []
    while (block := (yield)) is not None:
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
        if comparison is not None:
            oracle_influences.append(distance @ comparison.slopes)
    snr_influence, variance_influence, magnitude_influence, ratio = torch.cat(influences, 1)

    # A replicate enters the DSNR by its own ratio and, through the mean direction, by all ratios.
    pull /= count * norm
    dsnr_influences = []
    while (block := (yield)) is not None:
        dsnr_influences.append((block - mean) @ pull)
    dsnr_influence = ratio + torch.cat(dsnr_influences)

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
    if comparison is not None:
        averages |= comparison.averages(torch.cat(oracle_influences))
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


class _Comparison(NamedTuple):
    """The mean gradient beside its oracle; `slopes` [parameters, 2]: of bias and cosine by the mean."""

    bias: Tensor
    bias_z: Tensor
    cosine: Tensor
    slopes: Tensor
    variances: Tensor  # of bias and cosine, by the oracle's own errors

    @classmethod
    def of(cls, mean: Tensor, mean_se: Tensor, oracle: Oracle) -> "_Comparison":
        gradient, oracle_se = oracle.gradient.to(mean), oracle.se.to(mean)
        difference, se = mean - gradient, (mean_se.square() + oracle_se.square()).sqrt()
        z = difference / se
        known = se > 0
        slope = difference.sign() * torch.where(known, _folding(z.masked_fill(~known, 0.0)), 0.0) / len(mean)
        to_mean, to_oracle = mean / mean.norm(), gradient / gradient.norm()
        cosine = to_mean @ to_oracle
        turn, oracle_turn = (
            (to_oracle - cosine * to_mean) / mean.norm(),
            (to_mean - cosine * to_oracle) / gradient.norm(),
        )
        by_oracle = torch.stack([slope, oracle_turn], 1) * oracle_se.unsqueeze(1)
        return cls(
            difference.abs().mean(),
            z[known].square().mean().sqrt(),
            cosine,
            torch.stack([slope, turn], 1),
            by_oracle.square().sum(0),
        )

    def averages(self, influences: Tensor) -> dict[str, Tensor]:
        """Return the metrics, given the influences [replicates, 2] of replicates on bias and cosine."""
        bias_se, cosine_se = (influences.var(0) / len(influences) + self.variances).sqrt()
        return {
            "grads/bias": self.bias,
            "grads/bias_se": bias_se,
            "grads/bias_z": self.bias_z,
            "grads/cosine": self.cosine,
            "grads/cosine_se": cosine_se,
        }


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
