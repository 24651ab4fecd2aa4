"""The queue of an experiment: who may run which job, in one file that only managers write.

Every change is one read-modify-write under one file lock. A manager claims jobs, hands them to its workers and writes
back what became of them; a claim is named by the manager and the attempt, and only the current claim can finish.
Whether a manager or a job is alive is asked of the locks that their processes hold, never of a clock.
"""

import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from tinydb import TinyDB
from tinydb.storages import Storage
from tinydb.table import Table

from errors import CorruptFileError
from orchestration.locks import ProcessLock, is_free
from orchestration.run_directory import FINAL_STATES, ExperimentFolder
from orchestration.storage import AtomicStorage, BufferedStorage

STATES = ("queued", "running", "done", "failed", "aborted")
REQUEUE_LEVELS = {"aborted": 1, "failed": 2, "done": 10_000}
MAX_DEATHS = 3

Document = MutableMapping[str, Any]  # a row as TinyDB holds it


class Row(NamedTuple):
    """A job as the queue knows it."""

    id: str
    overrides: list[str]
    state: str = "queued"
    attempt: int = 0
    snapshot: str = ""
    manager: str = ""  # who claimed it, while it runs
    deaths: int = 0  # workers that died on it in a row without a new checkpoint
    checkpoint: str = ""  # which checkpoint it had at its last death


class Result(NamedTuple):
    """What became of a claim: the job, the attempt that it was claimed as, and its new state."""

    id: str
    attempt: int
    state: str


class Manager:
    """This process as a claimant of jobs: a name of its own, and a lock that it holds for life."""

    def __init__(self, folder: ExperimentFolder):
        for lock in folder.managers.glob("*.lock"):
            if is_free(lock):
                lock.unlink(missing_ok=True)  # its manager was killed; no other will ever have that name
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._lock = ProcessLock(folder.manager_lock(self.name))
        self._lock.acquire()

    def close(self) -> None:
        """Leave: what this manager had claimed is up for collection once its workers are done."""
        self._lock.path.unlink(missing_ok=True)
        self._lock.release()


