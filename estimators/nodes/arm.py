"""ARM: the score function of a Bernoulli over an antithetic pair of uniforms."""

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from estimators.nodes.base import Method, Sample, gradient_of_logits, logits_of, uniforms


class AntitheticPair(Method):
    """What ARM and DisARM have in common: b = 1[u > 1 - p] and b~ = 1[u < p] from one uniform u, a pair a draw.

    Points [2n, *plates, *rest]: all b, then all b~. Each has the law of the node, so each counts for the value.
    """

    takes = (Bernoulli,)

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:  # noqa: ARG002
        """Return u, [n, *plates, *rest]."""
        return uniforms(distribution, self.n_samples)

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return both of each pair; `noise` of the sample is u."""
        # sigmoid(-l), not 1 - p: both are exact where the other rounds to 1.
        logits = logits_of(distribution).detach()
        points = torch.cat([noise > (-logits).sigmoid(), noise < logits.sigmoid()]).to(logits.dtype)
        return Sample(distribution, num_plates, points, noise)

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return zeros with the estimate as their gradient, [*plates, m]."""
        first, second = cost.detach().chunk(2)
        rest = (1,) * (sample.noise.dim() - 1 - sample.num_plates)
        difference = (first - second).unflatten(-1, (*rest, -1)) if rest else first - second
        factor = self.factor(sample).unsqueeze(-1)
        return gradient_of_logits(sample, (difference * factor).mean(0), type(self).__name__)

    def factor(self, sample: Sample) -> Tensor:
        """Return what multiplies f(b) - f(b~) in the gradient by each logit, [n, *plates, *rest]."""
        raise NotImplementedError


class ARM(AntitheticPair):
    """(f(1[u > 1 - p]) - f(1[u < p])) (u - 1/2), the mean over n uniforms u (Yin & Zhou 2019, "ARM").

    Two costs a sample, whatever the number of variables. Unbiased. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    source = "Yin & Zhou 2019"

    def factor(self, sample: Sample) -> Tensor:
        """Return u - 1/2."""
        return sample.noise - 0.5
