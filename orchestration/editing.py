"""Changes of an experiment's queue by hand: each under the queue's lock, all or nothing, and never against a process.

The caller holds the setup lock: no manager starts, requeues or takes in a file at the same time; those that run go on.
"""

import getpass
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import CorruptFileError, UserError, near
from orchestration.composer import Composer
from orchestration.configuration import parse_override, shown, spell
from orchestration.execution import CANCELLED
from orchestration.lifecycle import read_edits, read_record, recorded_rows
from orchestration.locks import ProcessLock, holder, is_free
from orchestration.queue import Queue, Row
from orchestration.run_directory import FINAL_STATES, ExperimentFolder
from orchestration.selection import Values, canonical, equals


@dataclass
class Editor:
    """Edits the queue of one experiment; each verb returns a line for each job that it left alone."""

    folder: ExperimentFolder
    queue: Queue
    user_dir: Path | None = None

    def cancel(self, ids: Collection[str]) -> tuple[list[Row], list[str]]:
        """Abort jobs: queued ones at once, running ones by word to their worker, whose later end is refused."""
        cancelled: list[Row] = []
        refused: list[str] = []

        def change(rows: list[Row]) -> list[Row]:
            after = []
            for row in rows:
                if row.id in ids and (why := self._uncancellable(row)):
                    refused.append(f"{row.id}: {why}")
                elif row.id in ids:
                    cancelled.append(row)
                    if row.state == "running":
                        self.folder.job(row.id).cancel(row.attempt)
                    row = row._replace(state="aborted", manager="", deaths=0, checkpoint="")
                after.append(row)
            return after

        self.queue.edit(change)
        for row in cancelled:  # not under the queue's lock: thousands take their time, and managers go on
            if row.state == "queued":
                self.folder.job(row.id).cancel(row.attempt)
            self._mark_aborted(row)
        return cancelled, refused

    def _uncancellable(self, row: Row) -> str:
        if row.state not in ("queued", "running"):
            return f"it is {row.state}"
        status = self.folder.job(row.id).read_status() or {}
        if row.state == "running" and (status.get("attempt"), status.get("state")) == (row.attempt, "done"):
            return "it is done, and about to be collected"
        return ""

    def _mark_aborted(self, row: Row) -> None:
        """Say in the status of a cancelled job that it is, unless a process runs it: that says so itself at its end."""
        run = self.folder.job(row.id)
        lock = ProcessLock(run.lock)
        status = run.read_status() or {}
        has_ended = (status.get("attempt"), status.get("state")) in [(row.attempt, state) for state in FINAL_STATES]
        if has_ended or lock.acquire(blocking=False):
            try:
                by = f"{CANCELLED} by {_user()} on {socket.gethostname()}"
                run.write_status({**status, "attempt": row.attempt, "state": "aborted", "error": by})
            finally:
                lock.release()

    def delete(self, ids: Collection[str]) -> tuple[list[Row], list[str]]:
        """Remove jobs that nobody runs, with their folders."""
        deleted: list[Row] = []
        refused: list[str] = []

        def change(rows: list[Row]) -> list[Row]:
            for row in rows:
                if row.id in ids and (why := self._undeletable(row)):
                    refused.append(f"{row.id}: {why}")
                elif row.id in ids:
                    deleted.append(row)
            self._record([row.id for row in deleted], [])
            gone = {row.id for row in deleted}
            return [row for row in rows if row.id not in gone]

        self.queue.edit(change)
        self.folder.remove_jobs(row.id for row in deleted)
        return deleted, refused

    def _undeletable(self, row: Row) -> str:
        if row.state == "running":
            return "it is running: --cancel it first"
        lock = self.folder.job(row.id).lock
        return "" if is_free(lock) else f"an earlier attempt still runs ({holder(lock)})"

    def replace(self, changes: dict[str, Row]) -> tuple[list[str], list[str]]:
        """Put other jobs in the place of queued ones; return the ids replaced, and a line for each that was not."""
        replaced: list[str] = []
        refused: list[str] = []

        def change(rows: list[Row]) -> list[Row]:
            known = {row.id for row in rows}
            after = []
            for row in rows:
                lock = self.folder.job(row.id).lock
                new = changes.get(row.id)
                if new and row.state != "queued":
                    refused.append(f"{row.id}: it is {row.state}")
                elif new and not is_free(lock):
                    refused.append(f"{row.id}: an earlier attempt still runs ({holder(lock)})")
                elif new:
                    self._refuse_collision(row, new, known)
                    replaced.append(row.id)
                    row = row._replace(overrides=new.overrides) if new.id == row.id else new
                after.append(row)
            self._record(replaced, [changes[identity] for identity in replaced])
            return after

        self.queue.edit(change)
        self.folder.remove_jobs(identity for identity in replaced if changes[identity].id != identity)
        return replaced, refused

    def _refuse_collision(self, row: Row, new: Row, known: Collection[str]) -> None:
        if new.id != row.id and (new.id in known or self.folder.job(new.id).path.exists()):
            raise UserError(f"--update: {row.id} would become {new.id}, which exists already; nothing was changed")

    def _record(self, removed: Sequence[str], added: Sequence[Row]) -> None:
        """Keep with the experiment what its grid does not say: a queue that is rebuilt has the same jobs."""
        record = require_record(self.folder)
        edits = read_edits(record)
        for identity in removed:
            edits.remove(identity)
        for row in added:
            edits.add(row)
        if removed or added:
            self.folder.write_record({**record, "edits": edits.record()})

    def restore(self) -> tuple[list[str], list[str]]:
        """Make the jobs those of the grid again; return the ids queued, and those withdrawn.

        What was put in the place of a job stays where it has started.
        """
        record = require_record(self.folder)
        edits = read_edits(record)
        without = {key: value for key, value in record.items() if key != "edits"}
        planned = recorded_rows(without, self.folder, self.user_dir)
        grid = {row.id for row in planned}
        added: list[str] = []
        withdrawn: list[str] = []

        def change(rows: list[Row]) -> list[Row]:
            known = {row.id: row for row in rows}
            after = []
            for row in planned:  # in the grid's order
                old = known.get(row.id)
                if old is None:
                    added.append(row.id)
                    after.append(self.queue.recovered(row))
                elif old.state == "queued" and old.id in edits.added:
                    after.append(old._replace(overrides=row.overrides))
                else:
                    after.append(old)
            for row in rows:
                if row.id in edits.added and row.id not in grid and row.state == "queued":
                    withdrawn.append(row.id)
                elif row.id not in grid:
                    after.append(row)
            self.folder.write_record(without)
            return after

        self.queue.edit(change)
        return added, withdrawn

    def rebuild(self) -> tuple[list[str], Path | None]:
        """Make the queue anew; return a line for each row that changed, and where a damaged file is kept.

        What a living process or manager holds stays as the queue says, where that can be read; so do jobs that have
        left the grid and have results.
        """
        record = require_record(self.folder)
        planned = recorded_rows(record, self.folder, self.user_dir)
        try:
            before = {row.id: row for row in self.queue.rows()}
        except CorruptFileError:
            aside = self.queue.rebuild(planned)
            return [f"{row.id}: {row.state}" for row in self.queue.rows()], aside
        lines: list[str] = []

        def change(rows: list[Row]) -> list[Row]:
            known = {row.id: row for row in rows}
            ids = {row.id for row in planned}
            after = [self._rebuilt(known[row.id]) if row.id in known else self.queue.recovered(row) for row in planned]
            after += [row for row in rows if row.id not in ids and row.state != "queued"]
            for row in after:
                if (old := known.get(row.id)) is None:
                    lines.append(f"{row.id}: {row.state}, was not there")
                elif old.state != row.state:
                    lines.append(f"{row.id}: {row.state}, was {old.state}")
            kept = {row.id for row in after}
            lines.extend(
                f"{identity}: removed, it is no longer in the grid" for identity in before if identity not in kept
            )
            return after

        self.queue.edit(change)
        return lines, None

    def _rebuilt(self, row: Row) -> Row:
        if row.state == "running" and self.queue.is_alive(row):
            return row
        found = self.queue.recovered(row._replace(state="queued", manager="", deaths=0, checkpoint=""))
        if row.state == "queued" and found.state in ("failed", "aborted"):
            found = row  # it was queued again
        return found._replace(attempt=max(found.attempt, row.attempt))


