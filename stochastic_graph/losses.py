"""Binary cross-entropy of tensors on different plates, its logarithms taken before they meet."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor as Plain

from models.pieces import cut, is_cut
from stochastic_graph.lining import LineUp, event_dims_of
from stochastic_graph.plates import Plate
from stochastic_graph.repeated import added_up, gather, valid_repeats
from stochastic_graph.tensor import Tensor, plates_of, tensors_among

DENSE = 32  # so many terms of a matrix product cost as much as passes over one number


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


class _RepeatedBinaryCrossEntropy(torch.autograd.Function):
    """The same of r that repeats: its rows r [V, *event], each item's row, index [*plates], and x [*plates, *event].

    x has size 1 for plates that it is not on. Logarithms are those of rows, and where each item's loss is a sum its
    gradients are added up by row and observation, [V, B], before they meet x [B, *event].
    """

    @staticmethod
    def forward(ctx: Any, r: Plain, index: Plain, x: Plain) -> Plain:
        ctx.save_for_backward(r, index, x)
        rows = r.reshape(len(r), -1)
        log_r, log_not_r = rows.log().clamp_(min=-100), (-rows).log1p_().clamp_(min=-100)
        loss = r.new_empty(*index.shape, *r.shape[1:])
        items, of_x = loss.view(index.numel(), -1), x.reshape(-1, rows.shape[1])
        size = cut(items.shape)[1] if is_cut(items) else max(1, len(items))
        pieces = (each.split(size) for each in (items, index.flatten(), _places(x, index.shape)))
        for part, row, place in zip(*pieces, strict=True):
            torch.index_select(log_not_r, 0, row, out=part)
            torch.lerp(part, log_r.index_select(0, row), of_x.index_select(0, place), out=part).neg_()
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Plain) -> tuple[Plain | None, None, Plain | None]:
        (gradient,), (r, index, x) = gradients, ctx.saved_tensors
        of_r = of_x = None
        if ctx.needs_input_grad[0]:
            of_r = _gradient_of_rows(gradient, r, index, x)
        if ctx.needs_input_grad[2]:
            slope = (-r).log1p().clamp(min=-100) - r.log().clamp(min=-100)
            of_x = (gradient * slope[index]).sum_to_size(x.shape)
        return of_r, None, of_x


def _gradient_of_rows(gradient: Plain, r: Plain, index: Plain, x: Plain) -> Plain:
    """Return the gradient of rows r [V, *event], given the losses' [*plates, *event]."""
    num_plates, num_items, num_x = index.dim(), index.numel(), x.shape[: index.dim()].numel()
    is_sum = gradient.numel() > 0 and not any(gradient.stride()[num_plates:])
    if not is_sum or len(r) * num_x > DENSE * num_items:
        items = r[index]
        of_items = torch.ops.aten.binary_cross_entropy_backward(gradient, items, x.expand_as(items), None, 0)
        return added_up(of_items.reshape(num_items, *r.shape[1:]), index.flatten(), len(r))
    while gradient.dim() > num_plates:
        gradient = gradient[..., 0]
    pairs = index.flatten() * num_x + _places(x, index.shape)
    summed = added_up(gradient.reshape(-1), pairs, len(r) * num_x).reshape(len(r), num_x)
    rows = r.reshape(len(r), -1)
    difference = rows * summed.sum(1, keepdim=True) - summed @ x.reshape(num_x, -1)
    return (difference / (rows * (1 - rows)).clamp(min=1e-12)).reshape(r.shape)


def _places(x: Plain, sizes: torch.Size) -> Plain:
    """Return, for each item of plates of these sizes, which item of x is its own, [items]."""
    own = x.shape[: len(sizes)]
    return torch.arange(own.numel(), device=x.device).reshape(own).expand(sizes).flatten()


def binary_cross_entropy_rule(otherwise: Callable) -> Callable:
    """Return the rule of binary_cross_entropy without weights or reduction; in all other cases it is `otherwise`."""

    def rule(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: tuple[Plate, ...]) -> Any:
        given = dict(zip(("input", "target", "weight", "size_average", "reduce", "reduction"), args, strict=False))
        given.update(kwargs)
        r, x = given["input"], given["target"]
        is_plain = given.get("reduction") == "none" and all(
            given.get(key) is None for key in ("weight", "size_average", "reduce")
        )
        is_like = is_plain and r.dtype == x.dtype and _event_shape(r) == _event_shape(x)
        repeats = valid_repeats(r) if is_like and plates == plates_of(r) else None
        for value in tensors_among((*args, *kwargs.values())):
            if repeats is None or value is not r:
                gather(value)
        if not is_like:
            return otherwise(name, func, args, kwargs, plates)
        line_up = LineUp(name, plates, event_dims_of(r))
        if repeats is not None:
            rows, _ = repeats.rows
            _check_probabilities(rows)
            repeats.leave()
            return _RepeatedBinaryCrossEntropy.apply(rows, repeats.index.to(rows.device), line_up(x))
        r, x = line_up(r), line_up(x)
        _check_probabilities(r)
        result = _BinaryCrossEntropy.apply(r, x)
        sizes = tuple(plate.size for plate in plates)
        return result if result.shape[: len(sizes)] == sizes else result.expand(*sizes, *result.shape[len(sizes) :])

    return rule


def _check_probabilities(r: Plain) -> None:
    if r.numel():
        smallest, largest = r.detach().aminmax()
        if not (smallest >= 0 and largest <= 1):
            raise ValueError(
                f"binary_cross_entropy: the input ranges from {smallest:g} to {largest:g}, expected probabilities"
            )


def _event_shape(value: torch.Tensor) -> torch.Size:
    return value.event_shape if isinstance(value, Tensor) else value.shape
