"""One command of dbutils.py on one experiment: which jobs it means, and whether the user agrees."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from errors import UserError, near
from orchestration.command_line import DONE, waiting
from orchestration.composer import Composer
from orchestration.experiment import SINGLE
from orchestration.lifecycle import read_record
from orchestration.queue import STATES, Queue, Row
from orchestration.run_directory import ExperimentFolder
from orchestration.selection import Values, parse, values_of
from orchestration.single import SingleJobs

if TYPE_CHECKING:
    from orchestration.editing import Editor

MOST_SHOWN = 20  # jobs listed before a question


@dataclass
class Session:
    """The jobs of an experiment that a command is about."""

    arguments: argparse.Namespace
    folder: ExperimentFolder

    @cached_property
    def queue(self) -> Queue:
        """The experiment's queue."""
        return Queue(self.folder)

    @property
    def is_single(self) -> bool:
        """Whether these are run.py's jobs, which have no queue."""
        return self.folder.name == SINGLE

    def read(self) -> list[Row]:
        """Return all jobs as they are now, by the queue's file or, where there is none, by their own word."""
        return SingleJobs(self.folder).rows() if self.is_single else self.queue.rows()

    @cached_property
    def rows(self) -> list[Row]:
        """All jobs, as they were when this was first asked."""
        return self.read()

    @cached_property
    def user_dir(self) -> Path | None:
        """The user's folder: the one given, else the one that the experiment was created with."""
        given: Path | None = self.arguments.user_dir
        if given is None and self.folder.record.exists():
            record = read_record(self.folder) or {}
            given = Path(record["user_dir"]) if record.get("user_dir") else None
        if given is not None:
            sys.path.insert(0, str(given))
        return given

    @cached_property
    def composer(self) -> Composer:
        """What composes jobs as the experiment's source does."""
        return Composer(self.folder, self.user_dir)

    @cached_property
    def values(self) -> dict[str, Values]:
        """Each job's configuration under dotted keys."""
        return values_of(self.rows, self.folder, self.composer)

    @property
    def is_narrowed(self) -> bool:
        """Whether --find or --state choose among the jobs."""
        return self.arguments.find is not None or self.arguments.state is not None

    @cached_property
    def selected(self) -> list[Row]:
        """The jobs that --find and --state mean; all where neither is given."""
        found = self.rows
        if self.arguments.state is not None:
            states = self.arguments.state.split(",")
            for state in states:
                if state not in STATES:
                    raise UserError(f"--state: unknown state {state!r}{near(state, STATES)}")
            found = [row for row in found if row.state in states]
        if self.arguments.find is not None and self.rows:
            terms = parse(self.arguments.find, {key for values in self.values.values() for key in values})
            found = [row for row in found if all(term.holds(self.values[row.id]) for term in terms)]
        return found

    def chosen(self, verb: str) -> list[Row]:
        """Return the jobs that a verb without a selection of its own is for; which ones has to be said."""
        if not (self.is_narrowed or self.arguments.all):
            raise UserError(f"{verb}: say which jobs: --find EXPR, --state STATES or --all")
        return self.selected

    def agreed(self, what: str, rows: Sequence[Row], note: Callable[[Row], str] | None = None) -> bool:
        """Show what will be done to these jobs and ask; say so where there are none."""
        if not rows:
            print(f"no job to {what.split(',')[0]}: nothing was changed")
            return False
        notes = map(note, rows) if note else repeat("")
        lines = [
            f"    {row.state:<8} {row.id} {text}".rstrip() for row, text in zip(rows[:MOST_SHOWN], notes, strict=False)
        ]
        if len(rows) > MOST_SHOWN:
            lines.append(f"    ... and {len(rows) - MOST_SHOWN} more")
        return self.allowed("\n".join([f"{what} {len(rows)} jobs:", *lines]))

    def allowed(self, plan: str) -> bool:
        """Show a plan and ask, unless --yes is given; where nobody can answer that is an error."""
        if not self.arguments.yes and (sys.stdin is None or not sys.stdin.isatty()):
            raise UserError(
                "nobody can be asked here (standard input is no terminal): --yes does it, nothing was changed"
            )
        print(plan, flush=True)
        if self.arguments.yes:
            return True
        try:
            answer = input("go on? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() in ("y", "yes"):
            return True
        print("nothing was changed")
        return False

    @contextmanager
    def editing(self) -> "Iterator[Editor]":
        """Hold the lock that keeps managers from setting up meanwhile."""
        from orchestration.editing import Editor

        with waiting(FileLock(self.folder.setup_lock)):
            yield Editor(self.folder, self.queue, self.user_dir)


def tally(counts: "Counter[str]") -> str:
    """Return counts by state as one line."""
    order = ("done", "running", "queued", "lost", "missing", "failed", "aborted")
    return ", ".join(f"{counts[state]} {state}" for state in order if counts[state]) or "no jobs"


def some(names: Sequence[str]) -> str:
    """Return names for a message, the first of them where they are many."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def tell(refused: Sequence[str]) -> int:
    """Print what was left alone, since it changed between the question and the deed; return the exit status."""
    for line in refused:
        print(f"left alone: {line}")
    return DONE
