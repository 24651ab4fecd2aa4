"""What the disk says of an experiment's jobs, beside what its queue says. Nothing is written and no lock is touched.

Whether a process lives is seen from this host's /proc, never asked of its lock: a reader that took a lock for a moment
could have a manager or a worker take it for a living process.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from orchestration.experiment import SINGLE
from orchestration.locks import holder, is_seen_held
from orchestration.queue import Row
from orchestration.run_directory import FINAL_STATES, ExperimentFolder


class Finding(NamedTuple):
    """A job: its row, its state by the disk (the queue's states, lost or missing), what is odd, and if it is a fault.

    What is odd and no fault comes right by itself, such as an end that its manager has not yet collected.
    """

    row: Row
    state: str
    remark: str = ""
    is_fault: bool = False


def inspect(folder: ExperimentFolder, read: Callable[[], list[Row]], ids: Iterable[str] | None = None) -> list[Finding]:
    """Compare each job's row (of these jobs only, where they are given) with its run directory.

    `read` returns the rows as they are at that moment. What looks wrong is looked at twice: a job may go on between two
    looks.
    """
    wanted = None if ids is None else set(ids)
    found = {row.id: _look(folder, row) for row in read() if wanted is None or row.id in wanted}
    if any(finding.remark for finding in found.values()):
        again = {row.id: row for row in read()}
        for identity, finding in found.items():
            if finding.remark and identity in again:
                found[identity] = _look(folder, again[identity])
    return list(found.values())


def strangers(folder: ExperimentFolder, rows: Iterable[Row]) -> list[str]:
    """Return the folders of jobs that are not among these rows."""
    known = {row.id for row in rows}
    return sorted(path.name for path in folder.jobs.glob("[!.]*/") if path.name not in known)


def count(findings: Iterable[Finding]) -> Counter[str]:
    """Return how many jobs are in each state by the disk."""
    return Counter(finding.state for finding in findings)


def _look(folder: ExperimentFolder, row: Row) -> Finding:
    run = folder.job(row.id)
    status = run.read_status() or {}
    said, attempt = status.get("state", ""), status.get("attempt", 0)
    runs = is_seen_held(run.lock)
    if row.state == "running":
        return _look_at_running(folder, row, said if attempt == row.attempt else "", runs)
    if runs and row.state in ("queued", "aborted"):
        remark = f"{holder(run.lock)} still runs an earlier attempt: its end is refused"
        return Finding(row, row.state, remark)
    if row.state == "queued":
        if said == "done":
            return Finding(row, "queued", f"its status says done, by attempt {attempt}: --rebuild takes that", True)
        return Finding(row, "queued")
    if not status:
        state = "missing" if row.state == "done" else row.state
        remark = f"the queue says {row.state}, and it has no status that can be read: --rebuild queues it again"
        return Finding(row, state, remark, True)
    if said != row.state:
        if row.state == "aborted" and run.cancelled_attempt() == attempt:
            return Finding(row, "aborted", f"its status says {said}: it ended so after it was cancelled", True)
        state = said if said in FINAL_STATES else row.state
        mend = "takes the latter" if said in FINAL_STATES else "queues it again"
        return Finding(row, state, f"the queue says {row.state}, its status {said}: --rebuild {mend}", True)
    return Finding(row, row.state)


def _look_at_running(folder: ExperimentFolder, row: Row, said: str, runs: bool | None) -> Finding:
    """Look at a job that the queue says is running; `said` is the present attempt's word of itself."""
    lock, manager = folder.job(row.id).lock, folder.manager_lock(row.manager)
    if said in FINAL_STATES:
        return Finding(row, said, f"the queue says running; it has ended, {said}, and is not collected yet")
    managed = is_seen_held(manager)
    if runs or managed:
        return Finding(row, "running")
    if runs is None and managed is None:
        return Finding(row, "running", f"cannot be seen from here (last: {holder(lock)})")
    if runs is None or managed is None:
        who = holder(lock if runs is None else manager)
        return Finding(row, "running", f"cannot be seen from here ({who})")
    who = "the same command" if folder.name == SINGLE else "the next manager"
    return Finding(row, "lost", f"no living process runs it (last: {holder(lock)}): {who} goes on with it")
