"""Workers on this machine: one process a slot, fed through pipes."""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.devices import Slot
from orchestration.executors import Event
from orchestration.queue import Row
from orchestration.run_directory import ExperimentFolder

KERNEL_COUNTERS = Path("/proc/vmstat")
MEMORY_LAG = 10.0  # seconds between the kernel's word of a kill for memory and the end of the process
MOST_CHECKS = 3  # workers that may die of a check
GRACE = 10.0  # seconds that a worker without a job has to end
END_INTERVAL = 0.01  # seconds between two looks at whether workers have ended


@dataclass
class Worker:
    """A worker process, the job that it was handed, if any, and those it holds to go on with."""

    slot: Slot
    snapshot: str
    process: subprocess.Popen[bytes]
    job: Row | None = None
    has_begun: bool = False  # with the job: it has the job's lock
    ahead: deque[Row] = field(default_factory=deque)
    returns: bool = False  # what it holds ahead when it is asked to: it has started, and its source knows how
    is_recalled: bool = False
    unread: bytes = b""

    def hand(self, row: Row) -> None:
        """Send the worker a job."""
        self.tell(do="run", id=row.id, attempt=row.attempt, overrides=row.overrides, alone=row.alone)

    def advance(self) -> None:
        """Take note that the job has ended: the next one is under way."""
        self.job = self.ahead.popleft() if self.ahead else None
        self.has_begun = False

    def tell(self, **message: Any) -> None:
        """Send one message; a worker that is gone is noticed when its events are read."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """Close the worker's input: it finishes what it does and ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def has_ended(self) -> bool:
        """Say whether the process has ended; its number is nobody else's until `reap`."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> None:
        """Wait for the end of the process."""
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def kill(self) -> None:
        """End the process at once, and those of its jobs' children that are in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Wait for the end of the process, end what is left of its group, and return its exit status."""
        self.wait()
        self.kill()
        return self.process.wait()


