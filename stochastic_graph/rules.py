"""How each torch function treats plates. One that has no rule is refused: nothing about plates is guessed."""
# ruff: noqa: ARG001  (all rules take the same arguments)

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.nn import functional

from stochastic_graph import names
from stochastic_graph.layers import LAYERS
from stochastic_graph.lining import LineUp, event_dims_of, product
from stochastic_graph.losses import binary_cross_entropy_rule
from stochastic_graph.plates import Plate, said
from stochastic_graph.tensor import (
    Tensor,
    check_plates,
    common_averaged,
    common_plates,
    plain,
    plates_of,
    tensors_among,
    wrap,
    wrapped,
)

Plates = tuple[Plate, ...]
Rule = Callable[[str, Callable, Sequence[Any], dict[str, Any], Plates], Any]
_NO_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass


def run(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what a torch function gives for arguments among which are tensors with plates, with their plates on it."""
    name = func.__name__
    if name == "__get__":
        return _attribute(func, args)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    if name in names.PLAIN or (name in ("all", "any") and len(args) == 1 and not kwargs):
        with _NO_TORCH_FUNCTION():
            return func(*args, **kwargs)
    if name in names.CASTS:
        return _cast(func, args, kwargs)
    tensors = tensors_among((*args, *kwargs.values()) if kwargs else args)
    plates, averaged = common_plates(tensors), common_averaged(tensors)
    if name in names.IN_PLACE:
        return _in_place(name, func, args, kwargs, plates, averaged)
    if name == "__setitem__":
        return _set_item(*args, plates=plates, averaged=averaged)
    if kwargs.get("out") is not None:
        raise ValueError(f"{name}: out= cannot keep plates ({said(plates)}); use what the function returns")
    rule = RULES.get(name) if plates else _as_it_is
    with _NO_TORCH_FUNCTION():
        if rule is None:
            return _unknown(name, func, args, kwargs, plates)
        return wrapped(rule(name, func, args, kwargs, plates), plates, averaged, name)


def _as_it_is(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    return func(*args, **kwargs)


def _unknown(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Return an answer that is no tensor, as that of a question about it; refuse whatever would be one."""
    is_changing = name.endswith("_") and not name.endswith("__")
    if not is_changing and name not in names.REFUSED:
        result = func(*args, **kwargs)
        if not _has_tensors(result):
            return result
    remedy = names.REFUSED.get(name, f"run it item by item, as in per_item({name})(...)")
    raise ValueError(f"{name} is not known to leave plates alone ({said(plates)}): {remedy}")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensors, value)))


