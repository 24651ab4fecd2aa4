"""The verbs of dbutils.py that only read: each writes nothing, takes no lock, and returns the exit status."""

import os
import sys
import time
from collections import Counter
from pathlib import Path

from errors import UserError, near
from orchestration.command_line import DONE, FAILED, REMAIN
from orchestration.inspection import count, inspect, strangers
from orchestration.locks import is_seen_held
from orchestration.queue import STATES
from orchestration.run_directory import FINAL_STATES
from orchestration.session import Session, some, tally
from orchestration.single import choices

POLL_INTERVAL = 0.2  # seconds between two looks at a log


def check(session: Session) -> int:
    """Count the jobs by state, from the disk, and name what does not fit."""
    folder = session.folder
    ids = [row.id for row in session.selected] if session.is_narrowed else None
    findings = inspect(folder, session.read, ids)
    counts, rows = count(findings), Counter(finding.row.state for finding in findings)
    print(f"{folder.name}: {tally(counts)}{' (jobs of run.py: they have no queue)' if session.is_single else ''}")
    if counts != rows and not session.is_single:
        print(f"the queue says: {tally(rows)}")
    for finding in findings:
        if finding.remark:
            print(f"{'fault' if finding.is_fault else 'note '}  {finding.row.id}: {finding.remark}")
    if not session.is_narrowed and (unknown := strangers(folder, session.rows)):
        print(f"note   {len(unknown)} folders of jobs that the queue does not hold: {some(unknown)}")
    if any(finding.is_fault for finding in findings) or counts["failed"] or counts["aborted"] or counts["missing"]:
        return FAILED
    return REMAIN if counts["queued"] or counts["running"] or counts["lost"] else DONE


def show_all(session: Session) -> int:
    """List the jobs: state, attempt, id and overrides."""
    for row in session.selected:
        overrides = [text for text in row.overrides if not text.startswith("data_root=")]
        if session.is_single:
            overrides = choices(session.folder.job(row.id))
        print(f"{row.state:<8} {row.attempt:>3}  {row.id}  {' '.join(overrides)}")
    print(f"{len(session.selected)} jobs: {tally(Counter(row.state for row in session.selected))}")
    return DONE


def error_messages(session: Session) -> int:
    """List why jobs failed or were aborted, the most frequent reason first."""
    reasons: dict[str, list[str]] = {}
    for row in session.selected:
        if row.state in ("failed", "aborted"):
            why = session.folder.job(row.id).reason()
            reasons.setdefault(f"{row.state}: {why}", []).append(row.id)
    for reason, ids in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(ids)} {reason}")
        print("".join(f"    {identity}\n" for identity in ids), end="")
    if not reasons:
        print("no job has failed or was aborted")
    return DONE


def logs(session: Session) -> int:
    """Print a job's log; with --follow until the job ends."""
    identity = _find_job(session, session.arguments.logs)
    log = session.folder.job(identity).log
    if not session.arguments.follow:
        if not log.exists():
            raise UserError(f"{identity} has printed nothing: {log} is not there")
        _copy(log, 0)
        return DONE
    position = 0
    while True:
        ended = _ending(session, identity)  # looked at first: what is printed before the end is copied below
        position = _copy(log, position)
        if ended is not None:
            return ended
        time.sleep(POLL_INTERVAL)


def _find_job(session: Session, prefix: str) -> str:
    """Return the id of the one job that begins so."""
    ids = {path.name for path in session.folder.jobs.glob("[!.]*/")}
    if session.folder.queue.exists():
        ids |= {row.id for row in session.rows}
    found = sorted(identity for identity in ids if identity.startswith(prefix))
    if prefix in ids:
        return prefix
    if not found:
        raise UserError(f"--logs: no job begins with {prefix!r}{near(prefix, ids) if len(ids) < 100 else ''}")
    if len(found) > 1:
        raise UserError(f"--logs: {len(found)} jobs begin with {prefix!r}: {some(found)}")
    return found[0]


def _ending(session: Session, identity: str) -> int | None:
    """Return the exit status of a job that has ended or is gone, None while it has not."""
    status = session.folder.job(identity).read_status() or {}
    state = status.get("state")
    if session.folder.queue.exists():
        row = session.queue.row(identity)
        if row is not None and row.state == "queued":
            return None  # what its status says is of an attempt before
        if row is not None and row.state == "running" and status.get("attempt") != row.attempt:
            return None
        if row is not None and row.state != "running":
            state = row.state
        if row is None and state not in STATES:
            return FAILED
    if state in FINAL_STATES:
        return DONE if state == "done" else FAILED
    if session.is_single and state == "running" and is_seen_held(session.folder.job(identity).lock) is False:
        return FAILED  # no manager will go on with it
    return None


def _copy(log: Path, position: int) -> int:
    """Print a log from a position on; return where it ends. One that was begun anew is printed from its beginning."""
    try:
        with open(log, "rb") as file:
            if os.fstat(file.fileno()).st_size < position:
                position = 0
            file.seek(position)
            while chunk := file.read(1 << 16):
                sys.stdout.buffer.write(chunk)
                position += len(chunk)
    except FileNotFoundError:
        return position
    sys.stdout.buffer.flush()
    return position
