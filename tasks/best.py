"""The best model so far: what best.pt holds, and what the final evaluation is of."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orchestration.run_directory import RunDirectory
from orchestration.storage import write_atomically


class Best:
    """The state of the model at the evaluation with the highest test loss/L_k, the first of equals.

    It is kept here, and with it in each checkpoint, so that best.pt is a copy that no resumed job depends on.
    """

    def __init__(self, run: RunDirectory):
        self._run = run
        self.step, self.value = 0, -math.inf
        self.model: dict[str, Any] = {}

    def see(self, step: int, value: float, model: nn.Module) -> bool:
        """Take note of an evaluation, keep its model where it is the best and write best.pt; return whether it is."""
        if not value > self.value:
            return False
        self.step, self.value, self.model = step, value, copy.deepcopy(model.state_dict())
        self.write()
        return True

    def write(self) -> None:
        """Write best.pt: the step, its test loss/L_k as `value`, and the state_dict of the model."""
        write_atomically(self._run.best, lambda file: torch.save(self.state_dict(), file))

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Put the best state into the model for as long as the context lasts."""
        last = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.model)
        try:
            yield
        finally:
            model.load_state_dict(last)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the value and the model's state."""
        return {"step": self.step, "value": self.value, "model": self.model}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned, best.pt too."""
        self.step, self.value, self.model = state["step"], state["value"], dict(state["model"])
        if self.model:
            self.write()
