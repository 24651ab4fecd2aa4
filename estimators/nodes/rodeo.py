"""RODEO: leave-one-out with control variates made by a discrete Stein operator."""

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution

from estimators.nodes.base import Method, Sample, gradient_of_logits
from estimators.nodes.double_cv import check_others, mean_of_others
from estimators.nodes.parts import (
    differentiable,
    probs_of,
    slopes,
    training_term,
    variance_objective,
)


class RODEO(Method):
    """Leave-one-out, with what a Stein operator makes of the other samples' costs (Shi et al. 2022).

    The Gibbs operator (A h)(b) = 1/D sum_i q(flipped b_i) (h(b with bit i flipped) - h(b)) has mean 0 under q, for any
    h. With h_k a network of the first-order expansion of the cost at b, made of the other samples,

        lin_k(b) = mean over j != k of f'(b_j) (b - b_j),   h_k(b) = network(lin_k(b), mean over j != k of f(b_j)),

    two outputs of it, g_k and h_k, give

        1/n sum_k (f(b_k) - mean over j != k of (f(b_j) + (A g_j)(b_j))) grad log q(b_k) + (A (h_k grad log q))(b_k).

    n samples (two or more) take n costs, points [n, *plates, *rest], and one pass backwards; the network is evaluated
    at all n D neighbours. Its output is 0 at first, where the method is the score function with the leave-one-out
    baseline: backward() gives its parameters the gradient of the variance, for an optimiser that has
    `method.parameters()`.

    Needs costs that are differentiable in the samples. Unbiased whatever the network. Proof:
    tests/estimators/nodes/test_enumeration.py.
    """

    source = "Shi et al. 2022"
    takes = (Bernoulli,)

    def __init__(self, plate_name: str, n_samples: int = 2, hidden: int = 16):
        super().__init__(plate_name, n_samples)
        check_others(self)
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), last)

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return b."""
        return Sample(distribution, num_plates, differentiable(noise))

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:
        """Return zeros with the estimate, and the gradient of the network's parameters, as their gradient."""
        if not torch.is_grad_enabled():
            return None
        kept, m = 1 + sample.num_plates, cost.shape[-1]
        logits_shape = sample.points.shape[1:]
        b = sample.points.detach().reshape(*sample.points.shape[:kept], -1)  # [n, *plates, D]
        p = probs_of(sample.distribution).reshape(*b.shape[1:])
        slope = slopes(self, sample, cost).reshape(*b.shape, m)
        cost = cost.detach().expand(*b.shape[:-1], m)
        here, there = self._surrogates(b, slope, cost)  # [n, *plates, m, 2] and [n, *plates, D, m, 2]
        flip = torch.where(b > 0, 1 - p, p).unsqueeze(-1)  # q(flipped b_i), [n, *plates, D, 1]
        change = there - here.unsqueeze(-3)
        baseline = mean_of_others(cost + (flip * change[..., 0]).mean(-2))
        score = (b - p).unsqueeze(-1)
        # A (h grad log q): bit d of a neighbour's score differs from that of b in the flipped bit alone.
        moved = (flip * change[..., 1]).mean(-2).unsqueeze(-2) * score
        own = flip * there[..., 1] * (1 - 2 * b).unsqueeze(-1) / b.shape[-1]
        coefficient = ((cost - baseline).unsqueeze(-2) * score + moved + own).mean(0).reshape(*logits_shape, m)
        training = training_term(self.parameters(), variance_objective(coefficient, sample.num_plates))
        return gradient_of_logits(sample, coefficient.detach(), type(self).__name__) + training

    def _surrogates(self, b: Tensor, slope: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's two outputs at each sample and at each of its neighbours."""
        others = mean_of_others(slope)
        offset = mean_of_others((slope * b.unsqueeze(-1)).sum(-2))
        linear = (others * b.unsqueeze(-1)).sum(-2) - offset  # [n, *plates, m]
        neighbours = linear.unsqueeze(-2) + others * (1 - 2 * b).unsqueeze(-1)  # [n, *plates, D, m]
        level = mean_of_others(cost)
        dtype = next(self.network.parameters()).dtype

        def output(x: Tensor, y: Tensor) -> Tensor:
            return self.network(torch.stack([x, y.expand_as(x)], -1).to(dtype)).to(b.dtype)

        return output(linear, level), output(neighbours, level.unsqueeze(-2))
