"""Where everything of an experiment lies on the disk. One class owns each folder; nobody else spells a file's name."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from errors import CorruptFileError
from orchestration.locks import is_free
from orchestration.storage import write_atomically

FINAL_STATES = ("done", "failed", "aborted")
RECORD_KEYS = ("name", "file", "overrides", "snapshot", "user_dir")


class RunDirectory:
    """The folder of one job: `<root>/<experiment>/jobs/<id>`."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.log = path / "run.log"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.lock = path / "lock"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration, a plain nested mapping."""
        write_atomically(self.config, yaml.safe_dump(dict(config), sort_keys=False).encode())

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

    def checkpoint_identity(self) -> str:
        """Return a name that changes with each new checkpoint, empty where there is none."""
        try:
            found = self.checkpoint.stat()
        except FileNotFoundError:
            return ""
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"

    def clear(self) -> None:
        """Remove what an earlier attempt computed: metrics, checkpoint, TensorBoard events, samples."""
        for path in (self.checkpoint, self.metrics):
            path.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.samples):
            shutil.rmtree(folder, ignore_errors=True)

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
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)

    def append(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add one row for each value."""
        rows = (
            json.dumps({"step": step, "split": split, "name": name, "value": float(value)})
            for name, value in values.items()
        )
        self._file.write("".join(row + "\n" for row in rows).encode())
        self._file.flush()

    def sync(self) -> int:
        """Bring every row to the disk; return the length of the file in bytes."""
        self._file.flush()
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
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace the record: name, file (the experiment's YAML text), overrides, snapshot, user_dir."""
        write_atomically(self.record, json.dumps(record, indent=1).encode() + b"\n")

    def living(self) -> Iterator[Path]:
        """Yield the locks of this experiment that a living manager or job holds."""
        for lock in (*self.managers.glob("*.lock"), *self.jobs.glob("*/lock")):
            if not is_free(lock):
                yield lock

    def set_aside(self) -> Path:
        """Move the folder out of the way, under a hidden name; return where to."""
        aside = self.path.with_name(f".{self.name}.removed-{os.getpid()}")
        os.replace(self.path, aside)
        return aside
