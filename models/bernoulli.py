"""Bernoulli variables by their logits: log-probabilities summed over the last dimension, and draws.

    log p(v) = sum_d v_d l_d - softplus(l_d),    d log p(v) / d l = v - sigmoid(l)

The backward passes keep v - sigmoid(l) and nothing else of that size. They know first derivatives only: a gradient is
a constant to whatever differentiates it again (but for logits that several values share, which are torch's own
operations). Everything runs under torch.func.vmap and torch.func.grad. Proof: tests/models/test_bernoulli.py.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vmap
from torch.nn import functional as F

from models.functions import known_signature
from models.pieces import cut, is_cut

# Of numbers of at least 1/2: their product is no less than 2^-100, and float32 reaches down to 2^-126.
_MOST_FACTORS = 100


def bernoulli_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    """Return sum_d log p(value_d) for logits and values [..., D] that broadcast against each other: [...].

    The value may be any number, as in the cross-entropy of grey pixels, and may carry a gradient.
    """
    if logits.numel() < value.numel() and _common_shape(logits.shape, value.shape) == value.shape:
        # Several values to each of the logits, whose logarithms are taken once. With v - 1 where l > 0, both terms are
        # at most 0 for bits, and nothing cancels.
        logits = _in_common_dtype(logits, value)
        is_positive = logits > 0
        linear = (value - is_positive.to(logits.dtype)) * logits
        return linear.sum(-1) + F.logsigmoid(torch.where(is_positive, logits, -logits)).sum(-1)
    return _LogProb.apply(logits, value)[0]


def linear_bernoulli_log_prob(h: Tensor, weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    """Return the same for logits = h weight^T + bias: [...], in one step, whose logits are not kept.

    h: [..., H]; weight: [D, H]; bias: [D]; value: [..., D], broadcast against the leading dimensions of h. The gradient
    of h is computed where h needs one.
    """
    rows = h.shape[:-1]
    if _common_shape(rows, value.shape[:-1]) != rows:  # one of h serves several values: its logits are computed once
        return bernoulli_log_prob(F.linear(h, weight, bias), value)
    if value.requires_grad or not (h.requires_grad and (weight.requires_grad or bias.requires_grad)):
        return _LinearLogProb.apply(h, weight, bias, value)[0]
    # Two nodes, so that whoever asks for the gradient of h alone does not have the weight's computed, and vice versa.
    log_prob, residual = _LinearLogProb.apply(h, weight.detach(), bias.detach(), value)
    return log_prob + _LinearTerm.apply(h.detach(), weight, bias, residual)


def linear_bernoulli_draw(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Draw z [..., D] with logits h weight^T + bias; return it, without a gradient, and its log-probability [...]."""
    uniform = torch.rand(*h.shape[:-1], len(weight), dtype=h.dtype, device=h.device)
    z, log_prob, _ = _LinearDraw.apply(h, weight, bias, uniform)
    return z, log_prob


def bernoulli_draw(logits: Tensor, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Draw z [*sample_shape, ..., D] with logits [..., D], without a gradient; return it and its log-probability."""
    z = draw_bernoulli(logits.sigmoid(), sample_shape)
    return z, bernoulli_log_prob(logits, z)


def draw_bernoulli(probs: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Draw 0 or 1 with probabilities [...], in their dtype, without a gradient: [*sample_shape, ...].

    As u < p for a uniform u in [0, 1): 0 is never 1 and 1 is never 0.
    """
    uniform = torch.rand(*sample_shape, *probs.shape, dtype=probs.dtype, device=probs.device)
    # u < p without a bool, whose conversion takes three times as long: p - u > 0 rounds up to 1, the rest to -0.
    return (probs.detach() - uniform).ceil_().abs_()


@known_signature
class _LogProb(Function):
    """(logits, value) -> sum_d log p(value_d), value - sigmoid(logits)."""

    @staticmethod
    def forward(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        logits = _in_common_dtype(logits, value)
        residual = logits.new_empty(_common_shape(logits.shape, value.shape))
        return _sum_log_prob(logits, value, residual), residual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        logits, value = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], logits if ctx.needs_input_grad[1] else None)
        ctx.shapes = logits.shape, value.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        residual, logits = ctx.saved_tensors
        by_logits = _sum_to(gradient.unsqueeze(-1) * residual, ctx.shapes[0]) if ctx.needs_input_grad[0] else None
        by_value = _sum_to(gradient.unsqueeze(-1) * logits, ctx.shapes[1]) if ctx.needs_input_grad[1] else None
        return by_logits, by_value

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _LogProb.apply(*_batch_first(in_dims, *inputs)), (0, 0)


