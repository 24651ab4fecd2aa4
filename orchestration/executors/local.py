"""Workers on this machine: one process a slot, fed through pipes."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.devices import Slot
from orchestration.executors import Event
from orchestration.queue import Row
from orchestration.run_directory import ExperimentFolder


@dataclass
class Worker:
    """A worker process and the job that it was handed, if any."""

    slot: Slot
    snapshot: str
    process: subprocess.Popen[bytes]
    job: Row | None = None
    unread: bytes = b""

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


class Executor:
    """One long-lived worker a slot, so that `import torch` is paid once; a worker that dies is replaced."""

    def __init__(self, folder: ExperimentFolder, manager: str, slots: Sequence[Slot]):
        self.folder, self.manager, self.slots = folder, manager, list(slots)
        self._workers: dict[str, Worker] = {}
        self._selector = selectors.DefaultSelector()

    def free(self) -> int:
        """Return how many slots have no job."""
        return len(self.slots) - sum(worker.job is not None for worker in self._workers.values())

    def submit(self, row: Row) -> str:
        """Hand the job to a free slot, preferably one whose worker serves the job's snapshot already."""
        worker = self._worker(row.snapshot)
        worker.job = row
        worker.tell(do="run", id=row.id, attempt=row.attempt, overrides=row.overrides)
        return worker.slot.name

    def check(self, jobs: Sequence[Sequence[str]], snapshot: str) -> list[str]:
        """Build each of these jobs' model and estimator in one worker; return one line for each refusal."""
        worker = self._worker(snapshot)
        worker.tell(do="check", jobs=jobs)
        while True:
            for event in self.events(timeout=1.0):
                if event.kind == "checked":
                    return list(event.errors)
                if event.kind == "died":
                    return [f"the worker that checked the jobs died: {last_line(self.folder.worker_log)}"]

    def events(self, timeout: float) -> list[Event]:
        """Return what the workers have said, and which of them have died."""
        found: list[Event] = []
        for key, _ in self._selector.select(timeout):
            found += self._read(key.data)
        for worker in list(self._workers.values()):
            if worker.process.poll() is not None:
                found += [*self._read(worker), *self._bury(worker)]
        return found

    def stop(self) -> None:
        """Ask all jobs to write a checkpoint and end."""
        for worker in self._workers.values():
            worker.tell(do="stop")

    def kill(self) -> None:
        """End every worker at once."""
        for worker in self._workers.values():
            worker.process.kill()
            worker.process.wait()

    def close(self) -> None:
        """End the workers: they leave at the end of their input."""
        for worker in self._workers.values():
            worker.hang_up()
        for worker in self._workers.values():
            worker.process.wait()
        self._workers.clear()
        self._selector.close()

    def _worker(self, snapshot: str) -> Worker:
        """Return an idle worker for this snapshot, started where there is none."""
        idle = [worker for worker in self._workers.values() if worker.job is None]
        for worker in idle:
            if worker.snapshot == snapshot:
                return worker
        slot = next((slot for slot in self.slots if slot.name not in self._workers), None)
        if slot is None:
            slot = idle[0].slot
            idle[0].hang_up()
            idle[0].process.wait()
            self._forget(idle[0])
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
        found = []
        for line in lines:
            message = json.loads(line)
            kind = message.pop("event")
            message["errors"] = tuple(message.get("errors", ()))
            found.append(Event(kind, worker.slot.name, **message))
            if kind == "ended":
                worker.job = None
        return found

    def _bury(self, worker: Worker) -> list[Event]:
        code = worker.process.returncode
        why = f"its worker was killed by signal {-code}" if code < 0 else f"its worker ended with status {code}"
        why += f" ({last_line(self.folder.worker_log)})" if code > 0 else ""
        self._forget(worker)
        row = worker.job
        return [Event("died", worker.slot.name, row.id if row else "", row.attempt if row else 0, "died", why)]

    def _forget(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        del self._workers[worker.slot.name]


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no word")