def _elementwise(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a function of numbers, of any number of tensors."""
    values = (*args, *kwargs.values()) if kwargs else args
    found = [value for value in values if isinstance(value, torch.Tensor)]
    if len(found) == 1:
        return func(*args, **kwargs)
    line_up = LineUp(name, plates, max(event_dims_of(each) for each in found if isinstance(each, Tensor)))
    return func(*[line_up(value) for value in args], **{key: line_up(value) for key, value in kwargs.items()})


def _first(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a function of numbers, of its first argument alone; the others are the same for all items."""
    _only_first(name, args, kwargs)
    return func(*args, **kwargs)


def _cast(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a change of type or device; another tensor may say to which."""
    with _NO_TORCH_FUNCTION():
        result = func(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
    return wrap(result, args[0].plates, args[0].averaged) if isinstance(args[0], Tensor) else result


def _only_first(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if not args or not isinstance(args[0], Tensor) or tensors_among((*args[1:], *kwargs.values())):
        raise ValueError(
            f"{name}: plates ({said(common_plates(tensors_among((*args, *kwargs.values()))))}) can be on its first "
            f"argument alone; run it item by item, as in per_item({name})(...)"
        )


def _along(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a function that works along dimensions: none of them may be a plate."""
    _only_first(name, args, kwargs)
    if name == "quantile" and any(isinstance(value, torch.Tensor) for value in (*args[1:], *kwargs.values())):
        raise ValueError(f"quantile: several at once would stand before the plates ({said(plates)}); give one number")
    _check_along(name, args, kwargs, plates, args[0].dim())
    return func(*args, **kwargs)


def _check_along(name: str, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates, rank: int) -> None:
    at, missing = names.ALONG[name]
    given = next((kwargs[key] for key in ("dim", "axis", "dims", "start_dim") if key in kwargs), None)
    if given is None and len(args) > at:
        given = args[at:] if name in names.MANY else args[at]
    if given is None or isinstance(given, bool):
        given = missing
    _check_dimensions(name, given, plates, rank)


def _check_dimensions(name: str, given: Any, plates: Sequence[Plate], rank: int) -> None:
    """Raise ValueError where a dimension is a plate, or where none is given and all are meant."""
    if given is None or given == ():
        _refuse(name, plates, 0, " without saying which dimensions")
    for dim in given if isinstance(given, list | tuple) else (given,):
        if isinstance(dim, list | tuple):
            _check_dimensions(name, dim, plates, rank)
        elif not isinstance(dim, int):
            raise ValueError(f"{name}: {dim!r} is no dimension; plates ({said(plates)}) are not given by name here")
        elif -rank <= dim < rank and dim % rank < len(plates):
            _refuse(name, plates, dim % rank)


def _refuse(name: str, plates: Sequence[Plate], dim: int, how: str = "") -> NoReturn:
    plate = plates[dim]
    raise ValueError(
        f"{name}{how} would work along plate {plate}, dimension {dim}: the {len(plates)} plate dimensions "
        f"({said(plates)}) must stay; give a dimension from {len(plates)} on or a negative one beside them, or take "
        f"the mean over a plate with reduce_plates(tensor, {plate.name!r})"
    )


def _whole_or_along(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """max and min: of two tensors number by number, of one along a dimension."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else kwargs.get("other"))
    if isinstance(given, torch.Tensor):
        return _elementwise(name, func, args, kwargs, plates)
    _check_dimensions(name, given, plates, args[0].dim())
    return func(*args, **kwargs)


def _question(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """all and any along dimensions."""
    _check_dimensions(name, kwargs.get("dim", args[1] if len(args) > 1 else None), plates, args[0].dim())
    return func(*args, **kwargs)


def _moving(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a function that exchanges dimensions."""
    dims = [*args[1:3], *(value for value in kwargs.values() if isinstance(value, int | tuple | list))]
    _check_dimensions(name, dims, plates, args[0].dim())
    return func(*args, **kwargs)


def _permute(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    order = kwargs.get("dims", args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:])
    rank = args[0].dim()
    for i, plate in enumerate(plates):
        if i >= len(order) or order[i] % rank != i:
            _refuse(name, [*plates[:i], plate, *plates[i + 1 :]], i)
    return func(*args, **kwargs)


def _new_dimension(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    rank = args[0].dim() + 1
    if -rank <= dim < rank and dim % rank < len(plates):
        _refuse(name, plates, dim % rank)
    return func(*args, **kwargs)


def _shape(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a change of shape: it leaves the items alone exactly where the result begins with the plates' sizes."""
    result = func(*[plain(value) for value in args], **kwargs)
    if name in ("expand", "expand_as", "broadcast_to") and result.dim() > args[0].dim():
        raise ValueError(f"{name}: new dimensions would stand before the plates ({said(plates)})")
    return result


def _repeat(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    times = kwargs.get("dims", kwargs.get("repeats", args[1:]))
    times = times[0] if len(times) == 1 and isinstance(times[0], list | tuple) else times
    before = len(times) - args[0].dim()
    if before > 0:
        raise ValueError(f"{name}: new dimensions would stand before the plates ({said(plates)})")
    for i in range(len(plates)):
        if i + before >= 0 and times[i + before] != 1:
            _refuse(name, plates, i)
    return func(*args, **kwargs)


def _joined(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """cat and stack; a dimension from the left counts all plates of all tensors."""
    values = args[0] if args else kwargs["tensors"]
    most = max(event_dims_of(value) for value in values)
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    _check_dimensions(name, dim, plates, len(plates) + most + (name == "stack"))
    return func([LineUp(name, plates, most, expands=True)(value) for value in values], dim)


def _gathering(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """gather and scatter: all tensors have the dimensions of the first."""
    most = event_dims_of(args[0])
    at = 2 if name == "take_along_dim" else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else None)
    _check_dimensions(name, dim, plates, len(plates) + most)
    line_up = LineUp(name, plates, most, expands=True)
    return func(*[line_up(value) for value in args], **{key: line_up(value) for key, value in kwargs.items()})


def _loss(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a loss, number by number; what it sums or averages over everything is found to have lost its plates."""
    most = max(event_dims_of(each) for each in tensors_among((*args, *kwargs.values())))
    line_up = LineUp(name, plates, most, expands=True)
    return func(*[line_up(value) for value in args], **{key: line_up(value) for key, value in kwargs.items()})


def _broadcast(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    tensors = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    line_up = LineUp(name, plates, max(event_dims_of(each) for each in tensors if isinstance(each, Tensor)))
    return func(*[line_up(value) for value in tensors])


def _expand_as(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    line_up = LineUp(name, plates, max(map(event_dims_of, args[:2])))
    return func(*[line_up(value) for value in args])


def _matmul(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    first, second = args[::-1] if name == "__rmatmul__" else (*args, *kwargs.values())
    return product(first, second, plates)


def _linear(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """A linear layer; a weight with plates of its own is a product for each of their items."""

    def given(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not event_dims_of(value):
            raise ValueError(f"linear: the input has no dimension of features beside its plates ({said(plates)})")
        if not plates_of(weight) and not plates_of(bias):
            return functional.linear(plain(value), plain(weight), bias if bias is None else plain(bias))
        result = product(value, wrap(plain(weight).mT, plates_of(weight)), plates)
        if bias is None:
            return result
        return result + LineUp(name, plates, event_dims_of(value))(bias)

    return given(*args, **kwargs)


def _matrix(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run a function of the matrices in the last two dimensions."""
    _only_first(name, args, kwargs)
    if event_dims_of(args[0]) < 2:
        raise ValueError(f"{name} works on the last two dimensions, one of which is a plate ({said(plates)})")
    return func(*args, **kwargs)


def _einsum(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    """Run an einsum whose '...' stands for the plates, and for nothing else, wherever there are some."""
    equation, values = args[0], args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(equation, str) or "->..." not in equation.replace(" ", ""):
        raise ValueError(f"einsum: write '...' for the plates ({said(plates)}), as in '...i,ij->...j'")
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, value in zip(terms, values, strict=True):
        letters = term.removeprefix("...")
        if term.startswith("...") != isinstance(value, Tensor) or len(letters) != event_dims_of(value):
            raise ValueError(
                f"einsum: {term!r} is to be '...' and a letter for each dimension that is no plate ({said(plates)}), "
                "without '...' for a plain tensor"
            )
    return func(equation, *[LineUp(name, plates, event_dims_of(value))(value) for value in values])


def _get_item(name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates) -> Any:
    check_index(args[0], args[1])
    return func(*args)


def check_index(tensor: torch.Tensor, index: Any) -> None:
    """Raise ValueError where an index selects among the items of a plate, or could move one."""
    plates = plates_of(tensor)
    parts = list(index) if isinstance(index, tuple) else [index]
    if tensors_among(parts):
        raise ValueError(
            f"an index that has plates ({said(common_plates(tensors_among(parts)))}) could take items from them: use "
            "torch.where, torch.gather or a product with a one-hot vector"
        )
    at = [i for i, part in enumerate(parts) if part is Ellipsis]
    if at:
        used = sum(_dims_used(part) for part in parts if part is not Ellipsis)
        parts[at[0] : at[0] + 1] = [slice(None)] * (tensor.dim() - used)
    for i in range(len(plates)):
        if i < len(parts) and not (isinstance(parts[i], slice) and parts[i] == slice(None)):
            _refuse(f"the index {parts[i]!r}", plates, i)
    chosen = [i for i, part in enumerate(parts) if part is not None and not isinstance(part, slice)]
    is_advanced = any(not isinstance(parts[i], int) for i in chosen)
    if is_advanced and chosen and chosen[-1] - chosen[0] + 1 != len(chosen):
        raise ValueError(
            f"the index {index!r} would put its items before the plates ({said(plates)}): index one dimension at a time"
        )


def _dims_used(part: Any) -> int:
    if part is None:
        return 0
    is_mask = isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
    return part.dim() if is_mask else 1


def _set_item(tensor: Any, index: Any, value: Any, *, plates: Plates, averaged: Plates) -> None:
    """tensor[index] = value, at all items alike, or where a mask with plates says so."""
    _check_room("an assignment to items", tensor, plates)
    raw = plain(tensor)
    is_number = not isinstance(value, torch.Tensor) or value.dim() == 0
    if isinstance(index, Tensor) and index.dtype == torch.bool and is_number:
        if event_dims_of(index) != event_dims_of(tensor):
            raise ValueError(f"the mask of an assignment has fewer dimensions than the tensor ({said(plates)})")
        mask = LineUp("an assignment", plates, event_dims_of(tensor))(index)
        raw.masked_fill_(mask, plain(value) if isinstance(value, torch.Tensor) else value)
        tensor.averaged = averaged
        return
    check_index(tensor, index)
    if isinstance(value, torch.Tensor):
        value = LineUp("an assignment", plates, raw[index].dim() - len(plates))(value)
    raw[index] = value
    tensor.averaged = averaged


def _in_place(
    name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], plates: Plates, averaged: Plates
) -> Any:
    """Run a function of numbers that changes its first argument, which has to be on all plates."""
    target = args[0]
    _check_room(name, target, plates)
    line_up = LineUp(name, plates, event_dims_of(target))
    with _NO_TORCH_FUNCTION():
        func(
            target,
            *[line_up(value) for value in args[1:]],
            **{key: line_up(value) for key, value in kwargs.items()},
        )
    target.averaged = averaged
    return target


def _check_room(name: str, target: Any, plates: Plates) -> None:
    lacking = [plate for plate in plates if not any(plate.is_same(own) for own in plates_of(target))]
    if not isinstance(target, Tensor) or lacking:
        raise ValueError(
            f"{name}: the tensor that it changes is not on plate {said(lacking or plates)}; use the function that "
            "returns a new one"
        )


def _attribute(func: Callable, args: Sequence[Any]) -> Any:
    """Return an attribute of a tensor, with its plates where it is a tensor."""
    self = args[0]
    with _NO_TORCH_FUNCTION():
        result = func(*args)
    if not isinstance(result, torch.Tensor):
        return result
    name = func.__self__.__name__  # type: ignore[attr-defined]
    plates = self.plates
    if plates and name in ("T", "H"):
        raise ValueError(f".{name} would move the plates ({said(plates)}): use .mT, for the last two dimensions")
    if name in ("mT", "mH") and self.dim() - len(plates) < 2 and plates:
        raise ValueError(f".{name} exchanges the last two dimensions, one of which is a plate ({said(plates)})")
    result = plain(result)
    check_plates(result, plates, f".{name}")
    return wrap(result, plates, self.averaged)


RULES: dict[str, Rule] = {
    **dict.fromkeys(names.ELEMENTWISE, _elementwise),
    **dict.fromkeys(names.FIRST, _first),
    **dict.fromkeys(names.ALONG, _along),
    **dict.fromkeys(("max", "min"), _whole_or_along),
    **dict.fromkeys(("all", "any"), _question),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"), _moving),
    **dict.fromkeys(("reshape", "view", "view_as", "reshape_as", "expand", "broadcast_to"), _shape),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "take_along_dim"), _gathering),
    **dict.fromkeys(names.LOSSES, _loss),
    "binary_cross_entropy": binary_cross_entropy_rule(_loss),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "linalg_matmul"), _matmul),
    **dict.fromkeys(names.MATRICES, _matrix),
    "permute": _permute,
    "unsqueeze": _new_dimension,
    "broadcast_tensors": _broadcast,
    "expand_as": _expand_as,
    "linear": _linear,
    "einsum": _einsum,
    "__getitem__": _get_item,
    **LAYERS,
}
