"""Everything that a job needs to go on as if it had never stopped, in one file written atomically."""

import random
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from errors import CorruptFileError
from orchestration.run_directory import RunDirectory
from orchestration.storage import write_atomically


def save(run: RunDirectory, step: int, metrics_length: int, parts: Mapping[str, Any]) -> None:
    """Write the state of `parts` (each has a state_dict), of every random generator, and how long the metrics were."""
    state = {
        "step": step,
        "metrics_length": metrics_length,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": random_state(),
    }
    write_atomically(run.checkpoint, lambda file: torch.save(state, file))


def load(run: RunDirectory, device: torch.device, names: Collection[str] | None = None) -> dict[str, Any] | None:
    """Return what `save` wrote, its tensors on `device`; None where there is no checkpoint.

    Raises CorruptFileError where the file cannot be read, or where its parts are not those of `names`.
    """
    if not run.checkpoint.exists():
        return None
    try:
        # The zip archive that torch.save writes has a CRC-32 of each of its files, which torch.load does not verify.
        with zipfile.ZipFile(run.checkpoint) as archive:
            damaged = archive.testzip()
        if damaged is None:
            state = torch.load(run.checkpoint, map_location=device, weights_only=False)
            if names is None or set(state["parts"]) == set(names):
                return state
            raise CorruptFileError(f"{run.checkpoint} has other parts: {', '.join(state['parts'])}")
    except torch.OutOfMemoryError:
        raise
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, zlib.error) as error:
        raise CorruptFileError(f"{run.checkpoint} is cut or damaged") from error
    raise CorruptFileError(f"{run.checkpoint} is damaged in {damaged}")


def restore(state: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Put `parts` and the random generators into the saved state."""
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    set_random_state(state["random"])


def random_state() -> dict[str, Any]:
    """Return the states of the global random generators of torch (CPU and CUDA), NumPy and Python."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global random generators into a state that `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def seed_random_state(seed: int) -> None:
    """Seed the global random generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
