"""Local expectations: every coordinate enumerated in turn."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of, gradient_of_logits, logits_of
from estimators.nodes.joint import points_of
from estimators.nodes.parts import probs_of, weights_of


class LocalExpectation(Method):
    """sum_v grad q(b_d = v) f(b with b_d = v), for each variable d, the others as drawn.

    (Titsias & Lazaro-Gredilla 2015, "Local expectation gradients for black box variational inference".)
    For a Bernoulli p_d (1 - p_d) (f with b_d = 1 - f with b_d = 0) by its logit. The exact gradient of one variable; D
    variables of C categories take n (1 + D (C - 1)) costs. Points in this number: all b, then, with weight 0, all that
    differ from them in one variable.

    Asks costs for their values at possible samples, nothing else. Unbiased. Proof:
    tests/estimators/nodes/test_enumeration.py.
    """

    source = "Titsias & Lazaro-Gredilla 2015"
    takes = (Bernoulli, OneHotCategorical, Categorical)

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return b and its neighbours; `noise` of the sample is b as categories, [n, *plates, D]."""
        size = num_categories(distribution)
        at = categories_at(distribution, noise, num_plates)
        num = at.shape[-1]
        shift = torch.arange(1, size, device=at.device).reshape(-1, *(1,) * at.dim(), 1)
        eye = torch.eye(num, dtype=torch.long, device=at.device).reshape(num, *(1,) * (at.dim() - 1), num)
        neighbours = (at + shift * eye) % size  # [C - 1, D, n, *plates, D]
        points = torch.cat([at, neighbours.flatten(0, 2)])
        return Sample(distribution, num_plates, points_of(distribution, points), at)

    def weigh(self, sample: Sample) -> Tensor:
        """Return 1 / n for b and 0 for its neighbours."""
        return weights_of(sample, self.n_samples)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return zeros with the estimate as their gradient, [*plates, m]."""
        logits, at, n = logits_of(sample.distribution), sample.noise, self.n_samples
        size, num = num_categories(sample.distribution), at.shape[-1]
        cost = cost.detach().expand(-1, *at.shape[1:-1], -1)
        others = cost[n:].unflatten(0, (size - 1, num, n))  # [C - 1, D, n, *plates, m]
        shifted = torch.cat([cost[:n].expand(1, num, *cost[:n].shape), others])
        shifted = shifted.movedim((0, 1), (-2, -3))  # [n, *plates, D, C, m]
        value = torch.arange(size, device=at.device)
        index = ((value - at.unsqueeze(-1)) % size).unsqueeze(-1).expand_as(shifted)
        costs = shifted.gather(-2, index)
        if isinstance(base_of(sample.distribution), Bernoulli):
            p = probs_of(sample.distribution).unsqueeze(-1)
            difference = (costs[..., 1, :] - costs[..., 0, :]).mean(0)
            coefficient = p * (1 - p) * difference.reshape(*logits.shape, -1)
        else:
            p = probs_of(sample.distribution).unsqueeze(-1)
            costs = costs.mean(0).reshape(*logits.shape, -1)
            coefficient = p * (costs - (p * costs).sum(-2, keepdim=True))
        return gradient_of_logits(sample, coefficient, type(self).__name__)


def num_categories(distribution: Distribution) -> int:
    """Return how many values a variable has."""
    return 2 if isinstance(base_of(distribution), Bernoulli) else logits_of(distribution).shape[-1]


def categories_at(distribution: Distribution, points: Tensor, num_plates: int) -> Tensor:
    """Return points [n, *plates, *rest, *event] of a discrete node as categories, [n, *plates, D]."""
    if isinstance(base_of(distribution), OneHotCategorical):
        points = points.argmax(-1)
    return points.long().reshape(*points.shape[: 1 + num_plates], -1)
