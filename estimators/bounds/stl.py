"""The pathwise gradient without the score: sticking the landing."""

from estimators.bounds.base import BoundEstimator, Estimate
from estimators.bounds.pathwise import stop_q
from estimators.bounds.weights import log_terms, theta_surrogate, weigh
from models.particles import Particles


class StickingTheLanding(BoundEstimator):
    """STL (Roeder et al. 2017): pathwise IWAE with q's own parameters stopped in log q, sum_k v_k d log w_k/dz dz/dphi.

    What is left out is the score, - beta sum_k v_k h_k, whose mean is zero for K = 1 alone: the expectation is
    grad L^a + beta E[sum_k v_k h_k], under freebits with m_{k,l} beside the score of layer l. theta: grad L^a,
    unbiased. At q(z|x) = p(z|x) every draw of phi's gradient is zero.

    Needs z with a gradient in every layer and what `densities_with_stopped_q` asks of a model. Proof: closed forms and
    quadrature on the conjugate Gaussian model and a hierarchy of two: tests/estimators/bounds/test_pathwise.py and
    test_stopped_q.py.
    """

    id = "stl"
    min_particles = 1
    reparameterises = True

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and its surrogate."""
        stopped = stop_q(self.id, particles)
        terms = log_terms(stopped, beta, self.freebits, stop_q=False)
        weights = weigh(terms.log_w, alpha)
        return Estimate(weights.bound, theta_surrogate(weights.w_norm, terms.log_w))
