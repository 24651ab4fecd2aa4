"""Task `efficiency`: what a training step costs, in time and in memory."""

import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from analysis.cost import least_of, peak_nbytes, peak_resident_nbytes, seconds_of
from errors import CorruptFileError, UserError
from seeding import derive_seed
from tasks import checkpoint
from tasks.build import build_dataset, build_estimator, build_model, build_networks, build_optimizer, prepare_torch
from tasks.context import Context, Interrupted
from tasks.recorder import Recorder

LEAST_STEPS, MOST_STEPS = 10, 1000  # that are timed
MEMORY_STEPS = 2  # in which memory is measured, apart from those that are timed
CHECKPOINT_SECONDS = 30.0  # of timed steps that a killed job loses at most, beside the one it was at
MIB = 2**20


class Times:
    """The seconds of the steps timed so far, and the machine that took them: those of another do not compare.

    `cpu` has the processor's seconds of each: less than `seconds` where one thread waits for its turn.
    """

    def __init__(self, machine: str):
        self.machine = machine
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def append(self, step: Callable[[], object], device: torch.device) -> None:
        """Time one more step."""
        start = time.process_time()
        self.seconds.append(seconds_of(step, device))
        self.cpu.append(time.process_time() - start)

    def state_dict(self) -> dict[str, Any]:
        """Return the times and their machine."""
        return {"machine": self.machine, "seconds": self.seconds, "cpu": self.cpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the times of `state` where they are of this machine."""
        if state["machine"] == self.machine:
            self.seconds, self.cpu = list(state["seconds"]), list(state["cpu"])


class Efficiency:
    """One measurement: a model in training, and the times of its steps so far.

    A step is the loss on a batch that is at hand, its backward pass, and the step of the optimizer, after which the
    gradients are freed. Steps differ in their batches and train the model, as in task `train`.
    """

    def __init__(self, config: DictConfig, context: Context):
        check_options(config)
        self.config, self.context = config, context
        self.device = prepare_torch(config)
        self.dataset = build_dataset(config)
        self.model = build_model(config, self.device, self.dataset)
        self.estimator = build_estimator(config, self.device)
        build_networks(config, self.estimator, self.model, self._batch(0))
        self.optimizer = build_optimizer(config, self.model, self.estimator)
        self.times = Times(machine_of(self.device))
        self._steps = count()

    def run(self) -> None:
        """Measure memory, then time, from the last checkpoint or from the start; write the results."""
        self._resume()
        for _ in range(self.config.task.warmup):
            self._pause()
            self._step(self._next_batch())
        memory = self._memory()
        self._time()
        self._write(memory | self._summary())

    def _resume(self) -> None:
        """Take the times of an earlier attempt; the model begins anew, for its values decide nothing."""
        state = None
        try:
            state = checkpoint.load(self.context.run, self.device)
        except CorruptFileError as error:
            print(f"{error}: starting from the first step")
        if state is None:
            self.context.run.clear()
        else:
            self.times.load_state_dict(state["parts"]["times"])
            print(f"going on from step {len(self.times.seconds):,}")
        checkpoint.seed_random_state(derive_seed(self.config.seed, "training"))

    def _batch(self, step: int) -> Tensor:
        return self.dataset.batch(step, self.config.batch_size, self.config.seed).to(self.device)

    def _next_batch(self) -> Tensor:
        return self._batch(next(self._steps))

    def _step(self, x: Tensor) -> None:
        loss, _, _ = self.estimator(self.model, x)
        if self.device.type == "cpu" and not loss.isfinite():
            raise FloatingPointError("the loss is not finite: the times of what is not a number say nothing")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _memory(self) -> dict[str, float]:
        """Return, in MiB, the peak of what a step makes, that of the process's RAM, and what stays between steps."""
        peaks: list[float] = []
        resident: list[int | None] = []

        def measure() -> None:
            peaks.append(peak_nbytes(lambda: self._step(x), self.device) / MIB)

        for _ in range(MEMORY_STEPS):
            self._pause()
            x = self._next_batch()
            resident.append(peak_resident_nbytes(measure))
        standing = sum(tensor.nbytes for tensor in standing_tensors(self.model, self.estimator, self.optimizer))
        found = {"memory/step_mb": max(peaks), "memory/step_mb_least": min(peaks), "memory/standing_mb": standing / MIB}
        if told := [nbytes for nbytes in resident if nbytes is not None]:
            found["memory/resident_mb"] = max(told) / MIB
        return found

    def _time(self) -> None:
        task, seconds = self.config.task, self.times.seconds
        self._saved_at = time.monotonic()
        while len(seconds) < task.least_steps or (sum(seconds) < task.seconds and len(seconds) < MOST_STEPS):
            if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
                self._save()
            self._pause()
            x = self._next_batch()
            self.times.append(lambda x=x: self._step(x), self.device)  # type: ignore[misc]
            share = min(len(seconds) / task.least_steps, sum(seconds) / task.seconds)
            self.context.progress(len(seconds), max(len(seconds), min(MOST_STEPS, round(len(seconds) / share))))

    def _pause(self) -> None:
        """Write a checkpoint and raise Interrupted where the job is to stop."""
        if self.context.should_stop():
            self._save()
            raise Interrupted

    def _save(self) -> None:
        checkpoint.save(self.context.run, len(self.times.seconds), 0, {"times": self.times})
        self._saved_at = time.monotonic()

    def _summary(self) -> dict[str, float]:
        """Return the times' least, its standard error, median and 90th percentile, ms; how many; where they were taken.

        What else runs on the machine shows in how far the median is from the least, and the least from that of the
        processor's own time.
        """
        seconds = self.times.seconds
        least, se = least_of(seconds)
        return {
            "time/step_ms": 1e3 * least,
            "time/step_ms_se": 1e3 * se,
            "time/step_ms_median": 1e3 * statistics.median(seconds),
            "time/step_ms_p90": 1e3 * statistics.quantiles(seconds, n=10, method="inclusive")[-1],
            "time/step_cpu_ms": 1e3 * min(self.times.cpu),
            "time/steps": len(seconds),
            "time/on_gpu": float(self.device.type == "cuda"),
        }

    def _write(self, values: Mapping[str, float]) -> None:
        """Write the metrics, with which the job is complete."""
        ms, median, mib = values["time/step_ms"], values["time/step_ms_median"], values["memory/step_mb"]
        print(
            f"{self.times.machine}: {ms:.4g} ms a step (median of {len(self.times.seconds)}: {median:.4g}), "
            f"{mib:.4g} MiB"
        )
        shutil.rmtree(self.context.run.tensorboard, ignore_errors=True)  # of an attempt that was killed in here
        recorder = Recorder(self.context.run)
        try:
            recorder.record(0, "train", values)
            recorder.sync()
        finally:
            recorder.close()
        self.context.run.checkpoint.unlink(missing_ok=True)


def machine_of(device: torch.device) -> str:
    """Return the host's name, and the GPU's where it is one."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{platform.node()}, {gpu}"


def standing_tensors(model: nn.Module, estimator: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield what stays from step to step: parameters and buffers, and the optimizer's state."""
    for module in (model, estimator):
        yield from module.parameters()
        yield from module.buffers()
    yield from (leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))


