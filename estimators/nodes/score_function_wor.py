"""The score function over samples without replacement, weighed by importance."""

import torch
from torch import Tensor

from estimators.nodes.base import Sample
from estimators.nodes.without_replacement import WithoutReplacement


class ScoreFunctionWOR(WithoutReplacement):
    """sum_i w_i (f(x_i) - b_i) grad log q(x_i), w_i = q(x_i) / (1 - exp(-exp(log q(x_i) - t))) (Kool et al. 2019).

    x_1..x_k are drawn without replacement, t is the threshold: the (k+1)-th largest perturbed log-probability. A value
    is among them, given t, with the probability that its weight divides by. The baseline

        b_i = q(x_i) f(x_i) + sum_{j != i} w_j f(x_j)

    has no bias, as E[w_i w_j] = q(x_i) q(x_j) (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!").
    Points [k, *plates, *rest, *event], weights [k, *plates], which sum to 1 in the mean alone. Without a second sample
    (k = 1) the variance is infinite: E[w^2] diverges as the threshold grows.

    Unbiased, to any order. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Kool et al. 2019"

    def weigh(self, sample: Sample) -> Tensor:
        """Return w, [k, *plates]."""
        log_prob, threshold = sample.log_prob.detach(), sample.noise
        x = (log_prob - threshold).exp()
        # Far below the threshold q / (1 - exp(-x)) = exp(threshold) x / (1 - exp(-x)) is exp(threshold).
        far = x < torch.finfo(x.dtype).eps
        weight = torch.where(far, threshold.exp(), log_prob.exp() / -torch.expm1(-x.masked_fill(far, 1)))
        return weight.masked_fill(log_prob == -torch.inf, 0)

    def baseline(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return b, [k, *plates, m]."""
        weight, prob = self.weigh(sample).unsqueeze(-1), sample.log_prob.detach().exp().unsqueeze(-1)
        return (weight * cost).sum(0) + (prob - weight) * cost
