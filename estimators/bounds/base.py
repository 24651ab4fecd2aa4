"""The base classes of the estimators of multi-sample bounds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import vjp

from estimators.bounds.diagnostics import Diagnostics
from estimators.bounds.weights import (
    Terms,
    Weights,
    extended,
    first,
    learning_signal,
    log_terms,
    phi_surrogate,
    theta_slope,
    theta_slopes,
    theta_surrogate,
    weigh,
)
from models.particles import Particles, densities_of, draw_particles, with_densities


class Objective(NamedTuple):
    """What the gradient of an estimate is compared with.

    kind: "bound", E[L^a] of `num_particles` particles (the ELBO for one); "wake", E_{p(z|x)}[log q(z|x)]; "sleep",
    E_{p(z, x)}[log q(z|x)]; "thermodynamic", the estimator's Riemann sum under the exact pi_t.
    """

    kind: Literal["bound", "wake", "sleep", "thermodynamic"]
    num_particles: int = 1


class Estimate(NamedTuple):
    """A bound, and a surrogate whose gradient estimates the gradient of its expectation: each [mc, batch]."""

    bound: Tensor
    surrogate: Tensor


@dataclass(eq=False, repr=False)
class BoundEstimator(nn.Module, ABC):
    """An estimator of the gradient of a bound on log p(x), for the parameters of p (theta) and of q (phi).

    A subclass gives `id` and `estimate` (a `LinearEstimator` its `coefficients`, a `ScoreFunction` its control variate
    alone), adds the parameters of its id to the fields, and says what it needs: the fewest particles, whether it has a
    form for alpha, beta and freebits, whether z must carry a gradient. The constructor's arguments are those of
    `estimators.get_estimator`; it raises ValueError, naming the id, what came and what would be right.

    num_mc: copies of the estimate, averaged.
    num_particles: K, the particles of the bound.
    num_extra: particles drawn beside them for each copy.
    """

    mc: int = 1
    iw: int = 16
    alpha: float = 0.0
    beta: float = 1.0
    freebits: float | None = None

    min_particles: ClassVar[int] = 2
    takes_alpha: ClassVar[bool] = True
    takes_beta: ClassVar[bool] = True
    takes_freebits: ClassVar[bool] = True
    reparameterises: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__init__()
        for name, value, least in (("mc", self.mc, 1), ("iw", self.iw, self.min_particles)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                what = {"mc": "copies of the estimate", "iw": "particles"}[name]
                raise ValueError(f"{self.id}: {name} = {value!r}, expected {least} or more {what}")
        if self.freebits is not None and not isfinite(self.freebits):
            raise ValueError(f"{self.id}: freebits = {self.freebits}, expected a finite number of nats or None")
        if self.freebits is not None and not self.takes_freebits:
            raise ValueError(f"{self.id}: freebits = {self.freebits}, expected None: it has no form for them")
        self.alpha = self._valid_alpha(self.alpha)
        self.beta = self._valid_beta(self.beta)
        self.num_mc, self.num_particles, self.num_extra = self.mc, self.iw, 0

    @property
    @abstractmethod
    def id(self) -> str:
        """The canonical id."""

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """What theta and phi descend: the bound of K particles, unless a subclass says otherwise."""
        bound = Objective("bound", self.num_particles)
        return bound, bound

    def forward(
        self, model: nn.Module, x: Tensor, alpha: float | None = None, beta: float | None = None
    ) -> tuple[Tensor, Diagnostics, Mapping[str, Any]]:
        """Draw particles for x [batch, ...] and estimate the gradient of the bound.

        `alpha` and `beta` replace the constructed ones for this call.

        Returns the loss, a scalar whose value is -bound (mean over mc and the batch) and whose gradient is the
        estimate; the diagnostics; the output of the model. Raises ValueError as the constructor does, and where a z
        that must carry a gradient has none.
        """
        alpha = self.alpha if alpha is None else self._valid_alpha(alpha)
        beta = self.beta if beta is None else self._valid_beta(beta)
        particles = self.draw(model, x, self.num_extra)
        return self.loss(particles, alpha, beta), Diagnostics(particles, self.num_particles), particles.output

    def draw(self, model: nn.Module, x: Tensor, num_extra: int) -> Particles:
        """Draw [num_mc, num_particles + num_extra, batch] particles for x [batch, ...], as `forward` does.

        Raises ValueError where a z that must carry a gradient has none, or one that must not carries one.
        """
        num_drawn, name = self.num_particles + num_extra, type(model).__name__
        needs = f"{self.id}: needs z to carry the gradient of q's parameters, and that of {name} has none"
        try:
            particles = draw_particles(model, x, self.num_mc, num_drawn, reparam=self.reparameterises)
        except NotImplementedError as error:
            if not self.reparameterises:
                raise
            raise ValueError(f"{needs}: its distribution has no rsample()") from error
        except ValueError as error:
            raise ValueError(f"{self.id}: {error}") from error
        # Where log q has no gradient either, none is asked for: no_grad, or the gradient of p's parameters alone.
        if not any(log_q.requires_grad for log_q in particles.log_qz):
            return particles
        if self.reparameterises and not all(particles.with_gradient):
            if particles.is_discrete:
                raise ValueError(f"{needs}: it is discrete; score function estimators take it")
            raise ValueError(f"{needs}; use rsample() when forward is given reparam=True")
        if not self.reparameterises and any(particles.with_gradient):
            raise ValueError(
                f"{self.id}: needs z without a gradient, and that of {name} carries one, which would be added to the "
                "score's; use sample() unless forward is given reparam=True"
            )
        return particles

    def loss(self, particles: Particles, alpha: float, beta: float) -> Tensor:
        """Return the loss of particles [num_mc, num_particles + num_extra, batch], as `forward` does: a scalar."""
        bound, surrogate = self.estimate(particles, alpha, beta)
        return (surrogate.detach() - surrogate - bound).mean()

    def slopes(self, particles: Particles, alpha: float, beta: float) -> list[Tensor]:
        """Return the derivatives of -(mc x batch) loss by the log-densities, as `densities_of` lists them."""

        def loss(densities: list[Tensor]) -> Tensor:
            return self.loss(with_densities(particles, densities), alpha, beta)

        num_mc, _, batch = particles.log_px.shape
        densities = densities_of(particles)
        if any(is_functorch_wrapped_tensor(density) for density in densities):
            value, pull_back = vjp(loss, densities)[:2]
            return list(pull_back(value.new_tensor(-num_mc * batch))[0])
        with torch.enable_grad():  # torch.func refuses autograd.Functions of an older style, and numpy
            leaves = [density.detach().requires_grad_() for density in densities]
            value = -num_mc * batch * loss(leaves)
        if not value.requires_grad:
            return [torch.zeros_like(density) for density in densities]
        return list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))

    @abstractmethod
    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound and the surrogate of particles [num_mc, num_particles + num_extra, batch]."""

    def extra_repr(self) -> str:
        """Return what `repr` shows of the estimator."""
        options = ("mc", "iw", "alpha", "beta", "freebits")
        return ", ".join([self.id, *(f"{name}={getattr(self, name)}" for name in options)])

    def _valid_alpha(self, alpha: float) -> float:
        if not 0 <= alpha < 1:
            raise ValueError(f"{self.id}: alpha = {alpha}, expected a number in [0, 1)")
        if alpha and not self.takes_alpha:
            raise ValueError(f"{self.id}: alpha = {alpha}, expected 0: its bound has no Rényi form")
        return float(alpha)

    def _valid_beta(self, beta: float) -> float:
        if not 0 <= beta < inf:
            raise ValueError(f"{self.id}: beta = {beta}, expected a number that is not negative")
        if beta != 1 and not self.takes_beta:
            raise ValueError(f"{self.id}: beta = {beta}, expected 1: it has no form for another")
        return float(beta)


