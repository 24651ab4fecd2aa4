"""Implicit maximum likelihood estimation through a solver, with a fixed step (I-MLE) or one that adapts (AIMLE)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from estimators.imle.noise import NoiseDistribution, check_noise, draw
from estimators.imle.solver import Arguments, Solver, fold, refuse_mapped, refuse_second_derivative, solve, unfold
from estimators.imle.target import (
    AdaptiveTargetDistribution,
    BaseTargetDistribution,
    TargetDistribution,
    check_target,
    target_scores,
)


@dataclass(frozen=True)
class _Options:
    solver: Solver
    target: BaseTargetDistribution
    noise: NoiseDistribution | None
    nb_samples: int
    input_temperature: float
    target_temperature: float
    scales_by_samples: bool
    divides_by_step: bool
    is_symmetric: bool
    name: str


class _Implicit(torch.autograd.Function):
    """MAP of the perturbed scores, and the noise; its gradient is the difference to MAP of the perturbed target's.

    vmap lays its copies into the batch, so that a solver sees one batch as always.
    """

    @staticmethod
    def forward(theta: Tensor, options: _Options, arguments: Arguments) -> tuple[Tensor, Tensor]:
        scores = theta.repeat_interleave(options.nb_samples, 0)
        noise = draw(options.noise, scores)
        return solve(options.solver, scores + options.input_temperature * noise, arguments), noise

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        theta, ctx.options, ctx.arguments = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(theta, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Difference.apply(*ctx.saved_tensors, gradients[0], ctx.options, ctx.arguments), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, theta: Tensor, options: _Options, arguments: Arguments) -> tuple:
        refuse_mapped(options.name, in_dims[2])
        y, noise = _Implicit.apply(fold(theta, in_dims[0], info.batch_size), options, arguments)
        if noise.dim() == 0:
            return (unfold(y, info.batch_size), noise), (0, None)
        return (unfold(y, info.batch_size), unfold(noise, info.batch_size)), (0, 0)


class _Difference(torch.autograd.Function):
    """The gradient by theta, as a function of all that it depends on; its own derivative is refused."""

    @staticmethod
    def forward(theta: Tensor, y: Tensor, noise: Tensor, dy: Tensor, options: _Options, arguments: Arguments) -> Tensor:
        scores = theta.repeat_interleave(options.nb_samples, 0)
        dy = dy * (options.nb_samples if options.scales_by_samples else 1)

        def solution(direction: Tensor) -> Tensor:
            perturbed = target_scores(options.target, scores, direction) + options.target_temperature * noise
            return solve(options.solver, perturbed, arguments)

        step = options.target.step(scores, dy)
        gradient = (solution(-dy) if options.is_symmetric else y) - solution(dy)
        options.target.update(gradient)
        if options.divides_by_step:
            step = torch.as_tensor(step, dtype=gradient.dtype, device=gradient.device)
            divided = gradient / ((2 if options.is_symmetric else 1) * step)
            # Without a step the two solutions differ, if at all, by their temperatures alone.
            gradient = torch.where(step > 0, divided, torch.zeros_like(divided))
        return gradient.unflatten(0, (len(theta), options.nb_samples)).mean(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.name = inputs[4].name

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        refuse_second_derivative(ctx.name)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        *tensors, options, arguments = inputs
        refuse_mapped(options.name, in_dims[5])
        folded = [
            fold(tensor, dim, info.batch_size) if tensor.dim() else tensor
            for tensor, dim in zip(tensors, in_dims[:4], strict=True)
        ]
        return unfold(_Difference.apply(*folded, options, arguments), info.batch_size), 0


def imle(
    function: Solver | None = None,
    target_distribution: BaseTargetDistribution | None = None,
    noise_distribution: NoiseDistribution | None = None,
    nb_samples: int = 1,
    input_noise_temperature: float = 1.0,
    target_noise_temperature: float = 1.0,
    scale_by_samples: bool = True,
) -> Callable[..., Any]:
    """Make a solver differentiable by implicit maximum likelihood estimation (Niepert et al. 2021).

    As a function, `imle(solver, ...)`, or a decorator, `@imle(...)`. The result takes theta [batch, ...] and further
    arguments, handed through unchanged, and returns y [batch * nb_samples, ...], an item's samples side by side:

        y = MAP(theta + tau_in eps),   d loss/d theta = mean_samples (y - MAP(theta' + tau_target eps)),

    with theta' of the target distribution (TargetDistribution() by default) and the same noise eps in both.

    noise_distribution: None for none. The temperatures multiply the noise.
    scale_by_samples: multiply dy by nb_samples before it enters the target, so that the gradient of a loss that is a
    mean over y does not shrink as samples are added; False for the scaling of the original.

    Raises ValueError where nb_samples is not positive, where a temperature is negative, for what is no target or noise
    distribution, where theta has no batch or is of integers, where scores hold a nan, and where the solver returns
    another shape or nan. Biased. Proof: tests/estimators/imle.
    """
    target = TargetDistribution() if target_distribution is None else target_distribution
    return _differentiable(
        "imle",
        function,
        target,
        noise_distribution,
        nb_samples,
        (input_noise_temperature, target_noise_temperature),
        scale_by_samples,
        divides_by_step=False,
        is_symmetric=False,
    )


def aimle(
    function: Solver | None = None,
    target_distribution: BaseTargetDistribution | None = None,
    noise_distribution: NoiseDistribution | None = None,
    nb_samples: int = 1,
    input_noise_temperature: float = 1.0,
    target_noise_temperature: float = 1.0,
    scale_by_samples: bool = True,
    symmetric_perturbation: bool = False,
) -> Callable[..., Any]:
    """Make a solver differentiable by adaptive implicit maximum likelihood estimation (Minervini et al. 2023).

    As `imle`, with the gradient divided by the target's step lambda,

        mean_samples (y - MAP(theta - lambda dy + tau eps)) / lambda,

    or, with `symmetric_perturbation`,

        mean_samples (MAP(theta + lambda dy + tau eps) - MAP(theta - lambda dy + tau eps)) / (2 lambda).

    The default target, an AdaptiveTargetDistribution of its own, adapts lambda until enough gradients are not zero; its
    state lives in that object, so give one to keep it in a checkpoint.
    """
    target = AdaptiveTargetDistribution() if target_distribution is None else target_distribution
    return _differentiable(
        "aimle",
        function,
        target,
        noise_distribution,
        nb_samples,
        (input_noise_temperature, target_noise_temperature),
        scale_by_samples,
        divides_by_step=True,
        is_symmetric=symmetric_perturbation,
    )


def _differentiable(
    name: str,
    function: Solver | None,
    target: BaseTargetDistribution,
    noise: NoiseDistribution | None,
    nb_samples: int,
    temperatures: tuple[float, float],
    scales_by_samples: bool,
    divides_by_step: bool,
    is_symmetric: bool,
) -> Callable[..., Any]:
    check_target(name, target)
    check_noise(name, noise)
    if nb_samples < 1:
        raise ValueError(f"{name} was given nb_samples={nb_samples}, expected at least 1")
    if min(temperatures) < 0:
        raise ValueError(f"{name} was given the temperatures {temperatures}, expected none below 0")

    def decorate(solver: Solver) -> Callable[..., Tensor]:
        options = _Options(
            solver, target, noise, nb_samples, *temperatures, scales_by_samples, divides_by_step, is_symmetric, name
        )

        @wraps(solver)
        def differentiable(theta: Tensor, *positional: Any, **named: Any) -> Tensor:
            check_scores(name, theta)
            return _Implicit.apply(theta, options, Arguments(positional, named))[0]

        return differentiable

    return decorate if function is None else decorate(function)


def check_scores(name: str, theta: Tensor) -> None:
    """Raise ValueError for scores without a batch, or of integers."""
    if theta.dim() < 2 or not theta.is_floating_point():
        raise ValueError(
            f"{name} was given scores {list(theta.shape)} of {theta.dtype}, expected [batch, ...] of floating point"
        )
