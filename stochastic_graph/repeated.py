"""Tensors whose items repeat: what follows from samples of few values is computed once a value, not once a sample."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor as Plain
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.distributions import Bernoulli, Categorical, Distribution, OneHotCategorical

from estimators.nodes.base import base_of
from stochastic_graph import names
from stochastic_graph.plates import Plate
from stochastic_graph.tensor import Tensor, plain, tensors_among, wrap

LEAST = 256  # items; fewer cost more to look after than to compute
_PART = 512  # items that are added up one after another
_NO_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass


@dataclass(eq=False)
class Memory:
    """What a tensor and its views have in common: which function, if any, changed one of them in place."""

    changed_by: str = ""


@dataclass(eq=False)
class Repeats:
    """The distinct values of a tensor [*plates, *event].

    values: [V, *ones, *event], on plates of these sizes that have the names of the tensor's; index: [*plates], the
    value of each item; version, node: the tensor's, for which they hold; is_gathered: whether the tensor has its
    numbers; tensor: the tensor, as long as somebody has it; parents, children: those that the values, where they have
    gradients, were computed of, and that were computed of them; has_left: whether something that does not repeat was
    computed of a child.
    """

    values: Tensor
    index: Plain
    version: int = 0
    node: Any = None
    is_gathered: bool = False
    memory: Memory = field(default_factory=Memory)
    tensor: Callable[[], Any] = lambda: None
    parents: tuple["Repeats", ...] = ()
    children: WeakSet["Repeats"] = field(default_factory=WeakSet)
    has_left: bool = False

    @property
    def rows(self) -> tuple[Plain, Plain]:
        """Return the values as rows [V, *event], and each item's row, [items]."""
        values = plain(self.values)
        return values.flatten(0, self.index.dim() - 1), self.index.flatten().to(values.device)

    @property
    def are_used(self) -> bool:
        """Return whether gradients come to the values from elsewhere than the items."""
        remaining = [self]
        while remaining:
            each = remaining.pop()
            if each.has_left or (each is not self and each._has_gradient):
                return True
            remaining += each.children
        return False

    @property
    def _has_gradient(self) -> bool:
        value = self.tensor()
        return value is not None and value.requires_grad

    def leave(self) -> None:
        """Note that something that does not repeat is computed of the values."""
        remaining = [self]
        while remaining:
            each = remaining.pop()
            if not each.has_left:
                each.has_left = True
                remaining += each.parents


class Repeated(Tensor):
    """A tensor whose items may repeat.

    Functions that have a rule run on the distinct values; what they return repeats in the same way, and gets its
    numbers, by index, as soon as a function needs them: one of tensors that differ in their plates or repeat otherwise,
    one that is random, that changes its argument, or that has no rule. Shape and type are always those of all items,
    and in the graph of derivatives it stands between the values and whatever is computed of the items.
    """

    repeats: Repeats | None = None
    was_used = False  # as long as it repeated, which it does no more

    def as_subclass(self, cls: Any) -> Any:
        """Return the tensor, with its numbers, as one of another class: torch does not ask __torch_function__."""
        gather(self)
        with torch._C._DisableTorchDispatch():
            return super().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function on the distinct values where that gives the same, else on all items."""
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of torch's that has not been asked for by a torch function, on the numbers of all items."""
        kwargs = kwargs or {}
        with _NO_TORCH_FUNCTION(), torch._C._DisableTorchDispatch():
            for value in _repeated_among((*args, *kwargs.values())):
                gather(value)
            return func(*args, **kwargs)


def _repeated_among(given: Iterable[Any]) -> Iterator[Repeated]:
    for value in given:
        if isinstance(value, Repeated):
            yield value
        elif isinstance(value, list | tuple):
            yield from _repeated_among(value)


