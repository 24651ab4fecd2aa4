"""The same work in another library, in a process and an environment of its own, which takes turns with this one.

Times are of the processor, each library's on one thread, so that what else the machine does falls on neither.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.timing import machine
from tasks.allocator import keep_freed_memory

Works = Mapping[str, Callable[[], object]]


class Peer:
    """A process of `python` that serves the works of a benchmark, `python -m benchmarks.<name> --serve`."""

    def __init__(self, python: str, name: str):
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{name}", "--serve"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._answer() != "ready":
            raise SystemExit(f"{python} lacks what --help says that it needs")

    def seconds(self, work: str) -> float:
        """Do a work once and return its seconds."""
        assert self._process.stdin is not None
        print(work, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def seconds_of(run: Callable[[], object]) -> float:
    """Run it twice and return the second one's seconds on the processor, in caches and memory that are its own."""
    run()
    start = time.process_time()
    run()
    return time.process_time() - start


def serve(works: Works) -> None:
    """Be the peer: read a work's name, do it, write its seconds, until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(seconds_of(works[line.strip()]), flush=True)


def compare(ours: Works, peer: Peer | None, rounds: int, goals: Mapping[str, float]) -> None:
    """Print minimum and median of each work's milliseconds in `rounds` turns, after one that is not counted."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ours}
    for turn in range(rounds + 1):
        for name, run in ours.items():
            own, other = seconds_of(run), peer.seconds(name) if peer else float("nan")
            if turn:
                seconds[name][0].append(own)
                seconds[name][1].append(other)
    print(f"{'':34}{'ours ms':>18}{'peer ms':>20}{'times faster':>16}   goal   (minimum, median)")
    for name, pair in seconds.items():
        (own_min, own_median), (other_min, other_median) = (
            (1e3 * min(times), 1e3 * statistics.median(times)) for times in pair
        )
        print(
            f"{name:34}{own_min:9.2f}{own_median:9.2f}{other_min:11.2f}{other_median:9.2f}"
            f"{other_min / own_min:9.2f}{other_median / own_median:7.2f}   {goals.get(name, '')}"
        )


def main(
    name: str,
    docstring: str | None,
    ours: Callable[[], Works],
    theirs: Callable[[], Works],
    goals: Mapping[str, float] | None = None,
    rounds: int = 5,
) -> Works:
    """Run the command line of `benchmarks.<name>`; return our works once they have been compared."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns that are counted (default: %(default)s)")
    parser.add_argument("--peer", help="the Python of an environment with the other library")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        serve(theirs())
        sys.exit()
    keep_freed_memory()  # as a job does
    print(machine())
    if options.peer is None:
        print("ours alone: --peer was not given; see --help for how to install it")
    peer = Peer(options.peer, name) if options.peer else None
    works = ours()
    try:
        compare(works, peer, options.rounds, goals or {})
    finally:
        if peer:
            peer.close()
    return works
