#!/usr/bin/env python3
"""Run one job: a Hydra configuration, composed from conf/ and the overrides given.

    python run.py                                              # the defaults: a Gaussian mixture with ovis-gamma1
    python run.py estimator=vimco-arithmetic estimator.iw=20 seed=3 steps=5000
    python run.py model=gaussian_toy estimator=pathwise-iwae --cfg

The job's folder is <root>/single/jobs/<id>. The same overrides again go on from its checkpoint, or say that it is done.
Exit status: 0 done; 1 failed, or the disk refused; 2 bad usage or configuration; 130 interrupted.
"""

import argparse
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from errors import UserError
from orchestration.command_line import DONE, FAILED, INTERRUPTED, Parser, existing_folder, guarded

if TYPE_CHECKING:
    from orchestration.run_directory import RunDirectory


class Tee(io.TextIOBase):
    """A stream that also writes to a log, for as long as that is open."""

    def __init__(self, stream: TextIO, log: TextIO):
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        """Write to both."""
        if not self.log.closed:
            self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush both."""
        if not self.log.closed:
            self.log.flush()
        self.stream.flush()


class Interrupts:
    """The signals of one run: the first asks the job to stop, the second stops it, another one ends the process."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)

    def any(self) -> bool:
        """Say whether there was one."""
        return self.count > 0

    def _take(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (signal's signature)
        # A handler runs in the middle of anything, itself included: it uses no lock and no buffered stream.
        self.count += 1
        if self.count > 1:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        with suppress(OSError):
            os.write(2, b"interrupted: writing a checkpoint; once more stops at once\n")


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(__doc__)
    p.add_argument("--cfg", action="store_true", help="print the resolved configuration and run nothing")
    p.add_argument("--user_dir", type=existing_folder, metavar="DIR", help="your own modules and conf/")
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="key=value, such as model=gmm or estimator.iw=5")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or a message need not be Unicode
    arguments = parser().read(argv)
    return guarded(lambda: command(arguments))


def command(arguments: argparse.Namespace) -> int:
    """Compose the job and run it under its lock."""
    import yaml

    from orchestration.configuration import compose
    from orchestration.execution import check, execute, open_log
    from orchestration.experiment import SINGLE
    from orchestration.locks import ProcessLock, holder
    from orchestration.run_directory import ExperimentFolder
    from tasks.context import Context

    if arguments.user_dir:
        sys.path.insert(0, str(arguments.user_dir))
    job = compose(arguments.overrides, arguments.user_dir)
    if arguments.cfg:
        print(yaml.safe_dump(job.config, sort_keys=False), end="")
        return DONE
    run = ExperimentFolder(Path(job.config["root"]).resolve(), SINGLE).job(job.id)
    if is_done(run):
        print(f"done already: {run.path}")
        return DONE
    check(job)
    lock = ProcessLock(run.lock)
    if not lock.acquire(blocking=False):
        raise UserError(f"{run.path} is being run by {holder(run.lock)}: wait for it, or stop it")
    try:
        attempt = (run.read_status() or {}).get("attempt", 0) + 1
        interrupts = Interrupts()
        print(f"{job.id}\n{run.path}", flush=True)
        streams = sys.stdout, sys.stderr
        with open_log(run) as log:
            sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)
            try:
                outcome = execute(lambda: job, Context(run, interrupts.any), attempt)
            finally:
                sys.stdout, sys.stderr = streams
    finally:
        lock.release()
    if outcome.state == "queued":
        # A second Ctrl-C that comes too late must not take the exit status: Python's own end is all that is left.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("stopped at a checkpoint: the same command goes on from there")
        return INTERRUPTED
    print(f"{outcome.state}{': ' if outcome.error else ''}{outcome.error}")
    return DONE if outcome.state == "done" else FAILED


def is_done(run: "RunDirectory") -> bool:
    """Say whether the job in this folder has ended well."""
    return (run.read_status() or {}).get("state") == "done"


if __name__ == "__main__":
    sys.exit(main())
