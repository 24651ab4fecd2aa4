"""OVIS with the asymptotic form of the optimal control variate."""

from dataclasses import dataclass
from math import inf, log, log1p

import torch
from torch import Tensor

from estimators.bounds.base import ScoreFunction
from estimators.bounds.weights import Weights, leave_one_out
from estimators.registry import spell


@dataclass(eq=False, repr=False)
class OvisGamma(ScoreFunction):
    """OVIS~ (Liévin et al. 2020, eq. 17; there for alpha = 0, beta = 1), by the factorised leave-one-out bound:

        c_k = L^a + [log(1 - v_k) - gamma log(1 - 1/K)] / (1 - a) - gamma beta v_k
            = [log sum_{j != k} w_j^{1-a} - log K - gamma log(1 - 1/K)] / (1 - a) - gamma beta v_k

    Unbiased for gamma = 0, which is best at a low effective sample size. Otherwise, and best at a high one, biased as
    v_k depends on z_k: E = grad L^a + gamma beta E[sum_k v_k h_k], whose SNR grows as sqrt(K). Proof: the rows of
    `ovis-gamma` in tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < inf:
            raise ValueError(f"{self.id}: gamma = {self.gamma}, expected a number that is not negative")

    @property
    def id(self) -> str:
        """`ovis-gamma<gamma>`."""
        return f"ovis-gamma{spell(self.gamma)}"

    def control_variate(self, weights: Weights, beta: float) -> Tensor:
        """Return c_k - shift, [mc, iw, batch]."""
        constant = log(weights.num_particles) + self.gamma * log1p(-1 / weights.num_particles)
        others = weights.unheated(leave_one_out(weights) - constant)
        return torch.sub(others, weights.w_norm, alpha=self.gamma * beta)
