"""OVIS with VIMCO's control variates."""

from dataclasses import dataclass
from math import inf, log1p

import torch
from torch import Tensor

from estimators.bounds.base import ScoreFunction
from estimators.bounds.vimco import bound_with_mean_of_others
from estimators.bounds.weights import Weights
from estimators.registry import spell


@dataclass(eq=False, repr=False)
class OvisVimco(ScoreFunction):
    """OVIS~ (Liévin et al. 2020) from VIMCO's c_k, which stands for L^a with particle k replaced:

        c_k = c_k of `vimco-<mean>` - gamma beta v_k + (1 - gamma) log(1 - 1/K) / (1 - a)

    With the arithmetic mean this is `ovis-gamma<gamma>`. Unbiased for gamma = 0; otherwise biased as v_k depends on
    z_k: E = grad L^a + gamma beta E[sum_k v_k h_k]. Proof: the rows of `ovis-arithmetic-gamma` and
    `ovis-geometric-gamma` in tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    mean: str = "arithmetic"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean not in ("arithmetic", "geometric"):
            raise ValueError(f"{self.id}: mean = {self.mean!r}, expected 'arithmetic' or 'geometric'")
        if not 0 <= self.gamma < inf:
            raise ValueError(f"{self.id}: gamma = {self.gamma}, expected a number that is not negative")

    @property
    def id(self) -> str:
        """`ovis-<mean>-gamma<gamma>`."""
        return f"ovis-{self.mean}-gamma{spell(self.gamma)}"

    def control_variate(self, weights: Weights, beta: float) -> Tensor:
        """Return c_k - shift, [mc, iw, batch]."""
        constant = (1 - self.gamma) * log1p(-1 / weights.num_particles) / (1 - weights.alpha)
        others = bound_with_mean_of_others(weights, self.mean) + constant
        return torch.sub(others, weights.w_norm, alpha=self.gamma * beta)
