"""The experiment `tally`, whose jobs count without torch: made once, in memory, and copied for each test."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

import dbutils
from orchestration.queue import Manager, Queue, Result
from orchestration.run_directory import ExperimentFolder

SOURCE = Path(__file__).resolve().parents[2]


class Study:
    """An experiment in a folder of its own, and the command lines that work on it."""

    def __init__(self, root, user_dir):
        self.folder, self.user_dir = ExperimentFolder(root, "tally"), user_dir
        self.queue = Queue(self.folder)
        self.managers: list[subprocess.Popen[str]] = []

    def command(self, program, *arguments):
        return [sys.executable, program, "--exp", "tally", "--root", str(self.folder.root), *arguments]

    def manager(self, *arguments):
        command = self.command("manager.py", "--user_dir", str(self.user_dir), "--processes", "2", *arguments)
        process = subprocess.Popen(command, cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.managers.append(process)
        return process

    def end(self):
        """Let no manager outlive a test that failed."""
        for process in self.managers:
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.3)
            assert process.stdout is not None
            process.stdout.close()

    def run(self, *arguments):
        """Run dbutils.py in this process; return its exit status."""
        return dbutils.main(["--exp", "tally", "--root", str(self.folder.root), *arguments])

    def process(self, *arguments, **options):
        command = self.command("dbutils.py", *arguments)
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, **options}
        return subprocess.run(command, cwd=SOURCE, text=True, timeout=60, **options)

    @property
    def rows(self):
        return {re.findall(r"seed\d+", row.id)[0]: row for row in self.queue.rows()}

    @property
    def states(self):
        return {name: row.state for name, row in self.rows.items()}

    def job(self, name):
        return self.folder.job(self.rows[name].id)

    def wait_for(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.02)

    def fail(self, name, error="RuntimeError: told to"):
        """Have a job claimed, and failed."""
        manager = Manager(self.folder)
        claimed, _ = self.queue.claim(manager, 6)
        results = [Result(row.id, row.attempt, "failed" if f"{name}-" in row.id else "queued") for row in claimed]
        self.queue.claim(manager, 0, results)
        manager.close()
        job = self.job(name)
        job.path.mkdir(exist_ok=True)
        job.write_status({"state": "failed", "attempt": self.rows[name].attempt, "error": error})

    def running(self):
        """The jobs that the queue says are running and whose tasks have printed."""
        rows = [row for row in self.queue.rows() if row.state == "running"]
        return [row for row in rows if (log := self.folder.job(row.id).log).exists() and log.stat().st_size]

    def contents(self):
        """Every file and folder below the root: its name, when it changed, and what it holds."""
        paths = sorted(self.folder.root.rglob("*"))
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}


@pytest.fixture(scope="session")
def memory():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="session")
def original(memory):
    """Six jobs: seed 1 and 2 done, the others queued."""
    base = memory / "original"
    shutil.copytree(SOURCE / "tests" / "tally", base / "user", ignore=shutil.ignore_patterns("__pycache__"))
    study = Study(base / "runs", base / "user")
    output, _ = study.manager("--max_jobs", "2").communicate(timeout=60)
    assert sorted(study.states.values()) == ["done"] * 2 + ["queued"] * 4, output
    return study


@pytest.fixture
def study(original, memory):
    root = memory / "study" / "runs"
    shutil.copytree(original.folder.root, root, ignore=shutil.ignore_patterns("snapshots"))
    snapshots = root / "tally" / "snapshots"
    shutil.copytree(original.folder.snapshots, snapshots, copy_function=os.link)  # they never change
    study = Study(root, original.user_dir)
    yield study
    study.end()
    shutil.rmtree(root.parent)
