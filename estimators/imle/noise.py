"""Noise for perturb-and-MAP. A distribution of your own needs `sample(shape, dtype, device)`, or `sample(shape)`."""

import inspect
from collections.abc import Callable
from math import log
from typing import Protocol, runtime_checkable

import torch
from torch import Size, Tensor
from torch.distributions import Gamma


@runtime_checkable
class NoiseDistribution(Protocol):
    """What perturbs the scores. A `sample` that has the options dtype and device is given those of the scores."""

    def sample(self, shape: Size, /) -> Tensor:
        """Return noise of this shape; what it is in, it is converted to the scores' dtype and device."""


class SumOfGammaNoiseDistribution:
    """(1/k) (sum_{i=1}^s Gamma(1/k, scale k/i) - log s): Niepert et al. 2021, section 4.1, at temperature 1.

    The sum of k independent draws is distributed as the largest of s unit exponentials minus log s, exactly, which is
    Gumbel in the limit of many iterations s. So k is how many of the components a solution chooses, and the score of
    each solution is then perturbed as the Gumbel-max trick wants it.
    """

    def __init__(self, k: float, nb_iterations: int = 10):
        if k <= 0 or nb_iterations < 1:
            raise ValueError(
                f"SumOfGammaNoiseDistribution was given k={k}, nb_iterations={nb_iterations}: expected k above 0 "
                "and at least 1 iteration"
            )
        self.k, self.nb_iterations = k, nb_iterations

    def sample(self, shape: Size, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Return noise of this shape; half precision is drawn in float32."""
        precise = torch.promote_types(dtype, torch.float32)
        concentration = torch.tensor(1 / self.k, dtype=precise, device=device)
        total = torch.full(shape, -log(self.nb_iterations) / self.k, dtype=precise, device=device)
        for i in range(1, self.nb_iterations + 1):
            total += Gamma(concentration, torch.full_like(concentration, i), validate_args=False).sample(shape)
        return total.to(dtype)


class GumbelNoiseDistribution:
    """loc + scale G, with G of the standard Gumbel distribution: exp(-exp(-g)) is its cumulative distribution."""

    def __init__(self, loc: float = 0.0, scale: float = 1.0):
        if scale <= 0:
            raise ValueError(f"GumbelNoiseDistribution was given scale={scale}, expected a number above 0")
        self.loc, self.scale = loc, scale

    def sample(self, shape: Size, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Return noise of this shape; half precision is drawn in float32."""
        precise = torch.promote_types(dtype, torch.float32)
        waiting = torch.empty(shape, dtype=precise, device=device).exponential_()
        return (self.loc - self.scale * waiting.clamp_(min=torch.finfo(precise).tiny).log_()).to(dtype)


def draw(noise: NoiseDistribution | None, like: Tensor) -> Tensor:
    """Return noise in the shape, dtype and device of a tensor; without a distribution a zero, [].

    Half precision is drawn in float32. Raises ValueError where the noise has another shape.
    """
    if noise is None:
        return like.new_zeros(())
    dtype = torch.promote_types(like.dtype, torch.float32)
    sample: Callable[..., Tensor] = noise.sample
    takes_dtype = {"dtype", "device"} <= inspect.signature(sample).parameters.keys()
    found = sample(like.shape, **({"dtype": dtype, "device": like.device} if takes_dtype else {}))
    if not isinstance(found, Tensor) or found.shape != like.shape:
        returned = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{type(noise).__name__}.sample returned {returned}, expected {list(like.shape)} as asked for")
    return found.detach().to(like)


def check_noise(name: str, noise: object) -> None:
    """Raise ValueError for what is neither None nor has the method `sample`."""
    if noise is not None and not isinstance(noise, NoiseDistribution):
        raise ValueError(f"{name} was given the noise {noise!r}, expected an object with a method sample(shape)")
