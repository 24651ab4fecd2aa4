#!/usr/bin/env python3
"""Inspect and edit an experiment's queue.

    python dbutils.py --exp quickstart                                  # counts, from the disk, and what does not fit
    python dbutils.py --exp quickstart --find 'estimator=ovis-*,iw>=10' # the jobs that are meant
    python dbutils.py --exp quickstart --error_messages                 # why jobs failed
    python dbutils.py --exp quickstart --requeue --requeue_level 2      # run failed and aborted jobs again
    python dbutils.py --exp quickstart --update optimizer.lr:0.1:0.01   # queued jobs with another value
    python dbutils.py --exp quickstart --find seed=3 --cancel
    python dbutils.py --exp quickstart --logs gmm-ovis --follow

--find EXPR: comparisons separated by commas, KEY=VALUE, also with != < <= > >=. KEY is a configuration key, whole or by
its last part, a group, or id, state, attempt. VALUE may have * and ?, and alternatives: seed=1|2.

What changes the queue shows what it will do and asks first, or takes --yes. A job that a living process runs is never
deleted or queued again: cancel it first. Reading writes nothing and waits for nothing, also while managers work.

Exit status: 0 all is well; 1 some job failed or was aborted, or does not fit; 2 bad usage; 3 jobs remain (these two of
--check, and --logs); 130 interrupted. More in docs/queue.md.
"""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from errors import CorruptFileError, UserError, near
from orchestration.command_line import DONE, Parser, count, existing_folder, guarded

READING = ("check", "show_all", "error_messages", "logs")  # the functions of orchestration.reading
CHANGING = ("update", "delete", "cancel", "requeue", "rebuild", "restore")  # those of orchestration.changing


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(__doc__)
    p.add_argument("--exp", required=True, metavar="NAME", help="the experiment; single: the jobs of run.py")
    p.add_argument("--root", type=Path, default=Path("runs"), help="folder of all runs (default: ./runs)")
    p.add_argument("--user_dir", type=existing_folder, metavar="DIR", help="your own modules (default: as recorded)")
    which = p.add_argument_group("which jobs")
    which.add_argument("--find", metavar="EXPR", help="those that an expression describes; alone, it lists them")
    which.add_argument("--state", metavar="STATES", help="those in these states of the queue, separated by commas")
    which.add_argument("--all", action="store_true", help="every job: --delete and --cancel want it said")
    read = p.add_argument_group("reading")
    change = p.add_argument_group("changing")
    read.add_argument(
        "--check", action="store_true", help="count jobs by state, from the disk, and name what does not fit"
    )
    read.add_argument("--show_all", action="store_true", help="list the jobs")
    read.add_argument("--error_messages", action="store_true", help="list why jobs failed or were aborted")
    read.add_argument("--logs", metavar="JOB", help="print a job's log; JOB is the beginning of its id")
    read.add_argument("--follow", action="store_true", help="with --logs: go on until the job ends")
    text = "give queued jobs another value, checked as any override"
    change.add_argument("--update", metavar="KEY:OLD:NEW", help=text)
    change.add_argument("--delete", action="store_true", help="remove jobs that nobody runs, and what they computed")
    change.add_argument("--cancel", action="store_true", help="abort jobs, running ones at their next step")
    change.add_argument("--requeue", action="store_true", help="queue jobs again, up to --requeue_level")
    levels = "1 aborted or lost (default), 2 failed too, 100 running without a living process too, 10000 all"
    change.add_argument("--requeue_level", type=count, metavar="N", help=levels)
    change.add_argument(
        "--rebuild", action="store_true", help="make the queue anew from the record and the jobs' status"
    )
    change.add_argument(
        "--restore", action="store_true", help="take --delete and --update back: the jobs of the grid again"
    )
    p.add_argument("expression", nargs="*", help=argparse.SUPPRESS)  # to say where it belongs
    change.add_argument("--yes", action="store_true", help="do not ask")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = parser()
    arguments = p.read(argv)
    if stray := arguments.expression:
        p.error(f"{stray[0]!r} belongs to no flag: which jobs are meant is said by --find {shlex.quote(stray[0])}")
    if len(both := verbs(arguments)) > 1:
        p.error(f"--{both[0]} and --{both[1]}: give one of them")
    if arguments.follow and arguments.logs is None:
        p.error("--follow goes with --logs JOB")
    if arguments.requeue_level is not None and not arguments.requeue:
        p.error("--requeue_level goes with --requeue")
    for verb in ("rebuild", "restore"):
        if getattr(arguments, verb) and (arguments.find is not None or arguments.state is not None):
            p.error(f"--{verb} is of the whole queue: it takes no --find and no --state")
    try:
        return guarded(lambda: command(arguments))
    finally:
        with_output_gone()


def verbs(arguments: argparse.Namespace) -> list[str]:
    """Return the verbs that were given."""
    return [name for name in READING + CHANGING if getattr(arguments, name) not in (None, False)]


def with_output_gone() -> None:
    """Flush what is left; a reader that has gone, as in `... | head`, is no error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask."""
    from orchestration.experiment import SINGLE
    from orchestration.run_directory import ExperimentFolder
    from orchestration.session import Session

    folder = ExperimentFolder(arguments.root.resolve(), arguments.exp)
    is_name = Path(arguments.exp).name == arguments.exp
    if not is_name or not (folder.record.exists() or folder.queue.exists() or folder.jobs.is_dir()):
        made = sorted({path.parent.name for path in folder.root.glob("*/jobs")})
        raise UserError(f"no experiment {arguments.exp!r} in {folder.root}{near(arguments.exp, made)}")
    verb = next(iter(verbs(arguments)), "check" if (arguments.find, arguments.state) == (None, None) else "show_all")
    if folder.name == SINGLE and verb in CHANGING:
        raise UserError(
            f"--{verb}: run.py's jobs have no queue: run.py with the same overrides goes on with one, its folder in "
            f"{folder.jobs} can be removed by hand"
        )
    module = importlib.import_module(f"orchestration.{'reading' if verb in READING else 'changing'}")
    do: Callable[[Session], int] = getattr(module, verb)
    try:
        return do(Session(arguments, folder))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except CorruptFileError as error:
        raise UserError(f"{error}; --rebuild makes it anew from the run directories") from error


if __name__ == "__main__":
    sys.exit(main())
