"""Reweighted wake-sleep."""

from estimators.bounds.base import BoundEstimator, Estimate, Objective
from estimators.bounds.weights import log_terms, phi_surrogate, theta_surrogate, weigh
from models.particles import Particles


class WakeWake(BoundEstimator):
    """Reweighted wake-sleep with the wake-phase update of q (Bornschein & Bengio 2015; Le et al. 2019).

    theta: grad_theta L^a, unbiased. phi: sum_k v_k h_k, descent on the inclusive divergence KL(p | q): at alpha = 0,
    beta = 1 the self-normalised importance sampling estimate of E_{p(z|x)}[grad_phi log q(z|x)], consistent for it as K
    grows. Heated weights are those of another posterior: at beta = 1 the normalised q^a p(x, z)^{1-a}. Proof: the rows
    of `wake-wake` in tests/estimators/test_bounds_enumeration.py.
    """

    id = "wake-wake"
    min_particles = 1

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The bound for theta, the wake phase for phi."""
        return Objective("bound", self.num_particles), Objective("wake")

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and the surrogates of both updates."""
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        weights = weigh(terms.log_w, alpha)
        surrogate = theta_surrogate(weights.w_norm, terms.log_w) + phi_surrogate(weights.w_norm, terms.log_q)
        return Estimate(weights.bound, surrogate)