@known_signature
class _Draw(Function):
    """(logits, uniform) -> z, 1 where uniform < sigmoid(logits), sum_d log p(z_d), z - sigmoid(logits)."""

    @staticmethod
    def forward(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, residual = torch.empty_like(uniform), torch.empty_like(uniform)
        return z, _sum_log_prob(logits, z, residual, uniform), residual

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        z, _, residual = output
        ctx.mark_non_differentiable(z, residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual)
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, _: None, gradient: Tensor, __: None) -> tuple[Tensor | None, ...]:
        (residual,) = ctx.saved_tensors
        return _sum_to(gradient.unsqueeze(-1) * residual, ctx.shape), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        logits, uniform = _batch_first(in_dims, *inputs)
        return _Draw.apply(logits, uniform.expand(info.batch_size, *uniform.shape[1:])), (0, 0, 0)


@known_signature
class _LinearLogProb(Function):
    """(h, weight, bias, value) -> sum_d log p(value_d), value - sigmoid(logits)."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor, bias: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        logits = _in_common_dtype(F.linear(h, weight, bias), value)
        return _sum_log_prob(logits, value, logits), logits  # the residual in the place of the logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        h, weight, bias, value = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, output[1], bias if ctx.needs_input_grad[3] else None)
        ctx.value_shape = value.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        h, weight, residual, bias = ctx.saved_tensors
        by_value = None
        if ctx.needs_input_grad[3]:
            by_value = _sum_to(gradient.unsqueeze(-1) * F.linear(h, weight, bias), ctx.value_shape)
        return *_linear_gradients(ctx, gradient, h, weight, residual), by_value

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        h, weight, bias, value = inputs
        if _only_rows_are_batched(in_dims):
            h, value = _batch_first((in_dims[0], in_dims[3]), h, value)
            return _LinearLogProb.apply(h, weight, bias, value), (0, 0)
        return _LogProb.apply(*_logits_and(in_dims, *inputs)), (0, 0)


@known_signature
class _LinearTerm(Function):
    """(h, weight, bias, value - sigmoid(logits)) -> zeros with the gradients of sum_d log p by weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:  # noqa: ARG004
        return 0 * residual[..., 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        h, weight, _, residual = inputs
        ctx.save_for_backward(h, weight, residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_linear_gradients(ctx, *gradients, *ctx.saved_tensors), None


@known_signature
class _LinearDraw(Function):
    """(h, weight, bias, uniform) -> z, 1 where uniform < sigmoid(logits), sum_d log p(z_d), z - sigmoid(logits)."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor, bias: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = _in_common_dtype(F.linear(h, weight, bias), uniform)
        z = torch.empty_like(logits)
        return z, _sum_log_prob(logits, z, logits, uniform), logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        h, weight, _, _ = inputs
        z, _, residual = output
        ctx.mark_non_differentiable(z, residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, residual)

    @staticmethod
    def backward(ctx: Any, _: None, gradient: Tensor, __: None) -> tuple[Tensor | None, ...]:
        return *_linear_gradients(ctx, gradient, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        h, weight, bias, uniform = inputs
        if _only_rows_are_batched(in_dims):
            h, uniform = _batch_first((in_dims[0], in_dims[3]), h, uniform)
            return _LinearDraw.apply(h, weight, bias, uniform), (0, 0, 0)
        logits, uniform = _logits_and(in_dims, *inputs)
        return _Draw.apply(logits, uniform.expand(info.batch_size, *uniform.shape[1:])), (0, 0, 0)


def _only_rows_are_batched(in_dims: tuple[int | None, ...]) -> bool:
    """Return whether vmap maps h and, of the others, at most the last input."""
    h, weight, bias, _ = in_dims
    return h is not None and weight is None and bias is None


def _logits_and(in_dims: tuple[int | None, ...], *inputs: Tensor) -> list[Tensor]:
    """Return the logits of (h, weight, bias), and the last input, as `_batch_first` does."""
    *parts, last = inputs
    *dims, last_dim = in_dims
    is_batched = any(dim is not None for dim in dims)
    logits = (vmap(F.linear, tuple(dims)) if is_batched else F.linear)(*parts)
    return _batch_first((0 if is_batched else None, last_dim), logits, last)


def _batch_first(in_dims: tuple[int | None, ...], *inputs: Tensor) -> list[Tensor]:
    """Return tensors whose first dimension is the one that vmap maps, 1 for a tensor that has none.

    Behind it they are padded with ones to equally many dimensions: they broadcast as they do in each of the calls.
    """
    pairs = zip(in_dims, inputs, strict=True)
    fronted = [each.unsqueeze(0) if dim is None else each.movedim(dim, 0) for dim, each in pairs]
    most = max(each.dim() for each in fronted)
    return [each.reshape(len(each), *[1] * (most - each.dim()), *each.shape[1:]) for each in fronted]


def _sum_log_prob(logits: Tensor, value: Tensor, residual: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Return sum_d v_d l_d - softplus(l_d), and write v - sigmoid(l) to `residual`, which may be the logits.

    With `uniform` v is drawn, 1 where that is below sigmoid(l), and written to `value`.

    softplus(l) = max(l, 0) - log max(p, 1 - p) for p = sigmoid(l). As max(p, 1 - p) lies in [1/2, 1], many of them can
    be multiplied before a logarithm is taken of the product, which is exact to rounding and takes half the time of
    softplus.
    """
    num, one = _num_products(logits.shape[-1]), logits.new_ones(())
    dim, pieces = _pieces(logits, value, residual, uniform)
    scratch = torch.empty_like(pieces[0][0]), torch.empty_like(pieces[0][0])  # the same for all pieces
    products, linear = [], []
    for logit, v, r, *u in pieces:
        probs, other = scratch
        if logit.shape != probs.shape:  # the last piece is the smallest
            probs, other = (each.narrow(dim, 0, logit.shape[dim]) for each in scratch)
        torch.sigmoid(logit, out=probs)
        if u:
            torch.lt(u[0], probs, out=v)
        larger = torch.maximum(probs, torch.sub(one, probs, out=other), out=other)
        products.append(larger.reshape(*logit.shape[:-1], num, logit.shape[-1] // num).prod(-1))
        positive = torch.clamp(logit, min=0, out=other)
        other = torch.addcmul(positive, v, logit, value=-1, out=other if logit.shape == r.shape else None)
        linear.append(other.sum(-1))
        torch.sub(v, probs, out=r)
    return _joined(products, dim).log_().sum(-1) - _joined(linear, dim)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _pieces(
    logits: Tensor, value: Tensor, residual: Tensor, uniform: Tensor | None
) -> tuple[int, Sequence[tuple[Tensor, ...]]]:
    """Return a dimension, and what these tensors are along it piece by piece, without `uniform` where there is none.

    There is one piece alone on other devices than a CPU, and where logits are broadcast.
    """
    whole = (logits, value, residual) if uniform is None else (logits, value, residual, uniform)
    if not is_cut(logits) or logits.shape != residual.shape:
        return 0, [whole]
    dim, size = cut(logits.shape)
    return dim, list(zip(*(each.expand_as(logits).split(size, dim) for each in whole), strict=True))


@cache
def _num_products(size: int) -> int:
    """Return the fewest products of equally many factors that `size` factors can be shared out to."""
    return next(num for num in range(1, size + 1) if size % num == 0 and size // num <= _MOST_FACTORS)


def _linear_gradients(
    ctx: Any, gradient: Tensor, h: Tensor, weight: Tensor, residual: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of sum_d log p by h, weight and bias, each where it is needed.

    The gradient [...] scales the rows of h, which are shorter than those of the residual.
    """
    needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    rows = residual.reshape(-1, residual.shape[-1])
    column = gradient.unsqueeze(-1)
    by_h = column * torch.matmul(residual, weight) if needs_h else None
    by_weight = rows.t() @ (column * h).reshape(-1, h.shape[-1]) if needs_weight else None
    by_bias = rows.t() @ gradient.reshape(-1) if needs_bias else None
    return by_h, by_weight, by_bias


def _in_common_dtype(logits: Tensor, value: Tensor) -> Tensor:
    """Return logits in the type that they and the values have in common: under autocast they have less digits."""
    return logits.to(torch.promote_types(logits.dtype, value.dtype))


def _common_shape(first: torch.Size, second: torch.Size) -> torch.Size:
    """Return the shape that two broadcast to; torch.broadcast_shapes takes as long as ten small operations."""
    shorter, longer = sorted((first, second), key=len)
    return longer if longer[len(longer) - len(shorter) :] == shorter else torch.broadcast_shapes(first, second)


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Return a gradient summed over what was broadcast from `shape`."""
    extra = gradient.dim() - len(shape)
    broadcast = [extra + i for i, size in enumerate(shape) if size != gradient.shape[extra + i]]
    dims = [*range(extra), *broadcast]
    return gradient.sum(dims, keepdim=True).reshape(shape) if dims else gradient
