"""Tasks of equal steps: each may be stopped between any two, and goes on to the numbers of one never interrupted."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from seeding import derive_seed
from tasks import checkpoint
from tasks.build import prepare_torch
from tasks.context import Context, Interrupted
from tasks.recorder import Recorder
from tasks.resume import resume


class StepwiseTask(ABC):
    """A task of `total` steps, `config.steps` unless a subclass says otherwise.

    `parts`, by name, hold all that a step changes beside the global random generators; each has a state_dict. They are
    what a checkpoint keeps, every `config.checkpoint_every` steps and where the task is asked to stop.
    """

    parts: Mapping[str, Any]
    recorder: Recorder

    def __init__(self, config: DictConfig, context: Context):
        self.config, self.context = config, context
        self.device = prepare_torch(config)
        self.seed: int = config.seed
        self.total: int = config.steps
        self.step = 0

    @abstractmethod
    def advance(self) -> None:
        """Take step number `step`, counted from 0, and record what it measures."""

    def finish(self) -> None:  # noqa: B027 (most have nothing to do)
        """Record what is measured once, after the last step."""

    def run(self) -> None:
        """Go from the last checkpoint, or from the start, to the end."""
        seed = derive_seed(self.seed, type(self).__name__)
        self.recorder, step = resume(self.context.run, self.parts, self.device, seed)
        self.step = step or 0
        try:
            self._loop()
        finally:
            self.recorder.close()

    def record(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add metrics to the run's; raise FloatingPointError for one that is not finite."""
        for name, value in values.items():
            if value - value != 0:
                raise FloatingPointError(f"{name} is {value} after step {self.step:,}")
        self.recorder.record(step, split, values)

    def _loop(self) -> None:
        saved = self.step
        while self.step < self.total:
            stop = self.context.should_stop()
            if self.step > saved and (stop or self.step % self.config.checkpoint_every == 0):
                self._save()
                saved = self.step
            if stop:
                raise Interrupted
            self.advance()
            self.step += 1
            self.context.progress(self.step, self.total)
        if self.step > saved:
            self.finish()
            self._save()

    def _save(self) -> None:
        checkpoint.save(self.context.run, self.step, self.recorder.sync(), self.parts)
