"""The thermodynamic variational objective."""

from dataclasses import dataclass
from math import inf

import torch

from estimators.bounds.base import BoundEstimator, Estimate
from estimators.bounds.weights import FLOOR, log_terms, phi_surrogate, relative, theta_surrogate
from estimators.registry import spell
from models.particles import Particles


@dataclass(eq=False, repr=False)
class Tvo(BoundEstimator):
    """TVO (Masrani et al. 2019, eq. 8 and 11): the left Riemann sum of int_0^1 E_{pi_t}[log w] dt = log p(x).

    pi_t is proportional to q w^t: log pi_t = log q + t log w + const. The N intervals lie between 0 and N log-spaced
    points from 10^-exponent to 1. With v^t the normalised w^t, each term E_{pi_t}[log w] is estimated by sum_k v^t_k
    log w_k, and its gradient by

        sum_k v^t_k grad log w_k + K/(K-1) sum_k v^t_k (log w_k - sum_j v^t_j log w_j) grad log pi_t(z_k)

    for theta and phi alike, with the particles held fixed. Consistent: its bias, that of self-normalised importance
    sampling, vanishes as 1/K; at t = 0, where the weights are uniform, it is unbiased. Particles of weight zero have no
    part in any pi_t, t > 0, and are left out of t = 0 as well. Proof: the rows of `tvo` in
    tests/estimators/test_bounds_enumeration.py.
    """

    takes_alpha = False
    num_intervals: int = 5
    exponent: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_intervals < 2:
            raise ValueError(f"{self.id}: {self.num_intervals} intervals, expected 2 or more")
        if not 0 < self.exponent < inf:
            raise ValueError(f"{self.id}: b = {self.exponent}, expected a positive number: the first point is 10^-b")
        points = torch.logspace(-self.exponent, 0.0, self.num_intervals, dtype=torch.float64)
        self.register_buffer("points", torch.cat([torch.zeros(1), points]), persistent=False)

    @property
    def id(self) -> str:
        """`tvo-part<num_intervals>-beta<exponent>`."""
        return f"tvo-part{self.num_intervals}-beta{spell(self.exponent)}"

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:  # noqa: ARG002
        """Return the Riemann sum and its surrogate; N K numbers are held at once, [intervals, mc, iw, batch]."""
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        shift, log_w = relative(terms.log_w.detach(), alpha=0.0)
        is_alive = log_w > -torch.inf
        log_w = log_w.masked_fill(~is_alive, 0.0)

        points = self.get_buffer("points").to(log_w).view(-1, 1, 1, 1)
        t, width = points[:-1], points.diff(dim=0)
        w = (t * log_w).clamp(min=FLOOR).exp() * is_alive
        v = w / w.sum(-2, keepdim=True).clamp(min=1.0)  # the largest is 1, unless all are zero
        mean = (v * log_w).sum(-2, keepdim=True)
        num_particles = self.num_particles
        covariance = num_particles / (num_particles - 1) * v * (log_w - mean)

        # The surrogate is linear in log w_k and, of log pi_t and of log w, in log q_{k,l}.
        to_log_w = (width * (v + t * covariance)).sum(0)
        to_log_q = (width * covariance).sum(0) - terms.slope * to_log_w
        surrogate = theta_surrogate(to_log_w, terms.log_w) + phi_surrogate(to_log_q, terms.log_q)
        return Estimate((shift + (width * mean).sum(0)).squeeze(-2), surrogate)
