"""What users find after a crash, an upgrade or a colleague's mistake: one line says what to do, and nothing is lost."""

import json
import subprocess
import sys

import pytest

from errors import UserError
from orchestration import queue as queue_module
from orchestration.locks import holder
from orchestration.queue import Queue, Row
from orchestration.run_directory import VERSION, ExperimentFolder
from tests.orchestration.test_manager import SOURCE, Study

HOLD = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
HOLD += "print('held', flush=True); time.sleep(float(sys.argv[2]))"


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


@pytest.fixture
def hold():
    """Return a function that has a process which is none of ours lock a file; return the process."""
    started = []

    def start(path, seconds=60.0):
        path.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finished_jobs(study):
    return {path: path.read_bytes() for path in study.folder.jobs.glob("*/metrics.jsonl")}


def assert_refused(result, *words):
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def flipped(content, share):
    place = int(share * len(content))
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def test_a_damaged_queue_is_rebuilt_by_the_same_command_and_nothing_runs_again(study):
    assert study.run("--max_jobs", "4").returncode == 3
    done = finished_jobs(study)
    whole = study.folder.queue.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", flipped(whole, 0.5)]  # each cut and bit: test_storage
    for number, content in enumerate(damaged, start=1):
        study.folder.queue.write_bytes(content)
        result = study.run("--max_jobs", "1") if number == 1 else study.run()
        assert result.returncode == (3 if number == 1 else 0), result.stdout + result.stderr
        assert "rebuilt from the experiment's grid and its run directories" in result.stdout
        assert f"kept as queue.json.damaged-{number})" in result.stdout
        assert finished_jobs(study).items() >= done.items()
        done = finished_jobs(study)
        assert {row.attempt for row in study.rows if row.state == "done"} == {1}
    study.assert_all_done_once()


def test_a_lock_says_who_holds_it_and_since_when(tmp_path, hold):
    process = hold(tmp_path / "lock")
    assert holder(tmp_path / "lock").startswith(f"pid {process.pid} on ")
    assert "which runs since 20" in holder(tmp_path / "lock")
    (tmp_path / "lock").write_text("elsewhere 1\n")  # whoever had it before
    assert holder(tmp_path / "lock").startswith(f"pid {process.pid} on ")
    process.kill()
    process.wait()
    assert holder(tmp_path / "lock").startswith("pid 1 on elsewhere since 20")


def test_a_manager_says_who_holds_the_locks_that_it_waits_for(study, hold):
    process = hold(study.folder.setup_lock, seconds=4)
    result = study.run("seed=1")
    assert result.returncode == 0, result.stderr
    assert f"pid {process.pid} on " in result.stdout
    assert "is setting this experiment up" in result.stdout
    (row,) = study.rows
    process = hold(study.folder.job(row.id).lock, seconds=9)
    result = study.run("--requeue_level", "10000")
    assert result.returncode == 0, result.stderr
    assert f"waits    {row.id}: pid {process.pid} on " in result.stdout
    assert study.steps("seed1") == list(range(5))


def test_the_queues_lock_says_who_holds_it(tmp_path, hold, monkeypatch, capsys):
    monkeypatch.setattr(queue_module, "PATIENCE", 0.1)
    folder = ExperimentFolder(tmp_path, "study")
    folder.path.mkdir()
    process = hold(folder.queue_lock, seconds=1.0)
    Queue(folder).rebuild([Row("a", [])])
    assert f"pid {process.pid} on " in capsys.readouterr().err
    assert len(Queue(folder).rows()) == 1


def test_a_single_job_says_who_runs_it(tmp_path, hold):
    command = [sys.executable, "run.py", "--user_dir", "tests/tally", "task=tally", "steps=2", f"root={tmp_path}"]
    assert subprocess.run(command, cwd=SOURCE, capture_output=True).returncode == 0
    (job,) = (tmp_path / "single" / "jobs").iterdir()
    (job / "status.json").unlink()
    process = hold(job / "lock")
    result = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert_refused(result, f"pid {process.pid} on ", "since 20")


def test_an_experiment_of_another_version_is_refused_with_what_goes_on_and_loses_nothing(study):
    assert study.run("--max_jobs", "2").returncode == 3
    done, record = finished_jobs(study), study.folder.record.read_text()
    assert json.loads(record)["version"] == VERSION
    study.folder.record.write_text(record.replace(f'"{VERSION}"', '"0.9"'))
    own = study.folder.snapshot(json.loads(record)["snapshot"]) / "manager.py"
    assert_refused(study.run(), "version 0.9", f"version {VERSION}", "--root", str(own))
    study.folder.record.write_text(record)
    assert finished_jobs(study) == done
    # The program that the message names is whole.
    command = [sys.executable, str(own), "--exp", "tally", "--root", str(study.folder.root)]
    result = subprocess.run(command, cwd=study.folder.root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    study.assert_all_done_once()


def test_a_queue_of_another_version_is_refused(tmp_path):
    folder = ExperimentFolder(tmp_path, "study")
    folder.path.mkdir()
    queue = Queue(folder)
    for jobs in ({"1": {"name": "a"}}, {"1": 5}):
        queue._storage.write({"jobs": jobs})
        before = folder.queue.read_bytes()
        with pytest.raises(UserError, match=f"another version, this program reads version {VERSION}"):
            queue.rows()
        assert folder.queue.read_bytes() == before


def test_a_damaged_record_says_what_to_do_and_that_loses_nothing(study):
    assert study.run("--max_jobs", "2").returncode == 3
    study.folder.record.write_text("{")
    assert_refused(study.run(), "experiment.json", "move it away")
    study.folder.record.rename(study.folder.record.with_suffix(".bad"))
    assert study.run().returncode == 0
    study.assert_all_done_once()
    assert {row.attempt for row in study.rows} == {1}


def test_what_a_killed_removal_left_is_put_back_or_removed(study):
    assert study.run("--max_jobs", "2").returncode == 3
    done = finished_jobs(study)
    study.folder.set_aside()  # and here --rf was killed
    study.folder.path.mkdir()
    assert study.run("--max_jobs", "1").returncode == 3
    assert finished_jobs(study).items() >= done.items()
    aside = study.folder.root / f".{study.folder.name}.removed-1"
    (aside / "jobs").mkdir(parents=True)  # killed when the new experiment was there
    (study.folder.snapshots / ".abc.1.tmp").mkdir()
    (study.folder.path / ".queue.json.1.tmp").touch()
    (study.folder.path / ".experiment.json.1.tmp").touch()
    assert study.run().returncode == 0
    study.assert_all_done_once()
    assert [
        path.name for path in study.folder.root.rglob("*") if path.name.endswith(".tmp") or "removed" in path.name
    ] == []