def require_record(folder: ExperimentFolder) -> dict[str, Any]:
    """Return what the experiment was created with; raise UserError where that is missing."""
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder.record} is missing: restore it first; `manager.py --exp` writes it anew")
    return record


def changed_rows(
    rows: Sequence[Row], values: Mapping[str, Values], key: str, old: str, new: str, composer: Composer
) -> dict[str, Row]:
    """Return what becomes of each job whose `key` is `old` when it is `new`, composed as the job's snapshot does it.

    Raises UserError where no job has that value, and where two jobs would become one.
    """
    if key.startswith("estimator") and key in ("estimator", "estimator.id"):
        key, old = "estimator", canonical(old)
    if key == "root":
        raise UserError("--update: root: an experiment's folder is chosen by --root")
    matching = [row for row in rows if equals(values[row.id].get(key), old)]
    if not matching:
        have = sorted({spell(values[row.id][key]) for row in rows if key in values[row.id]})
        raise UserError(f"--update: no job has {shown(f'{key}={old}')}{near(old, have)}")
    parsed = parse_override(f"{key}={new}")
    if parsed.is_sweep:
        raise UserError(f"--update: {shown(new)}: a job takes one value, not a sweep")
    value: Any = parsed.values[0]
    if key == "data_root":
        value = str(Path(str(value)).resolve())
    found: dict[str, Row] = {}
    sources: dict[str, str] = {}
    for row in matching:
        kept = [override for override in row.overrides if parse_override(override).key != key]
        (job,) = composer.compose([[*kept, f"{key}={spell(value)}"]], row.snapshot)
        if isinstance(job, UserError):
            raise job
        if job.id in sources:
            raise UserError(f"--update: {sources[job.id]} and {row.id} would both become {job.id}; nothing was changed")
        sources[job.id] = row.id
        found[row.id] = Row(job.id, job.overrides, snapshot=row.snapshot)
    return found


def _user() -> str:
    with suppress(OSError, KeyError):  # a user without a name
        return getpass.getuser()
    return "an unknown user"
