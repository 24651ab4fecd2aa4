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
from orchestration import commits, snapshot
from orchestration.composer import Composer
from orchestration.configuration import parse_override, spell
from orchestration.experiment import Experiment, difference, expand
from orchestration.job import Job
from orchestration.locks import holder
from orchestration.queue import Queue, Row
from orchestration.run_directory import ExperimentFolder
from orchestration.storage import TEMPORARY, sweep

Check = Callable[[Sequence[Sequence[str]], str], list[str]]  # overrides of jobs, snapshot -> a line for each refusal
Record = dict[str, Any]
MOST_LISTED = 20  # lines of one list


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
        self.queue.sweep()
        if not update_lib:
            self._require_snapshots()
        if update_exp:
            record = self._update_experiment(record, experiment, overrides)
        elif overrides and not _are_same(overrides, record["overrides"]):
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
        aside = self.queue.rebuild(recorded_rows(record, self.folder, self.user_dir))
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
        edits = read_edits(record)
        directory = os.getcwd() if overrides else record.get("directory", os.getcwd())
        overrides = overrides or record["overrides"]
        jobs = [job for job in expand(experiment, overrides) if job.id not in edits.removed]
        change = difference([row.id for row in self.queue.rows() if row.id not in edits.added], jobs)
        change = change._replace(added=[job for job in change.added if job.id not in edits.added])
        before = record["snapshot"]
        name = self._snapshot() if change.added else before
        self._refuse_bad(change.added, name)
        record = self._record(experiment, overrides, name) | {"directory": directory}
        record |= {"edits": edits.record()} if edits else {}
        self.folder.write_record(record)
        withdrawn = self.queue.withdraw(change.removed)
        self.queue.add(rows(change.added, name, directory))
        self.say(f"{self.folder.name}: {len(change.added)} new jobs queued, {len(withdrawn)} queued ones withdrawn")
        self._list([f"+ {job.id}" for job in change.added] + [f"- {identity}" for identity in withdrawn])
        if kept := len(change.removed) - len(withdrawn):
            self.say(f"{kept} jobs that are no longer in the grid have started, and stay")
        if edits:
            self.say(
                f"edits by dbutils.py stay: {edits}; `dbutils.py --exp {self.folder.name} --restore` takes them back"
            )
            self._list([f"without {identity}" for identity in sorted(edits.removed)])
            self._list([f"with    {identity}" for identity in edits.added])
        if name != before:
            self._say_changed_source(before, name)
        return record

    def _say_changed_source(self, before: str, name: str) -> None:
        """Say in which files a new snapshot differs from the earlier one."""
        earlier = self.folder.snapshot(before)
        if not earlier.is_dir():
            self.say("the source's earlier snapshot is missing: what has changed since is not known")
            return
        files = snapshot.difference(earlier, self.folder.snapshot(name))
        self.say(f"the source has changed in {len(files)} files:")
        self._list(files)

    def _list(self, lines: Sequence[str]) -> None:
        for line in lines[:MOST_LISTED]:
            self.say(f"  {line}")
        if len(lines) > MOST_LISTED:
            self.say(f"  ... and {len(lines) - MOST_LISTED} more")

    def _update_source(self, record: Record) -> None:
        name = self._snapshot()
        if name == record["snapshot"]:
            self.say("the source has not changed since the experiment's snapshot")
            return
        before = record["snapshot"]
        queued = [row.overrides for row in self.queue.rows() if row.state == "queued"]
        composed = Composer(self.folder, self.user_dir).compose(queued, name)
        refusals = [str(job) for job in composed if isinstance(job, UserError)]
        self._refuse_bad([job for job in composed if isinstance(job, Job)], name, "--update_lib: ", refusals)
        self.folder.write_record({**record, "snapshot": name})
        self.say(f"{self.queue.renew_snapshot(name)} queued jobs will run from the present source")
        self._say_changed_source(before, name)

    def _snapshot(self) -> str:
        self.folder.snapshots.mkdir(exist_ok=True)
        name = snapshot.take(self.folder.snapshots, self.user_dir)
        sources = {"source": snapshot.SOURCE} | ({"user_dir": self.user_dir} if self.user_dir else {})
        commits.record(self.folder.commits, name, sources)
        return name

    def _refuse_bad(self, jobs: Sequence[Job], name: str, where: str = "", refusals: Sequence[str] = ()) -> None:
        """Raise UserError where this snapshot cannot build what these jobs need, or `refusals` say so already."""
        errors = refusals or (self.check([job.overrides for job in distinct(jobs)], name) if jobs else [])
        if errors:
            more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
            raise UserError(f"{where}{errors[0]}{more}; {'nothing was changed' if where else 'no job was queued'}")

    def _record(self, experiment: Experiment, overrides: list[str], name: str) -> Record:
        return {
            "name": experiment.name,
            "file": experiment.text,
            "overrides": overrides,
            "snapshot": name,
            "user_dir": str(self.user_dir) if self.user_dir else None,
            "directory": os.getcwd(),
        }


