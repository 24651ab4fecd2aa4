"""OVIS with a Monte Carlo estimate of the optimal control variate."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor, log

import torch
from torch import Tensor

from estimators.bounds.base import Coefficients, LinearEstimator, Objective
from estimators.bounds.weights import FLOOR, Terms, Weights, learning_signal, leave_one_out, weigh
from estimators.registry import spell


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
    and its weight sigmoid(a_s - o_k). Tensors of S K numbers are the largest, and no exponential underflows.
    """
    others = leave_one_out(weights).unsqueeze(-3)
    own = (1 - weights.alpha) * (auxiliary.log_w.detach() - weights.shift).unsqueeze(-2)
    # In place: at S K numbers a tensor, allocating is half of the cost.
    v = (own - others).clamp(FLOOR, -FLOOR).sigmoid_()
    log_sum = torch.maximum(others, own).sub_(torch.maximum(v, 1 - v).log_()).mean(-3)
    bound = (log_sum - log(weights.num_particles)) / (1 - weights.alpha)
    if isinstance(auxiliary.slope, float):
        return bound - auxiliary.slope * v.mean(-3)
    return bound - (auxiliary.slope.unsqueeze(-2) * v).mean(-3)
