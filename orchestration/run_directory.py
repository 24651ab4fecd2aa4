"""Where everything of an experiment lies on the disk. One class owns each folder; nobody else spells a file's name."""

import glob
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from errors import CorruptFileError, UserError
from orchestration.job import ID_VERSION
from orchestration.locks import is_free
from orchestration.storage import sweep, sync_folder, write_atomically

_FAST_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C, where PyYAML was built with it
FINAL_STATES = ("done", "failed", "aborted")
FORMAT = 1  # raised when the files of an experiment change so that an earlier program's cannot be read
VERSION = f"{FORMAT}.{ID_VERSION}"
RECORD_KEYS = ("name", "file", "overrides", "snapshot", "user_dir")


class RunDirectory:
    """The folder of one job: `<root>/<experiment>/jobs/<id>`."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.gradients = path / "gradients.npz"
        self.checkpoint = path / "checkpoint.pt"
        self.best = path / "best.pt"
        self.log = path / "run.log"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.lock = path / "lock"
        self.cancellation = path / "cancelled.json"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration, a plain nested mapping; the status that follows brings its name to disk."""
        try:
            text = yaml.dump(dict(config), Dumper=_FAST_DUMPER, sort_keys=False)
        except UnicodeEncodeError:  # a file's name that is no Unicode
            text = yaml.safe_dump(dict(config), sort_keys=False)
        write_atomically(self.config, text.encode(), sync_name=False)

    def read_status(self) -> dict[str, Any] | None:
        """Return the job's status, None where it has none that can be read."""
        try:
            status = json.loads(self.status.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        if not isinstance(status, dict) or not isinstance(status.get("state"), str):
            return None
        return status if type(status.get("attempt")) is int else None

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace the job's status: state, attempt, host, pid, started, ended, error."""
        write_atomically(self.status, json.dumps(status, indent=1).encode() + b"\n")

    def cancel(self, attempt: int) -> None:
        """Leave word for whoever runs this attempt that it is cancelled."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.cancellation, json.dumps({"attempt": attempt}).encode() + b"\n")

    def cancelled_attempt(self) -> int:
        """Return the last attempt that was cancelled, -1 where none was."""
        try:
            attempt = json.loads(self.cancellation.read_bytes())["attempt"]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return -1
        return attempt if type(attempt) is int else -1

    def reason(self) -> str:
        """Return why the job failed or was aborted, for people."""
        status = self.read_status() or {}
        if self.cancelled_attempt() == status.get("attempt", 0) and status.get("state") not in FINAL_STATES:
            return "cancelled; its process has not ended yet"
        return str(status.get("error") or "no reason left")

    def checkpoint_identity(self) -> str:
        """Return a name that changes with each new checkpoint, empty where there is none."""
        try:
            found = self.checkpoint.stat()
        except FileNotFoundError:
            return ""
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"

    def clear(self) -> None:
        """Remove what an earlier attempt computed: metrics, gradients, checkpoints, TensorBoard events, samples."""
        for path in (self.checkpoint, self.best, self.metrics, self.gradients):
            path.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.samples):
            if folder.exists():
                shutil.rmtree(folder)

    def sweep(self) -> None:
        """Remove what a killed attempt had begun to write; for who knows that no attempt runs."""
        files = (self.config, self.status, self.checkpoint, self.best, self.gradients)
        sweep(self.path, [path.name for path in files])
        sweep(self.samples)

    def make(self) -> None:
        """Make the folder; `keep` has it be there after a power cut too."""
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)

    def keep(self) -> None:
        """Bring the folder's name to the disk: after its first file, which brings most of that there already."""
        sync_folder(self.path.parent)

    def forget(self) -> None:
        """Remove the status and all that was computed: the job is as if it had never run."""
        self.status.unlink(missing_ok=True)
        self.clear()


class MetricsFile:
    """metrics.jsonl: one row a value, appended; the truth that reports read.

    A checkpoint remembers how long the file was, and `keep` cuts it back to that, so that no step is recorded twice and
    a last line that a crash tore is dropped.
    """

    def __init__(self, path: Path):
        # Unbuffered: what a full disk refused must not reach the file later, behind the rows of another attempt.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add one row for each value."""
        rows = (
            json.dumps({"step": step, "split": split, "name": name, "value": float(value)})
            for name, value in values.items()
        )
        content = memoryview("".join(row + "\n" for row in rows).encode())
        while content:
            content = content[self._file.write(content) :]

    def sync(self) -> int:
        """Bring every row to the disk; return the length of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def keep(self, length: int) -> None:
        """Drop all rows past the first `length` bytes. Raises CorruptFileError where the file is shorter."""
        size = os.fstat(self._file.fileno()).st_size
        if size < length:
            raise CorruptFileError(f"{self._file.name} is shorter ({size} bytes) than its checkpoint says ({length})")
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ExperimentFolder:
    """The folder of one experiment, `<root>/<name>`, and the two locks beside it that outlive its removal."""

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        self.path = root / name
        self.queue = self.path / "queue.json"
        self.record = self.path / "experiment.json"
        self.jobs = self.path / "jobs"
        self.managers = self.path / "managers"
        self.snapshots = self.path / "snapshots"
        self.commits = self.path / "commits"
        self.worker_log = self.path / "workers.log"
        self.queue_lock = root / f".{name}.queue.lock"
        self.setup_lock = root / f".{name}.setup.lock"

    def job(self, identity: str) -> RunDirectory:
        """Return the folder of a job."""
        return RunDirectory(self.jobs / identity)

    def manager_lock(self, manager: str) -> Path:
        """Return the lock that a manager holds for life."""
        return self.managers / f"{manager}.lock"

    def snapshot(self, name: str) -> Path:
        """Return the folder of a snapshot of the source."""
        return self.snapshots / name

    def read_record(self) -> dict[str, Any] | None:
        """Return what the experiment was created with, None where it has not been created.

        Raises CorruptFileError where the record cannot be read.
        """
        try:
            record = json.loads(self.record.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{self.record} is cut or damaged") from error
        if not isinstance(record, dict) or not record.keys() >= set(RECORD_KEYS):
            raise CorruptFileError(f"{self.record} is damaged: it lacks some of {', '.join(RECORD_KEYS)}")
        if (version := record.pop("version", VERSION)) != VERSION:
            raise UserError(self.other_version(self.record, f"version {version} of these files", record["snapshot"]))
        return record

    def other_version(self, path: Path, made: str, snapshot: str = "<name>") -> str:
        """Return what to say of a file that another version of this program made, and this one does not read."""
        program, root = (shlex.quote(str(path)) for path in (self.snapshot(snapshot) / "manager.py", self.root))
        own = f"python {program} --exp {self.name} --root {root}"
        return f"{path} is of {made}, this program reads version {VERSION}: `{own}` goes on, or give another --root"

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace the record: name, file (the experiment's YAML text), overrides, snapshot, user_dir; perhaps edits."""
        write_atomically(self.record, json.dumps({**record, "version": VERSION}, indent=1).encode() + b"\n")

    def living(self) -> Iterator[Path]:
        """Yield the locks of this experiment that a living manager or job holds."""
        for lock in (*self.managers.glob("*.lock"), *self.jobs.glob("*/lock")):
            if not is_free(lock):
                yield lock

    def remove_jobs(self, identities: Iterable[str]) -> None:
        """Remove the folders of these jobs, each under a hidden name first, so that none is ever seen half removed."""
        for identity in identities:
            aside = self.jobs / f".{identity}.removed"
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(FileNotFoundError):
                os.replace(self.jobs / identity, aside)
            shutil.rmtree(aside, ignore_errors=True)

    def set_aside(self) -> Path:
        """Move the folder out of the way, under a hidden name; return where to."""
        aside = self.path.with_name(f".{self.name}.removed-{os.getpid()}")
        os.replace(self.path, aside)
        return aside

    def asides(self) -> Iterator[Path]:
        """Yield the folders that `set_aside` moved out of the way."""
        return self.root.glob(f".{glob.escape(self.name)}.removed-*")
