"""MuProp: the score function with the first-order expansion of the cost at the mean as its control variate."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of, gradient_of_logits
from estimators.nodes.parts import beside, differentiable, probs_of, score_of, slopes, weights_of


class MuProp(Method):
    """(f(b) - f(mu) - f'(mu) (b - mu)) grad log q(b) + f'(mu) grad mu, mu the mean of the node (Gu et al. 2016).

    Points [n + 1, *plates, *rest, *event]: all b, and mu with weight 0: n + 1 costs.

    Needs costs that are differentiable in the samples, and defined between their values. Unbiased; exact in each draw
    for linear costs. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Gu et al. 2016"
    takes = (Bernoulli, OneHotCategorical)

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return b and the mean."""
        points = torch.cat([noise, probs_of(distribution).unsqueeze(0)])
        return Sample(distribution, num_plates, differentiable(points))

    def weigh(self, sample: Sample) -> Tensor:
        """Return 1 / n for b and 0 for the mean."""
        return weights_of(sample, self.n_samples)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return zeros with the estimate as their gradient, [*plates, m]."""
        if not torch.is_grad_enabled():
            return None
        slope = slopes(self, sample, cost)[-1]
        costs, n = beside(sample, cost.detach()), self.n_samples
        score = score_of(sample.distribution, sample.points[:n]).unsqueeze(-1)
        # b - mu is the score itself.
        linear = summed(sample, slope * score)
        coefficient = ((costs[:n] - costs[n:] - linear) * score).mean(0)
        return gradient_of_logits(sample, coefficient + by_mean(sample, slope), type(self).__name__)


def summed(sample: Sample, values: Tensor) -> Tensor:
    """Return values [n, *logits, m] summed over the node's variables and their categories, [n, *plates, *ones, m]."""
    dims = tuple(range(1 + sample.num_plates, values.dim() - 1))
    return values.sum(dims, keepdim=True) if dims else values


def by_mean(sample: Sample, slope: Tensor) -> Tensor:
    """Return slopes by the mean of the node [..., *logits, m] as slopes by its logits."""
    p = probs_of(sample.distribution).unsqueeze(-1)
    if isinstance(base_of(sample.distribution), Bernoulli):
        return p * (1 - p) * slope
    return p * (slope - (p * slope).sum(-2, keepdim=True))
