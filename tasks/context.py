"""What a task is given beside its configuration: its run directory, and word from whoever runs it."""

from collections.abc import Callable
from dataclasses import dataclass

from orchestration.run_directory import RunDirectory


class Interrupted(Exception):
    """Raised by a task that was asked to stop and has written its checkpoint."""


def _never() -> bool:
    return False


def _ignore(step: int, steps: int) -> None:
    pass


@dataclass(frozen=True)
class Context:
    """The surroundings of a job.

    A task asks `should_stop()` between its steps; when it answers true, the task writes a checkpoint and raises
    `Interrupted`. It calls `progress(step, steps)` as often as it likes.
    """

    run: RunDirectory
    should_stop: Callable[[], bool] = _never
    progress: Callable[[int, int], None] = _ignore