class Executor:
    """One long-lived worker a slot, so that `import torch` is paid once; a worker that dies is replaced."""

    def __init__(self, folder: ExperimentFolder, manager: str, slots: Sequence[Slot]):
        self.folder, self.manager, self.slots = folder, manager, list(slots)
        self._workers: dict[str, Worker] = {}
        self._kept: str | None = None  # the device that is being emptied for a job that is to run alone
        self._killed_for_memory = killed_for_memory()
        self._kills: deque[float] = deque()  # when such kills were seen that explain no death yet
        self._selector = selectors.DefaultSelector()

    def free(self) -> int:
        """Return how many slots have no job, on devices that are not kept for a job alone."""
        return sum(slot.name not in self._busy() for slot in self._open_slots())

    def takes(self, row: Row) -> bool:
        """Say whether the job could start now.

        For one that is to run alone, a device gets no further jobs until it has none: only then the answer is yes.
        Neighbours that other managers put there are not known here.
        """
        if not row.alone:
            return self.free() > 0
        jobs = Counter(slot.visible for slot in self.slots if slot.name in self._busy())
        if self._kept is None:
            self._kept = min(dict.fromkeys(slot.visible for slot in self.slots), key=lambda device: jobs[device])
        return not jobs[self._kept]

    def submit(self, row: Row) -> str:
        """Hand the job to a free slot, preferably one whose worker serves the job's snapshot already.

        A job that is to run alone gets the device that was kept for it, with a process of its own: idle workers go, and
        what memory they hold.
        """
        if row.alone:
            for neighbour in [worker for worker in self._workers.values() if worker.slot.visible == self._kept]:
                self._dismiss(neighbour)
            slot = next(slot for slot in self.slots if slot.visible == self._kept)
            worker, self._kept = self._start(slot, row.snapshot), None
        else:
            worker = self._worker(row.snapshot)
        worker.job, worker.has_begun = row, False
        worker.hand(row)
        return worker.slot.name

    def submit_ahead(self, row: Row, most: int) -> bool:
        """Hand the job to a busy worker of the job's snapshot that holds less than `most` ahead, if there is one.

        Such a worker need not wait for its manager between two jobs. Jobs that run alone are not handed over ahead, nor
        is any job to a neighbour of theirs.
        """
        slots = [] if row.alone else self._open_slots()
        able = [worker for worker in self._workers.values() if worker.job and worker.returns and worker.slot in slots]
        able = [worker for worker in able if worker.snapshot == row.snapshot and len(worker.ahead) < most]
        if not able:
            return False
        worker = min(able, key=lambda worker: len(worker.ahead))
        worker.ahead.append(row)
        worker.is_recalled = False
        worker.hand(row)
        return True

    def recall(self) -> None:
        """Ask each worker for the jobs that it holds ahead; those it has not begun come back as returned."""
        for worker in self._workers.values():
            if worker.ahead and not worker.is_recalled:
                worker.is_recalled = True
                worker.tell(do="return")

    def _busy(self) -> set[str]:
        return {name for name, worker in self._workers.items() if worker.job is not None}

    def _open_slots(self) -> list[Slot]:
        closed = {worker.slot.visible for worker in self._workers.values() if worker.job and worker.job.alone}
        return [slot for slot in self.slots if slot.visible not in closed | {self._kept}]

    def _dismiss(self, worker: Worker) -> None:
        """End an idle worker."""
        self._end([worker], at_once=lambda: False)

    def _end(self, workers: Sequence[Worker], at_once: Callable[[], bool]) -> None:
        """Wait for the end of these workers; those that have no job, or all where that is asked, are made to end."""
        for worker in workers:
            worker.hang_up()
        deadline = time.monotonic() + GRACE
        while left := [worker for worker in workers if not worker.has_ended()]:
            for worker in left:
                if at_once() or (worker.job is None and time.monotonic() > deadline):
                    worker.kill()
            time.sleep(END_INTERVAL)
        for worker in workers:
            worker.reap()
            self._forget(worker)

    def check(self, jobs: Sequence[Sequence[str]], snapshot: str) -> list[str]:
        """Build each of these jobs' model and estimator in one worker; return one line for each refusal.

        A worker that dies of it is replaced, but not for ever.
        """
        why = ""
        for _ in range(MOST_CHECKS):
            worker = self._worker(snapshot)
            worker.tell(do="check", jobs=jobs)
            answer = self._answer()
            if answer.kind == "checked":
                return list(answer.errors)
            why = answer.error
        return [f"the jobs could not be checked {MOST_CHECKS} times: {why}"]

    def _answer(self) -> Event:
        """Return the first event by which a worker says what it has checked, or has died."""
        while True:
            for event in self.events(timeout=1.0):
                if event.kind in ("checked", "died"):
                    return event

    def events(self, timeout: float) -> list[Event]:
        """Return what the workers have said, and which of them have died."""
        found: list[Event] = []
        self._watch_memory()
        for key, _ in self._selector.select(timeout):
            found += self._read(key.data)
        for worker in list(self._workers.values()):
            if worker.has_ended():
                found += self._read(worker)
                if worker.slot.name in self._workers:
                    found += self._bury(worker, worker.reap())
        return found

    def _watch_memory(self) -> None:
        """Take note of the processes that the kernel has killed for memory since the last look."""
        killed = killed_for_memory()
        self._kills.extend([time.monotonic()] * (killed - self._killed_for_memory))
        self._killed_for_memory = killed

    def _is_for_memory(self) -> bool:
        """Say whether a worker that was just found killed may be one that the kernel has killed for memory.

        The kernel counts the kill first; until the process is dead it may be a while. Each kill explains one death.
        """
        self._watch_memory()
        while self._kills and time.monotonic() - self._kills[0] > MEMORY_LAG:
            self._kills.popleft()
        if not self._kills:
            return False
        self._kills.popleft()
        return True

    def stop(self) -> None:
        """Ask all jobs to write a checkpoint and end."""
        for worker in self._workers.values():
            worker.tell(do="stop")

    def kill(self) -> None:
        """End every worker at once."""
        for worker in self._workers.values():
            worker.kill()
        for worker in self._workers.values():
            worker.wait()

    def close(self, at_once: Callable[[], bool]) -> None:
        """End the workers: they leave at the end of their input, or as soon as `at_once` says so."""
        self._end(list(self._workers.values()), at_once)
        self._selector.close()

    def _worker(self, snapshot: str) -> Worker:
        """Return an idle worker for this snapshot, started where there is none."""
        slots = self._open_slots()
        idle = [worker for worker in self._workers.values() if worker.job is None and worker.slot in slots]
        for worker in idle:
            if worker.snapshot == snapshot:
                return worker
        slot = next((slot for slot in slots if slot.name not in self._workers), None)
        if slot is None:
            slot = idle[0].slot
            self._dismiss(idle[0])
        return self._start(slot, snapshot)

    def _start(self, slot: Slot, snapshot: str) -> Worker:
        source = self.folder.snapshot(snapshot)
        command = [sys.executable, "-m", "orchestration.worker", "--root", str(self.folder.root)]
        command += [f"--experiment={self.folder.name}", f"--manager={self.manager}"]
        if (source / "user_dir").exists():
            command += ["--user_dir", str(source / "user_dir")]
        # Idle BLAS threads spin beside torch's; a session of its own keeps the terminal's Ctrl-C with the manager.
        environment = {
            **os.environ,
            "PYTHONPATH": str(source),
            "CUDA_VISIBLE_DEVICES": slot.visible,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with open(self.folder.worker_log, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=source,
                env=environment,
                start_new_session=True,
            )
        worker = Worker(slot, snapshot, process)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers[slot.name] = worker
        return worker

    def _read(self, worker: Worker) -> list[Event]:
        assert worker.process.stdout is not None
        while chunk := worker.process.stdout.read(65536):
            worker.unread += chunk
        *lines, worker.unread = worker.unread.split(b"\n")
        found, leaving = [], False
        for line in lines:
            message = json.loads(line)
            leaving = message.pop("leaving", False)
            found += self._heard(worker, message, leaving)
        if leaving:
            self._dismiss(worker)
        return found

    def _heard(self, worker: Worker, message: dict[str, Any], leaving: bool) -> list[Event]:
        """Return what one message of a worker means."""
        errors = tuple(message.pop("errors", ()))
        event = Event(message.pop("event"), worker.slot.name, **message, errors=errors)
        job = worker.job
        if event.kind == "ready":
            worker.returns = True
        elif event.kind == "started":
            worker.has_begun = True
        elif event.kind == "ended" and job and (event.id, event.attempt) != (job.id, job.attempt):
            worker.ahead = deque(row for row in worker.ahead if (row.id, row.attempt) != (event.id, event.attempt))
            return [event._replace(kind="returned")]
        elif event.kind == "ended":
            if event.state == "queued" and not worker.has_begun:
                event = event._replace(kind="returned")
            unbegun = self._unbegun(worker) if leaving else []
            worker.advance()
            turn = worker.job
            return [event, *unbegun, *([Event("next", event.slot, turn.id, turn.attempt)] if turn else [])]
        return [event]

    def _unbegun(self, worker: Worker) -> list[Event]:
        """Take what a worker that leaves was handed ahead: it began no job before the end of the one before."""
        rows, worker.ahead = worker.ahead, deque()
        return [Event("returned", worker.slot.name, row.id, row.attempt) for row in rows]

    def _bury(self, worker: Worker, code: int) -> list[Event]:
        why = f"its worker was killed by signal {-code}" if code < 0 else f"its worker ended with status {code}"
        why += f" ({last_line(self.folder.worker_log)})" if code > 0 else ""
        if code == -signal.SIGKILL and self._is_for_memory():
            why = "its worker was killed for memory: the machine's, or its container's, was used up"
        self._forget(worker)
        row = worker.job
        died = Event("died", worker.slot.name, row.id if row else "", row.attempt if row else 0, "died", why)
        return [died, *self._unbegun(worker)]

    def _forget(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        worker.hang_up()
        self._selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        del self._workers[worker.slot.name]


def killed_for_memory() -> int:
    """Return how many processes the kernel of this machine has killed for memory; 0 where it does not say."""
    try:
        counters = KERNEL_COUNTERS.read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", counters, re.MULTILINE)
    return int(found.group(1)) if found else 0


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no word")
