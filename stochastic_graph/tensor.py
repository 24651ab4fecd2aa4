"""Tensors that know their plates: torch functions work on them, and none may lose a plate in silence."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from stochastic_graph.plates import Plate, are_same, said, union


class Tensor(torch.Tensor):
    """A torch tensor [*plates, ...] whose leading dimensions are plates.

    torch functions and modules take it beside others with other plates, and beside plain tensors, which are the same
    for all items and whose dimensions are lined up from the right with those that are no plates. What is computed is
    what would be computed for each item by itself. A function that would reduce, move or lose a plate raises a
    ValueError which names it, and so does one that is not known to leave plates alone (`per_item` runs those);
    `reduce_plates` takes means over plates.

    plates: the samples', the newest first, then the others.
    averaged: the nodes over whose samples a mean was taken on the way here: no cost may depend on that.
    """

    plates: tuple[Plate, ...] = ()
    averaged: tuple[Plate, ...] = ()

    @property
    def _tensor(self) -> torch.Tensor:
        """The plain tensor."""
        return self.as_subclass(torch.Tensor)

    @property
    def event_shape(self) -> torch.Size:
        """The shape without the plates."""
        return self.shape[len(self.plates) :]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self._tensor!r} with plates {[plate.name for plate in self.plates]}"

    def __format__(self, format_spec: str) -> str:
        return format(self._tensor, format_spec) if format_spec else repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the plain tensor: plates belong to a running story."""
        return self._tensor.__reduce_ex__(protocol)

    def __copy__(self) -> "Tensor":
        return wrap(self._tensor, self.plates, self.averaged)

    def __deepcopy__(self, memo: Any) -> "Tensor":
        return wrap(self._tensor.__deepcopy__(memo), self.plates, self.averaged)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a torch function by the rule that it has, and put the plates on what it returns."""
        from stochastic_graph.rules import run

        return run(func, args, kwargs or {})


def wrap(tensor: torch.Tensor, plates: Sequence[Plate], averaged: tuple[Plate, ...] = ()) -> Tensor:
    """Return a plain tensor [*plates, ...] as one that knows them."""
    wrapped = tensor.as_subclass(Tensor)
    wrapped.plates = tuple(plates)
    if averaged:
        wrapped.averaged = averaged
    return wrapped


def plates_of(value: Any) -> tuple[Plate, ...]:
    """Return the plates of a tensor; none for a plain one."""
    return value.plates if isinstance(value, Tensor) else ()


def averaged_of(value: Any) -> tuple[Plate, ...]:
    """Return the nodes over whose samples a mean was taken on the way to a tensor."""
    return value.averaged if isinstance(value, Tensor) else ()


def plain(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its plates."""
    return value.as_subclass(torch.Tensor) if isinstance(value, Tensor) else value


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors with plates among a function's arguments, and in lists and tuples of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors_among(value))
    return found


def common_plates(tensors: Sequence[Tensor]) -> tuple[Plate, ...]:
    """Return all plates of these tensors, in a tensor's order."""
    if not tensors:
        return ()
    first = tensors[0].plates
    for other in tensors[1:]:
        if not are_same(first, other.plates):
            return union(each.plates for each in tensors)
    return first


def common_averaged(tensors: Sequence[Tensor]) -> tuple[Plate, ...]:
    """Return the nodes that were averaged on the way to any of these tensors."""
    found = tensors[0].averaged if tensors else ()
    for other in tensors[1:]:
        found += tuple(plate for plate in other.averaged if plate not in found)
    return found


def wrapped(result: Any, plates: tuple[Plate, ...], averaged: tuple[Plate, ...], name: str) -> Any:
    """Return what a function gave, its tensors with plates. Raises ValueError where one of them has lost a plate."""
    if isinstance(result, torch.Tensor):
        check_plates(result, plates, name)
        return wrap(result, plates, averaged)
    if isinstance(result, tuple | list):
        return type(result)([wrapped(each, plates, averaged, name) for each in result])
    return result


def check_plates(result: torch.Tensor, plates: Sequence[Plate], name: str) -> None:
    """Raise ValueError where a result does not begin with the dimensions of its plates."""
    shape = result.shape
    for i, plate in enumerate(plates):
        if i >= len(shape):
            raise ValueError(
                f"{name} returned too few dimensions: {len(plates)} plate dimensions were expected, {len(shape)} "
                f"found. Plate {plate}, dimension {i}, is lost; keep the plates (reduction='none' for a loss, then a "
                f"sum over its last dimensions), or take the mean over it with reduce_plates(tensor, {plate.name!r})"
            )
        if shape[i] != plate.size:
            raise ValueError(
                f"{name} returned {list(shape)}, whose dimension {i} has size {shape[i]} where plate {plate} lies: "
                f"keep the {len(plates)} leading dimensions ({said(plates)})"
            )
