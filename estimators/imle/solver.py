"""Calling a user's solver: no gradient, the same shape, nothing that is not a number."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Solver = Callable[..., Tensor]


class Arguments(NamedTuple):
    """What a solver takes beside the scores."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


def solve(solver: Solver, theta: Tensor, arguments: Arguments) -> Tensor:
    """Return the solver's answer for scores theta [n, ...], in their shape, dtype and device.

    Raises ValueError, naming the solver, for scores that hold a nan, and where it returns what is no tensor of their
    shape, or a nan.
    """
    name = getattr(solver, "__name__", type(solver).__name__)
    if theta.isnan().any():
        raise ValueError(f"scores {list(theta.shape)} for the solver {name} hold a nan")
    with torch.no_grad():
        found = solver(theta.detach().contiguous(), *arguments.positional, **arguments.named)
    if not isinstance(found, Tensor) or found.shape != theta.shape:
        returned = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the solver {name} returned {returned} for scores {list(theta.shape)}, expected their shape")
    if found.is_floating_point() and found.isnan().any():
        raise ValueError(f"the solver {name} returned nan for scores {list(theta.shape)}")
    return found.detach().to(theta)


def refuse_second_derivative(name: str) -> NoReturn:
    """Raise ValueError where a gradient is differentiated itself."""
    raise ValueError(f"{name} has first derivatives alone: its gradient cannot be differentiated")


class _FirstOrder(torch.autograd.Function):
    """A gradient as it stands, refusing to be differentiated by what it depends on."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # noqa: ARG004
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        refuse_second_derivative(ctx.name)


def first_order(name: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:
    """Return a gradient that was computed without a graph; to differentiate it by `depends_on` raises ValueError."""
    return _FirstOrder.apply(name, gradient, *depends_on)


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Lay the dimension over which torch.func.vmap maps, `size` copies where there is none, into the batch."""
    copies = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return copies.flatten(0, 1)


def unfold(tensor: Tensor, size: int) -> Tensor:
    """Undo `fold`: [size, batch, ...]."""
    return tensor.unflatten(0, (size, -1))


def refuse_mapped(name: str, dims: Any) -> None:
    """Raise ValueError where vmap maps over further arguments of a solver, which no one batch can have."""
    if any(dim is not None for dim in tree_leaves(dims, is_leaf=lambda leaf: leaf is None)):
        raise ValueError(f"{name}: torch.func.vmap maps over the scores alone, not over further arguments")
