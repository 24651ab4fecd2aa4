"""The derivatives of several estimators' losses by the log-densities of particles that they have in common."""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from estimators.bounds.base import BoundEstimator
from estimators.bounds.weights import computed_once, extended
from models.functions import known_signature
from models.particles import Particles, densities_of


class Losses(nn.Module):
    """The losses of given particles, as a function of the parameters and buffers of the estimators."""

    def __init__(self, estimators: Sequence[BoundEstimator]):
        super().__init__()
        self.modules_of_estimators = nn.ModuleList(estimators)
        self._estimators = tuple(estimators)

    def forward(self, particles: Particles) -> list[Tensor]:
        """Return the losses, estimator by estimator."""
        return [each.loss(own, each.alpha, each.beta) for each, own in self._with_own(particles)]

    def _with_own(self, particles: Particles, sees_values: bool = False) -> Iterator[tuple[BoundEstimator, Particles]]:
        """Give each estimator the first of the particles, as many as it takes; what they compute alike is shared."""
        sizes = [estimator.num_particles + estimator.num_extra for estimator in self._estimators]
        firsts = {size: particles.first(size) for size in set(sizes)}
        with computed_once(sees_values):
            for estimator, size in zip(self._estimators, sizes, strict=True):
                yield estimator, firsts[size]


class Slopes(Losses):
    """The derivatives of -(mc x batch) times the same losses by the particles' log-densities.

    Where no estimator mixes copies, torch.func.vmap's replicates are further copies to it: it works on plain tensors,
    whose values it may look at.
    """

    def __init__(self, estimators: Sequence[BoundEstimator]):
        super().__init__(estimators)
        # Not inherited: what a subclass makes of the copies is its own.
        self._by_copy = all(vars(type(each)).get("copies_are_independent", False) for each in estimators)

    def forward(self, particles: Particles, needed: Sequence[bool]) -> list[list[Tensor]]:  # type: ignore[override]
        """Return the derivatives by those of `densities_of(particles)` that are needed, estimator by estimator."""
        if not (self._by_copy and any(needed)):
            return self.rows(particles, needed)
        slopes = iter(_ByCopy.apply(self, tuple(needed), len(particles.log_pz), *densities_of(particles)))
        return [[next(slopes) for _ in range(sum(needed))] for _ in self._estimators]

    def rows(self, particles: Particles, needed: Sequence[bool], sees_values: bool = False) -> list[list[Tensor]]:
        """Return the same, without another way for vmap."""
        return [
            [extended(slope, particles.log_px) for slope in compress(each.slopes(own, each.alpha, each.beta), needed)]
            for each, own in self._with_own(particles, sees_values)
        ]


@known_signature
class _ByCopy(Function):
    """(Slopes, needed, number of layers, *densities) -> the derivatives, estimator by estimator."""

    @staticmethod
    def forward(slopes: Slopes, needed: tuple[bool, ...], num_layers: int, *densities: Tensor) -> tuple[Tensor, ...]:
        log_px, log_pz, log_qz = densities[0], densities[1 : 1 + num_layers], densities[1 + num_layers :]
        particles = Particles(log_px, log_pz, log_qz, {}, nn.Module(), log_px.new_empty(0))
        rows = slopes.rows(particles, needed, sees_values=log_px.device.type == "cpu")
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
