"""What changes with the step while a model trains: alpha, beta, the temperature, the learning rates.

All but a reduction on a plateau are pure functions of the step, so that a resumed job needs no state of them.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from errors import UserError, near

Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class Warmup:
    """A value that goes from `start` to `end` within `steps` steps, after `offset` steps at `start`.

    With t = (step - offset) / steps, held within [0, 1]: start + t (end - start) on the scale `linear`; on `log`
    1 - (1 - start)^(1-t) (1 - end)^t, the Rényi warm-up of Liévin et al. 2020, whose 1 - alpha, the exponent of the
    weights, grows by the same factor each step. Values of both ends are exact. On `log` start and end are below 1.
    """

    start: float
    end: float
    steps: int
    offset: int = 0
    scale: Scale = "linear"

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        done = step - self.offset
        if done <= 0:
            return self.start
        if done >= self.steps:
            return self.end
        t = done / self.steps
        if self.scale == "linear":
            return self.start + t * (self.end - self.start)
        return -math.expm1((1 - t) * math.log1p(-self.start) + t * math.log1p(-self.end))


@dataclass(frozen=True)
class Decay:
    """max(minimum, start exp(-rate step)): how Jang et al. 2017 lower the temperature of a relaxation."""

    start: float
    rate: float
    minimum: float

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return max(self.minimum, self.start * math.exp(-self.rate * step))


@dataclass(frozen=True)
class Reductions:
    """factor^n, with n how many of the increasing `steps` have come."""

    steps: tuple[int, ...]
    factor: float

    def __call__(self, step: int) -> float:
        """Return the value at a step: a step reduces from itself on."""
        return self.factor ** bisect_right(self.steps, step)


class Plateau:
    """Reductions by `factor` each time that `patience` evaluations in a row bring nothing better; none where null."""

    def __init__(self, patience: int | None, factor: float):
        self.patience, self.factor = patience, factor
        self.waited = self.count = 0

    def __call__(self) -> float:
        """Return factor^n after n reductions."""
        return self.factor**self.count

    def see(self, is_better: bool) -> None:
        """Take note of an evaluation."""
        self.waited = 0 if is_better else self.waited + 1
        if self.waited == self.patience:
            self.waited, self.count = 0, self.count + 1

    def state_dict(self) -> dict[str, int]:
        """Return how long it has waited and how often it has reduced."""
        return {"waited": self.waited, "count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Put back what `state_dict` returned."""
        self.waited, self.count = state["waited"], state["count"]


class Schedules:
    """All that a training job changes by the step; `set(step)` puts it where that step needs it.

    alpha and beta are set on the estimator, so that statistics of its gradients are taken at the same values; the
    temperature is set on the model, the rates on the optimizer's groups. What has no schedule is never touched.
    """

    def __init__(self, task: DictConfig, estimator: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer):
        """Read the schedules off the options of conf/task/train.yaml; raise UserError for what fits nothing."""
        self.plateau = Plateau(task.lr_patience, task.lr_factor)
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._reductions = Reductions(_increasing("task.lr_steps", task.lr_steps), task.lr_factor)
        self._reduces = bool(task.lr_steps) or task.lr_patience is not None
        self._factor = 1.0
        self._values: list[tuple[str, Any, Warmup | Decay]] = [
            *((name, estimator, warmup) for name, warmup in _warmups(task, estimator)),
            *(("temperature", model, decay) for decay in _decays(task, model)),
        ]

    def set(self, step: int) -> None:
        """Put everything where a step needs it."""
        for name, owner, schedule in self._values:
            setattr(owner, name, schedule(step))
        if self._reduces and (factor := self._reductions(step) * self.plateau()) != self._factor:
            self._factor = factor
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor

    def check(self, estimator: nn.Module, model: nn.Module, x: Tensor) -> None:
        """Try alpha and beta where they start, on x [batch, ...]; raise UserError where the estimator refuses one."""
        for name, owner, schedule in self._values:
            if owner is not estimator:
                continue
            try:
                estimator(model, x, **{name: schedule(0)})
            except ValueError as error:
                raise UserError(f"task.warmup_{name}={schedule(0)}: {error}") from error

    def values(self) -> dict[str, float]:
        """Return what is set, by the name of its metric, for what has a schedule."""
        values = {f"schedule/{name}": getattr(owner, name) for name, owner, _ in self._values}
        if self._reduces:
            values["schedule/lr"] = self._optimizer.param_groups[0]["lr"]
        return values


def _increasing(key: str, steps: Sequence[int]) -> tuple[int, ...]:
    if any(after <= before for before, after in pairwise(steps)):
        raise UserError(f"{key}={list(steps)}: expected steps that increase")
    return tuple(steps)


def _warmups(task: DictConfig, estimator: nn.Module) -> list[tuple[str, Warmup]]:
    """Return the warm-ups of alpha and beta that the options ask for, with the names of what they change."""
    scale = task.warmup_scale
    if scale not in get_args(Scale):
        raise UserError(f"task.warmup_scale={scale}{near(scale, get_args(Scale))}")
    starts = {"alpha": task.warmup_alpha, "beta": task.warmup_beta}
    given = {name: float(start) for name, start in starts.items() if start is not None}
    if given and not task.warmup_steps:
        names = " and ".join(f"task.warmup_{name}" for name in given)
        raise UserError(f"task.warmup_steps=0: {names} needs a number of steps to change in")
    if not given and (task.warmup_steps or task.warmup_offset):
        key = "warmup_steps" if task.warmup_steps else "warmup_offset"
        raise UserError(f"task.{key}={task[key]}: nothing warms up; give task.warmup_alpha or task.warmup_beta")
    scales: dict[str, Scale] = {"alpha": scale, "beta": "linear"}
    found = []
    for name, start in given.items():
        if not isinstance(end := getattr(estimator, name, None), float):
            raise UserError(f"task.warmup_{name}={start}: {type(estimator).__name__} has no {name} to change")
        found.append((name, Warmup(start, end, task.warmup_steps, task.warmup_offset, scales[name])))
    return found


def _decays(task: DictConfig, model: nn.Module) -> list[Decay]:
    """Return the decay of the temperature that the options ask for, or nothing."""
    rate, minimum = task.temperature_rate, task.temperature_minimum
    if not rate:
        if minimum:
            raise UserError(f"task.temperature_minimum={minimum}: nothing falls; give task.temperature_rate")
        return []
    start = getattr(model, "temperature", None)
    if not isinstance(start, int | float):
        name = type(model).__name__
        raise UserError(f"task.temperature_rate={rate}: {name} has no temperature; give 0")
    if not 0 < minimum < start:
        raise UserError(f"task.temperature_minimum={minimum}: expected above 0 and below model.temperature={start}")
    return [Decay(float(start), rate, minimum)]
