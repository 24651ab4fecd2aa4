#!/usr/bin/env python3
"""Run every job of an experiment, or go on with it.

    python manager.py --exp quickstart                      # all its jobs, on the devices of this machine
    python manager.py --exp quickstart --status             # how far it is
    python manager.py --exp quickstart steps=500 --dry_run  # which jobs these would be

Exit status: 0 all jobs are done; 1 some failed or were aborted, or the disk refused; 2 bad usage or configuration;
3 jobs remain; 130 interrupted.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError, near
from orchestration.command_line import (
    DONE,
    FAILED,
    INTERRUPTED,
    REMAIN,
    Parser,
    count,
    existing_folder,
    fraction,
    guarded,
    positive,
    waiting,
)

if TYPE_CHECKING:
    from orchestration.experiment import Experiment
    from orchestration.queue import Queue
    from orchestration.run_directory import ExperimentFolder


def parser() -> Parser:
    """Return the command line's parser."""
    p = Parser(__doc__)
    add = p.add_argument
    add("--exp", metavar="NAME", help="an experiment: a file in experiments/ without its ending")
    add("--root", type=Path, default=Path("runs"), help="folder of all runs (default: ./runs)")
    add("--processes", type=positive, metavar="N", help="jobs at once on each device (default: 1; CPU: its cores)")
    add("--max_gpus", type=positive, metavar="N", help="use at most this many CUDA devices")
    add("--max_load", type=fraction, default=0.5, metavar="X", help="skip busier devices (default: %(default)s)")
    add("--max_memory", type=fraction, default=0.5, metavar="X", help="skip fuller devices (default: %(default)s)")
    add("--rf", action="store_true", help="remove the experiment's folder and start afresh")
    add("--resume", action="store_true", help="go on with an existing experiment (it is done anyway)")
    add("--dry_run", action="store_true", help="list the jobs and write nothing")
    add("--status", action="store_true", help="print how far the experiment is and write nothing")
    add("--doctor", action="store_true", help="say whether this machine and the disk below --root can be relied on")
    add("--max_jobs", type=positive, metavar="N", help="start at most this many jobs")
    again = "queue again what was aborted (1), failed too (2), or all (10000)"
    add("--requeue_level", type=count, default=0, metavar="N", help=again)
    add("--update_exp", action="store_true", help="take in a changed experiment file or other overrides")
    add("--update_lib", action="store_true", help="run jobs that have not started from the present source")
    add("--executor", default="local", metavar="NAME", help="how jobs reach processes (default: %(default)s)")
    add("--user_dir", type=existing_folder, metavar="DIR", help="your own modules, conf/ and experiments/")
    overrides = "configuration of all jobs: steps=500 estimator.iw=5,10"
    add("overrides", nargs="*", metavar="OVERRIDE", help=overrides)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = parser()
    arguments = p.read(argv)
    if arguments.exp is None and not arguments.doctor:
        p.error("the following arguments are required: --exp")
    return guarded(lambda: command(arguments))


