"""The reparameterised gradients of the evidence lower bound and of importance-weighted bounds."""

from torch import Tensor

from estimators.bounds.base import BoundEstimator, Estimate, Objective
from estimators.bounds.weights import log_terms, possible, theta_surrogate, weigh
from models.particles import Particles, densities_with_stopped_q


class Pathwise(BoundEstimator):
    """Gradients through z_k = g(eps_k, phi) alone; the mc copies of K particles become particles of one estimate."""

    min_particles = 1
    reparameterises = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_mc, self.num_particles = 1, self.mc * self.iw


class PathwiseIwae(Pathwise):
    """IWAE (Burda et al. 2016): sum_k v_k grad log w_k through z_k = g(eps_k, phi), for L^a of mc x iw particles.

    Unbiased for grad L^a_{mc iw}. Needs z with a gradient in every layer. Proof: against the conjugate Gaussian model,
    in closed form: tests/estimators/bounds/test_pathwise.py.
    """

    id = "pathwise-iwae"

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and its surrogate."""
        terms = log_terms(particles, beta, self.freebits, stop_q=False)
        weights = weigh(terms.log_w, alpha)
        return Estimate(weights.bound, theta_surrogate(weights.w_norm, terms.log_w))


class PathwiseVae(Pathwise):
    """The reparameterised ELBO (Kingma & Welling 2014): the mean of grad log w_k over mc x iw samples of z.

    log w carries beta and freebits; the mean of it has no Rényi form. Unbiased for the gradient of the ELBO, E[log w].
    Samples of weight zero, where the ELBO is -inf, are left out of the gradient. Needs z with a gradient in every
    layer. Proof: as for `pathwise-iwae`.
    """

    id = "pathwise-vae"
    takes_alpha = False

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The ELBO for both."""
        return Objective("bound", 1), Objective("bound", 1)

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:  # noqa: ARG002
        """Return the mean of log w and its surrogate."""
        log_w = log_terms(particles, beta, self.freebits, stop_q=False).log_w
        samples = possible(log_w)
        return Estimate(log_w.detach().mean(-2), theta_surrogate(samples.is_in / samples.num, log_w))


def stop_q(id: str, particles: Particles, scale: Tensor | None = None) -> Particles:
    """Return `densities_with_stopped_q(particles, scale)`; what it refuses is refused in the name of the estimator."""
    try:
        return densities_with_stopped_q(particles, scale)
    except ValueError as error:
        raise ValueError(f"{id}: {error}") from error
