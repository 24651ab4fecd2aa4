"""The queue of an experiment: who may run which job, in one file that only managers write.

Every change is one read-modify-write under one file lock. A manager claims jobs, hands them to its workers and writes
back what became of them; a claim is named by the manager and the attempt, and only the current claim can finish.
Whether a manager or a job is alive is asked of the locks that their processes hold, never of a clock.
"""

import json
import os
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tinydb import TinyDB
from tinydb.storages import Storage
from tinydb.table import Table

from errors import CorruptFileError, UserError
from orchestration.locks import ProcessLock, holder, is_free
from orchestration.run_directory import FINAL_STATES, ExperimentFolder
from orchestration.storage import AtomicStorage, BufferedStorage, sweep

STATES = ("queued", "running", "done", "failed", "aborted")
REQUEUE_LEVELS = {"aborted": 1, "lost": 1, "failed": 2, "stalled": 100, "done": 10_000}
MAX_DEATHS = 3
MOST_COLLECTED = 200  # jobs in one change: each has a lock held, and a process has few open files
PATIENCE = 5.0  # seconds until it is said who holds the queue's lock

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
    alone: bool = False  # it found too little memory beside others on its GPU


def row_of(document: Mapping[str, Any]) -> Row:
    """Return the row that a document holds; what other versions may have added is left out."""
    return Row(**{name: document[name] for name in Row._fields if name in document})


def document_of(row: Row) -> Document:
    """Return what the queue's file holds of a row; workers of snapshots that know no `alone` read it too."""
    return {name: value for name, value in row._asdict().items() if name != "alone" or value}


class Result(NamedTuple):
    """What became of a claim: the job, the attempt that it was claimed as, and its new state."""

    id: str
    attempt: int
    state: str
    error: str = ""


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
        with suppress(OSError):  # a read-only disk: the lock is what counts
            self._lock.path.unlink(missing_ok=True)
        self._lock.release()


