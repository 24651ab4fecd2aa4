"""Times as multiples of two primitives that are timed beside them, so that machines and busy hours compare."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Work(NamedTuple):
    """A piece of work: `run` does it `repeats` times; `before` each turn something is done that is not counted."""

    name: str
    run: Callable[[], object]
    repeats: int = 1
    before: Callable[[], object] = lambda: None


def primitives() -> list[Work]:
    """Return Q, one (1200 x 200) by (200 x 784) float32 product, and N, one `torch.randn(2_048_000)`."""
    left, right = torch.randn(1200, 200), torch.randn(200, 784)
    return [repeated("Q", lambda: left @ right, 20), repeated("N", lambda: torch.randn(2_048_000), 5)]


def repeated(name: str, run: Callable[[], object], repeats: int) -> Work:
    """Return the work of running `run` `repeats` times."""

    def run_all() -> None:
        for _ in range(repeats):
            run()

    return Work(name, run_all, repeats)


def measure(works: Sequence[Work], rounds: int) -> dict[str, float]:
    """Return the median seconds of each work, done once, of `rounds` turns."""
    return {name: statistics.median(values) for name, values in turns(works, rounds).items()}


def turns(works: Sequence[Work], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each work, done once, in each of `rounds` turns.

    The works take turns, after a first one that is not counted: what else the machine does meanwhile falls on all.
    """
    seconds: dict[str, list[float]] = {work.name: [] for work in works}
    for _ in range(rounds + 1):
        for work in works:
            work.before()
            start = time.perf_counter()
            work.run()
            seconds[work.name].append((time.perf_counter() - start) / work.repeats)
    return {name: values[1:] for name, values in seconds.items()}


def machine() -> str:
    """Return what the times were measured on: processor, threads, torch and Python versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    return (
        f"{processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
