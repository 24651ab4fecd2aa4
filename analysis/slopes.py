"""The derivatives of several estimators' losses by the log-densities of particles that they have in common."""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.autograd import Function

from estimators.bounds.base import BoundEstimator, LinearEstimator
from estimators.bounds.weights import computed_once, extended
from models.functions import known_signature
from models.particles import Particles, densities_of


class _Absent:
    """What stands for a model and what it returned where log-densities are all that counts: it refuses to be read."""

    def __getattribute__(self, name: str) -> Any:
        raise LookupError(f"there is nothing but log-densities here, and no {name}")


_ABSENT: Any = _Absent()
Row = TypeVar("Row")


def densities_alone(densities: Sequence[Tensor], num_layers: int, x: Tensor = _ABSENT) -> Particles:
    """Return particles of x that are nothing but log-densities, as `densities_of` lists them."""
    log_pz, log_qz = tuple(densities[1 : 1 + num_layers]), tuple(densities[1 + num_layers :])
    return Particles(densities[0], log_pz, log_qz, output=_ABSENT, model=_ABSENT, x=x)


class Losses(nn.Module):
    """The losses of given particles, as a function of the parameters and buffers of the estimators."""

    def __init__(self, estimators: Sequence[BoundEstimator]):
        super().__init__()
        self.modules_of_estimators = nn.ModuleList(estimators)
        self._estimators = tuple(estimators)

    def forward(self, particles: Particles) -> list[Tensor]:
        """Return the losses, estimator by estimator."""
        return self._each(lambda estimator, own: estimator.loss(own, estimator.alpha, estimator.beta), particles)

    def _each(
        self, function: Callable[[BoundEstimator, Particles], Row], particles: Particles, sees_values: bool = False
    ) -> list[Row]:
        """Call a function with each estimator and as many of the particles as it takes, the first of them.

        What the calls compute alike is shared.
        """
        sizes = [estimator.num_particles + estimator.num_extra for estimator in self._estimators]
        firsts = {size: particles.first(size) for size in set(sizes)}
        with computed_once(sees_values):
            return [function(estimator, firsts[size]) for estimator, size in zip(self._estimators, sizes, strict=True)]


class Slopes(Losses):
    """The derivatives of -(mc x batch) times the same losses by the particles' log-densities.

    Where no estimator mixes copies, torch.func.vmap's replicates are further copies to it: it works on plain tensors,
    whose values it may look at.
    """

    def __init__(self, estimators: Sequence[BoundEstimator]):
        super().__init__(estimators)
        self._by_copy = all(_is_linear_by_copy(type(each)) for each in estimators)

    def forward(self, particles: Particles, needed: Sequence[bool]) -> list[list[Tensor]]:  # type: ignore[override]
        """Return the derivatives by those of `densities_of(particles)` that are needed, estimator by estimator."""
        if not (self._by_copy and any(needed)):
            return self.rows(particles, needed)
        slopes = iter(_ByCopy.apply(self, tuple(needed), len(particles.log_pz), *densities_of(particles)))
        return [[next(slopes) for _ in range(sum(needed))] for _ in self._estimators]

    def rows(self, particles: Particles, needed: Sequence[bool], sees_values: bool = False) -> list[list[Tensor]]:
        """Return the same, without another way for vmap."""

        def row(estimator: BoundEstimator, own: Particles) -> list[Tensor]:
            slopes = estimator.slopes(own, estimator.alpha, estimator.beta)
            return [extended(slope, particles.log_px) for slope in compress(slopes, needed)]

        return self._each(row, particles, sees_values)


def _is_linear_by_copy(kind: type[BoundEstimator]) -> bool:
    """Return whether coefficients are all there is to a class, and it says that they are each copy's own.

    That is not inherited: what a subclass makes of the copies is its own.
    """
    parts = ("estimate", "loss", "slopes")
    is_linear = all(getattr(kind, part) is getattr(LinearEstimator, part) for part in parts)
    return is_linear and vars(kind).get("copies_are_independent", False)


@known_signature
class _ByCopy(Function):
    """(Slopes, needed, number of layers, *densities) -> the derivatives, estimator by estimator."""

    @staticmethod
    def forward(slopes: Slopes, needed: tuple[bool, ...], num_layers: int, *densities: Tensor) -> tuple[Tensor, ...]:
        particles = densities_alone(densities, num_layers)
        rows = slopes.rows(particles, needed, sees_values=densities[0].device.type == "cpu")
        return tuple(slope for row in rows for slope in row)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        slopes, needed, num_layers, *densities = inputs
        many = [
            density.expand(info.batch_size, *density.shape) if dim is None else density.movedim(dim, 0)
            for density, dim in zip(densities, in_dims[3:], strict=True)
        ]
        found = _ByCopy.apply(slopes, needed, num_layers, *(density.flatten(0, 1) for density in many))
        return tuple(each.unflatten(0, many[0].shape[:2]) for each in found), (0,) * len(found)
