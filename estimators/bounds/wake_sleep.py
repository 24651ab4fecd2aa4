"""Reweighted wake-sleep with the sleep phase."""

from estimators.bounds.base import BoundEstimator, Estimate, Objective
from estimators.bounds.weights import log_terms, theta_surrogate, weigh
from models.dreams import log_q_of_dreams
from models.particles import Particles


class WakeSleep(BoundEstimator):
    """Wake-sleep (Hinton et al. 1995), the wake phase with K particles (Bornschein & Bengio 2015; Le et al. 2019).

    theta: grad_theta L^a on the data, unbiased. phi: the mean of grad_phi log q(z|x) over dreams (z, x) from the
    model's own joint, one for each copy and observation (mc x batch a call): unbiased for E_{p(z, x)}[grad_phi
    log q(z|x)], descent on the divergence KL(p(z|x) | q(z|x)) of dreamt x. alpha, beta and freebits change the bound of
    theta alone.

    Needs sample_from_prior(bs), and log_prob(x, z) where z has several layers. Proof:
    tests/estimators/bounds/test_wake_sleep.py.
    """

    id = "wake-sleep"
    min_particles = 1

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The bound for theta, the sleep phase for phi."""
        return Objective("bound", self.num_particles), Objective("sleep")

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and the surrogates of both updates."""
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        weights = weigh(terms.log_w, alpha)
        num_mc, _, batch = particles.log_px.shape
        try:
            log_q = log_q_of_dreams(particles.model, num_mc * batch, particles.x)
        except ValueError as error:
            raise ValueError(f"{self.id}: {error}") from error
        surrogate = theta_surrogate(weights.w_norm, terms.log_w) + log_q.view(num_mc, batch)
        return Estimate(weights.bound, surrogate)
