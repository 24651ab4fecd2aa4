"""Binary cross-entropy of tensors on different plates, its logarithms taken before they meet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor as Plain

from models.pieces import cut, is_cut
from stochastic_graph.lining import LineUp, event_dims_of
from stochastic_graph.plates import Plate
from stochastic_graph.tensor import Tensor


class _BinaryCrossEntropy(torch.autograd.Function):
    """-(x log r + (1 - x) log(1 - r)), logarithms of at least -100, and the derivative in r that torch gives it.

    r of enumerated values and x of observations differ in their plates: r has [values, 1, ...], x [1, data, ...], and
    the gradient of r is a matrix product where each item's loss is a sum.
    """

    @staticmethod
    def forward(ctx: Any, r: Plain, x: Plain) -> Plain:
        ctx.save_for_backward(r, x)
        if not is_cut(r) or torch.broadcast_shapes(r.shape, x.shape) != r.shape:
            return torch.lerp((-r).log1p_().clamp_(min=-100), r.log().clamp_(min=-100), x).neg_()
        loss = torch.empty_like(r)
        dim, size = cut(r.shape)
        for part, of_r, of_x in zip(*(each.split(size, dim) for each in (loss, r, x.expand_as(r))), strict=True):
            torch.neg(of_r, out=part).log1p_().clamp_(min=-100)
            torch.lerp(part, of_r.log().clamp_(min=-100), of_x, out=part).neg_()
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Plain) -> tuple[Plain | None, Plain | None]:
        (gradient,), (r, x) = gradients, ctx.saved_tensors
        of_r = of_x = None
        if ctx.needs_input_grad[0]:
            if r.shape == gradient.shape:
                of_r = torch.ops.aten.binary_cross_entropy_backward(gradient, r, x.expand_as(r), None, 0)
            else:
                ones = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
                difference = r * _summed(gradient, ones, r.shape) - _summed(gradient, x, r.shape)
                of_r = difference / (r * (1 - r)).clamp(min=1e-12)
        if ctx.needs_input_grad[1]:
            of_x = (gradient * ((-r).log1p().clamp(min=-100) - r.log().clamp(min=-100))).sum_to_size(x.shape)
        return of_r, of_x


def _summed(gradient: Plain, x: Plain, shape: torch.Size) -> Plain:
    """Return gradient * x summed to a shape."""
    is_product = gradient.dim() == 3 and shape[1] == 1 and x.shape[0] == 1 and gradient.stride(-1) == 0
    if is_product and x.shape[1:] == gradient.shape[1:]:
        return (gradient[..., 0] @ x[0]).unsqueeze(1)
    return (gradient * x).sum_to_size(shape)


def binary_cross_entropy_rule(otherwise: Callable) -> Callable:
    """Return the rule of binary_cross_entropy without weights or reduction; in all other cases it is `otherwise`."""

    def rule(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: tuple[Plate, ...]) -> Any:
        given = dict(zip(("input", "target", "weight", "size_average", "reduce", "reduction"), args, strict=False))
        given.update(kwargs)
        r, x = given["input"], given["target"]
        is_plain = given.get("reduction") == "none" and all(
            given.get(key) is None for key in ("weight", "size_average", "reduce")
        )
        if not is_plain or r.dtype != x.dtype or _event_shape(r) != _event_shape(x):
            return otherwise(name, func, args, kwargs, plates)
        line_up = LineUp(name, plates, event_dims_of(r))
        r, x = line_up(r), line_up(x)
        if r.numel():
            smallest, largest = r.detach().aminmax()
            if not (smallest >= 0 and largest <= 1):
                raise ValueError(
                    f"binary_cross_entropy: the input ranges from {smallest:g} to {largest:g}, expected probabilities"
                )
        result = _BinaryCrossEntropy.apply(r, x)
        sizes = tuple(plate.size for plate in plates)
        return result if result.shape[: len(sizes)] == sizes else result.expand(*sizes, *result.shape[len(sizes) :])

    return rule


def _event_shape(value: torch.Tensor) -> torch.Size:
    return value.event_shape if isinstance(value, Tensor) else value.shape
