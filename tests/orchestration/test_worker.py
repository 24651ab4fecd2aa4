"""A worker process in conversation with its manager, while its jobs misbehave. The jobs count, without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestration.execution import one_line
from orchestration.queue import Manager, Queue, Row
from orchestration.run_directory import ExperimentFolder

SOURCE = Path(__file__).resolve().parents[2]
TALLY = SOURCE / "tests" / "tally"


class Conversation:
    """What the manager of one worker says and hears."""

    def __init__(self, root):
        self.folder = ExperimentFolder(root, "tally")
        self.folder.path.mkdir(parents=True)
        self.manager = Manager(self.folder)
        self.queue = Queue(self.folder)
        self.queue.rebuild([])
        command = [sys.executable, "-m", "orchestration.worker", "--root", str(root), "--experiment", "tally"]
        self.process = subprocess.Popen(
            [*command, "--manager", self.manager.name, "--user_dir", str(TALLY)],
            cwd=SOURCE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )

    def run(self, identity, *more):
        """Have the worker run a job; return what it says at the end."""
        overrides = ["task=tally", "steps=2", *more]
        self.queue.add([Row(identity, overrides, snapshot="none")])
        ((row,), _) = self.queue.claim(self.manager, 1)
        self.say(do="run", id=identity, attempt=row.attempt, overrides=overrides)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if message["event"] == "ended":
                assert message["id"] == identity
                return message
        raise AssertionError("the worker has died")

    def say(self, **message):
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def end(self):
        """Let the worker go; return what it still says and its status."""
        rest, _ = self.process.communicate(timeout=30)
        return rest, self.process.returncode


@pytest.fixture
def worker(tmp_path):
    conversation = Conversation(tmp_path / "runs")
    yield conversation
    conversation.process.kill()
    conversation.process.communicate()
    conversation.manager.close()


@pytest.mark.parametrize(
    ("mode", "state", "error"),
    [
        ("fork", "done", ""),
        ("fork_and_raise", "done", ""),
        ("cat", "done", ""),
        ("print_surrogate", "done", ""),
        ("close_output", "done", ""),
        ("close_descriptors", "done", ""),
        ("no_output", "done", ""),
        ("input", "failed", "EOFError: EOF when reading a line"),
        ("interrupt", "failed", "KeyboardInterrupt: by itself"),
        ("generator_exit", "failed", "GeneratorExit: by itself"),
        ("group", "failed", "BaseExceptionGroup: several (1 sub-exception)"),
        ("exit", "failed", "SystemExit: left"),
        ("surrogate", "failed", "RuntimeError: file \\udcff.txt"),
        ("unprintable", "failed", "Unprintable: its message cannot be printed"),
        ("missing_file", "failed", "FileNotFoundError: [Errno 2] No such file or directory: '/nonexistent'"),
        ("no_permission", "failed", "PermissionError: [Errno 13] Permission denied: '/data'"),
    ],
)
def test_an_odd_job_ends_alone_and_the_worker_runs_the_next(worker, mode, state, error):
    ended = worker.run("odd", f"task.mode={mode}")
    assert (ended["state"], ended["error"]) == (state, error)
    odd = worker.folder.job("odd")
    status = odd.read_status()
    assert (status["state"], status["error"], status["pid"]) == (state, error or None, worker.process.pid)
    assert ("Traceback" in odd.log.read_text()) == (state == "failed")
    assert worker.run("next")["state"] == "done"
    assert worker.folder.job("next").log.read_text() == "counting, greeting one\n"
    assert worker.end() == ("", 0)


def test_a_job_that_removes_its_own_folder_fails_and_leaves_a_status(worker):
    ended = worker.run("odd", "task.mode=remove_folder")
    assert ended["state"] == "failed"
    assert worker.folder.job("odd").read_status()["state"] == "failed"
    assert worker.run("next")["state"] == "done"


def test_a_file_in_the_folders_place_fails_the_job(worker):
    worker.folder.jobs.mkdir()
    worker.folder.job("odd").path.touch()
    assert worker.run("odd")["state"] == "failed"
    assert worker.run("next")["state"] == "done"


def test_a_full_disk_is_no_failure_of_the_job(worker):
    ended = worker.run("odd", "task.mode=disk_full")
    assert ended["state"] == "refused"
    assert "No space left" in ended["error"]


def test_a_refused_configuration_leaves_its_status(worker):
    ended = worker.run("odd", "task.mod=fork")
    status = worker.folder.job("odd").read_status()
    assert ended["state"] == status["state"] == "failed"
    assert "task.mode" in status["error"]
    assert (status["attempt"], status["pid"]) == (1, worker.process.pid)
    assert status["started"]
    assert status["ended"]
    assert "Traceback" in worker.folder.job("odd").log.read_text()


@pytest.mark.parametrize("name", ["a${b}", "${", "a'b\\${c}", "it's\\", os.fsdecode(b"\xff")])
def test_a_root_may_have_any_name(tmp_path, name):
    worker = Conversation(tmp_path / name)
    ended = worker.run("job")
    worker.end()
    worker.manager.close()
    assert ended["state"] == "done", ended
    config = yaml.safe_load(worker.folder.job("job").config.read_text())
    assert config["root"] == str(tmp_path / name)


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n b\udcff")) == "a b\\udcff"
    assert one_line(KeyError("a")) == "KeyError: 'a'"