def read_record(folder: ExperimentFolder) -> Record | None:
    """Return what the experiment was created with, None where it has not been created."""
    try:
        return folder.read_record()
    except CorruptFileError as error:
        advice = "restore it, or move it away: the same command then makes it anew from the experiment's file"
        raise UserError(f"{error}: {advice}") from error


@contextmanager
def afresh(folder: ExperimentFolder, remove: bool) -> Iterator[None]:
    """Make the experiment's folder, in the place of an earlier one where that is to be removed.

    What was there is removed when all has gone well; otherwise it is put back, and a folder made here vanishes. Raises
    UserError while any process of the experiment is alive, and for a folder that holds no experiment.
    """
    aside = None
    _tidy(folder)
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


def _tidy(folder: ExperimentFolder) -> None:
    """Clear up what a manager that was killed here left: put back what it had not yet replaced, remove the rest."""
    for aside in folder.asides():
        if not folder.record.exists() and not folder.queue.exists():
            shutil.rmtree(folder.path, ignore_errors=True)
            os.replace(aside, folder.path)
        shutil.rmtree(aside, ignore_errors=True)
    sweep(folder.path, [folder.record.name])
    for begun in folder.snapshots.glob(f".*{TEMPORARY}"):
        shutil.rmtree(begun, ignore_errors=True)


def rows(jobs: Sequence[Job], name: str, folder: str = "") -> list[Row]:
    """Return the queue's rows for these jobs, on this snapshot.

    Workers run elsewhere, so data_root is absolute: below `folder`, or below the working directory.
    """
    return [
        Row(job.id, [*job.overrides, f"data_root={spell(str(Path(folder, path).resolve()))}"], snapshot=name)
        for job, path in ((job, job.config["data_root"]) for job in jobs)
    ]


def recorded_rows(record: Record, folder: ExperimentFolder, user_dir: Path | None) -> list[Row]:
    """Return the rows that an experiment's record stands for: those of its grid, as they have been edited since.

    They are composed as the experiment's snapshot does it: the ids are those that its jobs have had from the first.
    """
    edits = read_edits(record)
    text, overrides, name = record["file"], record["overrides"], record["snapshot"]
    jobs = Composer(folder, user_dir).expand(record["name"], text, overrides, name)
    grid = rows(jobs, name, record.get("directory", ""))
    added = [Row(identity, overrides, snapshot=name) for identity, overrides in edits.added.items()]
    known = {row.id for row in added}
    return [row for row in grid if row.id not in edits.removed | known] + added


@dataclass
class Edits:
    """How an experiment's jobs differ from its grid: ids removed from it, and overrides of those in their place."""

    removed: set[str]
    added: dict[str, list[str]]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added)

    def __str__(self) -> str:
        return f"{len(self.removed)} jobs removed from the grid, {len(self.added)} put in the place of such"

    def remove(self, identity: str) -> None:
        """Take note of a job that is no more."""
        self.added.pop(identity, None)
        self.removed.add(identity)

    def add(self, row: Row) -> None:
        """Take note of a job that the grid does not have."""
        self.added[row.id] = row.overrides

    def record(self) -> dict[str, Any]:
        """Return what the experiment's record keeps."""
        return {"removed": sorted(self.removed), "added": self.added}


def read_edits(record: Record) -> Edits:
    """Return the edits that an experiment's record keeps."""
    kept = record.get("edits", {})
    return Edits(set(kept.get("removed", [])), dict(kept.get("added", {})))


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Return one job for each way of building a model, a data set, an estimator and an optimizer."""
    keys = ("task", "model", "dataset", "estimator", "optimizer", "analysis", "evaluation", "batch_size", "device")
    found: dict[str, Job] = {}
    for job in jobs:
        key = json.dumps([job.config.get(name) for name in keys], sort_keys=True)
        found.setdefault(key, job)
    return list(found.values())


def _are_same(overrides: Sequence[str], others: Sequence[str]) -> bool:
    """Say whether two command lines ask for the same, in whatever order."""
    first, second = ({each.key: each.values for each in map(parse_override, given)} for given in (overrides, others))
    return first == second


def shown(overrides: Sequence[str]) -> str:
    """Return overrides for a message."""
    return " ".join(overrides) or "no overrides"
