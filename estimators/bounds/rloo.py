"""REINFORCE with the mean of the other particles, for the ELBO."""

from estimators.bounds.base import Coefficients, ElboEstimator, LinearEstimator
from estimators.bounds.weights import Terms, possible


class Rloo(ElboEstimator, LinearEstimator):
    """RLOO (Kool et al. 2019): K samples of the ELBO, each centred by the mean of the others.

        phi: 1/K sum_k (log w_k - mean_{j != k} log w_j) h_k = 1/(K-1) sum_k (log w_k - mean_j log w_j) h_k
        theta: 1/K sum_k grad log w_k

    The term -beta h_k / K, whose mean is zero, is dropped. Unbiased for the gradient of the ELBO, E[log w]; a number
    added to every log w changes no draw. Particles of weight zero, where the ELBO is -inf, are left out of the
    gradients. Proof: the rows of `rloo` in tests/estimators/test_bounds_enumeration.py.
    """

    copies_are_independent = True
    id = "rloo"

    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:  # noqa: ARG002
        """Return the ELBO of K samples, 1/K and the centred signal."""
        samples = possible(terms.log_w)
        signal = samples.centre(samples.log_w) / (samples.num - 1).clamp(min=1.0)
        return Coefficients(terms.log_w.detach().mean(-2), samples.is_in / samples.num, signal)
