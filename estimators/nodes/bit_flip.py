"""BitFlip-1: one random bit enumerated, the others as drawn."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution
from torch.nn.functional import one_hot

from estimators.nodes.base import Method, Sample, gradient_of_logits, logits_of
from estimators.nodes.parts import beside, probs_of, weights_of


class BitFlip1(Method):
    """D p_i (1 - p_i) (f with b_i = 1 - f with b_i = 0), i one of the D variables drawn uniformly (arXiv 2208.06124).

    Two costs a sample, whatever D; the gradient by all logits but one is 0 in each draw. Points [2n, *plates, *rest]:
    all b, then, with weight 0, each with its bit i flipped.

    Asks costs for their values at possible samples, nothing else. Unbiased. Proof:
    tests/estimators/nodes/test_enumeration.py.
    """

    source = "arXiv 2208.06124"
    takes = (Bernoulli,)

    def draw(self, distribution: Distribution, num_plates: int) -> tuple[Tensor, Tensor]:
        """Return b, [n, *plates, *rest], and i, [n, *plates]."""
        b = distribution.sample(torch.Size([self.n_samples]))
        shape = logits_of(distribution).shape
        index = torch.randint(shape[num_plates:].numel(), (self.n_samples, *shape[:num_plates]), device=b.device)
        return b, index

    def place(self, distribution: Distribution, num_plates: int, noise: tuple[Tensor, Tensor]) -> Sample:
        """Return b, and b with its bit i flipped; `noise` of the sample is 1 at i and 0 elsewhere, [n, *logits]."""
        b, index = noise
        num = logits_of(distribution).shape[num_plates:].numel()
        chosen = one_hot(index, num).to(b.dtype).reshape(b.shape)
        return Sample(distribution, num_plates, torch.cat([b, b + chosen * (1 - 2 * b)]), chosen)

    def weigh(self, sample: Sample) -> Tensor:
        """Return 1 / n for b and 0 for the others."""
        return weights_of(sample, self.n_samples)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return zeros with the estimate as their gradient, [*plates, m]."""
        p, chosen = probs_of(sample.distribution), sample.noise
        num = p.shape[sample.num_plates :].numel()
        drawn, flipped = cost.detach().chunk(2)
        difference = beside(sample, drawn - flipped)
        sign = 2 * sample.points[: self.n_samples] - 1
        factor = num * p * (1 - p) * chosen * sign
        return gradient_of_logits(sample, (factor.unsqueeze(-1) * difference).mean(0), type(self).__name__)
