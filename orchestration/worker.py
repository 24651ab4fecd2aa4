"""A worker: a process that lives in one slot and runs the jobs that its manager hands it, one after another.

    python -m orchestration.worker --root ROOT --experiment NAME --manager NAME [--user_dir DIR]

It reads and writes one JSON object a line on what were standard input and output when it started:

    <- {"do": "check", "jobs": [[override, ...], ...]}        -> {"event": "checked", "errors": [...]}
    <- {"do": "run", "id", "attempt", "overrides", "alone"}   -> {"event": "waiting" | "started" | ... | "ended", ...}
    <- {"do": "stop"}                                         the running job writes a checkpoint and ends as queued
    <- {"do": "return"}                                       jobs that are not begun end as queued

It says {"event": "ready"} first, and may be handed jobs to go on with while it runs one. At the end of its input (its
manager is gone, or has no more to do) it finishes the job it runs, leaves the job's status, and ends. A SIGTERM sends
its job back to the queue with a checkpoint, and ends it; the word of the job's end then says that it is leaving. It
serves one snapshot of the source: the one in whose folder it was started.
"""

import argparse
import gc
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from errors import UserError
from orchestration.configuration import compose
from orchestration.execution import Outcome, check, execute, flush, open_log, unwritable
from orchestration.job import Job
from orchestration.locks import ProcessLock, holder
from orchestration.queue import Queue
from orchestration.run_directory import ExperimentFolder, RunDirectory
from tasks.context import Context

PROGRESS_INTERVAL = 0.5  # seconds between two words of progress
CANCEL_INTERVAL = 0.5  # seconds between two looks at whether the job is cancelled
PATIENCE = 5.0  # seconds until it is said who holds a job's lock
LOCK_INTERVAL = 0.05  # seconds between two looks at a lock that an earlier attempt still holds
GRACE = 5.0  # seconds that threads which jobs have left may keep a worker that has no more to do


