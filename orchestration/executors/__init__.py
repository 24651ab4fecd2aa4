"""How jobs reach processes: an executor is one file here with a class `Executor`, chosen by `manager.py --executor`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from orchestration.queue import Row


class Event(NamedTuple):
    """What a slot has to say.

    `kind` is waiting (for the job's lock), started, progress, ended, died, next (a job that was handed over ahead takes
    its turn), returned (one that was handed over and never begun) or checked.
    """

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

    def takes(self, row: Row) -> bool:
        """Say whether this job could start now; a device is emptied for one that is to run alone."""

    def submit(self, row: Row) -> str:
        """Start this claimed job in a free slot; return the slot's name."""

    def submit_ahead(self, row: Row, most: int) -> bool:
        """Hand the job to a busy slot that holds less than `most` ahead, to go on with; say whether there was one."""

    def recall(self) -> None:
        """Ask for the jobs that were handed over ahead and are not begun."""

    def check(self, jobs: Sequence[Sequence[str]], snapshot: str) -> list[str]:
        """Build each of these jobs' model and estimator in a worker; return one line for each refusal."""

    def events(self, timeout: float) -> list[Event]:
        """Return what has happened, waiting at most `timeout` seconds for something to happen."""

    def stop(self) -> None:
        """Ask all jobs to write a checkpoint and end."""

    def kill(self) -> None:
        """End every worker at once, and what its jobs have started."""

    def close(self, at_once: Callable[[], bool]) -> None:
        """End the workers, which have nothing more to do; without waiting for them as soon as `at_once` says so."""


def names() -> list[str]:
    """Return the executors there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
