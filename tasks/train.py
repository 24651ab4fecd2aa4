"""Task `train`: maximise an estimator's bound by stochastic gradients, and measure the gradients on the way."""

import math
import time
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from analysis.gradients import gradient_statistics, select_parameters
from errors import CorruptFileError
from seeding import derive_seed
from tasks import checkpoint
from tasks.build import build_dataset, build_estimator, build_model, build_optimizer, prepare_torch
from tasks.context import Context, Interrupted
from tasks.evaluation import evaluate_bound
from tasks.recorder import Recorder

NAN_INTERVAL = 100  # steps between two looks at the loss where each look would make the CPU wait for the GPU


class Training:
    """One training run: what it is made of, and where it stands."""

    def __init__(self, config: DictConfig, context: Context):
        self.config, self.context = config, context
        self.device = prepare_torch(config)
        self.dataset = build_dataset(config)
        self.model = build_model(config, self.device)
        self.estimator = build_estimator(config, self.device)
        self.optimizer = build_optimizer(config, self.model, self.estimator)
        self.parts: Mapping[str, Any] = {
            "model": self.model,
            "estimator": self.estimator,
            "optimizer": self.optimizer,
        }
        # Read once: omegaconf takes as long for a value as torch for a small product.
        self.batch_size, self.seed = config.batch_size, config.seed
        self.step = 0
        self.resumed = False

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        self.recorder = self._resume()
        try:
            self._loop()
        finally:
            self.recorder.close()

    def _resume(self) -> Recorder:
        try:
            state = checkpoint.load(self.context.run, self.device)
            if state is not None:
                recorder = Recorder(self.context.run, state["metrics_length"], state["step"])
                checkpoint.restore(state, self.parts)
                self.step, self.resumed = state["step"], True
                print(f"going on from step {self.step:,}")
                return recorder
        except CorruptFileError as error:
            print(f"{error}: starting from the first step")
        self.context.run.clear()
        checkpoint.seed_random_state(derive_seed(self.seed, "training"))
        return Recorder(self.context.run)

    def _loop(self) -> None:
        steps, eval_every, checkpoint_every = self.config.steps, self.config.eval_every, self.config.checkpoint_every
        fresh = not self.resumed  # a checkpoint is written after its step's evaluation
        self._clock = time.perf_counter(), self.step
        while True:
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

    def _evaluate(self) -> None:
        self._require_finite()
        config = self.config
        seconds, steps = time.perf_counter() - self._clock[0], self.step - self._clock[1]
        said = f"step {self.step:,}"
        for split in ("train", "test"):
            x = self.dataset.points(split)[: config.evaluation.points].to(self.device)
            values = evaluate_bound(self.model, x, config.evaluation.iw, derive_seed(self.seed, split, self.step))
            values |= {name: value.item() for name, value in self.model.diagnostics(x, self.dataset).items()}
            for name, value in values.items():
                if math.isnan(value) or (name == "loss/L_k" and math.isinf(value)):
                    raise FloatingPointError(f"{split} {name} is {value} at step {self.step}")
            self._record(split, values)
            said += f"  {split} loss/L_k {values['loss/L_k']:.4f}"
        statistics = gradient_statistics(
            self.estimator,
            self.model,
            self._batch(),
            num_replicates=config.analysis.num_replicates,
            parameters=list(config.analysis.parameters),
            seed=derive_seed(self.seed, "gradients", self.step),
            block_size=config.analysis.block_size,
        )
        if not statistics.variance.isfinite().all():
            raise FloatingPointError(f"the gradient's variance is not finite at step {self.step}")
        summary = statistics.summary()
        self._record("train", summary)
        print(f"{said}  grads/snr {summary['grads/snr']:.4g}", flush=True)
        if steps:
            self._record("train", {"time/step_ms": 1e3 * seconds / steps})
        self._clock = time.perf_counter(), self.step

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


def run(config: DictConfig, context: Context) -> None:
    """Train as `config` says; write metrics, checkpoints and TensorBoard events to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop, FloatingPointError (with the step and the quantity)
    where the loss or a parameter is NaN or infinite.
    """
    Training(config, context).run()


def check(config: DictConfig) -> None:
    """Build everything once and take one gradient on two observations; raise what a job would raise."""
    device = prepare_torch(config)
    model, estimator = build_model(config, device), build_estimator(config, device)
    build_optimizer(config, model, estimator)
    dataset = build_dataset(config)
    dataset.batch(0, config.batch_size, config.seed)
    x = dataset.points("train")[:2].to(device)
    estimator(model, x)[0].backward()
    model.diagnostics(x, dataset)
    select_parameters(model, list(config.analysis.parameters))
