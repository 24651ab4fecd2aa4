"""dbutils.py on the jobs of run.py, which have no queue."""

import subprocess
import sys
from pathlib import Path

import pytest

import dbutils
from orchestration.locks import ProcessLock
from orchestration.run_directory import ExperimentFolder

SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """One job that is done, one that failed, one that was killed, one that runs."""
    folder = ExperimentFolder(tmp_path, "single")
    command = [sys.executable, "run.py", "--user_dir", "tests/tally", "task=tally", "steps=2", f"root={tmp_path}"]
    subprocess.run(command, cwd=SOURCE, check=True, capture_output=True)
    for name, state, error in [
        ("bad", "failed", "ValueError: x"),
        ("killed", "running", None),
        ("now", "running", None),
    ]:
        folder.job(name).path.mkdir()
        folder.job(name).write_status({"state": state, "attempt": 1, "error": error})
    with ProcessLock(folder.job("now").lock):
        yield folder


def run(folder, *arguments):
    return dbutils.main(["--exp", "single", "--root", str(folder.root), *arguments])


def test_they_are_counted_by_their_own_word_and_locks(folder, capsys):
    assert run(folder) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "single: 1 done, 1 running, 1 lost, 1 failed (jobs of run.py: they have no queue)"
    assert [line.split(":")[0] for line in rest] == ["note   killed"]
    assert "the same command goes on" in rest[0]
    assert not folder.queue.exists()


def test_they_can_be_read_as_those_of_a_queue(folder, capfdbinary):
    (job,) = (path.name for path in folder.jobs.iterdir() if len(path.name) > 10)
    assert run(folder, "--find", "task=tally,steps=2") == 0
    assert capfdbinary.readouterr().out.decode().startswith(f"done       1  {job}  task=tally ")
    assert run(folder, "--error_messages") == 0
    assert b"1 failed: ValueError: x" in capfdbinary.readouterr().out
    assert run(folder, "--logs", job[:-3], "--follow") == 0
    assert capfdbinary.readouterr().out == b"counting, greeting one\n"
    assert run(folder, "--logs", "killed", "--follow") == 1


@pytest.mark.parametrize("verb", [["--rebuild"], ["--delete", "--all"], ["--requeue"], ["--update", "seed:1:2"]])
def test_they_have_no_queue_to_be_changed(folder, capsys, verb):
    assert run(folder, *verb, "--yes") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.py's jobs have no queue" in line
