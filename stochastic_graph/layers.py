"""The functions of neural networks' layers that see a batch: plates are flattened into it, and put back."""
# ruff: noqa: ARG001  (all rules take the same arguments)

from collections.abc import Callable, Sequence
from typing import Any

import torch

from stochastic_graph.lining import LineUp, event_dims_of
from stochastic_graph.plates import Plate, said
from stochastic_graph.tensor import Tensor, plain, tensors_among

Plates = tuple[Plate, ...]


def _batched(dims: int) -> Callable:
    """Return the rule of a function of [batch, ...] with `dims` dimensions to an item; all before them is the batch."""

    def rule(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
        _refuse_others(name, args, kwargs, plates)
        value = args[0]
        if event_dims_of(value) < dims:
            raise ValueError(
                f"{name} wants {dims} dimensions beside the plates ({said(plates)}), not {list(value.event_shape)}"
            )
        raw = plain(value)
        leading = raw.shape[: raw.dim() - dims]
        flat = raw.reshape(leading.numel(), *raw.shape[len(leading) :])
        result = func(flat, *args[1:], **kwargs)
        if isinstance(result, tuple):
            return tuple(each.reshape(*leading, *each.shape[1:]) for each in result)
        return result.reshape(*leading, *result.shape[1:])

    return rule


def _items(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a function whose first dimension is the batch and whose second the channels: all plates are the batch."""
    is_training = (kwargs.get("training", args[5] if len(args) > 5 else False)) if name == "batch_norm" else False
    if is_training:
        raise ValueError(
            f"batch_norm in training mixes the items of plates ({said(plates)}), which are to be independent: call "
            "eval(), or use layer_norm or group_norm"
        )
    if not event_dims_of(args[0]):
        raise ValueError(f"{name} wants channels beside the plates ({said(plates)})")
    return _batched(event_dims_of(args[0]))(name, func, args, kwargs, plates)


def _classes(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run cross_entropy or nll_loss: [*plates, classes, ...] against [*plates, ...], all plates the batch."""
    value, target, *rest = [*args, *([kwargs.pop("target")] if "target" in kwargs else [])]
    if tensors_among((*rest, *kwargs.values())):
        raise ValueError(f"{name}: weights of classes cannot have plates ({said(plates)})")
    if not event_dims_of(value):
        raise ValueError(f"{name} wants classes beside the plates ({said(plates)})")
    lined = [LineUp(name, plates, event_dims_of(each), expands=True)(each) for each in (value, target)]
    sizes = [plate.size for plate in plates]
    flat = [each.reshape(-1, *each.shape[len(sizes) :]) for each in lined]
    result = func(*flat, *rest, **kwargs)
    return result.reshape(*sizes, *result.shape[1:]) if result.dim() else result


def _layer_norm(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    _refuse_others(name, args, kwargs, plates)
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    if len(shape) > event_dims_of(args[0]):
        raise ValueError(f"{name} over {list(shape)} would work along the plates ({said(plates)})")
    return func(*args, **kwargs)


def _one_hot(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    if kwargs.get("num_classes", args[1] if len(args) > 1 else -1) < 0:
        raise ValueError(f"one_hot would count the classes over all items of the plates ({said(plates)}): say how many")
    return func(*args, **kwargs)


def _pad(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    widths = kwargs.get("pad", args[1] if len(args) > 1 else ())
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    if mode != "constant":
        return _batched(1 + len(widths) // 2)(name, func, args, kwargs, plates)
    if len(widths) // 2 > event_dims_of(args[0]):
        raise ValueError(f"pad by {list(widths)} would pad the plates ({said(plates)})")
    return func(*args, **kwargs)


def _refuse_others(name: str, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> None:
    if not isinstance(args[0], Tensor) or tensors_among((*args[1:], *kwargs.values())):
        raise ValueError(
            f"{name}: plates ({said(plates)}) can be on its input alone, not on weights; run it item by item, as in "
            f"per_item({name})(...)"
        )


_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
LAYERS: dict[str, Callable] = {
    **{f"conv{n}d": _batched(n + 1) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _batched(n + 1) for n in (1, 2, 3)},
    **{f"{pool}{n}d": _batched(n + 1) for pool in _POOLS for n in (1, 2, 3)},
    **{f"{pool}{n}d_with_indices": _batched(n + 1) for pool in ("max_pool", "adaptive_max_pool") for n in (1, 2, 3)},
    **{f"dropout{n}d": _batched(n + 1) for n in (1, 2, 3)},
    "pixel_shuffle": _batched(3),
    "pixel_unshuffle": _batched(3),
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm", "interpolate", "local_response_norm"), _items),
    **dict.fromkeys(("cross_entropy", "nll_loss"), _classes),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "one_hot": _one_hot,
    "pad": _pad,
}


def per_item(function: Callable) -> Callable:
    """Return `function` as one that is run for each item of the plates of its arguments, by torch.vmap.

    It sees plain tensors without plates and may do with them what vmap allows; noise differs from item to item. What it
    returns, a tensor or a tuple of them, is on all plates of its arguments.
    """
    from stochastic_graph.tensor import common_averaged, common_plates, wrapped

    def run(*args: Any) -> Any:
        tensors = tensors_among(args)
        plates = common_plates(tensors)
        at = [0 if isinstance(value, Tensor) else None for value in args]
        lined = [
            LineUp("per_item", plates, event_dims_of(value), expands=True)(value)
            if isinstance(value, Tensor)
            else value
            for value in args
        ]
        vectorised = function
        for _ in plates:
            vectorised = torch.vmap(vectorised, in_dims=tuple(at), randomness="different")
        return wrapped(vectorised(*lined), plates, common_averaged(tensors), "per_item")

    return run
