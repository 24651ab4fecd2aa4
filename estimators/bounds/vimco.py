"""VIMCO: the particle replaced by a mean of the others."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from estimators.bounds.base import ScoreFunction
from estimators.bounds.weights import Weights, leave_one_out, shared


@dataclass(eq=False, repr=False)
class Vimco(ScoreFunction):
    """VIMCO (Mnih & Rezende 2016, eq. 10): c_k = L^a with w_k^{1-a} replaced by the mean of the others', m_k:

        c_k = [log(sum_{j != k} w_j^{1-a} + m_k) - log K] / (1 - a)

    With the arithmetic mean this is the bound of the K - 1 others; the geometric one is exp(mean_{j != k} log
    w_j^{1-a}). Unbiased for grad L^a, in linear time and memory. Proof: the rows of `vimco` in
    tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    mean: str = "arithmetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean not in ("arithmetic", "geometric"):
            raise ValueError(f"{self.id}: mean = {self.mean!r}, expected 'arithmetic' or 'geometric'")

    @property
    def id(self) -> str:
        """`vimco-<mean>`."""
        return f"vimco-{self.mean}"

    def control_variate(self, weights: Weights, beta: float) -> Tensor:  # noqa: ARG002
        """Return c_k - shift, [mc, iw, batch]."""
        return bound_with_mean_of_others(weights, self.mean)


@shared
def bound_with_mean_of_others(weights: Weights, mean: str) -> Tensor:
    """Return L^a with w_k^{1-a} replaced by the `mean` of the others', minus the shift, for every k: [mc, iw, batch].

    `mean` is "arithmetic" or "geometric".
    """
    others, num_others = leave_one_out(weights), weights.num_particles - 1
    if mean == "arithmetic":
        return weights.unheated(others - log(num_others))
    replaced = torch.logaddexp(others, _mean_of_others(weights))
    return weights.unheated(replaced - log(weights.num_particles))


def _mean_of_others(weights: Weights) -> Tensor:
    """Return mean_{j != k} log w_j for every k, -inf where one of the others is."""
    log_w, num_others = weights.log_w, weights.num_particles - 1
    if weights.have_others:
        return (log_w.sum(-2, keepdim=True) - log_w) / num_others
    is_zero = log_w == -torch.inf
    finite = torch.where(is_zero, 0.0, log_w)
    mean = (finite.sum(-2, keepdim=True) - finite) / num_others
    num_zero = is_zero.sum(-2, keepdim=True)
    return torch.where(num_zero > is_zero, -torch.inf, mean)
