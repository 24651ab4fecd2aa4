"""The verbs of dbutils.py that change a queue: each shows what it will do, asks, and returns the exit status."""

import re
from collections import Counter

from errors import UserError
from orchestration.command_line import DONE
from orchestration.editing import changed_rows, require_record
from orchestration.locks import is_seen_held
from orchestration.queue import REQUEUE_LEVELS, Row
from orchestration.selection import JOBS_OWN, equals, full_key
from orchestration.session import Session, some, tally, tell


def cancel(session: Session) -> int:
    """Abort jobs that have not ended."""
    found = [row for row in session.chosen("--cancel") if row.state in ("queued", "running")]
    if not session.agreed("cancel", found):
        return DONE
    with session.editing() as editor:
        cancelled, refused = editor.cancel({row.id for row in found})
    running = sum(row.state == "running" for row in cancelled)
    print(f"{len(cancelled)} jobs cancelled" + (f"; {running} were running, and stop by themselves" * bool(running)))
    return tell(refused)


def delete(session: Session) -> int:
    """Remove jobs with their folders."""
    require_record(session.folder)
    found = session.chosen("--delete")
    running = [row.id for row in found if row.state == "running"]
    found = [row for row in found if row.state != "running"]
    if running:
        print(f"left alone, since they run: {some(running)} (--cancel first)")
    if not session.agreed("delete, with all that they computed,", found):
        return DONE
    with session.editing() as editor:
        deleted, refused = editor.delete({row.id for row in found})
    print(f"{len(deleted)} jobs deleted")
    return tell(refused)


def update(session: Session) -> int:
    """Put other jobs in the place of queued ones."""
    require_record(session.folder)
    key, old, new = parse_update(session.arguments.update)
    if key in JOBS_OWN:
        raise UserError(f"--update: {key} is the queue's, and no key of the configuration")
    known = sorted({key for values in session.values.values() for key in values} - JOBS_OWN)
    key = full_key(key, known, "--update")
    queued = [row for row in session.selected if row.state == "queued"]
    others = [row for row in session.selected if row.state != "queued"]
    others = [row for row in others if equals(session.values[row.id].get(key), old)]
    if others:
        states = tally(Counter(row.state for row in others))
        if not any(equals(session.values[row.id].get(key), old) for row in queued):
            raise UserError(f"--update: no job with {key}={old} is queued ({states}): only queued jobs change")
        print(f"left alone, since they have started: {states}")
    changes = changed_rows(queued, session.values, key, old, new, session.composer)
    taken = {row.id for row in session.rows}
    for identity, row in changes.items():
        if row.id != identity and (row.id in taken or session.folder.job(row.id).path.exists()):
            raise UserError(f"--update: {identity} would become {row.id}, which exists already; nothing was changed")
    rows = [row for row in queued if row.id in changes]
    if not session.agreed(f"change {key} from {old} to {new} in", rows, lambda row: f"-> {changes[row.id].id}"):
        return DONE
    with session.editing() as editor:
        replaced, refused = editor.replace(changes)
    print(f"{len(replaced)} jobs changed")
    return tell(refused)


def requeue(session: Session) -> int:
    """Queue jobs again, up to a level."""
    level = 1 if session.arguments.requeue_level is None else session.arguments.requeue_level
    states = {state for state, least in REQUEUE_LEVELS.items() if level >= least}
    ended = [row for row in session.selected if row.state in states]
    running = [row for row in session.selected if row.state == "running" and states & {"lost", "stalled"}]
    running = [row for row in running if not is_seen_held(session.folder.job(row.id).lock)]
    if not session.agreed("queue again", ended + running, _requeue_note):
        return DONE
    with session.editing() as editor:
        queued = editor.queue.requeue(level, {row.id for row in ended + running})
    print(f"{queued} jobs queued again")
    return DONE


def _requeue_note(row: Row) -> str:
    """Return what a job's line says of how it is queued again."""
    notes = {"done": "starts anew: what it computed is removed", "running": "only if no living process runs it"}
    return notes.get(row.state, "")


def rebuild(session: Session) -> int:
    """Make the queue anew."""
    require_record(session.folder)
    if not session.allowed(f"rebuild {session.folder.queue} from experiment.json and the jobs' status.json"):
        return DONE
    with session.editing() as editor:
        lines, aside = editor.rebuild()
    kept = f"; the damaged file is kept as {aside.name}" if aside else ""
    print(f"rebuilt: {tally(session.queue.counts())}; {len(lines)} rows changed{kept}")
    print("".join(f"    {line}\n" for line in lines), end="")
    return DONE


def restore(session: Session) -> int:
    """Make the jobs those of the experiment's grid again."""
    require_record(session.folder)
    if not session.allowed("queue again what --delete removed from the grid, and withdraw what --update put in there"):
        return DONE
    with session.editing() as editor:
        added, withdrawn = editor.restore()
    print(f"{len(added)} jobs are back, {len(withdrawn)} queued ones withdrawn")
    print(
        "".join(f"    {sign} {identity}\n" for sign, ids in (("+", added), ("-", withdrawn)) for identity in ids),
        end="",
    )
    return DONE


def parse_update(text: str) -> tuple[str, str, str]:
    """Parse KEY:OLD:NEW; a value with a colon is quoted."""
    value = r"((?:'[^']*'|\"[^\"]*\"|[^:'\"])+)"
    found = re.fullmatch(rf"([\w.]+):{value}:{value}", text)
    if not found:
        raise UserError(
            f"--update: expected KEY:OLD:NEW, such as optimizer.lr:0.1:0.01 (a colon is quoted), not {text!r}"
        )
    key, old, new = found.groups()
    return key, old, new
