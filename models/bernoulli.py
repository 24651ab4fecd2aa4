"""Bernoulli variables by their logits: log-probabilities summed over the last dimension, and draws.

    log p(v) = sum_d v_d l_d - softplus(l_d),    d log p(v) / d l = v - sigmoid(l)

The backward passes keep v - sigmoid(l) and nothing else of that size. They know first derivatives only: a gradient is
a constant to whatever differentiates it again. Everything runs under torch.func.vmap and torch.func.grad. Proof:
tests/models/test_bernoulli.py.
"""

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

# Of numbers of at least 1/2: their product is no less than 2^-100, and float32 reaches down to 2^-126.
_MOST_FACTORS = 100


def bernoulli_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    """Return sum_d log p(value_d) for logits and values [..., D] that broadcast against each other: [...].

    The value may be any number, as in the cross-entropy of grey pixels, and may carry a gradient.
    """
    return _LogProb.apply(logits, value)[0]


def linear_bernoulli_log_prob(h: Tensor, weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    """Return the same for logits = h weight^T + bias: [...], in one step, whose logits are not kept.

    h: [..., H]; weight: [D, H]; bias: [D]; value: [..., D], broadcast against the leading dimensions of h. The gradient
    of h is computed where h needs one.
    """
    shape = torch.broadcast_shapes(h.shape[:-1], value.shape[:-1])
    if shape != h.shape[:-1]:  # a row of h serves several values: its logits are computed once
        return bernoulli_log_prob(F.linear(h, weight, bias), value)
    return _LinearLogProb.apply(h, weight, bias, value)[0]


def linear_bernoulli_draw(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Draw z [..., D] with logits h weight^T + bias; return it, without a gradient, and its log-probability [...]."""
    z, log_prob, _ = _LinearDraw.apply(h, weight, bias)
    return z, log_prob


def draw_bernoulli(probs: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Draw 0 or 1 with probabilities [...], in their dtype, without a gradient: [*sample_shape, ...].

    As u < p for a uniform u in [0, 1): 0 is never 1 and 1 is never 0.
    """
    uniform = torch.rand(*sample_shape, *probs.shape, dtype=probs.dtype, device=probs.device)
    # u < p without a bool, whose conversion takes three times as long: p - u > 0 rounds up to 1, the rest to -0.
    return (probs.detach() - uniform).ceil_().abs_()


class _LogProb(Function):
    """(logits, value) -> sum_d log p(value_d), value - sigmoid(logits)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        probs = logits.sigmoid()
        return _sum_log_prob(logits, probs, value), value - probs

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
        gradient = gradient.unsqueeze(-1)
        by_logits = _sum_to(gradient * residual, ctx.shapes[0]) if ctx.needs_input_grad[0] else None
        by_value = _sum_to(gradient * logits, ctx.shapes[1]) if ctx.needs_input_grad[1] else None
        return by_logits, by_value


class _LinearLogProb(Function):
    """(h, weight, bias, value) -> sum_d log p(value_d), value - sigmoid(logits)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, weight: Tensor, bias: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h, weight, bias)
        probs = logits.sigmoid()
        return _sum_log_prob(logits, probs, value), value - probs

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


class _LinearDraw(Function):
    """(h, weight, bias) -> z, drawn with the logits, sum_d log p(z_d), z - sigmoid(logits)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(h, weight, bias)
        probs = logits.sigmoid()
        z = draw_bernoulli(probs)
        return z, _sum_log_prob(logits, probs, z), z - probs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        h, weight, _ = inputs
        z, _, residual = output
        ctx.mark_non_differentiable(z, residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, residual)

    @staticmethod
    def backward(ctx: Any, _: None, gradient: Tensor, __: None) -> tuple[Tensor | None, ...]:
        return _linear_gradients(ctx, gradient, *ctx.saved_tensors)


for _function in (_LogProb, _LinearLogProb, _LinearDraw):
    # Function.apply looks the signature up at every call, which otherwise takes as long as ten small operations.
    vars(_function.forward)["__signature__"] = signature(_function.forward)


def _sum_log_prob(logits: Tensor, probs: Tensor, value: Tensor) -> Tensor:
    """Return sum_d v_d l_d - softplus(l_d), with softplus(l) = max(l, 0) - log max(p, 1 - p) for p = sigmoid(l).

    As max(p, 1 - p) lies in [1/2, 1], many of them can be multiplied before a logarithm is taken of the product, which
    is exact to rounding and takes half the time of softplus.
    """
    num = _num_products(logits.shape[-1])
    larger = torch.maximum(probs, 1 - probs).reshape(*logits.shape[:-1], num, logits.shape[-1] // num)
    linear = torch.addcmul(logits.relu(), value, logits, value=-1).sum(-1)
    return larger.prod(-1).log().sum(-1) - linear


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


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Return a gradient summed over what was broadcast from `shape`."""
    extra = gradient.dim() - len(shape)
    broadcast = [extra + i for i, size in enumerate(shape) if size != gradient.shape[extra + i]]
    dims = [*range(extra), *broadcast]
    return gradient.sum(dims, keepdim=True).reshape(shape) if dims else gradient
