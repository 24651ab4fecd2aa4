"""Differentiation of a blackbox solver by one more call of it (Vlastelica et al. 2020)."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from estimators.imle.implicit import check_scores
from estimators.imle.solver import Arguments, Solver, first_order, solve


class _Blackbox(torch.autograd.Function):
    """The solution; its gradient is that of the loss made piecewise linear."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, solver: Solver, lambda_: float, arguments: Arguments) -> Tensor:
        # A copy: a solver may work in place, and these are the caller's own scores.
        y = solve(solver, theta.clone(), arguments)
        ctx.save_for_backward(theta, y)
        ctx.solver, ctx.lambda_, ctx.arguments = solver, lambda_, arguments
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        theta, y = ctx.saved_tensors
        with torch.no_grad():
            target = solve(ctx.solver, theta - ctx.lambda_ * gradients[0], ctx.arguments)
        gradient = (y - target) / ctx.lambda_
        return first_order("blackbox", gradient, theta, gradients[0]), None, None, None


def blackbox(function: Solver | None = None, lambda_: float = 10.0) -> Callable[..., Any]:
    """Make a solver differentiable: y = MAP(theta), d loss/d theta = (y - MAP(theta - lambda dy)) / lambda.

    As a function or a decorator. It is the exact gradient of a piecewise linear interpolation of the loss, of which
    lambda sets how coarse it is (Vlastelica et al. 2020, there for solvers that minimise). Raises ValueError for a
    lambda that is not positive, and as `imle` does.
    """
    if lambda_ <= 0:
        raise ValueError(f"blackbox was given lambda_={lambda_}, expected a number above 0")

    def decorate(solver: Solver) -> Callable[..., Tensor]:
        @wraps(solver)
        def differentiable(theta: Tensor, *positional: Any, **named: Any) -> Tensor:
            check_scores("blackbox", theta)
            return _Blackbox.apply(theta, solver, lambda_, Arguments(positional, named))

        return differentiable

    return decorate if function is None else decorate(function)
