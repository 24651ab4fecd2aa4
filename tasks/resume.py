"""How a task of steps begins: where its last checkpoint left it, or afresh."""

from collections.abc import Mapping
from typing import Any

import torch

from errors import CorruptFileError
from orchestration.run_directory import RunDirectory
from tasks import checkpoint
from tasks.recorder import Recorder


def resume(run: RunDirectory, parts: Mapping[str, Any], device: torch.device, seed: int) -> tuple[Recorder, int | None]:
    """Put `parts` and the random generators where the last checkpoint left them; return the recorder and the step.

    Where there is no checkpoint that can be read the step is None: what an earlier attempt left is removed, the
    generators are seeded, and `parts` stay as they are.
    """
    try:
        state = checkpoint.load(run, device, parts)
        if state is not None:
            recorder = Recorder(run, state["metrics_length"], state["step"])
            checkpoint.restore(state, parts)
            print(f"going on from step {state['step']:,}")
            return recorder, state["step"]
    except CorruptFileError as error:
        print(f"{error}: starting from the first step")
    run.clear()
    checkpoint.seed_random_state(seed)
    return Recorder(run), None