class Queue:
    """The jobs of the experiment in `folder`. Reading takes no lock and writes nothing."""

    def __init__(self, folder: ExperimentFolder):
        self.folder = folder
        self._storage = AtomicStorage(folder.queue)

    def rows(self) -> list[Row]:
        """Return every job in the order of the grid.

        Raises CorruptFileError where the file is damaged or missing, UserError where another version has made it.
        """
        try:
            return [row_of(row) for row in self._read(self._storage)["jobs"].values()]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(self.folder.other_version(self.folder.queue, "another version")) from error

    def row(self, identity: str) -> Row | None:
        """Return one job without reading the others, which takes time where there are many; None where it is not there.

        Raises CorruptFileError where the file is damaged or missing.
        """
        content = self._storage.read_bytes()
        if content is None:
            raise CorruptFileError(f"{self.folder.queue} is missing")
        # No text inside a value looks like this: its quotation marks are escaped. A brace may stand in one.
        start = content.find(b'{"id":%s,' % json.dumps(identity).encode())
        end = start
        while start >= 0 and (end := content.find(b"}", end) + 1):
            with suppress(ValueError):
                return row_of(json.loads(content[start:end]))
        return None

    def counts(self) -> Counter[str]:
        """Return how many jobs are in each state."""
        return Counter(row.state for row in self.rows())

    def add(self, rows: Iterable[Row]) -> int:
        """Append the jobs whose id is not there yet; return how many were new."""
        with self._locked(), self._change() as (table, _):
            known = {row["id"] for row in table.all()}
            new = [document_of(row) for row in rows if row.id not in known]
            table.insert_multiple(new)
        return len(new)

    def withdraw(self, ids: Iterable[str]) -> list[str]:
        """Remove those of these jobs that are queued; return the ids removed."""
        wanted = set(ids)
        with self._locked(), self._change() as (table, _):
            found = [row for row in table.all() if row["id"] in wanted and row["state"] == "queued"]
            table.remove(doc_ids=[row.doc_id for row in found])
        return [row["id"] for row in found]

    def claim(
        self, manager: Manager, count: int, results: Sequence[Result] = (), patience: float | None = None
    ) -> tuple[list[Row], Counter[str]]:
        """Write back `results`, collect what dead managers left, and claim up to `count` queued jobs.

        A result counts only while its claim is the current one. Returns the rows claimed, their attempt already raised,
        and how many jobs are now in each state. Raises filelock's Timeout where the queue's lock is held by others for
        `patience` seconds; without it, the lock is waited for.
        """
        ended = {(result.id, result.attempt): result for result in results}
        claimed: list[Row] = []
        counts: Counter[str] = Counter()
        dead: dict[str, bool] = {}  # other managers
        held: list[ProcessLock] = []

        def visit(row: Document) -> bool:
            change: dict[str, Any] = {}
            if row["state"] == "running":
                if row["manager"] != manager.name:
                    change = self._collected(row, dead, held)
                elif result := ended.get((row["id"], row["attempt"])):
                    change = self._ended(row, result)
            row.update(change)
            if row["state"] == "queued" and len(claimed) < count:
                change = {"state": "running", "attempt": row["attempt"] + 1, "manager": manager.name}
                row.update(change)
                claimed.append(row_of(row))
            counts[row["state"]] += 1
            return bool(change)

        try:
            self._update(visit, patience)
        finally:
            for lock in held:
                lock.release()
        return claimed, counts

    def requeue(self, level: int, ids: Collection[str] | None = None) -> int:
        """Queue again what ended up to this level, of these jobs where they are given; return how many.

        Level 1: aborted, and running for a manager and a process that are both dead; 2: failed; 100: running without a
        living process, whoever claimed it; 10000: done. What a living process runs is never touched. All go on from
        their checkpoints but the done ones, which start anew: what they computed is removed.
        """
        states = {state for state, least in REQUEUE_LEVELS.items() if level >= least}

        done = []

        def visit(row: Document) -> bool:
            if ids is not None and row["id"] not in ids:
                return False
            state = row["state"]
            if state == "running":
                run = self.folder.job(row["id"])
                status = run.read_status() or {}
                has_ended = status.get("attempt") == row["attempt"] and status.get("state") in FINAL_STATES
                if has_ended or not is_free(run.lock):
                    return False  # a manager collects it, or it goes on
                state = "lost" if is_free(self.folder.manager_lock(row["manager"])) else "stalled"
            if state not in states:
                return False
            if state == "done":
                done.append(row["id"])
            row.update(state="queued", manager="", deaths=0, checkpoint="")
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

    def edit(self, change: Callable[[list[Row]], list[Row]]) -> None:
        """Replace the rows by what `change` makes of them; it is called under the lock, and all or nothing is written.

        Raises CorruptFileError where the file is damaged or missing, and whatever `change` raises.
        """
        with self._locked():
            before = self.rows()
            after = change(before)
            if after != before:
                self._write(after)

    def is_alive(self, row: Row) -> bool:
        """Say whether the manager that claimed a job, or the job, is alive; the caller holds the queue's lock."""
        return not (is_free(self.folder.job(row.id).lock) and is_free(self.folder.manager_lock(row.manager)))

    def sweep(self) -> None:
        """Remove what a killed manager had begun to write beside the queue."""
        with self._locked():
            sweep(self.folder.path, [self.folder.queue.name])

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
            self._write([self.recovered(row) for row in rows])
        return aside

    def _write(self, rows: Sequence[Row]) -> None:
        self._storage.write({"jobs": {str(number): document_of(row) for number, row in enumerate(rows, start=1)}})

    def recovered(self, row: Row) -> Row:
        """Return the row as its run directory tells it; the caller holds the queue's lock."""
        run = self.folder.job(row.id)
        status = run.read_status() or {}
        attempt = max(int(status.get("attempt", 0)), run.cancelled_attempt())
        if run.cancelled_attempt() == attempt:
            return row._replace(state="aborted", attempt=attempt)
        if status.get("state") in FINAL_STATES:
            return row._replace(state=status["state"], attempt=attempt)
        if not is_free(run.lock):
            # Its claim is lost with the file: it is collected when its process ends.
            return row._replace(state="running", attempt=attempt, manager="unknown")
        return row._replace(attempt=attempt, alone=status.get("alone") is True)

    def _ended(self, row: Document, result: Result) -> dict[str, Any]:
        """What a claim of this manager becomes.

        `died` is a worker that vanished without a word, `crowded` a job that goes on with no neighbour on its GPU.
        """
        if result.state == "crowded":
            return {"state": "queued", "manager": "", "deaths": 0, "checkpoint": "", "alone": True}
        if result.state != "died":
            return {"state": result.state, "manager": "", "deaths": 0, "checkpoint": ""}
        run = self.folder.job(row["id"])
        run.sweep()
        status = run.read_status() or {}
        if status.get("attempt") == row["attempt"] and status.get("state") in FINAL_STATES:
            return {"state": status["state"], "manager": ""}
        checkpoint = run.checkpoint_identity()
        deaths = row["deaths"] + 1 if checkpoint == row["checkpoint"] else 0
        state, error = "queued", result.error
        if deaths >= MAX_DEATHS:
            state = "aborted"
            error = f"its worker died {MAX_DEATHS} times in a row without a new checkpoint"
            error += f"; at last {result.error}" if result.error else ""
        if run.path.is_dir() or state == "aborted":
            run.path.mkdir(exist_ok=True)
            run.write_status({**status, "attempt": row["attempt"], "state": state, "error": error or None})
        return {"state": state, "manager": "", "deaths": deaths, "checkpoint": checkpoint}

    def _collected(self, row: Document, dead: dict[str, bool], held: list[ProcessLock]) -> dict[str, Any]:
        """What a running job of another manager becomes: nothing changes while that manager or the job is alive.

        The job's lock is held until the change is written: a worker that was handed the job and is about to take the
        lock must not find its claim still current. What exceeds `MOST_COLLECTED` waits for the next change.
        """
        name = row["manager"]
        if name not in dead:
            dead[name] = is_free(self.folder.manager_lock(name))
        run = self.folder.job(row["id"])
        lock = ProcessLock(run.lock)
        if not dead[name] or len(held) >= MOST_COLLECTED or not lock.acquire(blocking=False):
            return {}
        held.append(lock)
        status = run.read_status() or {}
        status = status if status.get("attempt") == row["attempt"] else {}
        state = status["state"] if status.get("state") in FINAL_STATES else "queued"
        return {"state": state, "manager": "", **({"alone": True} if status.get("alone") is True else {})}

    def _update(self, visit: Callable[[Document], bool], patience: float | None = None) -> int:
        """Show each row to `visit`, which may change it in place and says whether it did; return how many it did."""
        with self._locked(patience):
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
    def _locked(self, patience: float | None = None) -> Iterator[None]:
        lock = FileLock(self.folder.queue_lock, poll_interval=0.005)
        try:
            lock.acquire(timeout=PATIENCE if patience is None else patience)
        except Timeout:
            if patience is not None:
                raise
            who = holder(self.folder.queue_lock)
            print(f"{who} holds {self.folder.queue_lock}: waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
