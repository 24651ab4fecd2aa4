"""Plates: the named dimensions, on the left of a tensor, along which what happens is independent."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Plate:
    """A dimension of `size` independent items: observations of data, or samples of a node.

    name: what errors and functions call it.
    weight: [size, *sizes of parents], what the items count for in a mean; None: 1 / size each.
    parents: the plates of what it was made of, the newest first.
    is_sample: whether its items are the samples of a node.
    is_replicates: whether its items are repetitions of a whole story, each with a gradient of its own.
    order: where it stands. In a tensor samples lie on the left, the newest first, then replicates, then all others, the
    newest first: every plate stands to the left of those that it may depend on.
    """

    name: str
    size: int
    weight: Tensor | None = None
    parents: tuple["Plate", ...] = ()
    is_sample: bool = False
    is_replicates: bool = False
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        rank = 0 if self.is_sample else 1 if self.is_replicates else 2
        object.__setattr__(self, "order", (rank, -next(_serial)))

    def __str__(self) -> str:
        return f"{self.name!r} of size {self.size}"

    def __copy__(self) -> "Plate":
        return self

    def __deepcopy__(self, memo: object) -> "Plate":
        return self

    def is_same(self, other: "Plate") -> bool:
        """Return whether two plates are one: a sample's is its own, others agree in name, size and weight."""
        if self is other:
            return True
        if self.is_sample or other.is_sample:
            return False
        return (self.name, self.size) == (other.name, other.size) and _are_equal(self.weight, other.weight)


def _are_equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def union(groups: Iterable[Sequence[Plate]]) -> tuple[Plate, ...]:
    """Return all plates of these groups in the order in which a tensor has them.

    Of two that are the same the older one is taken. Raises ValueError where two have a name in common and are not the
    same.
    """
    found: dict[str, Plate] = {}
    for group in groups:
        for plate in group:
            present = found.setdefault(plate.name, plate)
            if present is plate:
                continue
            if not present.is_same(plate):
                raise ValueError(
                    f"two different plates are named {plate.name!r}, of sizes {present.size} and {plate.size}: "
                    + (
                        "a sample of before the last reset() or backward() meets a later one; sample again"
                        if plate.is_sample or present.is_sample
                        else "give what is independent otherwise another name"
                    )
                )
            if present.order < plate.order:
                found[plate.name] = plate
    return tuple(sorted(found.values(), key=_order))


def _order(plate: Plate) -> tuple[int, int]:
    return plate.order


def position(plates: Sequence[Plate], plate: Plate) -> int | None:
    """Return where a plate lies among others, None where it does not."""
    for i, each in enumerate(plates):
        if each.is_same(plate):
            return i
    return None


def are_same(first: Sequence[Plate], second: Sequence[Plate]) -> bool:
    """Return whether these are the same plates in the same order."""
    return first is second or (
        len(first) == len(second) and all(a.is_same(b) for a, b in zip(first, second, strict=True))
    )


def with_plates(tensor: Tensor, own: Sequence[Plate], wanted: Sequence[Plate]) -> Tensor:
    """Return a plain tensor [*own, ...] as [*wanted, ...], with size 1 for the plates that it does not have.

    `wanted` has to contain every plate of `own`.
    """
    if are_same(own, wanted):
        return tensor
    places = [position(wanted, plate) for plate in own]
    order = sorted(range(len(own)), key=lambda i: places[i])  # type: ignore[arg-type, return-value]
    if order != list(range(len(own))):
        tensor = tensor.permute(*order, *range(len(own), tensor.dim()))
    for i in range(len(wanted)):
        if i not in places:
            tensor = tensor.unsqueeze(i)
    return tensor


def mean_over(tensor: Tensor, plates: Sequence[Plate], plate: Plate) -> tuple[Tensor, tuple[Plate, ...]]:
    """Return the weighted mean of a plain tensor [*plates, ...] over one of them, and the plates that are left.

    A weight that depends on the plate's parents brings them along.
    """
    if plate.weight is None:
        at = position(plates, plate)
        return tensor.mean(at), tuple(each for each in plates if not each.is_same(plate))
    own = (plate, *plate.parents)[: plate.weight.dim()]
    wanted = union([plates, own])
    weight = with_plates(plate.weight, own, wanted)
    tensor = with_plates(tensor, plates, wanted)
    weight = weight.reshape(*weight.shape, *(1,) * (tensor.dim() - weight.dim()))
    at = position(wanted, plate)
    return (tensor * weight).sum(at), tuple(each for each in wanted if not each.is_same(plate))


def check_weight(weight: Tensor | None, size: int, name: str) -> None:
    """Raise ValueError for a weight that is not [size]."""
    if weight is not None and (not isinstance(weight, torch.Tensor) or weight.shape != (size,)):
        shape = list(weight.shape) if isinstance(weight, torch.Tensor) else weight
        raise ValueError(f"plate {name!r} was given weights {shape}, expected a tensor [{size}]")


def said(plates: Iterable[Plate]) -> str:
    """Return what errors call these plates."""
    return ", ".join(map(str, plates)) or "none"
