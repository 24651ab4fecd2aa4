"""REINFORCE with the mean of the other particles, for the ELBO."""

from estimators.bounds.base import ElboEstimator, Estimate
from estimators.bounds.weights import log_terms, phi_surrogate, possible, theta_surrogate
from models.particles import Particles


class Rloo(ElboEstimator):
    """RLOO (Kool et al. 2019): K samples of the ELBO, each centred by the mean of the others.

        phi: 1/K sum_k (log w_k - mean_{j != k} log w_j) h_k = 1/(K-1) sum_k (log w_k - mean_j log w_j) h_k
        theta: 1/K sum_k grad log w_k

    The term -beta h_k / K, whose mean is zero, is dropped. Unbiased for the gradient of the ELBO, E[log w]; a number
    added to every log w changes no draw. Particles of weight zero, where the ELBO is -inf, are left out of the
    gradients. Proof: the rows of `rloo` in tests/estimators/test_bounds_enumeration.py.
    """

    id = "rloo"

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:  # noqa: ARG002
        """Return the ELBO of K samples and its surrogate."""
        terms = log_terms(particles, beta, freebits=None, stop_q=True)
        samples = possible(terms.log_w)
        signal = samples.centre(samples.log_w) / (samples.num - 1).clamp(min=1.0)
        theta = theta_surrogate(samples.is_in / samples.num, terms.log_w)
        return Estimate(terms.log_w.detach().mean(-2), theta + phi_surrogate(signal, terms.log_q))