class Worker:
    """The worker's side of the conversation."""

    def __init__(self, folder: ExperimentFolder, manager: str, user_dir: Path | None):
        self.folder, self.manager, self.user_dir = folder, manager, user_dir
        self.stopping = threading.Event()
        self.inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._speaking = threading.Lock()
        self.orphaned = threading.Event()
        self.told_to_end = False
        self._pid = os.getpid()
        # The conversation is nobody else's: what a library prints outside a job goes to standard error, and a job or
        # its child that reads standard input finds it empty.
        self._in, self._out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)

    def listen(self) -> None:
        """Sort what the manager says: a stop takes effect at once, also in the middle of a job."""
        for line in self._in:
            message = json.loads(line)
            if message["do"] == "stop":
                self.stopping.set()
            elif message["do"] == "return":
                self.return_jobs()
            else:
                self.inbox.put(message)
        self.orphaned.set()
        self.inbox.put(None)

    def return_jobs(self) -> None:
        """Send back the jobs that are not begun."""
        with suppress(queue.Empty):
            while True:
                message = self.inbox.get_nowait()
                if message is None:
                    self.inbox.put(None)  # the word to end
                    return
                self.return_job(message)

    def return_job(self, message: dict[str, Any]) -> None:
        """Send back a job that is not begun."""
        self.say(event="ended", id=message["id"], attempt=message["attempt"], state="queued", error="")

    def say(self, **message: Any) -> None:
        """Tell the manager; a manager that is gone is not an error, the job's status says it all."""
        if os.getpid() != self._pid:
            return  # a child that a job forked is none of the manager's workers
        try:
            with self._speaking:
                self._out.write(json.dumps(message) + "\n")
        except BrokenPipeError:
            self.orphaned.set()

    def end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (signal's signature)
        """Obey a signal: the running job writes a checkpoint and goes back to the queue, then this process ends.

        Nothing here takes a lock that the interrupted code may hold. A child that a job forked dies of the signal.
        """
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.told_to_end = True
        self.inbox.put(None)

    def serve(self) -> None:
        """Do what the manager asks until there is no more to do."""
        signal.signal(signal.SIGTERM, self.end)
        threading.Thread(target=self.listen, daemon=True).start()
        self.say(event="ready")
        while not (self.orphaned.is_set() or self.told_to_end) and (message := self.inbox.get()):
            if message["do"] == "check":
                self.say(event="checked", errors=check_jobs(message["jobs"], self.user_dir))
            elif self.stopping.is_set():
                self.return_job(message)
            else:
                outcome = self.run(message["id"], message["attempt"], message["overrides"], message.get("alone", False))
                # What a crowded job leaves on the device is surely gone with its process.
                leaving = self.told_to_end or outcome.state == "crowded"
                end = {"id": message["id"], "attempt": message["attempt"], **outcome._asdict()}
                self.say(event="ended", **end, leaving=leaving)
                if leaving:
                    return
                free_gpu_memory()

    def run(self, identity: str, attempt: int, overrides: list[str], alone: bool) -> Outcome:
        """Run one job under its lock, unless the claim on it has been taken away in the meantime."""
        run = self.folder.job(identity)
        lock = ProcessLock(run.lock)
        try:
            patience = time.monotonic() + PATIENCE
            while not lock.acquire(blocking=False):
                if time.monotonic() > patience:
                    patience = math.inf
                    self.say(event="waiting", id=identity, error=f"{holder(run.lock)} holds {run.lock}")
                if self.stopping.wait(LOCK_INTERVAL) or self.told_to_end:
                    return Outcome("queued")
            if not self.is_current(identity, attempt):
                return Outcome("withdrawn")
            self.say(event="started", id=identity)
            with output_to(run):
                context = Context(run, self.should_stop(run, attempt), self.progress(identity))
                return execute(lambda: self.compose(overrides), context, attempt, retry=not alone)
        except OSError as error:
            return unwritable(error)
        finally:
            lock.release()

    def compose(self, overrides: list[str]) -> Job:
        """Return the job, with this experiment's root: a path need not be a value that an override can spell."""
        job = compose(overrides, self.user_dir)
        return replace(job, config={**job.config, "root": str(self.folder.root)})

    def is_current(self, identity: str, attempt: int) -> bool:
        """Say whether the queue still names this manager and this attempt for the job."""
        row = Queue(self.folder).row(identity)
        return row is not None and (row.state, row.manager, row.attempt) == ("running", self.manager, attempt)

    def should_stop(self, run: RunDirectory, attempt: int) -> Callable[[], bool]:
        """Return a function that says whether the manager asked the job to stop, or somebody cancelled it."""
        next_look, cancelled = 0.0, False

        def asked() -> bool:
            nonlocal next_look, cancelled
            if not cancelled and (now := time.monotonic()) >= next_look:
                next_look = now + CANCEL_INTERVAL
                cancelled = run.cancelled_attempt() == attempt
            return cancelled or self.told_to_end or self.stopping.is_set()

        return asked

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


def free_gpu_memory() -> None:
    """Give back what torch keeps on a GPU for later, which neighbours may need until this worker's next job."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def output_to(run: RunDirectory) -> Iterator[None]:
    """Send all that this process prints, on whatever level, to the job's log.

    The job gets stream objects of its own, so that it can close or replace them and take nothing from its worker.
    """
    outer = sys.stdout, sys.stderr
    flush(*outer)
    with open_log(run) as log:
        saved = os.dup(1), os.dup(2)
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    inner = [_stream(number) for number in (1, 2)]
    sys.stdout, sys.stderr = inner
    try:
        yield
    finally:
        flush(sys.stdout, sys.stderr, *inner, *outer)
        sys.stdout, sys.stderr = outer
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _stream(number: int) -> TextIO:
    return open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


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
    end = threading.Timer(GRACE, os._exit, (0,))
    end.daemon = True
    end.start()


if __name__ == "__main__":
    main()
