"""Task `train`: maximise an estimator's bound by stochastic gradients, and measure the gradients on the way."""

import math
import time
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from analysis.active_units import ActiveUnits
from analysis.gradients import gradient_statistics, select_parameters
from datasets.base import Dataset
from errors import UserError
from orchestration.storage import write_atomically
from seeding import derive_seed
from tasks import checkpoint
from tasks.best import Best
from tasks.build import build_dataset, build_estimator, build_model, build_networks, build_optimizer, prepare_torch
from tasks.context import Context, Interrupted
from tasks.evaluation import evaluate_bound
from tasks.pictures import draw_pictures, is_image, png
from tasks.resume import resume
from tasks.schedules import Schedules

NAN_INTERVAL = 100  # steps between two looks at the loss where each look would make the CPU wait for the GPU


class Training:
    """One training run: what it is made of, and where it stands."""

    def __init__(self, config: DictConfig, context: Context):
        self.config, self.context = config, context
        self.device = prepare_torch(config)
        self.dataset = build_dataset(config).to(self.device)
        self.model = build_model(config, self.device, self.dataset)
        self.estimator = build_estimator(config, self.device)
        first = self.dataset.batch(0, config.batch_size, config.seed).to(self.device)
        build_networks(config, self.estimator, self.model, first)
        self.optimizer = build_optimizer(config, self.model, self.estimator)
        self.schedules = Schedules(config.task, self.estimator, self.model, self.optimizer)
        self.best = Best(context.run)
        self.parts: Mapping[str, Any] = {
            "model": self.model,
            "estimator": self.estimator,
            "optimizer": self.optimizer,
            "plateau": self.schedules.plateau,
            "best": self.best,
        }
        # Read once: omegaconf takes as long for a value as torch for a small product.
        self.batch_size, self.seed = config.batch_size, config.seed
        self.steps = total_steps(config, self.dataset)
        self.measures_gap = is_finite(self.dataset)
        self.points: dict[str, Tensor] = {}
        self.step = 0
        self.resumed = False

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        seed = derive_seed(self.seed, "training")
        self.recorder, step = resume(self.context.run, self.parts, self.device, seed)
        self.step, self.resumed = step or 0, step is not None
        try:
            self._loop()
        finally:
            self.recorder.close()

    def _loop(self) -> None:
        steps, eval_every, checkpoint_every = self.steps, self.config.eval_every, self.config.checkpoint_every
        fresh = not self.resumed  # a checkpoint is written after its step's evaluation
        self._clock = time.perf_counter(), self.step
        while True:
            self.schedules.set(self.step)
            if fresh and (self.step % eval_every == 0 or self.step == steps):
                self._evaluate()
            if self.step == steps:
                break
            stop = self.context.should_stop()
            if fresh and (stop or (self.step and self.step % checkpoint_every == 0)):
                self._save()
            if stop:
                raise Interrupted
            self._train_step()
            self.step += 1
            fresh = True
            self.context.progress(self.step, steps)
        if fresh:
            self._evaluate_best()
        self._save()

    def _train_step(self) -> None:
        x = self._batch()
        loss, _, _ = self.estimator(self.model, x)
        if (self.device.type == "cpu" or self.step % NAN_INTERVAL == 0) and not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"the loss is {value} at step {self.step + 1}")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _batch(self) -> Tensor:
        return self.dataset.batch(self.step, self.batch_size, self.seed).to(self.device)

    def _points(self, split: str) -> Tensor:
        """Return the observations that are evaluated: a copy, so that what a data set makes of all of them is freed."""
        if split not in self.points:
            points = self.dataset.points(split)[: self.config.evaluation.points]
            self.points[split] = points.to(self.device, copy=True)
        return self.points[split]

    def _evaluate(self) -> None:
        self._require_finite()
        seconds, steps = time.perf_counter() - self._clock[0], self.step - self._clock[1]
        found = {split: self._evaluate_on(split) for split in ("train", "test")}
        train, test = (found[split]["loss/L_k"] for split in ("train", "test"))
        if self.measures_gap:
            found["test"]["loss/gap"] = train - test
        found["train"] |= self.schedules.values()
        for split, values in found.items():
            self._record(split, values)
        snr = self._measure_gradients()
        self._draw_pictures()
        self.schedules.plateau.see(self.best.see(self.step, test, self.model))
        print(
            f"step {self.step:,}  train loss/L_k {train:.4f}  test loss/L_k {test:.4f}  grads/snr {snr:.4g}", flush=True
        )
        if steps:
            self._record("train", {"time/step_ms": 1e3 * seconds / steps})
        self._clock = time.perf_counter(), self.step

    def _evaluate_on(self, split: str) -> dict[str, float]:
        """Return the bound of the fixed evaluator on a split, the active units and the model's own metrics."""
        x, iw = self._points(split), self.config.evaluation.iw
        units = ActiveUnits() if self.model.has_units else None
        values = evaluate_bound(self.model, x, iw, derive_seed(self.seed, split, self.step), units)
        if units is not None:
            values |= units.summary()
        values |= {name: value.item() for name, value in self.model.diagnostics(x, self.dataset).items()}
        for name, value in values.items():
            if math.isnan(value) or (name == "loss/L_k" and math.isinf(value)):
                raise FloatingPointError(f"{split} {name} is {value} at step {self.step}")
        return values

    def _measure_gradients(self) -> float:
        """Record the gradient's statistics on the batch of this step; return its SNR."""
        analysis = self.config.analysis
        statistics = gradient_statistics(
            self.estimator,
            self.model,
            self._batch(),
            num_replicates=analysis.num_replicates,
            parameters=list(analysis.parameters),
            seed=derive_seed(self.seed, "gradients", self.step),
            block_size=analysis.block_size,
        )
        # An infinite gradient shows in the mean, a variance that overflows in itself.
        if not (statistics.mean + statistics.variance).isfinite().all():
            raise FloatingPointError(f"the gradient's mean or variance is not finite at step {self.step}")
        summary = statistics.summary()
        self._record("train", summary)
        return summary["grads/snr"]

    def _draw_pictures(self) -> None:
        """Draw what a model of images looks like, at the evaluations 0, 1, 2, 4, 8... and the last: few files."""
        count, rest = divmod(self.step, self.config.eval_every)
        x = self._points("test")
        if not is_image(x) or (self.step != self.steps and (rest or count & (count - 1))):
            return
        folder = self.context.run.samples
        folder.mkdir(exist_ok=True)
        for name, picture in draw_pictures(self.model, x, derive_seed(self.seed, "pictures", self.step)).items():
            content = png(picture)
            write_atomically(folder / f"{name}-{self.step:010d}.png", content)
            self.recorder.record_picture(self.step, name, picture, content)

    def _evaluate_best(self) -> None:
        """Evaluate the best model by test loss/L_k on the validation points."""
        with self.best.in_place(self.model):
            self.schedules.set(self.best.step)
            values = self._evaluate_on("valid")
        self.schedules.set(self.step)
        self._record("valid", values)
        print(f"best at step {self.best.step:,}  valid loss/L_k {values['loss/L_k']:.4f}", flush=True)

    def _record(self, split: str, values: Mapping[str, float]) -> None:
        """Record what has a finite value: the SNR where nothing varies has none, and no row."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.recorder.record(self.step, split, finite)

    def _save(self) -> None:
        self._require_finite()
        checkpoint.save(self.context.run, self.step, self.recorder.sync(), self.parts)

    def _require_finite(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"parameter {name} is not finite after step {self.step}")


def is_finite(dataset: Dataset) -> bool:
    """Return whether a data set has epochs, so that training meets the same points again."""
    try:
        dataset.batches_per_epoch(1)
    except ValueError:
        return False
    return True


def total_steps(config: DictConfig, dataset: Dataset) -> int:
    """Return how many steps a job takes: `task.epochs` passes over the training points, or `steps` where it is null.

    Raises UserError for a data set without epochs.
    """
    epochs = config.task.epochs
    if epochs is None:
        return config.steps
    try:
        return epochs * dataset.batches_per_epoch(config.batch_size)
    except ValueError as error:
        raise UserError(f"task.epochs={epochs}: {error}") from error


def run(config: DictConfig, context: Context) -> None:
    """Train as `config` says; write metrics, checkpoints, pictures and TensorBoard events to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop, FloatingPointError (with the step and the quantity)
    where the loss or a parameter is NaN or infinite.
    """
    Training(config, context).run()


def check(config: DictConfig) -> None:
    """Build everything once and take one gradient on two observations; raise what a job would raise."""
    device = prepare_torch(config)
    dataset = build_dataset(config)
    total_steps(config, dataset)
    model, estimator = build_model(config, device, dataset), build_estimator(config, device)
    build_networks(config, estimator, model, dataset.batch(0, config.batch_size, config.seed).to(device))
    schedules = Schedules(config.task, estimator, model, build_optimizer(config, model, estimator))
    x = dataset.points("train")[:2].to(device)
    estimator(model, x)[0].backward()
    schedules.check(estimator, model, x)
    model.diagnostics(x, dataset)
    select_parameters(model, list(config.analysis.parameters))
