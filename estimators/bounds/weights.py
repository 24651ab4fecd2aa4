"""The mathematics of importance-weighted bounds, as functions of log-weights.

Shapes: K particles lie on the axis -2 and the batch on the axis -1: [mc, iw, batch]; reductions over particles keep
their axis. What belongs to a layer of z has the layers in front: [layers, mc, iw, batch].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce, wraps
from math import log
from operator import add
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from models.particles import Particles

# Beside exp(0) = 1, exp() of less adds nothing; divided by K, it would leave what float32 computes with at full speed.
FLOOR = -70.0

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_computed: ContextVar[dict[tuple, tuple[Any, Any]] | None] = ContextVar("computed", default=None)
_sees_values: ContextVar[bool] = ContextVar("sees_values", default=False)


@contextmanager
def computed_once(sees_values: bool = False) -> Iterator[None]:
    """Let estimators of the same particles share what they compute alike: each call of a `shared` function
    returns inside what it has returned for the very same arguments.

    sees_values: whether values may be looked at to leave out what they do not need, which neither torch.func.vmap nor a
    GPU's queue takes well.
    """
    tokens = _computed.set({}), _sees_values.set(sees_values)
    try:
        yield
    finally:
        _computed.reset(tokens[0])
        _sees_values.reset(tokens[1])


def _identity(argument: Any) -> Any:
    return argument if isinstance(argument, int | float | str | None) else id(argument)


def shared(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Let calls of a function be shared where `computed_once` says so."""

    @wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        computed = _computed.get()
        if computed is None:
            return function(*args, **kwargs)
        key = (function, *map(_identity, args), *kwargs, *map(_identity, kwargs.values()))
        if key not in computed:
            # The arguments are kept with the result: the id of one that is gone could come back as another's.
            computed[key] = function(*args, **kwargs), (args, kwargs)
        return computed[key][0]

    return call


class Terms(NamedTuple):
    """What the bounds need of particles.

    log_w: log w_k = log p(x|z_k) - beta sum_l max(log q_l - log p_l, freebits), [mc, iw, batch].
    log_q: log q(z_k|x), [layers, mc, iw, batch]; without freebits the layers are summed into one.
    slope: beta m_{k,l} = -d log w_k / d log q_l; as log_q under freebits, otherwise a number.
    """

    log_w: Tensor
    log_q: Tensor
    slope: Tensor | float

    def split(self, at: int) -> tuple["Terms", "Terms"]:
        """Return the terms of the first `at` particles and of the others."""
        log_w, log_q = self.log_w.tensor_split([at], -2), self.log_q.tensor_split([at], -2)
        slope = (self.slope, self.slope) if isinstance(self.slope, float) else self.slope.tensor_split([at], -2)
        return Terms(log_w[0], log_q[0], slope[0]), Terms(log_w[1], log_q[1], slope[1])


class Weights(NamedTuple):
    """The Rényi bound of particles and their normalised weights: numbers without gradient.

    Everything is heated to the power 1 - alpha, and in units of the largest weight exp(shift): near the optimum the
    differences that estimators live on are far below the rounding of log w itself.

    alpha: the order of the bound.
    shift: max_k log w_k, [mc, 1, batch].
    log_w: (1 - alpha)(log w_k - shift), at most 0, [mc, iw, batch].
    w: exp(log_w), with exponents below FLOOR raised to it, [mc, iw, batch].
    total: sum_k w_k, [mc, 1, batch].
    w_norm: v_k = w_k / total, [mc, iw, batch].
    relative_bound: L^a - shift, [mc, 1, batch].
    bound: L^a = (logsumexp_k (1 - a) log w_k - log K) / (1 - a), [mc, batch].
    have_others: whether each particle is known to have others, and all weights to be above zero.
    """

    alpha: float
    shift: Tensor
    log_w: Tensor
    w: Tensor
    total: Tensor
    w_norm: Tensor
    relative_bound: Tensor
    bound: Tensor
    have_others: bool

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_w.shape[-2]

    def unheated(self, values: Tensor) -> Tensor:
        """Return values / (1 - alpha)."""
        return values / (1 - self.alpha) if self.alpha else values


@shared
def log_terms(particles: Particles, beta: float, freebits: float | None, stop_q: bool) -> Terms:
    """Return the terms of particles; with `stop_q`, log w is constant in log q (its gradient is that of log p)."""
    if freebits is None:
        log_p, log_q = reduce(add, particles.log_pz).unsqueeze(0), reduce(add, particles.log_qz).unsqueeze(0)
    else:
        log_p, log_q = torch.stack(particles.log_pz), torch.stack(particles.log_qz)
    log_ratio = (log_q.detach() if stop_q else log_q) - log_p
    if freebits is None:
        return Terms(less_ratio(particles.log_px, log_ratio[0], beta), log_q, beta)
    log_w = less_ratio(particles.log_px, log_ratio.clamp(min=freebits).sum(0), beta)
    return Terms(log_w, log_q, beta * (log_ratio.detach() >= freebits).to(log_w.dtype))


def less_ratio(log_px: Tensor, log_ratio: Tensor, beta: float) -> Tensor:
    """Return log_px - beta log_ratio, all of one shape; with beta = 0 a ratio that is infinite counts for nothing."""
    if beta == 0:  # 0 inf would be nan
        log_ratio = log_ratio.clamp(max=torch.finfo(log_ratio.dtype).max)
    return torch.sub(log_px, log_ratio, alpha=beta)