def repeats_of(distribution: Distribution, points: Plain, plates: Sequence[Plate]) -> Repeats | None:
    """Return the distinct values of samples [*plates, ...]; None where they have gradients or hardly repeat."""
    base, num_items = base_of(distribution), points.shape[: len(plates)].numel()
    if not isinstance(base, Bernoulli | Categorical | OneHotCategorical) or points.requires_grad:
        return None
    if num_items < LEAST or not points.numel() or not _is_plain_mode():
        return None
    rows = points.flatten(0, len(plates) - 1)
    digits = rows.reshape(num_items, -1, *base.event_shape)
    size = 2 if isinstance(base, Bernoulli) else base.param_shape[-1]
    if size ** digits.shape[1] >= 2**62:
        return None
    if isinstance(base, OneHotCategorical):
        digits = digits @ torch.arange(size, dtype=rows.dtype, device=rows.device)
    codes = (digits.long() * size ** torch.arange(digits.shape[1], device=digits.device)).sum(1)
    num_values, index = _distinct(codes, size ** digits.shape[1])
    if 2 * num_values > num_items:
        return None
    places = torch.arange(num_items, device=index.device)
    values = rows[index.new_empty(num_values).scatter_(0, index, places)]
    if not torch.equal(values.index_select(0, index), rows):  # relaxed points, which have codes of others
        return None
    sizes = (len(values), *(1,) * (len(plates) - 1))
    stands_for = [Plate(plate.name, size) for plate, size in zip(reversed(plates), reversed(sizes), strict=True)]
    return Repeats(
        wrap(values.reshape(*sizes, *rows.shape[1:]), stands_for[::-1]),
        index.reshape(points.shape[: len(plates)]),
        points._version,
        is_gathered=True,
    )


def _distinct(codes: Plain, num_codes: int) -> tuple[int, Plain]:
    """Return how many different codes there are, and the rank of each item's among them, [items]."""
    if num_codes > len(codes):
        found, index = torch.unique(codes, return_inverse=True)
        return len(found), index
    codes = codes % num_codes  # those of points that are no values may be out of range
    occurs = codes.bincount(minlength=num_codes) > 0
    return int(occurs.sum()), (occurs.cumsum(0) - 1).index_select(0, codes)


def valid_repeats(value: Any) -> Repeats | None:
    """Return the distinct values of a tensor; None where it has none, or has been changed since."""
    repeats = value.repeats if isinstance(value, Repeated) else None
    if repeats is None or repeats.memory.changed_by or not _is_plain_mode():
        return None
    with _NO_TORCH_FUNCTION():
        # What a user's autograd.Function has returned has a gradient that the values lack.
        is_valid = value._version == repeats.version and value.grad_fn is repeats.node
    return repeats if is_valid else None


def gather(value: Any, leaves: bool = True) -> None:
    """Give a tensor its numbers where it lacks them; note that something is computed of it, if it `leaves`."""
    repeats = value.repeats if isinstance(value, Repeated) else None
    if repeats is None:
        return
    if repeats.memory.changed_by:
        raise ValueError(
            f"a tensor {list(value.shape)} is used after {repeats.memory.changed_by} has changed a view of it, or what "
            "it is a view of; use the function that returns a new one"
        )
    if not repeats.is_gathered:
        _fill(value, repeats)
    if leaves and value.requires_grad:
        for parent in repeats.parents:
            parent.leave()


def _fill(value: Tensor, repeats: Repeats) -> None:
    """Give a tensor its numbers."""
    with _plain_mode(), torch.no_grad():
        rows, index = repeats.rows
        value.data = rows.index_select(0, index).reshape(value.shape)
    repeats.is_gathered = True


def is_used(value: Any) -> bool:
    """Return whether a tensor's gradient is known for its distinct values alone, not for its items."""
    if not isinstance(value, Repeated):
        return False
    repeats = valid_repeats(value)
    return value.was_used if value.repeats is None else repeats is not None and repeats.are_used


def _refuse_used(value: Tensor, name: str) -> None:
    if is_used(value):
        raise ValueError(
            f"{name} of a tensor {list(value.shape)} whose items repeat: what was computed of it was computed once a "
            "distinct value, and the items' own gradients are not known; call its retain_grad() before it is used"
        )


