"""ARMS: many mutually antithetic samples of Bernoulli variables."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from estimators.nodes.base import Method, Sample, gradient_of_logits, logits_of
from estimators.nodes.parts import beside, score_of


class ARMS(Method):
    """1/(n-1) sum_i (f(b_i) - mean f) (b_i - p) p (1 - p) / (p - P11) by each logit (Dimitriev & Zhou 2021, "ARMS").

    The n samples of a variable are negatively correlated: a Dirichlet vector (d_1..d_n) of unit weights has
    (1 - d_i)^(n-1) uniform, and the rarer value of the bit is taken where that is below its probability s. Two samples
    then are both rare with probability S = max(0, 2 s^(1/(n-1)) - 1)^(n-1), and the factor is (1 - s) / (1 - S / s),
    which makes up for the correlation. n = 2 is DisARM.

    Points [n, *plates, *rest], each with the law of the node; n costs, whatever the number of variables. Asks costs for
    their values at possible samples, nothing else. Unbiased. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Dimitriev & Zhou 2021"
    takes = (Bernoulli,)

    def __init__(self, plate_name: str, n_samples: int = 2):
        super().__init__(plate_name, n_samples)
        if n_samples < 2:
            raise ValueError(f"ARMS({plate_name!r}): n_samples = {n_samples}, expected at least 2 antithetic samples")

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:  # noqa: ARG002
        """Return b, [n, *plates, *rest]."""
        logits = logits_of(distribution).detach()
        noise = torch.empty(self.n_samples, *logits.shape, dtype=logits.dtype, device=logits.device).exponential_()
        total = noise.sum(0)
        is_rare = ((total - noise) / total) ** (self.n_samples - 1) < _rarer(logits)
        return torch.where(logits > 0, ~is_rare, is_rare).to(logits.dtype)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return zeros with the estimate as their gradient, [*plates, m]."""
        costs = beside(sample, cost.detach())
        score = score_of(sample.distribution, sample.points).unsqueeze(-1)
        n, rare = self.n_samples, _rarer(logits_of(sample.distribution).detach())
        both = (2 * rare ** (1 / (n - 1)) - 1).clamp(min=0) ** (n - 1)
        factor = (1 - rare) / (1 - both / rare)
        coefficient = ((costs - costs.mean(0)) * score).sum(0) / (n - 1) * factor.unsqueeze(-1)
        return gradient_of_logits(sample, coefficient, type(self).__name__)


def _rarer(logits: Tensor) -> Tensor:
    """Return the probability of the rarer value of each bit, positive."""
    return (-logits.abs()).sigmoid().clamp(min=torch.finfo(logits.dtype).tiny)