def check_options(config: DictConfig) -> None:
    """Raise UserError for options of the task that no measurement can have."""
    task = config.task
    if task.warmup < 0:
        raise UserError(f"task.warmup={task.warmup}: expected a number of steps, at least 0")
    if not task.seconds > 0:
        raise UserError(f"task.seconds={task.seconds}: expected a time above 0")
    if not LEAST_STEPS <= task.least_steps <= MOST_STEPS:
        raise UserError(f"task.least_steps={task.least_steps}: expected a number from {LEAST_STEPS} to {MOST_STEPS:,}")


def run(config: DictConfig, context: Context) -> None:
    """Measure as `config` says; write metrics, checkpoints and TensorBoard events to the run directory.

    Raises Interrupted after a checkpoint where it is asked to stop, UserError for wrong options, FloatingPointError
    where a loss is NaN or infinite; what torch raises where memory is short is not caught: such a job has failed.
    """
    Efficiency(config, context).run()


def check(config: DictConfig) -> None:
    """Build everything once and take one step on two observations; raise what a job would raise."""
    check_options(config)
    device = prepare_torch(config)
    dataset = build_dataset(config)
    model, estimator = build_model(config, device, dataset), build_estimator(config, device)
    x = dataset.batch(0, config.batch_size, config.seed).to(device)
    build_networks(config, estimator, model, x)
    optimizer = build_optimizer(config, model, estimator)
    estimator(model, x[:2])[0].backward()
    optimizer.step()