class Queue:
    """The jobs of the experiment in `folder`. Reading takes no lock and writes nothing."""

    def __init__(self, folder: ExperimentFolder):
        self.folder = folder
        self._storage = AtomicStorage(folder.queue)

    def rows(self) -> list[Row]:
        """Return every job in the order of the grid. Raises CorruptFileError where the file is damaged or missing."""
        return [Row(**row) for row in self._read(self._storage)["jobs"].values()]

    def counts(self) -> Counter[str]:
        """Return how many jobs are in each state."""
        return Counter(row.state for row in self.rows())

    def add(self, rows: Iterable[Row]) -> int:
        """Append the jobs whose id is not there yet; return how many were new."""
        with self._locked(), self._change() as (table, _):
            known = {row["id"] for row in table.all()}
            new = [row._asdict() for row in rows if row.id not in known]
            table.insert_multiple(new)
        return len(new)

    def withdraw(self, ids: Iterable[str]) -> list[str]:
        """Remove those of these jobs that are queued; return the ids removed."""
        wanted = set(ids)
        with self._locked(), self._change() as (table, _):
            found = [row for row in table.all() if row["id"] in wanted and row["state"] == "queued"]
            table.remove(doc_ids=[row.doc_id for row in found])
        return [row["id"] for row in found]

    def claim(self, manager: Manager, count: int, results: Sequence[Result] = ()) -> tuple[list[Row], Counter[str]]:
        """Write back `results`, collect what dead managers left, and claim up to `count` queued jobs.

        A result counts only while its claim is the current one. Returns the rows claimed, their attempt already raised,
        and how many jobs are now in each state.
        """
        ended = {(result.id, result.attempt): result.state for result in results}
        claimed: list[Row] = []
        counts: Counter[str] = Counter()

        def visit(row: Document) -> bool:
            change: dict[str, Any] = {}
            if row["state"] == "running":
                if row["manager"] != manager.name:
                    change = self._collected(row)
                elif state := ended.get((row["id"], row["attempt"])):
                    change = self._ended(row, state)
            row.update(change)
            if row["state"] == "queued" and len(claimed) < count:
                change = {"state": "running", "attempt": row["attempt"] + 1, "manager": manager.name}
                row.update(change)
                claimed.append(Row(**row))
            counts[row["state"]] += 1
            return bool(change)

        self._update(visit)
        return claimed, counts

    def requeue(self, level: int) -> int:
        """Queue again what ended up to this level (1 aborted, 2 failed, 10000 done too); return how many.

        Aborted and failed jobs go on from their checkpoints, done ones start anew: what they computed is removed.
        """
        states = {state for state, least in REQUEUE_LEVELS.items() if level >= least}

        done = []

        def visit(row: Document) -> bool:
            if row["state"] not in states:
                return False
            if row["state"] == "done":
                done.append(row["id"])
            row.update(state="queued", deaths=0, checkpoint="")
            return True

        with self._locked():
            count = self._update_locked(visit)
            for identity in done:
                self.folder.job(identity).forget()  # its checkpoint is the end: going on from it would do nothing
        return count

    def renew_snapshot(self, snapshot: str) -> int:
        """Give every job that has not started this snapshot of the source; return how many."""

        def visit(row: Document) -> bool:
            if row["state"] != "queued":
                return False
            row["snapshot"] = snapshot
            return True

        return self._update(visit)

    def rebuild(self, rows: Iterable[Row]) -> Path | None:
        """Make the queue anew from the experiment's rows and the jobs' status files.

        A damaged queue file is kept aside; its new path is returned, None where there was none.
        """
        aside = None
        with self._locked():
            try:
                if self._storage.read() is not None:
                    return None  # another manager has rebuilt it in the meantime
            except CorruptFileError:
                aside = next(
                    path
                    for number in range(1, 10_000)
                    if not (path := self.folder.queue.with_name(f"queue.json.damaged-{number}")).exists()
                )
                os.replace(self.folder.queue, aside)
            jobs = {str(number): self._recovered(row)._asdict() for number, row in enumerate(rows, start=1)}
            self._storage.write({"jobs": jobs})
        return aside

    def _recovered(self, row: Row) -> Row:
        run = self.folder.job(row.id)
        status = run.read_status() or {}
        attempt = int(status.get("attempt", 0))
        if status.get("state") in FINAL_STATES:
            return row._replace(state=status["state"], attempt=attempt)
        if not is_free(run.lock):
            # Its claim is lost with the file: it is collected when its process ends.
            return row._replace(state="running", attempt=attempt, manager="unknown")
        return row._replace(attempt=attempt)

    def _ended(self, row: Document, state: str) -> dict[str, Any]:
        """What a claim of this manager becomes; `died` is a worker that vanished without a word."""
        if state != "died":
            return {"state": state, "manager": "", "deaths": 0, "checkpoint": ""}
        run = self.folder.job(row["id"])
        status = run.read_status() or {}
        if status.get("attempt") == row["attempt"] and status.get("state") in FINAL_STATES:
            return {"state": status["state"], "manager": ""}
        checkpoint = run.checkpoint_identity()
        deaths = row["deaths"] + 1 if checkpoint == row["checkpoint"] else 0
        state = "queued"
        if deaths >= MAX_DEATHS:
            state = "aborted"
            error = f"its worker died {MAX_DEATHS} times in a row without a new checkpoint"
            run.path.mkdir(exist_ok=True)
            run.write_status({**status, "attempt": row["attempt"], "state": state, "error": error})
        return {"state": state, "manager": "", "deaths": deaths, "checkpoint": checkpoint}

    def _collected(self, row: Document) -> dict[str, Any]:
        """What a running job of another manager becomes: nothing changes while that manager or the job is alive."""
        run = self.folder.job(row["id"])
        if not is_free(self.folder.manager_lock(row["manager"])) or not is_free(run.lock):
            return {}
        status = run.read_status() or {}
        state = status.get("state") if status.get("attempt") == row["attempt"] else None
        return {"state": state if state in FINAL_STATES else "queued", "manager": ""}

    def _update(self, visit: Callable[[Document], bool]) -> int:
        """Show each row to `visit`, which may change it in place and says whether it did; return how many it did."""
        with self._locked():
            return self._update_locked(visit)

    def _update_locked(self, visit: Callable[[Document], bool]) -> int:
        changed: list[bool] = []
        with self._change() as (table, storage):
            table.update(lambda row: changed.append(visit(row)))
            if not any(changed):
                storage.forget()
        return sum(changed)

    @contextmanager
    def _change(self) -> Iterator[tuple[Table, BufferedStorage]]:
        """The table of jobs and its storage, for who holds the lock; changes are written at the end, all or none."""
        storage = BufferedStorage(self._storage)
        self._read(storage)
        with TinyDB(storage=lambda: storage) as database:
            yield database.table("jobs", cache_size=0), storage
        storage.flush()

    def _read(self, storage: Storage) -> dict[str, Any]:
        tables = storage.read()
        if tables is None:
            raise CorruptFileError(f"{self.folder.queue} is missing")
        return tables

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder.queue_lock, poll_interval=0.005):
            yield
