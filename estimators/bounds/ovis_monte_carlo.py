"""OVIS with a Monte Carlo estimate of the optimal control variate."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import floor, log, log2

import torch
from torch import Tensor

from estimators.bounds.base import Coefficients, LinearEstimator, Objective
from estimators.bounds.weights import FLOOR, Terms, Weights, learning_signal, leave_one_out, weigh
from estimators.registry import spell
from models.pieces import PIECE


@dataclass(eq=False, repr=False)
class _AuxiliaryParticles(LinearEstimator):
    """What both forms share: S, the particles that the control variate is made of, a number or a share of K."""

    auxiliary: int | float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.auxiliary
        if not ((isinstance(given, int) and given >= 1) or 0 < given < 1):
            raise ValueError(f"{self.id}: S = {given}, expected 1 or more particles, or a share of iw below 1")
        # The share as it is written: floor(0.29 * 100) is 28 in binary.
        self.num_auxiliary = given if isinstance(given, int) else max(1, floor(Fraction(str(given)) * self.iw))


class OvisMonteCarlo(_AuxiliaryParticles):
    """OVIS-MC (Liévin et al. 2020, eq. 12) within K particles: phi learns from K - S of them, theta from all.

    The control variate is `mean_learning_signal` of the other S. Unbiased: for grad_phi L^a_{K-S} and grad_theta L^a_K.
    Proof: the rows of `ovis-S` in tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_auxiliary >= self.iw:
            raise ValueError(
                f"{self.id}: iw = {self.iw}, expected more than S = {self.num_auxiliary}; "
                f"with {self.id}-exclusive the S particles come on top"
            )

    @property
    def id(self) -> str:
        """`ovis-S<auxiliary>`."""
        return f"ovis-S{spell(self.auxiliary)}"

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The bound of K particles for theta, of K - S for phi."""
        num_main = self.num_particles - self.num_auxiliary
        return Objective("bound", self.num_particles), Objective("bound", num_main)

    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:  # noqa: ARG002
        """Return L^a and v_k of all particles, and the centred signal of the first K - S."""
        main, auxiliary = terms.split(self.num_particles - self.num_auxiliary)
        weights, main_weights = weigh(terms.log_w, alpha), weigh(main.log_w, alpha)
        signal = learning_signal(main_weights, main.slope, mean_learning_signal(main_weights, auxiliary))
        return Coefficients(weights.bound, weights.w_norm, signal)


class OvisMonteCarloExclusive(_AuxiliaryParticles):
    """OVIS-MC (Liévin et al. 2020, eq. 12) with S particles beside the K of the bound.

    The control variate is `mean_learning_signal` of the S. Unbiased for grad L^a_K. Proof: the rows of
    `ovis-S-exclusive` in tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    min_particles = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_extra = self.num_auxiliary

    @property
    def id(self) -> str:
        """`ovis-S<auxiliary>-exclusive`."""
        return f"ovis-S{spell(self.auxiliary)}-exclusive"

    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:  # noqa: ARG002
        """Return L^a, v_k and the centred signal of the first K particles."""
        main, auxiliary = terms.split(self.num_particles)
        weights = weigh(main.log_w, alpha)
        signal = learning_signal(weights, main.slope, mean_learning_signal(weights, auxiliary))
        return Coefficients(weights.bound, weights.w_norm, signal)


def mean_learning_signal(weights: Weights, auxiliary: Terms) -> Tensor:
    """Return c_k - shift for c_k = 1/S sum_s d_k(z^(s), z_-k), [mc, K, batch], with layers in front under freebits.

    d_k(z^(s), z_-k) is the learning signal of an auxiliary particle in the place of z_k. With o_k the log-sum of the
    others' weights and a_s its own log-weight, both heated, its bound is (logaddexp(o_k, a_s) - log K) / (1 - alpha)
    and its weight v_{k,s} = sigmoid(a_s - o_k). No exponential underflows, nor does any product: as logaddexp(o, a) =
    max(o, a) - log max(v, 1 - v), with numbers of at least 1/2, a logarithm is taken of the product of many.
    """
    # Contiguous, whatever the layout of the model's densities is: sums over S then run along the batch.
    others = leave_one_out(weights).unsqueeze(-3).contiguous()
    own = (1 - weights.alpha) * (auxiliary.log_w.detach() - weights.shift).unsqueeze(-2).contiguous()
    slope = auxiliary.slope if isinstance(auxiliary.slope, float) else auxiliary.slope.unsqueeze(-2)
    num_copies, _, num_particles, _ = others.shape
    numbers = own.shape[-3] * others.numel()
    if numbers <= PIECE or others.device.type != "cpu":
        return _mean_signal(weights, others, own, slope)
    if numbers > num_copies * PIECE:  # not even one copy fits
        size = max(1, num_particles * PIECE // numbers)
        return torch.cat([_mean_signal(weights, part, own, slope) for part in others.split(size, -2)], -2)
    size = num_copies * PIECE // numbers
    slopes = [slope] * num_copies if isinstance(slope, float) else slope.split(size, -4)
    parts = zip(others.split(size), own.split(size), slopes, strict=False)
    return torch.cat([_mean_signal(weights, *part) for part in parts], -3)


def _mean_signal(weights: Weights, others: Tensor, own: Tensor, slope: Tensor | float) -> Tensor:
    """Return c_k - shift of others [mc, 1, K, batch], own and slope [mc, S, 1, batch], the slope with layers in front.

    They may be a part of the copies, or others of the particles: what it computes with is to fit into a cache.
    """
    largest, num = torch.maximum(others, own).mean(-3), own.shape[-3]
    v = (own - others).clamp(FLOOR, -FLOOR).sigmoid_()
    share = slope * v.mean(-3) if isinstance(slope, float) else (slope * v).mean(-3)
    products = torch.maximum(v, 1 - v).split(_num_factors(v.dtype), -3)
    log_sum = torch.sub(largest, sum(product.prod(-3).log() for product in products), alpha=1 / num)
    return (log_sum - log(weights.num_particles)) / (1 - weights.alpha) - share


@cache
def _num_factors(dtype: torch.dtype) -> int:
    """Return how many numbers of at least 1/2 have a product that does not underflow."""
    return int(-log2(torch.finfo(dtype).tiny))
