"""The straight-through estimator."""

from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from estimators.nodes.base import Method, Sample, base_of


class StraightThrough(Method):
    """grad f(b) dp/dl: the hard sample b, derived as if it were its probabilities p (Bengio et al. 2013).

    Points [n, *plates, *rest, *event]. Biased: the value is exact, the gradient E[grad f(b)] dp/dl, which is right for
    linear f alone. Proof: tests/estimators/nodes/test_enumeration.py.
    """

    declares = "biased"
    source = "Bengio et al. 2013"
    takes = (Bernoulli, OneHotCategorical)

    def place(self, distribution: Distribution, num_plates: int, noise: Tensor) -> Sample:
        """Return the hard samples with the gradient of the probabilities."""
        base = base_of(distribution)
        assert isinstance(base, Bernoulli | OneHotCategorical)
        return Sample(distribution, num_plates, noise + (base.probs - base.probs.detach()))
