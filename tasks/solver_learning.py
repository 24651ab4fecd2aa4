"""What the tasks share that learn through a solver: the loop with its checkpoints, and the gradients to choose from."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from errors import UserError, near
from estimators.imle import (
    AdaptiveTargetDistribution,
    GumbelNoiseDistribution,
    NoiseDistribution,
    SumOfGammaNoiseDistribution,
    TargetDistribution,
    aimle,
    blackbox,
    imle,
    perturbed,
)
from estimators.imle.noise import draw
from estimators.imle.solver import Solver
from seeding import derive_seed
from tasks import checkpoint
from tasks.build import construct, options_of, prepare_torch
from tasks.context import Context, Interrupted
from tasks.resume import resume

NOISES = ("sum-of-gamma", "gumbel", "none")


def noise_of(name: str, k: float) -> NoiseDistribution | None:
    """Return the noise distribution of an option; k is how many components a solution has."""
    if name not in NOISES:
        raise UserError(f"task.noise={name}{near(name, NOISES)}")
    if name == "none":
        return None
    return GumbelNoiseDistribution() if name == "gumbel" else SumOfGammaNoiseDistribution(k)


def check_method(task: DictConfig, methods: tuple[str, ...]) -> None:
    """Raise UserError for a method that a task does not have, and for a step or a noise of zero that it cannot have."""
    method = task.method
    if method not in methods:
        raise UserError(f"task.method={method}{near(method, methods)}")
    positive = {"imle": "lambda_", "blackbox": "lambda_", "perturbed": "temperature"}.get(method)
    if positive is not None and task[positive] <= 0:
        raise UserError(f"task.{positive}={task[positive]}: expected a number above 0 for task.method={method}")


def differentiable(
    task: DictConfig, solver: Solver, noise: NoiseDistribution | None, target: AdaptiveTargetDistribution
) -> Callable[[Tensor], Tensor]:
    """Return the solver with the gradient that `task.method` names: scores [batch, ...] to y [batch * samples, ...].

    `perturbed` returns the mean of the samples, `blackbox` and it have no noise of the options. `target` is aimle's.
    """
    temperature = task.get("temperature", 1.0)
    sampled = {"noise_distribution": noise, "nb_samples": task.nb_samples}
    heated = {"input_noise_temperature": temperature, "target_noise_temperature": temperature}
    makers: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
        "imle": partial(imle, target_distribution=TargetDistribution(1.0, task.lambda_), **sampled, **heated),
        "aimle": partial(aimle, target_distribution=target, symmetric_perturbation=True, **sampled, **heated),
        "straight-through": partial(straight_through, noise=noise, nb_samples=task.nb_samples, temperature=temperature),
        "blackbox": partial(blackbox, lambda_=task.lambda_),
        "perturbed": partial(perturbed, num_samples=task.nb_samples, sigma=temperature),
    }
    return makers[task.method](solver)


def straight_through(
    solver: Solver, noise: NoiseDistribution | None, nb_samples: int, temperature: float
) -> Callable[[Tensor], Tensor]:
    """Return y = MAP(theta + tau eps) with the gradient dy by theta, as if y were theta: biased (Bengio 2013)."""

    def solve(theta: Tensor) -> Tensor:
        scores = theta.repeat_interleave(nb_samples, 0)
        with torch.no_grad():
            y = solver(scores + temperature * draw(noise, scores))
        return y + scores - scores.detach()

    return solve


def adaptive_target(task: DictConfig) -> AdaptiveTargetDistribution:
    """Return aimle's target of these options."""
    return AdaptiveTargetDistribution(initial_beta=task.lambda_, beta_update_step=task.lambda_update)


class SolverLearning(ABC):
    """One run: scores that learn through a solver, from the last checkpoint, or from the start, to the end."""

    def __init__(self, config: DictConfig, context: Context):
        self.config, self.context, self.task = config, context, config.task
        self.device = prepare_torch(config)
        self.target = adaptive_target(config.task)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "parameters"))
            self.network = self.make_network().to(self.device)
        options = {key: value for key, value in options_of(config.optimizer).items() if key != "estimator_lr"}
        self.optimizer = construct(options, self.network.parameters())
        self.parts: Mapping[str, Any] = {
            "network": self.network,
            "optimizer": self.optimizer,
            "target": self.target,
        }
        self.step = 0

    @abstractmethod
    def make_network(self) -> nn.Module:
        """Return what has the parameters."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Return the loss of this step, whose gradient is the method's."""

    @abstractmethod
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each split."""

    def finish(self) -> None:  # noqa: B027 (for those that draw)
        """Do what is left after the last step."""

    def run(self) -> None:
        """Learn; raise Interrupted after a checkpoint where the job is to stop."""
        seed = derive_seed(self.config.seed, "training")
        self.recorder, step = resume(self.context.run, self.parts, self.device, seed)
        self.step, self._fresh = step or 0, step is None
        try:
            self._loop()
        finally:
            self.recorder.close()

    def _loop(self) -> None:
        config, steps = self.config, self.config.steps
        while True:
            if self._fresh and (self.step % config.eval_every == 0 or self.step == steps):
                self._evaluate()
            if self.step == steps:
                break
            stop = self.context.should_stop()
            if self._fresh and (stop or (self.step and self.step % config.checkpoint_every == 0)):
                self._save()
            if stop:
                raise Interrupted
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.step += 1
            self._fresh = True
            self.context.progress(self.step, steps)
        self.finish()
        self._save()

    def _evaluate(self) -> None:
        """Record the metrics; the noise of an evaluation is its own, so that how many there are changes no step."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.config.seed, "evaluation", self.step))
            found = self.evaluate()
        for split, values in found.items():
            for name, value in values.items():
                if name.startswith(("loss/", "path/", "top_k/")) and not math.isfinite(value):
                    raise FloatingPointError(f"{split} {name} is {value} at step {self.step}")
            self.recorder.record(self.step, split, {k: v for k, v in values.items() if math.isfinite(v)})
        print(f"step {self.step:,}", *(f"{split} {k} {v:.4g}" for split in found for k, v in found[split].items()))

    def _save(self) -> None:
        checkpoint.save(self.context.run, self.step, self.recorder.sync(), self.parts)
