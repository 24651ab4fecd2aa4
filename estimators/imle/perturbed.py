"""Perturbed optimisers: the mean of a solver under noise, whose gradient is known (Berthet et al. 2020)."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from estimators.imle.implicit import check_scores
from estimators.imle.solver import Arguments, Solver, first_order, solve

NOISES = ("normal", "gumbel")


class _Perturbation(NamedTuple):
    solver: Solver
    num_samples: int
    sigma: float
    noise: str

    def draw(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise Z [samples, batch, ...] and the gradient of its negative log-density, drawn in float32 or up."""
        shape, dtype = (self.num_samples, *theta.shape), torch.promote_types(theta.dtype, torch.float32)
        if self.noise == "normal":
            z = torch.randn(shape, dtype=dtype, device=theta.device).to(theta)
            return z, z
        waiting = torch.empty(shape, dtype=dtype, device=theta.device).exponential_()
        waiting.clamp_(min=torch.finfo(dtype).tiny)
        return (-waiting.log()).to(theta), (1 - waiting).to(theta)

    def solutions(self, theta: Tensor, z: Tensor, arguments: Arguments) -> Tensor:
        """Return argmax_y <theta + sigma Z, y>, [samples, batch, ...]."""
        scores = theta.detach() + self.sigma * z
        return solve(self.solver, scores.flatten(0, 1), arguments).view_as(scores)


class _Mean(torch.autograd.Function):
    """The mean solution, and its Jacobian by integration by parts."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, perturbation: _Perturbation, arguments: Arguments) -> Tensor:
        z, score = perturbation.draw(theta)
        solutions = perturbation.solutions(theta, z, arguments)
        mean = solutions.mean(0)
        ctx.save_for_backward(theta, solutions, score, mean)
        ctx.sigma = perturbation.sigma
        return mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        theta, solutions, score, mean = ctx.saved_tensors
        num = len(solutions)
        with torch.no_grad():
            # The mean of the other samples is a baseline: (y_s - mean of others) = (y_s - mean) n / (n - 1).
            centred = (solutions - mean) * (num / (num - 1)) if num > 1 else solutions
            product = (gradients[0] * centred).flatten(2).sum(-1)
            weights = product.reshape(*product.shape, *(1,) * (score.dim() - 2))
            gradient = (weights * score).mean(0) / ctx.sigma
        return first_order("perturbed", gradient, theta, gradients[0]), None, None


def perturbed(
    function: Solver | None = None, num_samples: int = 100, sigma: float = 1.0, noise: str = "normal"
) -> Callable[..., Any]:
    """Make a solver differentiable as the mean y*(theta) = E[argmax_y <theta + sigma Z, y>] over noise Z.

    As a function or a decorator. The result takes theta [batch, ...] and further arguments, and returns the mean over
    `num_samples` draws, [batch, ...]; its gradient is the unbiased estimate (Berthet et al. 2020, proposition 3.1)

        d<dy, y*>/d theta = E[<dy, y_s> grad nu(Z_s)] / sigma,

    nu being the negative log-density of the noise, with the mean of the other samples subtracted from y_s.
    noise: normal or gumbel. Raises ValueError for other options, and as `imle` does.
    """
    perturbation = _checked("perturbed", num_samples, sigma, noise)

    def decorate(solver: Solver) -> Callable[..., Tensor]:
        own = perturbation._replace(solver=solver)

        @wraps(solver)
        def differentiable(theta: Tensor, *positional: Any, **named: Any) -> Tensor:
            check_scores("perturbed", theta)
            return _Mean.apply(theta, own, Arguments(positional, named))

        return differentiable

    return decorate if function is None else decorate(function)


class FenchelYoungLoss(nn.Module):
    """E[max_y <theta + sigma Z, y>] - <theta, y>, mean over the batch: convex, with gradient y*(theta) - y.

    Its minimum over theta is where the mean solution is the target y [batch, ...] (Berthet et al. 2020, section 4). The
    gradient's estimate is unbiased; the value is that of the same draws.
    """

    def __init__(self, solver: Solver, num_samples: int = 100, sigma: float = 1.0, noise: str = "normal"):
        super().__init__()
        self.perturbation = _checked("FenchelYoungLoss", num_samples, sigma, noise)._replace(solver=solver)

    def forward(self, theta: Tensor, y: Tensor, *positional: Any, **named: Any) -> Tensor:
        """Return the loss of scores theta and targets y, both [batch, ...], a scalar."""
        check_scores("FenchelYoungLoss", theta)
        if y.shape != theta.shape:
            raise ValueError(f"FenchelYoungLoss was given scores {list(theta.shape)} and targets {list(y.shape)}")
        return _FenchelYoung.apply(theta, y.to(theta), self.perturbation, Arguments(positional, named))


class _FenchelYoung(torch.autograd.Function):
    """The value of the loss, and y*(theta) - y of the same draws as its gradient by theta, -theta as that by y."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, y: Tensor, perturbation: _Perturbation, arguments: Arguments) -> Tensor:
        z, _ = perturbation.draw(theta)
        solutions = perturbation.solutions(theta, z, arguments)
        mean = solutions.mean(0)
        ctx.save_for_backward(theta, mean - y)
        noise_part = (perturbation.sigma * z * solutions).mean(0)
        return ((mean - y) * theta + noise_part).flatten(1).sum(1).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        theta, difference = ctx.saved_tensors
        scale = gradients[0].detach() / len(theta)
        by_theta, by_y = (
            first_order("FenchelYoungLoss", scale * part, theta, gradients[0]) for part in (difference, -theta.detach())
        )
        return by_theta, by_y, None, None


def _unset(theta: Tensor) -> Tensor:  # noqa: ARG001
    raise AssertionError("a perturbation without its solver")


def _checked(name: str, num_samples: int, sigma: float, noise: str) -> _Perturbation:
    if num_samples < 1 or sigma <= 0:
        raise ValueError(f"{name} was given num_samples={num_samples}, sigma={sigma}: expected at least 1, and above 0")
    if noise not in NOISES:
        raise ValueError(f"{name} was given noise={noise!r}, expected one of {', '.join(NOISES)}")
    return _Perturbation(_unset, num_samples, sigma, noise)
