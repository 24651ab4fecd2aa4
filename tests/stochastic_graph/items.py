"""The slow, obvious reference: what a function gives for each item of the plates by itself."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

import stochastic_graph as storch
from stochastic_graph.plates import Plate, union
from stochastic_graph.tensor import plain, plates_of, tensors_among


def on_plates(values: torch.Tensor, *names: str) -> storch.Tensor:
    """Return a tensor whose leading dimensions are plates of these names, in a tensor's order whatever that is."""
    result: torch.Tensor = values
    for i, name in enumerate(names):
        result = storch.denote_independent(result, i, name)
    assert isinstance(result, storch.Tensor)
    return result


def per_item(function: Callable, *args: Any) -> tuple[torch.Tensor, tuple[Plate, ...]]:
    """Return what a function gives for plain tensors, item by item, stacked [*plates, ...]; and the plates."""
    plates = union(each.plates for each in tensors_among(args))
    sizes = [plate.size for plate in plates]
    rows = []
    for at in itertools.product(*map(range, sizes)):
        where = {plate.name: i for plate, i in zip(plates, at, strict=True)}
        rows.append(function(*[_item(value, where) for value in args]))
    return torch.stack(rows).reshape(*sizes, *rows[0].shape), plates


def _item(value: Any, where: dict[str, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_item(each, where) for each in value])
    if not isinstance(value, storch.Tensor):
        return value
    return plain(value)[tuple(where[plate.name] for plate in value.plates)]


def assert_per_item(function: Callable, *args: Any, tolerance: float = 1e-12) -> None:
    """Fail unless a function gives for tensors with plates what it gives for each item by itself."""
    expected, plates = per_item(function, *args)
    result = function(*args)
    assert isinstance(result, storch.Tensor)
    assert [plate.name for plate in plates_of(result)] == [plate.name for plate in plates]
    torch.testing.assert_close(
        plain(result), expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_stride=False
    )