def relative(log_w: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the largest log w, [mc, 1, batch], and (1 - alpha)(log w - largest); -inf only where log w is."""
    largest = log_w.detach().amax(-2, keepdim=True)
    # Where every weight is zero, -inf - -inf would be nan.
    difference = log_w - largest.clamp(min=torch.finfo(log_w.dtype).min)
    return largest, difference if alpha == 0 else (1 - alpha) * difference


@shared
def weigh(log_w: Tensor, alpha: float) -> Weights:
    """Return the weights of particles: one exp of K numbers, from which bound and control variates follow."""
    shift, log_w = relative(log_w.detach(), alpha)
    w = log_w.clamp(min=FLOOR).exp()
    total = w.sum(-2, keepdim=True)
    relative_bound = (total.log() - log(w.shape[-2])) / (1 - alpha)
    bound = (shift + relative_bound).squeeze(-2)
    have_others = _sees_values.get() and w.shape[-2] > 1 and bool(log_w.amin() > -torch.inf)
    return Weights(alpha, shift, log_w, w, total, w / total, relative_bound, bound, have_others)


@shared
def leave_one_out(weights: Weights) -> Tensor:
    """Return log sum_{j != k} w_j for every k, [mc, iw, batch], in linear time and memory; -inf where nothing is left.

    At most one particle holds more than half of the total. For any other, total - w_k cancels nothing; for that one the
    others are summed anew, relative to their own maximum: exact to rounding at any gap.
    """
    dominant = weights.w_norm > 0.5
    largest, others = relative(torch.where(dominant, -torch.inf, weights.log_w), alpha=0.0)
    others = largest + others.clamp(min=FLOOR).exp().sum(-2, keepdim=True).log()
    rest = (weights.total - weights.w).clamp(min=0.5).log()
    return torch.where(dominant, others, rest)


def learning_signal(weights: Weights, slope: Tensor | float, control_variate: Tensor) -> Tensor:
    """Return d_{k,l} - c_k = L^a - beta m_{k,l} v_k - c_k for a control variate in units of the shift: c_k - shift.

    Where the control variate is -inf (the weights that it is made of are zero), c_k = 0. As that happens by the other
    particles alone, the mean of the estimate stays the same. Where all weights are zero, there is no bound to raise and
    the signal is 0.
    """
    signal = _relative_signal(weights, slope)
    if weights.have_others:
        return signal - control_variate
    uncentred, least = _uncentred(weights, signal)
    return torch.where(control_variate > least, signal - control_variate, uncentred)


@shared
def _relative_signal(weights: Weights, slope: Tensor | float) -> Tensor:
    """Return L^a - shift - beta m_{k,l} v_k."""
    return weights.relative_bound - slope * weights.w_norm


@shared
def _uncentred(weights: Weights, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the learning signal for c_k = 0, and what every c_k - shift that counts is above."""
    is_nothing = weights.shift == -torch.inf
    return torch.where(is_nothing, 0.0, signal + weights.shift), torch.where(is_nothing, torch.inf, -torch.inf)


@shared
def theta_surrogate(coefficients: Tensor, log_w: Tensor) -> Tensor:
    """Return sum_k coefficient_k log w_k, [mc, batch], finite where some log w_k is -inf."""
    return (coefficients * log_w.clamp(min=torch.finfo(log_w.dtype).min)).sum(-2)


@shared
def theta_slope(coefficients: Tensor, log_w: Tensor) -> Tensor:
    """Return the derivatives of `theta_surrogate` of the first particles by the log w of all, [mc, iw, batch]."""
    is_zero = first(log_w, coefficients.shape[-2]) == -torch.inf
    return extended(torch.where(is_zero, 0.0, coefficients), log_w)


@shared
def theta_slopes(by_log_w: Tensor, terms: Terms, num_layers: int) -> list[Tensor]:
    """Return derivatives by log w as those by log p(z), layer by layer."""
    if isinstance(terms.slope, float):
        return [by_log_w if terms.slope == 1 else terms.slope * by_log_w] * num_layers
    return [slope * by_log_w for slope in terms.slope.unbind()]


def first(values: Tensor, num: int) -> Tensor:
    """Return those of the first particles, [..., num, batch]."""
    return values if num == values.shape[-2] else values[..., :num, :]


def extended(values: Tensor, like: Tensor) -> Tensor:
    """Return values [..., iw, batch] with zeros for further particles, as many as `like` [mc, num, batch] has."""
    if values.shape[-2] == like.shape[-2]:
        return values
    whole = torch.zeros_like(like.expand(*values.shape[:-2], *like.shape[-2:]))
    whole[..., : values.shape[-2], :] = values
    return whole


def phi_surrogate(coefficients: Tensor, log_q: Tensor) -> Tensor:
    """Return sum_{k,l} coefficient_{k,l} log q_{k,l}, [mc, batch]; the coefficients may be one for all layers."""
    return (coefficients * log_q).sum((0, -2))


class Possible(NamedTuple):
    """Particles of the ELBO, each a sample of its own; those of weight zero, where it is -inf, are left out.

    log_w: log w_k - max_j log w_j, 0 for those left out, [mc, iw, batch].
    is_in: 1, or 0 for those left out, [mc, iw, batch].
    num: how many are in, at least 1, [mc, 1, batch].
    """

    log_w: Tensor
    is_in: Tensor
    num: Tensor

    def centre(self, values: Tensor) -> Tensor:
        """Return values [mc, iw, batch] minus their mean, 0 for those left out."""
        mean = (values * self.is_in).sum(-2, keepdim=True) / self.num
        return (values - mean) * self.is_in


def possible(log_w: Tensor) -> Possible:
    """Return the particles whose weight is not zero, as numbers without gradient."""
    _, log_w = relative(log_w.detach(), alpha=0.0)
    is_zero = log_w == -torch.inf
    is_in = (~is_zero).to(log_w.dtype)
    return Possible(log_w.masked_fill(is_zero, 0.0), is_in, is_in.sum(-2, keepdim=True).clamp(min=1.0))
