"""How jobs reach processes: an executor is one file here with a class `Executor`, chosen by `manager.py --executor`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from orchestration.queue import Row


class Event(NamedTuple):
    """What a slot has to say: `kind` is started, progress, ended, died or checked."""

    kind: str
    slot: str
    id: str = ""
    attempt: int = 0
    state: str = ""
    error: str = ""
    step: int = 0
    steps: int = 0
    errors: tuple[str, ...] = ()


class Executor(Protocol):
    """What the scheduler asks of an executor."""

    def free(self) -> int:
        """Return how many more jobs could start now."""

    def submit(self, row: Row) -> str:
        """Start this claimed job in a free slot; return the slot's name."""

    def check(self, jobs: Sequence[Sequence[str]], snapshot: str) -> list[str]:
        """Build each of these jobs' model and estimator in a worker; return one line for each refusal."""

    def events(self, timeout: float) -> list[Event]:
        """Return what has happened, waiting at most `timeout` seconds for something to happen."""

    def stop(self) -> None:
        """Ask all jobs to write a checkpoint and end."""

    def kill(self) -> None:
        """End every worker at once."""

    def close(self) -> None:
        """End the workers, which have nothing more to do."""


def names() -> list[str]:
    """Return the executors there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
