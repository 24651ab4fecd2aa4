"""The reparameterised gradient of importance-weighted bounds."""

from estimators.bounds.base import BoundEstimator, Estimate
from estimators.bounds.weights import log_terms, theta_surrogate, weigh
from models.particles import Particles


class PathwiseIwae(BoundEstimator):
    """IWAE (Burda et al. 2016): sum_k v_k grad log w_k through z_k = g(eps_k, phi), for L^a of mc x iw particles.

    Unbiased for grad L^a_{mc iw}. Needs z with a gradient in every layer. Proof: against the conjugate Gaussian model,
    in closed form: tests/estimators/bounds/test_pathwise.py.
    """

    id = "pathwise-iwae"
    min_particles = 1
    reparameterises = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_mc, self.num_particles = 1, self.mc * self.iw

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and its surrogate."""
        terms = log_terms(particles, beta, self.freebits, stop_q=False)
        weights = weigh(terms.log_w, alpha)
        return Estimate(weights.bound, theta_surrogate(weights.w_norm, terms.log_w))
