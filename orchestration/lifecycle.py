"""How an experiment comes to be in its folder, and how a changed file or source is taken in."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import CorruptFileError, UserError
from orchestration import snapshot
from orchestration.configuration import spell
from orchestration.experiment import Experiment, difference, expand, parse
from orchestration.job import Job
from orchestration.locks import holder
from orchestration.queue import Queue, Row
from orchestration.run_directory import ExperimentFolder

Check = Callable[[Sequence[Sequence[str]], str], list[str]]  # overrides of jobs, snapshot -> a line for each refusal
Record = dict[str, Any]


@dataclass
class Lifecycle:
    """Brings the folder of one experiment in line with its file; the caller holds the setup lock."""

    folder: ExperimentFolder
    queue: Queue
    check: Check
    say: Callable[[str], None]
    user_dir: Path | None = None

    def prepare(
        self, experiment: Experiment, overrides: list[str], update_exp: bool = False, update_lib: bool = False
    ) -> None:
        """Create the experiment, or open the one that is there and take in what has changed where that is asked."""
        record = read_record(self.folder)
        if record is None:
            self._create(experiment, overrides)
            return
        self._open(record)
        if not update_lib:
            self._require_snapshots()
        if update_exp:
            record = self._update_experiment(record, experiment, overrides or record["overrides"])
        elif overrides and overrides != record["overrides"]:
            raise UserError(
                f"{self.folder.name!r} was created with {shown(record['overrides'])}, not with {shown(overrides)}: "
                "give none to go on, or --update_exp to change its jobs"
            )
        elif experiment.text != record["file"]:
            self.say(f"{experiment.where} has changed since this was created; --update_exp takes the change in")
        if update_lib:
            self._update_source(record)

    def _create(self, experiment: Experiment, overrides: list[str]) -> None:
        jobs = expand(experiment, overrides)
        self.folder.jobs.mkdir(exist_ok=True)
        name = self._snapshot()
        self._refuse_bad(jobs, name)
        self.folder.write_record(self._record(experiment, overrides, name))
        # A queue and run directories are there where only the record was lost.
        self.queue.rebuild(rows(jobs, name))
        self.queue.add(rows(jobs, name))
        self.say(f"{self.folder.name}: {self.queue.counts()['queued']} of {len(jobs)} jobs queued")

    def _open(self, record: Record) -> None:
        """Make sure that the queue can be read; a crash right after creation or a damaged file has it rebuilt."""
        reason = f"{self.folder.queue} is missing"
        try:
            if self.folder.queue.exists():
                self.queue.rows()
                return
        except CorruptFileError as error:
            reason = str(error)
        stored = parse(record["name"], record["file"], str(self.folder.record), self.user_dir)
        jobs = expand(stored, record["overrides"])
        aside = self.queue.rebuild(rows(jobs, record["snapshot"]))
        kept = f" (the damaged file is kept as {aside.name})" if aside else ""
        self.say(f"{reason}: rebuilt from the experiment's grid and its run directories{kept}")

    def _require_snapshots(self) -> None:
        """Refuse to go on from a copy of the source that is missing or not what it was."""
        for name in {row.snapshot for row in self.queue.rows() if row.state in ("queued", "running")}:
            if not snapshot.is_whole(self.folder.snapshot(name)) and self._snapshot() != name:
                raise UserError(
                    f"{self.folder.snapshot(name)} is missing or damaged, and the source has changed since: "
                    "--update_lib lets the jobs that have not started run from the present source"
                )

    def _update_experiment(self, record: Record, experiment: Experiment, overrides: list[str]) -> Record:
        jobs = expand(experiment, overrides)
        change = difference([row.id for row in self.queue.rows()], jobs)
        name = self._snapshot() if change.added else record["snapshot"]
        self._refuse_bad(change.added, name)
        record = self._record(experiment, overrides, name)
        self.folder.write_record(record)
        withdrawn = self.queue.withdraw(change.removed)
        self.queue.add(rows(change.added, name))
        self.say(f"{self.folder.name}: {len(change.added)} new jobs queued, {len(withdrawn)} queued ones withdrawn")
        return record

    def _update_source(self, record: Record) -> None:
        name = self._snapshot()
        if name == record["snapshot"]:
            self.say("the source has not changed since the experiment's snapshot")
            return
        self.folder.write_record({**record, "snapshot": name})
        self.say(f"{self.queue.renew_snapshot(name)} queued jobs will run from the present source")

    def _snapshot(self) -> str:
        self.folder.snapshots.mkdir(exist_ok=True)
        return snapshot.take(self.folder.snapshots, self.user_dir)

    def _refuse_bad(self, jobs: Sequence[Job], name: str) -> None:
        errors = self.check([job.overrides for job in distinct(jobs)], name) if jobs else []
        if errors:
            more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{more}; no job was queued")

    def _record(self, experiment: Experiment, overrides: list[str], name: str) -> Record:
        return {
            "name": experiment.name,
            "file": experiment.text,
            "overrides": overrides,
            "snapshot": name,
            "user_dir": str(self.user_dir) if self.user_dir else None,
        }


def read_record(folder: ExperimentFolder) -> Record | None:
    """Return what the experiment was created with, None where it has not been created."""
    try:
        return folder.read_record()
    except CorruptFileError as error:
        raise UserError(f"{error}: restore it, or start afresh with --rf") from error


@contextmanager
def afresh(folder: ExperimentFolder, remove: bool) -> Iterator[None]:
    """Make the experiment's folder, in the place of an earlier one where that is to be removed.

    What was there is removed when all has gone well; otherwise it is put back, and a folder made here vanishes. Raises
    UserError while any process of the experiment is alive, and for a folder that holds no experiment.
    """
    aside = None
    existed = folder.path.exists()
    if remove and existed:
        if not any(path.exists() for path in (folder.record, folder.queue, folder.snapshots)):
            raise UserError(f"--rf: {folder.path} is not the folder of an experiment: remove it by hand")
        for lock in folder.living():
            what = "a manager" if lock.parent == folder.managers else f"job {lock.parent.name}"
            raise UserError(f"--rf: {what} of {folder.name!r} is running ({holder(lock)}); stop it first")
        aside = folder.set_aside()
    folder.path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if aside or not existed:
            shutil.rmtree(folder.path, ignore_errors=True)
        if aside:
            os.replace(aside, folder.path)
        raise
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


def rows(jobs: Sequence[Job], name: str) -> list[Row]:
    """Return the queue's rows for these jobs, on this snapshot; workers run elsewhere, so data_root is absolute."""
    return [
        Row(job.id, [*job.overrides, f"data_root={spell(str(Path(job.config['data_root']).resolve()))}"], snapshot=name)
        for job in jobs
    ]


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Return one job for each way of building a model, a data set, an estimator and an optimizer."""
    keys = ("task", "model", "dataset", "estimator", "optimizer", "analysis", "evaluation", "batch_size", "device")
    found: dict[str, Job] = {}
    for job in jobs:
        key = json.dumps([job.config.get(name) for name in keys], sort_keys=True)
        found.setdefault(key, job)
    return list(found.values())


def shown(overrides: Sequence[str]) -> str:
    """Return overrides for a message."""
    return " ".join(overrides) or "no overrides"