def command(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask."""
    if arguments.doctor:
        from orchestration.doctor import examine

        return DONE if examine(arguments.root.resolve(), print) else FAILED

    from orchestration.experiment import SINGLE, expand
    from orchestration.queue import Queue
    from orchestration.run_directory import ExperimentFolder

    if arguments.rf and (arguments.status or arguments.dry_run):
        raise UserError("--rf removes the experiment, --status and --dry_run change nothing: give one of them")
    folder = ExperimentFolder(arguments.root.resolve(), arguments.exp)
    if arguments.exp == SINGLE:
        raise UserError(f"{SINGLE!r} holds run.py's jobs, which have no queue: dbutils.py --exp {SINGLE} shows them")
    queue = Queue(folder)
    if arguments.status:
        return status(folder, queue)
    if root := next((text for text in arguments.overrides if text.startswith("root=")), None):
        raise UserError(f"{root}: an experiment's folder is chosen by a flag: give --root {root.partition('=')[2]}")
    experiment = find(arguments, folder)
    if arguments.dry_run:
        jobs = expand(experiment, arguments.overrides)
        for job in jobs:
            print(job.id, *job.overrides)
        print(f"{len(jobs)} jobs")
        return DONE
    if arguments.rf or arguments.update_exp or not folder.record.exists():
        expand(experiment, arguments.overrides)  # what is wrong there is said before anything is made or moved
    return run(arguments, experiment, folder, queue)


def find(arguments: argparse.Namespace, folder: "ExperimentFolder") -> "Experiment":
    """Return the experiment's file as it is now; an experiment that exists goes on without it, from its stored copy."""
    from orchestration.experiment import load, parse
    from orchestration.lifecycle import read_record
    from reporting import options

    is_name = Path(arguments.exp).name == arguments.exp
    record = read_record(folder) if is_name and not arguments.rf else None
    if arguments.user_dir is None and record and record["user_dir"]:
        arguments.user_dir = Path(record["user_dir"])
    try:
        experiment = load(arguments.exp, arguments.user_dir)
        options.parse(experiment.report, f"{experiment.where}: report")
    except UserError as error:
        if record is None or arguments.update_exp or arguments.dry_run:
            raise
        print(f"{error}; going on with the copy that the experiment was created with")
        return parse(record["name"], record["file"], str(folder.record), arguments.user_dir)
    return experiment


def status(folder: "ExperimentFolder", queue: "Queue") -> int:
    """Print the counts by state, and what failed."""
    from errors import CorruptFileError

    if folder.record.exists() and not folder.queue.exists():
        raise UserError(f"{folder.queue} is missing; `manager.py --exp {folder.name}` rebuilds it")
    if not folder.queue.exists():
        made = [path.parent.name for path in folder.root.glob("*/queue.json")]
        raise UserError(f"no experiment {folder.name!r} in {folder.root}{near(folder.name, made)}")
    try:
        rows = queue.rows()
    except CorruptFileError as error:
        raise UserError(f"{error}; `manager.py --exp {folder.name}` rebuilds it") from error
    counts = queue.counts()
    print(f"{folder.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    for row in rows:
        if row.state in ("failed", "aborted"):
            print(f"{row.state}  {row.id}: {folder.job(row.id).reason()}")
    return ending(counts)


def ending(counts: dict[str, int]) -> int:
    """Return the exit status that tells how the jobs have ended."""
    if counts.get("failed") or counts.get("aborted"):
        return FAILED
    return REMAIN if counts.get("queued") or counts.get("running") else DONE


def run(arguments: argparse.Namespace, experiment: "Experiment", folder: "ExperimentFolder", queue: "Queue") -> int:
    """Bring the experiment's folder in line with what was asked, then work until nothing is left to do."""
    from filelock import FileLock

    from orchestration.devices import cuda_devices, describe, place
    from orchestration.display import Display
    from orchestration.execution import resolve
    from orchestration.executors import names
    from orchestration.lifecycle import Lifecycle, afresh
    from orchestration.queue import Manager
    from orchestration.scheduler import Scheduler

    if arguments.executor not in names():
        raise UserError(f"--executor: unknown executor {arguments.executor!r}{near(arguments.executor, names())}")
    devices = cuda_devices()
    slots = place(devices, arguments.processes, arguments.max_gpus, arguments.max_load, arguments.max_memory)
    print(describe(devices, slots), flush=True)
    if not slots:
        limits = f"--max_load {arguments.max_load} or --max_memory {arguments.max_memory}"
        raise UserError(f"every CUDA device is beyond {limits}; raise them, or wait")
    folder.root.mkdir(parents=True, exist_ok=True)
    with waiting(FileLock(folder.setup_lock)), afresh(folder, remove=arguments.rf):
        manager = Manager(folder)
        executor = resolve(f"orchestration.executors.{arguments.executor}.Executor")(folder, manager.name, slots)
        try:
            lifecycle = Lifecycle(folder, queue, executor.check, print, arguments.user_dir)
            lifecycle.prepare(experiment, arguments.overrides, arguments.update_exp, arguments.update_lib)
            if arguments.requeue_level:
                print(f"{queue.requeue(arguments.requeue_level)} jobs queued again", flush=True)
        except BaseException:
            executor.kill()
            manager.close()
            raise
    display = Display(folder.name, len(slots))
    scheduler = Scheduler(queue, manager, executor, display, len(slots), arguments.max_jobs)
    try:
        counts = scheduler.run()
    finally:
        display.close()
        executor.kill()
        manager.close()
    print(f"{folder.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    if scheduler.interrupts:
        print("interrupted: the same command goes on")
        return INTERRUPTED
    if scheduler.refusal:
        print(f"error: the disk refused: {scheduler.refusal}", file=sys.stderr)
        return FAILED
    return ending(counts)


if __name__ == "__main__":
    sys.exit(main())
