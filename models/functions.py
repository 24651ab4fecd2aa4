"""Functions that know their own derivative: how they are declared, and one of general use."""

from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

F = TypeVar("F", bound=type[Function])


def known_signature(function: F) -> F:
    """Have the signature of a function's forward looked up once, and not at every call by Function.apply.

    That takes as long as ten small operations.
    """
    vars(function.forward)["__signature__"] = signature(function.forward)
    return function


def sum_of_squares(value: Tensor) -> Tensor:
    """Return the sum of squares over the last dimension of [..., D]: [...], differentiable any number of times.

    It passes over the numbers once, and once for the gradient.
    """
    return _SumOfSquares.apply(value)


@known_signature
class _SumOfSquares(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return torch.linalg.vector_norm(value, dim=-1).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return (2 * gradients[0]).unsqueeze(-1) * value

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return 2 * (value * tangents[0]).sum(-1)
