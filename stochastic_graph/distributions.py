"""Distributions of torch.distributions seen as the tensors that they hold, plates and all."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributions import Categorical, Distribution, Transform


def all_tensors(distribution: Distribution) -> list[torch.Tensor]:
    """Return every tensor in a distribution."""
    found: list[torch.Tensor] = []
    _collect(distribution, found, set())
    return found


def _collect(part: Any, found: list[torch.Tensor], seen: set[int]) -> None:
    """Add the tensors in a part of a distribution; a transform and its inverse hold each other."""
    if isinstance(part, torch.Tensor):
        found.append(part)
    elif isinstance(part, Distribution | Transform):
        if id(part) not in seen:
            seen.add(id(part))
            for value in vars(part).values():
                _collect(value, found, seen)
    elif isinstance(part, list | tuple):
        for value in part:
            _collect(value, found, seen)


def map_tensors(part: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of a distribution with a function applied once to every tensor in it.

    What it computed of its parameters and keeps, as the logits of a distribution of probs, is left out.
    """
    return _mapped(part, function, {})


def _mapped(part: Any, function: Callable, known: dict[int, Any]) -> Any:
    if isinstance(part, torch.Tensor):
        if id(part) not in known:
            known[id(part)] = function(part)
        return known[id(part)]
    if isinstance(part, list):
        return [_mapped(each, function, known) for each in part]
    if isinstance(part, tuple) and not isinstance(part, torch.Size):
        return tuple(_mapped(each, function, known) for each in part)
    if not isinstance(part, Distribution | Transform) or id(part) in known:
        return known.get(id(part), part)
    # Not copy.copy: transforms drop their inverses as they are copied.
    copied = known[id(part)] = object.__new__(type(part))
    held = vars(copied)
    held.update(vars(part))
    for name in computed(part):
        held.pop(name)
    held.update({name: _mapped(value, function, known) for name, value in held.items()})
    return copied


def computed(part: Any) -> list[str]:
    """Return which of probs and logits a distribution was not built of, but has computed and keeps."""
    held = vars(part)
    both = [name for name in ("probs", "logits") if name in held]
    others = [name for name in both if held[name] is not held.get("_param")]
    return others if (len(both), len(others)) == (2, 1) else []


def forget_computed(distribution: Distribution) -> None:
    """Let a distribution, and those inside it, compute again what they have computed of their parameters and keep."""
    for name in computed(distribution):
        del vars(distribution)[name]
    for part in vars(distribution).values():
        if isinstance(part, Distribution):
            forget_computed(part)


def parameters_of(distribution: Distribution) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters that a distribution was built of, by name."""
    base = distribution
    while hasattr(base, "base_dist"):
        base = base.base_dist
    inner = getattr(base, "_categorical", getattr(base, "_dirichlet", base))
    held = {name: value for part in (base, inner) for name, value in vars(part).items() if name not in computed(part)}
    for name in (*base.arg_constraints, *(name for name in inner.arg_constraints if name not in base.arg_constraints)):
        value = held.get(name)
        if isinstance(value, torch.Tensor):
            yield name, value


def is_categorical(distribution: Distribution) -> bool:
    """Return whether a distribution's probs and logits are those of categories, which it normalises."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(getattr(distribution, "_categorical", distribution), Categorical)
