"""ReinMax: the straight-through estimator of second order."""

from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of, logits_of
from estimators.nodes.gumbel_rao import zero_of


class ReinMax(Method):
    """grad f(b) (2 J((p + b) / 2) - J(p) / 2), J(q) = diag(q) - q q^T (Liu et al. 2023).

    The straight-through gradient grad f(b) J(p) is Euler's rule for the differences f(b) - f(b'); this is Heun's, and
    exact for f of degree two in each variable. Points [n, *plates, *rest, *event]: the hard samples.

    Needs costs that are differentiable in the samples. Biased: the value is exact, the gradient the mean of the above.
    Proof: tests/estimators/nodes/test_enumeration.py.
    """

    declares = "biased"
    source = "Liu et al. 2023"
    takes = (Bernoulli, OneHotCategorical)

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return b, with the gradient of 2 J l - J l / 2."""
        base = base_of(distribution)
        assert isinstance(base, Bernoulli | OneHotCategorical)
        zero, p = zero_of(logits_of(distribution)), base.probs.detach()
        middle = (p + noise) / 2
        if isinstance(base, Bernoulli):
            jacobian = 2 * middle * (1 - middle) - p * (1 - p) / 2
            return Sample(distribution, num_plates, noise + jacobian * zero)
        return Sample(distribution, num_plates, noise + 2 * _product(middle, zero) - _product(p, zero) / 2)


def _product(q: Tensor, x: Tensor) -> Tensor:
    """Return (diag(q) - q q^T) x, [n, *batch, C]."""
    return q * (x - (q * x).sum(-1, keepdim=True))
