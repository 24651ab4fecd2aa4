"""An experiment of jobs that count, in a folder of its own, run by real managers: what the tests of the queue share."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from orchestration.queue import Queue
from orchestration.run_directory import ExperimentFolder

SOURCE = Path(__file__).resolve().parents[2]
IDS = [f"seed{number}" for number in range(1, 7)]


class Study:
    """The experiment `tally` in a folder of its own."""

    def __init__(self, tmp_path):
        self.user_dir = tmp_path / "user"
        shutil.copytree(SOURCE / "tests" / "tally", self.user_dir, ignore=shutil.ignore_patterns("__pycache__"))
        self.folder = ExperimentFolder(tmp_path / "runs", "tally")

    def command(self, *arguments):
        options = ["--exp", "tally", "--root", str(self.folder.root), "--user_dir", str(self.user_dir)]
        return [sys.executable, "manager.py", *options, "--processes", "2", *arguments]

    def run(self, *arguments):
        return subprocess.run(self.command(*arguments), cwd=SOURCE, capture_output=True, text=True, timeout=120)

    def start(self, *arguments, output=subprocess.PIPE, **options):
        return subprocess.Popen(
            self.command(*arguments), cwd=SOURCE, stdout=output, stderr=subprocess.STDOUT, text=True, **options
        )

    @property
    def rows(self):
        return Queue(self.folder).rows()

    @property
    def states(self):
        return {re.findall(r"seed\d+", row.id)[0]: row.state for row in self.rows}

    def job(self, name):
        return self.folder.job(next(row.id for row in self.rows if f"{name}-" in row.id))

    def steps(self, name):
        return [json.loads(line)["step"] for line in self.job(name).metrics.read_text().splitlines()]

    def hurry(self):
        """Have jobs nap no more: what they were slow for has happened."""
        (self.folder.root / "hurry").touch()

    def wait_for(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.01)

    def running(self):
        """The pid of each job that is under way."""
        if not self.folder.queue.exists():
            return {}
        found = {row.id: self.folder.job(row.id).read_status() for row in self.rows}
        return {name: status["pid"] for name, status in found.items() if status and status["state"] == "running"}

    def worker_pids(self):
        """The pid of each living worker of this experiment, whoever its manager is or was."""
        own = b"\0orchestration.worker\0--root\0%s\0" % os.fsencode(self.folder.root)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it is gone
                if own in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def assert_all_done_once(self, steps=5):
        assert self.states == dict.fromkeys(IDS, "done")
        for name in IDS:
            assert self.steps(name) == list(range(steps))
            assert self.job(name).read_status()["state"] == "done"
            lines = (self.job(name).path / "attempts.jsonl").read_text().splitlines()
            spans = sorted((span["began"], span["ended"]) for span in map(json.loads, lines))
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