def _run(func: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    from stochastic_graph.rules import RULES, run

    name = func.__name__ if func.__name__ != "__get__" else f".{func.__self__.__name__}"  # type: ignore[attr-defined]
    if name in names.OF_SHAPE:
        with _NO_TORCH_FUNCTION():
            return func(*args, **kwargs)
    if name in names.OF_MEMORY:
        gather(args[0], leaves=False)
        with _NO_TORCH_FUNCTION(), torch._C._DisableTorchDispatch():
            result = func(torch.Tensor.as_subclass(args[0], torch.Tensor), *args[1:], **kwargs)
        if name != "tolist":
            _forget(args[0], "")
        return result
    if name == ".grad":
        return run(func, args, kwargs)
    tensors = tensors_among((*args, *kwargs.values()) if kwargs else args)
    has_rule = name in RULES or name in names.CASTS or name in names.VIEWS
    is_apart = name in names.APART or bool(kwargs.get("scale_grad_by_freq"))
    is_changing = name in names.IN_PLACE or name == "__setitem__" or bool(kwargs.get("inplace"))
    if has_rule and not is_apart and not is_changing and _repeat_alike(tensors):
        # What is wrong with the arguments is said below, of all items.
        with suppress(Exception):
            return _on_values(name, func, args, kwargs, tensors)
    if name in _DIFFERENTIATED:
        for value in tensors_among(_DIFFERENTIATED[name](args, kwargs)):
            _refuse_used(value, name)
    if name not in names.GATHERING:
        for value in tensors:
            gather(value, leaves=name not in names.ASKING and name not in _DIFFERENTIATED)
    result = run(func, args, kwargs)
    if is_changing or not (has_rule or name in names.ASKING or name in names.LEAVING):
        changed = args[0] if args else kwargs.get("input")
        _forget(changed, name if is_changing and name != "requires_grad_" else "")
    return result


# What a gradient is asked of, among the arguments.
_DIFFERENTIATED: dict[str, Callable[[Sequence[Any], dict[str, Any]], Sequence[Any]]] = {
    "grad": lambda args, _: args[1:],
    "backward": lambda _, kwargs: [kwargs.get("inputs")],
    "register_hook": lambda args, _: args,
    "retain_grad": lambda args, _: args,
}


def _forget(value: Any, changed_by: str) -> None:
    """Let a tensor be an ordinary one from now on; its views may not be used where it was `changed_by` a function."""
    if isinstance(value, Repeated) and value.repeats is not None:
        value.was_used = is_used(value) and not changed_by
        value.repeats.memory.changed_by = changed_by
        value.repeats = None


def _repeat_alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors with plates repeat by one index."""
    found = [valid_repeats(each) for each in tensors if each.plates]
    return bool(found) and all(each and found[0] and each.index is found[0].index for each in found)


def _on_values(
    name: str, func: Callable, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> Any:
    """Run a function on the distinct values; what it returns repeats as its arguments do."""
    from stochastic_graph.rules import run

    sources = [each.repeats for each in tensors if isinstance(each, Repeated) and each.repeats is not None]
    plates = next(each.plates for each in tensors if each.plates)
    if name in names.SIZES:
        args = (args[0], _sizes_of_values(name, args[1:], sources[0]))
    if kwargs:
        kwargs = dict(zip(kwargs, _values_among(kwargs.values()), strict=True))
    return _repeated(run(func, _values_among(args), kwargs), plates, sources)


def _sizes_of_values(name: str, sizes: Sequence[Any], repeats: Repeats) -> Sequence[Any]:
    """Return sizes that begin with those of the plates as they are for the values; ValueError for others."""
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    plates = repeats.index.shape
    begins = len(sizes) >= len(plates) and all(sizes[i] in (-1, plates[i]) for i in range(len(plates)))
    if not begins or (name in ("reshape", "view") and list(sizes).count(-1) > 1):
        raise ValueError(f"{name}: {sizes} does not begin with the sizes of the plates, {list(plates)}")
    return (*repeats.values.shape[: len(plates)], *sizes[len(plates) :])


def _values_among(given: Iterable[Any]) -> list[Any]:
    """Return a function's arguments, with the values in the place of tensors that repeat, also in lists of them."""
    return [
        value.repeats.values
        if isinstance(value, Repeated) and value.plates and value.repeats is not None
        else type(value)(_values_among(value))
        if isinstance(value, list | tuple) and tensors_among(value)
        else value
        for value in given
    ]


def _repeated(result: Any, plates: tuple[Plate, ...], sources: Sequence[Repeats]) -> Any:
    """Return values, alone or in lists and tuples, as tensors on plates that repeat as their sources do."""
    if isinstance(result, list | tuple):
        return type(result)([_repeated(each, plates, sources) for each in result])
    if not isinstance(result, Tensor) or not result.plates:
        return result
    with _NO_TORCH_FUNCTION():
        values, index = plain(result), sources[0].index
        has_gradient = values.requires_grad and torch.is_grad_enabled()
        value = _Gather.apply(values, index) if has_gradient else _without_numbers(values, index)
        repeats = Repeats(result, index, node=value.grad_fn, tensor=ref(value))
        # The forward of a user's autograd.Function has a gradient that cannot be seen inside.
        if has_gradient or (values.is_floating_point() and not torch.is_grad_enabled()):
            repeats.parents = tuple(source for source in sources if source.values.requires_grad or source.parents)
        for parent in repeats.parents:
            parent.children.add(repeats)
        for source in sources:
            if source.values.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
                repeats.memory = source.memory
    value.plates, value.averaged, value.repeats = plates, result.averaged, repeats
    return value


class _Gather(torch.autograd.Function):
    """The items [*plates, *event] of values [V, *ones, *event], without their numbers; their gradients, summed."""

    @staticmethod
    def forward(ctx: Any, values: Plain, index: Plain) -> Plain:
        ctx.save_for_backward(index)
        ctx.shape = values.shape
        return _without_numbers(values, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Plain) -> tuple[Plain, None]:
        gradient, (index,) = plain(gradients[0]), ctx.saved_tensors  # of a user's autograd.Function it may have plates
        rows = gradient.reshape(index.numel(), *gradient.shape[index.dim() :])
        return added_up(rows, index.flatten().to(rows.device), ctx.shape[0]).reshape(ctx.shape), None


def added_up(rows: Plain, index: Plain, num: int) -> Plain:
    """Return the sums [num, ...] of rows [items, ...] that have the same index, [items].

    Long sums are those of parts, as in torch.sum: one number after another, an error of one sign grows with each.
    """
    num_items = len(index)
    num_parts = max(1, min(-(-num_items // _PART), num_items // max(num, 1)))
    if num_parts > 1:
        index = index + num * (torch.arange(num_items, device=index.device) // -(-num_items // num_parts))
    dtype = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    sums = rows.new_zeros(num_parts * num, *rows.shape[1:], dtype=dtype).index_add(0, index, rows.to(dtype))
    return sums.unflatten(0, (num_parts, num)).sum(0).to(rows.dtype) if num_parts > 1 else sums.to(rows.dtype)


def _without_numbers(values: Plain, index: Plain) -> Any:
    """Return a tensor in the shape of all items, of one number that would be noticed."""
    nothing = values.new_full((), torch.nan if values.is_floating_point() or values.is_complex() else -1)
    return torch.Tensor._make_subclass(Repeated, nothing.expand((*index.shape, *values.shape[index.dim() :])))


def _is_plain_mode() -> bool:
    """Return whether no torch.func, forward mode or inference mode is at work, whose tensors are of other kinds."""
    is_of_func = torch._C._functorch.peek_interpreter_stack() is not None
    return not (is_of_func or forward_ad._current_level >= 0 or torch.is_inference_mode_enabled())


@contextmanager
def _plain_mode() -> Iterator[None]:
    """Work as if torch.func and inference mode were not at work."""
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False), _NO_TORCH_FUNCTION():
        yield
