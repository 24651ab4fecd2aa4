"""The gradient of the log-variance loss."""

from estimators.bounds.base import ElboEstimator, Estimate
from estimators.bounds.weights import log_terms, possible, theta_surrogate
from models.particles import Particles


class VarGrad(ElboEstimator):
    """VarGrad (Richter et al. 2020): phi descends half the variance of the log-ratio over K particles held fixed.

        phi: -grad 1/2 1/(K-1) sum_k (f_k - mean_j f_j)^2 with f_k = log q(z_k|x) - log p(x, z_k)
        theta: 1/K sum_k grad log w_k

    The phi gradient is that of `rloo`, draw by draw, hence unbiased for that of the ELBO; with beta other than 1 the
    score would enter f with another weight than log p, and the identity is lost. Particles of weight zero, where the
    ELBO is -inf, are left out of the gradients. Proof: the rows of `vargrad` in
    tests/estimators/test_bounds_enumeration.py.
    """

    id = "vargrad"
    takes_beta = False

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:  # noqa: ARG002
        """Return the ELBO of K samples and its surrogate."""
        terms = log_terms(particles, beta, freebits=None, stop_q=True)
        samples = possible(terms.log_w)
        # f_k up to a constant of all particles, with the gradient of log q alone.
        (log_q,) = terms.log_q
        log_ratio = log_q - log_q.detach() - samples.log_w
        variance = samples.centre(log_ratio).square().sum(-2) / (samples.num.squeeze(-2) - 1).clamp(min=1.0)
        theta = theta_surrogate(samples.is_in / samples.num, terms.log_w)
        return Estimate(terms.log_w.detach().mean(-2), theta - 0.5 * variance)
