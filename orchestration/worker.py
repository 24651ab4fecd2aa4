"""A worker: a process that lives in one slot and runs the jobs that its manager hands it, one after another.

    python -m orchestration.worker --root ROOT --experiment NAME --manager NAME [--user_dir DIR]

It reads one JSON object a line on standard input and writes one a line on what was standard output when it started:

    <- {"do": "check", "jobs": [[override, ...], ...]}        -> {"event": "checked", "errors": [...]}
    <- {"do": "run", "id", "attempt", "overrides": [...]}     -> {"event": "started" | "progress" | "ended", "id", ...}
    <- {"do": "stop"}                                         the running job writes a checkpoint and ends as queued

At the end of its input (its manager is gone, or has no more to do) it finishes the job it runs, leaves the job's
status, and ends. It serves one snapshot of the source: the one in whose folder it was started.
"""

import argparse
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import UserError
from orchestration.configuration import compose, spell
from orchestration.execution import Outcome, check, execute, one_line
from orchestration.locks import ProcessLock
from orchestration.queue import Queue
from orchestration.run_directory import ExperimentFolder, RunDirectory
from tasks.context import Context

PROGRESS_INTERVAL = 0.5  # seconds between two words of progress
LOCK_INTERVAL = 0.05  # seconds between two looks at a lock that an earlier attempt still holds


class Worker:
    """The worker's side of the conversation."""

    def __init__(self, folder: ExperimentFolder, manager: str, user_dir: Path | None):
        self.folder, self.manager, self.user_dir = folder, manager, user_dir
        self.places = [f"root={spell(str(folder.root))}"]
        self.stopping = threading.Event()
        self.inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.orphaned = threading.Event()
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        # Nothing but the protocol may reach the manager: what a library prints outside a job goes to standard error.
        os.dup2(2, 1)

    def listen(self) -> None:
        """Sort what the manager says: a stop takes effect at once, also in the middle of a job."""
        for line in sys.stdin:
            message = json.loads(line)
            if message["do"] == "stop":
                self.stopping.set()
            else:
                self.inbox.put(message)
        self.orphaned.set()
        self.inbox.put(None)

    def say(self, **message: Any) -> None:
        """Tell the manager; a manager that is gone is not an error, the job's status says it all."""
        try:
            self._out.write(json.dumps(message) + "\n")
        except BrokenPipeError:
            self.orphaned.set()

    def serve(self) -> None:
        """Do what the manager asks until there is no more to do."""
        threading.Thread(target=self.listen, daemon=True).start()
        while not self.orphaned.is_set() and (message := self.inbox.get()):
            if message["do"] == "check":
                self.say(event="checked", errors=check_jobs(message["jobs"], self.user_dir))
            elif self.stopping.is_set():
                self.say(event="ended", id=message["id"], attempt=message["attempt"], state="queued", error="")
            else:
                outcome = self.run(message["id"], message["attempt"], message["overrides"])
                self.say(event="ended", id=message["id"], attempt=message["attempt"], **outcome._asdict())

    def run(self, identity: str, attempt: int, overrides: list[str]) -> Outcome:
        """Run one job under its lock, unless the claim on it has been taken away in the meantime."""
        run = self.folder.job(identity)
        lock = ProcessLock(run.lock)
        try:
            while not lock.acquire(blocking=False):
                if self.stopping.wait(LOCK_INTERVAL):
                    return Outcome("queued")
            if not self.is_current(identity, attempt):
                return Outcome("withdrawn")
            self.say(event="started", id=identity)
            with output_to(run):
                try:
                    job = compose([*overrides, *self.places], self.user_dir)
                except Exception as error:
                    traceback.print_exc()
                    return Outcome("failed", one_line(error))
                return execute(job, Context(run, self.stopping.is_set, self.progress(identity)), attempt)
        except OSError as error:
            return Outcome("refused", one_line(error))
        finally:
            lock.release()

    def is_current(self, identity: str, attempt: int) -> bool:
        """Say whether the queue still names this manager and this attempt for the job."""
        row = next((row for row in Queue(self.folder).rows() if row.id == identity), None)
        return row is not None and (row.state, row.manager, row.attempt) == ("running", self.manager, attempt)

    def progress(self, identity: str) -> Callable[[int, int], None]:
        """Return a function that passes the job's progress on, not too often."""
        last = 0.0

        def tell(step: int, steps: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > PROGRESS_INTERVAL:
                last = now
                self.say(event="progress", id=identity, step=step, steps=steps)

        return tell


def check_jobs(jobs: list[list[str]], user_dir: Path | None) -> list[str]:
    """Return one line for each job that its task refuses."""
    errors = []
    for overrides in jobs:
        try:
            check(compose(overrides, user_dir))
        except UserError as error:
            errors.append(str(error))
    return errors


@contextmanager
def output_to(run: RunDirectory) -> Iterator[None]:
    """Send all that this process prints, on whatever level, to the job's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(run.log, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def main() -> None:
    """Serve the manager that started this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--manager", required=True)
    parser.add_argument("--user_dir", type=Path)
    given = parser.parse_args()
    if given.user_dir:
        sys.path.insert(0, str(given.user_dir))
    Worker(ExperimentFolder(given.root, given.experiment), given.manager, given.user_dir).serve()


if __name__ == "__main__":
    main()
