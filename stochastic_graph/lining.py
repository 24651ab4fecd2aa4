"""Tensors with different plates, and plain ones, lined up: plates on the left, other dimensions on the right."""

from collections.abc import Sequence
from typing import Any

import torch

from stochastic_graph.plates import Plate, said, with_plates
from stochastic_graph.tensor import Tensor, plain, plates_of


class LineUp:
    """Gives tensors the same plates on the left, with size 1 or, where it `expands`, in full.

    Plain tensors are the same for all items. `event_dims`: how many dimensions beside plates the result has; what has
    fewer gets dimensions of size 1 between its plates and its own (not where it expands: functions that want arguments
    of one shape line them up themselves or refuse).
    """

    def __init__(self, name: str, plates: Sequence[Plate], event_dims: int, expands: bool = False):
        self.name, self.plates, self.event_dims, self.expands = name, plates, event_dims, expands

    def __call__(self, value: Any) -> Any:
        """Return a tensor lined up, and those in a list or tuple; anything else as it is."""
        if isinstance(value, torch.Tensor):
            own = self.check(value)
            if isinstance(value, Tensor):
                value = with_plates(plain(value), value.plates, self.plates)
                if own < self.event_dims and not self.expands:
                    value = with_ones(value, len(self.plates), self.event_dims - own)
            if self.expands:
                value = value.expand(*(plate.size for plate in self.plates), *value.shape[value.dim() - own :])
            return value
        if isinstance(value, list | tuple) and any(isinstance(each, torch.Tensor) for each in value):
            return type(value)([self(each) for each in value])
        return value

    def check(self, value: torch.Tensor) -> int:
        """Return how many dimensions a tensor has beside its plates; raise ValueError where they are too many."""
        own = event_dims_of(value)
        if own > self.event_dims:
            raise ValueError(
                f"{self.name}: a plain tensor {list(value.shape)} meets one with {self.event_dims} dimensions "
                f"beside its plates ({said(self.plates)}): say with denote_independent which of its dimensions are "
                "plates, or give the other one dimensions of size 1"
            )
        return own


def event_dims_of(value: torch.Tensor) -> int:
    """Return how many dimensions a tensor has beside its plates."""
    return value.dim() - len(plates_of(value))


def with_ones(value: torch.Tensor, at: int, count: int) -> torch.Tensor:
    """Return a tensor with `count` dimensions of size 1 from dimension `at` on."""
    return value.reshape((*value.shape[:at], *(1,) * count, *value.shape[at:]))


def product(first: torch.Tensor, second: torch.Tensor, plates: Sequence[Plate]) -> torch.Tensor:
    """Return first @ second over the dimensions that are no plates, as torch.matmul takes vectors and matrices."""
    ranks = event_dims_of(first), event_dims_of(second)
    if not all(ranks):
        raise ValueError(f"@ wants a vector or a matrix beside the plates ({said(plates)}) on both sides")
    most = max(*ranks, 2)
    known = [rank for value, rank in zip((first, second), ranks, strict=True) if isinstance(value, Tensor)]
    for value in (first, second):
        LineUp("@", plates, max(2, *known)).check(value)
    result = _matrices(first, plates, most, -2) @ _matrices(second, plates, most, -1)
    if ranks[1] == 1:
        result = result.squeeze(-1)
    return result.squeeze(-1 if ranks[1] == 1 else -2) if ranks[0] == 1 else result


def _matrices(value: torch.Tensor, plates: Sequence[Plate], dims: int, at: int) -> torch.Tensor:
    """Return an operand of @ as [*plates, ..., n, m] with `dims` dimensions of its own; a vector gets one at `at`."""
    own, rank = plates_of(value), event_dims_of(value)
    lined = with_plates(plain(value), own, plates) if own else plain(value)
    if rank == 1:
        lined, rank = lined.unsqueeze(at), 2
    return with_ones(lined, len(plates), dims - rank) if own and rank < dims else lined
