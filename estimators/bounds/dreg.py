"""The doubly reparameterised gradient."""

from estimators.bounds.base import BoundEstimator, Estimate
from estimators.bounds.pathwise import stop_q
from estimators.bounds.weights import log_terms, theta_surrogate, weigh
from models.particles import Particles


class DoublyReparameterised(BoundEstimator):
    """DReG (Tucker et al. 2019; for L^a Daudel et al. 2023): the score in the pathwise gradient, reparameterised too.

        phi: sum_k ((1 - b (1 - a)) v_k + b (1 - a) v_k^2) d log w_k/dz dz/dphi, b = beta
        theta: sum_k v_k grad log w_k

    As E[v_k h_k] = E[dv_k/dz_k dz_k/dphi] = (1 - a) E[(v_k - v_k^2) d log w_k/dz dz/dphi], what the pathwise gradient
    has of the score, - b sum_k v_k h_k, turns into a term of the same form. v_k^2 at a = 0, b = 1. Unbiased for
    grad L^a in both; at q(z|x) = p(z|x) every draw of phi's gradient is zero. Freebits are refused: where their
    floor begins, the factor of the score jumps, and what that adds to its mean is in no term of this form. The graph of
    p(x|z) lives until the model's output is let go, beyond backward().

    Needs z with a gradient in every layer and what `densities_with_stopped_q` asks of a model. Proof: closed forms and
    quadrature on the conjugate Gaussian model and a hierarchy of two: tests/estimators/bounds/test_pathwise.py and
    test_stopped_q.py.
    """

    id = "dreg"
    min_particles = 1
    takes_freebits = False
    reparameterises = True

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and its surrogate, in which the gradient by z_k has a factor of its own."""
        weights = weigh(log_terms(particles, beta, freebits=None, stop_q=False).log_w, alpha)
        share = beta * (1 - alpha)
        stopped = stop_q(self.id, particles, scale=(1 - share) + share * weights.w_norm)
        log_w = log_terms(stopped, beta, freebits=None, stop_q=False).log_w
        return Estimate(weights.bound, theta_surrogate(weights.w_norm, log_w))