class Coefficients(NamedTuple):
    """An estimate that is linear in the gradients of log-densities, the particles being held fixed; no gradient itself.

    bound: [mc, batch].
    to_log_w: what the gradients of log w_k are multiplied with for theta, [mc, iw, batch].
    to_log_q: what those of log q_{k,l} are for phi, [mc, iw, batch], with layers in front under freebits.

    Both may be of the first particles alone, each of its own number: the others have no part in it.
    """

    bound: Tensor
    to_log_w: Tensor
    to_log_q: Tensor


class LinearEstimator(BoundEstimator):
    """sum_k a_k grad_theta log w_k + sum_{k,l} b_{k,l} grad_phi log q_{k,l}, with coefficients without gradient.

    copies_are_independent: whether a and b of each of the mc copies follow from its own log-densities alone, and where
    weights are zero from what `learning_signal` makes of a control variate of -inf there. Each class says so for
    itself; where all do, estimators on common particles are measured faster.
    """

    copies_are_independent: ClassVar[bool] = False

    @abstractmethod
    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:
        """Return the bound, a and b."""

    def estimate(self, particles: Particles, alpha: float, beta: float) -> Estimate:
        """Return the bound and its surrogate, linear in log w_k (for theta) and log q_{k,l} (for phi)."""
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        bound, to_log_w, to_log_q = self.coefficients(terms, alpha, beta)
        theta = theta_surrogate(to_log_w, first(terms.log_w, to_log_w.shape[-2]))
        return Estimate(bound, theta + phi_surrogate(to_log_q, first(terms.log_q, to_log_q.shape[-2])))

    def slopes(self, particles: Particles, alpha: float, beta: float) -> list[Tensor]:
        """Return the derivatives of -(mc x batch) loss, which are the coefficients."""
        if type(self).estimate is not LinearEstimator.estimate or type(self).loss is not BoundEstimator.loss:
            return super().slopes(particles, alpha, beta)
        terms = log_terms(particles, beta, self.freebits, stop_q=True)
        _, to_log_w, to_log_q = self.coefficients(terms, alpha, beta)
        by_log_w = theta_slope(to_log_w, terms.log_w)
        by_log_pz = theta_slopes(by_log_w, terms, len(particles.log_pz))
        by_log_q = extended(to_log_q, terms.log_w)
        by_layer = by_log_q.expand(len(particles.log_qz), *terms.log_w.shape)
        return [by_log_w, *by_log_pz, *by_layer]


class ScoreFunction(LinearEstimator):
    """grad_theta L^a + sum_{k,l} (d_{k,l} - c_k) h_{k,l}: the score function estimator with a control variate c_k.

    d_{k,l} = L^a - beta m_{k,l} v_k is the learning signal of particle k and layer l, h_{k,l} its score. With c_k
    independent of z_k given the other particles, E[c_k h_k] = 0: unbiased.
    """

    def coefficients(self, terms: Terms, alpha: float, beta: float) -> Coefficients:
        """Return the bound L^a, v_k and d_{k,l} - c_k."""
        weights = weigh(terms.log_w, alpha)
        signal = learning_signal(weights, terms.slope, self.control_variate(weights, beta))
        return Coefficients(weights.bound, weights.w_norm, signal)

    @abstractmethod
    def control_variate(self, weights: Weights, beta: float) -> Tensor:
        """Return c_k - weights.shift, [mc, iw, batch] (or what broadcasts to it)."""


class ElboEstimator(BoundEstimator):
    """An estimator of the gradient of the ELBO, E[log w], whose K particles are K samples of it."""

    takes_alpha = False
    takes_freebits = False

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        """The ELBO for both."""
        return Objective("bound", 1), Objective("bound", 1)
