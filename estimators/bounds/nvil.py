"""NVIL: a learnt baseline, and a signal centred and scaled by what it was before."""

import torch
from torch import Tensor

from estimators.bounds.base import BoundEstimator, Estimate
from estimators.bounds.baseline import Baseline, regression, signal_less
from estimators.bounds.weights import log_terms, phi_surrogate, theta_surrogate, weigh
from models.particles import Particles

DECAY = 0.8


class Nvil(BoundEstimator):
    """NVIL (Mnih & Gregor 2014, algorithm 1): the learning signal less c(x), less a running mean, over a running scale.

        phi: 1/scale sum_{k,l} (d_{k,l} - c(x) - mean) h_{k,l} with scale = max(1, running standard deviation)
        theta: grad L^a, not scaled

    `mean` and the variance are exponential averages (decay 0.8, free of the bias of their start from zero) of those of
    d - c(x) in the batches before: both are read before they are updated, and updated in training mode alone. c
    descends the squared error of the centred signal, d - mean, as in `reinforce-baseline`. Biased by design: whatever
    the state is, E = 1/scale grad_phi L^a. Proof: the rows of `nvil` in tests/estimators/test_bounds_enumeration.py.
    """

    id = "nvil"
    min_particles = 1

    mean_sum: Tensor
    variance_sum: Tensor
    weight_sum: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self.baseline = Baseline()
        for name in ("mean_sum", "variance_sum", "weight_sum"):
            self.register_buffer(name, torch.zeros(()))

    @property
    def running_mean(self) -> Tensor:
        """The average of the batches' means, a scalar; 0 before the first."""
        return self.mean_sum / self._weight

    @property
    def scale(self) -> Tensor:
        """The larger of 1 and the root of the average of the batches' variances, a scalar."""
        return (self.variance_sum / self._weight).sqrt().clamp(min=1.0)

    @property
    def _weight(self) -> Tensor:
        return self.weight_sum.clamp(min=1 - DECAY)

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound L^a and the surrogates of theta, phi and c."""
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        weights = weigh(terms.log_w, alpha)
        c = self.baseline(particles.x, weights.log_w.dtype)
        mean, scale = self.running_mean.to(c), self.scale.to(c)
        signal = signal_less(c.detach() + mean, weights, terms)
        if self.training:
            self._update(signal + mean)
        theta = theta_surrogate(weights.w_norm, terms.log_w)
        phi = phi_surrogate(signal / scale, terms.log_q)
        return Estimate(weights.bound, theta + phi + regression(c, signal, terms))

    def _update(self, signal: Tensor) -> None:
        values = (signal.mean(), signal.var(correction=0), torch.ones_like(self.weight_sum))
        sums = (self.mean_sum, self.variance_sum, self.weight_sum)
        for running, value in zip(sums, values, strict=True):
            running.mul_(DECAY).add_((1 - DECAY) * value)
