"""Signals, stopped processes, jumping clocks, reused pids, reboots and children that outlive their job."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from orchestration import snapshot
from orchestration.devices import Slot
from orchestration.executors import local
from orchestration.locks import holder, is_free
from orchestration.queue import Manager, Queue
from tests.orchestration.study import IDS, SOURCE, Study

SHIFT = """
import os, time
_true = time.time
time.time = lambda: _true() + (86400 if os.getpid() % 2 else -86400) * (1 + _true() % 3)
"""


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path)
    yield study
    for pid in study.worker_pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finish(manager, status):
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == status, output
    return output


def go_on(study, steps, *overrides):
    study.folder.root.mkdir(exist_ok=True)
    study.hurry()
    result = study.run(*overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    study.assert_all_done_once(steps)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, os.kill),
        (signal.SIGINT, os.killpg),
        pytest.param(signal.SIGINT, os.kill, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.slow),
    ],
)
def test_one_signal_lets_jobs_write_a_checkpoint_and_go_back(study, number, send):
    manager = study.start("task.nap=0.1", "steps=20", start_new_session=True)
    study.wait_for(lambda: len(study.running()) == 2)
    study.wait_for(lambda: all(study.folder.job(name).checkpoint.exists() for name in study.running()))
    send(manager.pid, number)
    output = finish(manager, 130)
    assert "jobs write a checkpoint and go back to the queue" in output
    assert output.endswith("tally: 6 queued\ninterrupted: the same command goes on\n")
    assert "failed" not in output
    assert study.worker_pids() == []
    stopped = [row.id for row in study.rows if row.attempt]
    assert len(stopped) == 2
    for name in stopped:
        assert study.folder.job(name).checkpoint.exists()
        assert study.folder.job(name).read_status()["state"] == "queued"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_stop_at_once(study, number):
    manager = study.start("task.nap=30", start_new_session=True)
    study.wait_for(lambda: len(study.running()) == 2)
    began = time.monotonic()
    os.killpg(manager.pid, number)
    time.sleep(0.5)
    os.killpg(manager.pid, number)
    output = finish(manager, 130)
    assert time.monotonic() - began < 10
    assert output.endswith("tally: 6 queued\ninterrupted: the same command goes on\n")
    assert study.worker_pids() == []


@pytest.mark.parametrize(
    ("number", "delay"),
    [
        (signal.SIGINT, 1.0),
        *(pytest.param(n, d, marks=pytest.mark.slow) for n in (2, 15) for d in (0.0, 0.4, 0.8, 1.6)),
    ],
)
def test_a_signal_at_any_moment_of_the_start_leaves_nothing_to_repair(study, number, delay):
    overrides = ["task.nap=0.1", "steps=20"]
    # A script's background command is started so.
    manager = study.start(
        *overrides, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    assert "jobs at a time" in manager.stdout.readline()
    time.sleep(delay)
    os.killpg(manager.pid, number)
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 130, output
    assert "Traceback" not in output
    study.wait_for(lambda: not study.worker_pids())
    go_on(study, 20, *overrides)  # which create it where the signal came before


def test_a_worker_that_is_told_to_end_sends_its_job_back_and_is_replaced(study):
    manager = study.start("task.nap=0.1", "steps=10", "seed=1,2")
    study.wait_for(lambda: len(study.running()) == 2)
    victim, pid = next(iter(study.running().items()))
    os.kill(pid, signal.SIGTERM)
    output = finish(manager, 0)
    assert f"stopped  {victim}" in output
    assert "lost" not in output
    (row,) = [row for row in study.rows if row.id == victim]
    assert (row.attempt, row.deaths) == (2, 0)
    assert len(study.folder.job(victim).metrics.read_text().splitlines()) == 10


def test_a_stopped_worker_keeps_its_job_until_it_goes_on(study):
    manager = study.start("task.nap=0.1", "steps=10", "seed=1,2")
    study.wait_for(lambda: len(study.running()) == 2)
    frozen, pid = next(iter(study.running().items()))
    os.kill(pid, signal.SIGSTOP)
    manager.kill()  # also where its manager is dead
    manager.communicate()
    second = study.start()
    other = next(row.id for row in study.rows if row.id != frozen)
    study.wait_for(lambda: (study.folder.job(other).read_status() or {})["state"] == "done")
    time.sleep(1.5)
    assert {row.id: (row.state, row.attempt) for row in study.rows}[frozen] == ("running", 1)
    assert second.poll() is None
    os.kill(pid, signal.SIGCONT)
    assert "waiting for" in finish(second, 0)
    assert {(row.state, row.attempt) for row in study.rows} == {("done", 1)}


def test_a_stopped_worker_whose_job_is_cancelled_finishes_for_nothing(study):
    manager = study.start("task.nap=0.1", "steps=10", "seed=1,2")
    study.wait_for(lambda: len(study.running()) == 2)
    frozen, pid = next(iter(study.running().items()))
    os.kill(pid, signal.SIGSTOP)
    manager.kill()
    manager.communicate()
    options = ["--exp", "tally", "--root", str(study.folder.root), "--user_dir", str(study.user_dir), "--yes"]
    for verb in (["--cancel"], ["--requeue", "--requeue_level", "1"]):
        command = [sys.executable, "dbutils.py", *options, *verb, "--find", f"id={frozen}"]
        subprocess.run(command, cwd=SOURCE, check=True, capture_output=True)
    second = study.start()  # it claims the job again, and its worker waits for the stopped one to be gone
    study.wait_for(lambda: {row.id: row.attempt for row in study.rows}[frozen] == 2)
    time.sleep(1)
    assert not is_free(study.folder.job(frozen).lock)
    assert holder(study.folder.job(frozen).lock).startswith(f"pid {pid} on")
    os.kill(pid, signal.SIGCONT)
    finish(second, 0)
    assert {row.id: (row.state, row.attempt) for row in study.rows}[frozen] == ("done", 2)
    assert study.folder.job(frozen).read_status()["attempt"] == 2
    assert len(study.folder.job(frozen).metrics.read_text().splitlines()) == 10


def test_clocks_that_jump_decide_nothing(study, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHIFT)
    tally = study.user_dir / "tally.py"
    tally.write_text(tally.read_text() + SHIFT)  # in the workers
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    managers = [study.start("task.nap=0.1", env=environment) for _ in range(2)]
    study.wait_for(lambda: len(study.running()) >= 2)
    managers[0].kill()
    managers[0].communicate()
    finish(managers[1], 0)
    finish(study.start(env=environment), 0)
    study.assert_all_done_once()
    # What the killed manager had claimed and not begun is claimed again: attempts are counted where they begin.
    assert {len(list((study.job(name).path / "beats").iterdir())) for name in IDS} == {1}


def test_a_reused_pid_fools_nobody(study):
    assert study.run("--max_jobs", "1").returncode == 3
    dead = Manager(study.folder)  # its name holds the pid of this process, which lives on
    (row,), _ = Queue(study.folder).claim(dead, 1)
    run = study.folder.job(row.id)
    run.path.mkdir()
    run.write_status({"state": "running", "attempt": 1, "host": os.uname().nodename, "pid": os.getpid()})
    run.lock.write_text(f"{os.uname().nodename} {os.getpid()}\n")
    dead.close()
    go_on(study, steps=5)
    assert {row.id: row.attempt for row in study.rows}[row.id] == 2


def test_a_reboot_fools_nobody(study):
    manager = study.start("task.nap=0.1", "steps=8")
    study.wait_for(lambda: len(study.running()) == 2)
    for pid in [manager.pid, *study.worker_pids()]:
        os.kill(pid, signal.SIGKILL)
    manager.communicate()
    study.wait_for(lambda: not study.worker_pids())
    assert len(study.running()) == 2  # say the statuses
    assert [row.state for row in study.rows].count("running") >= 2  # says the queue
    go_on(study, steps=8)


@pytest.mark.parametrize("mode", ["daemon", "daemon_by_exec"])
def test_a_child_that_outlives_its_job_does_not_keep_it_running(study, mode):
    manager = study.start(f"task.mode={mode}", "task.nap=0.1", "steps=6", "seed=1")
    study.wait_for(lambda: len(study.running()) == 1)
    run = study.job("seed1")
    study.wait_for(lambda: (run.path / "daemon.pid").exists() and (run.path / "beats").exists())
    child = int((run.path / "daemon.pid").read_text())
    children = [child]
    try:
        os.kill(next(iter(study.running().values())), signal.SIGKILL)
        study.wait_for(lambda: study.rows[0].attempt == 2)
        finish(manager, 0)
        children.append(int((run.path / "daemon.pid").read_text()))
        assert is_free(run.lock)
        for child in children:
            os.kill(child, 0)  # it has been alive all the while
        assert len(run.metrics.read_text().splitlines()) == 6
    finally:
        for child in set(children):
            os.kill(child, signal.SIGKILL)


def is_alive(pid):
    """Say whether a process runs; one that has ended and is not yet reaped does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("blow", ["one signal", "two signals", "a killed worker"])
def test_what_a_job_has_started_ends_with_its_worker(study, blow):
    nap = 30 if blow == "two signals" else 0.1
    manager = study.start("task.mode=child", f"task.nap={nap}", "steps=30", "seed=1")
    study.wait_for(lambda: len(study.running()) == 1)
    word = study.job("seed1").path / "daemon.pid"
    study.wait_for(word.exists)
    child = int(word.read_text())
    assert is_alive(child)
    if blow == "a killed worker":
        os.kill(next(iter(study.running().values())), signal.SIGKILL)
        study.wait_for(lambda: study.rows[0].attempt == 2)
        assert not is_alive(child)
    manager.send_signal(signal.SIGINT)
    if blow == "two signals":
        time.sleep(0.5)
        manager.send_signal(signal.SIGINT)
    finish(manager, 130)
    assert not is_alive(int(word.read_text()))
    assert study.worker_pids() == []


def test_a_thread_that_a_job_has_left_does_not_keep_its_worker(study):
    began = time.monotonic()
    result = study.run("task.mode=thread", "seed=1,2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert study.states == {"seed1": "done", "seed2": "done"}
    assert time.monotonic() - began < 60
    assert study.worker_pids() == []


@pytest.fixture
def executor(study):
    study.folder.snapshots.mkdir(parents=True)
    executor = local.Executor(study.folder, "nobody", [Slot("cpu:0", "")])
    yield executor
    executor.close(at_once=lambda: True)


@pytest.mark.parametrize("is_hurried", [True, False])
def test_a_stopped_worker_without_a_job_keeps_nobody(study, executor, monkeypatch, is_hurried):
    monkeypatch.setattr(local, "GRACE", 60.0 if is_hurried else 0.5)
    assert executor.check([], snapshot.take(study.folder.snapshots)) == []
    (pid,) = study.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    executor.close(at_once=lambda: is_hurried)
    assert time.monotonic() - began < 10
    assert study.worker_pids() == []


def test_a_worker_that_is_killed_at_its_check_is_replaced(study, executor):
    name = snapshot.take(study.folder.snapshots)
    assert executor.check([], name) == []
    (pid,) = study.worker_pids()
    os.kill(pid, signal.SIGKILL)
    assert executor.check([], name) == []
    assert study.worker_pids() != [pid]


def test_workers_that_cannot_check_are_one_line(study, executor, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (error,) = executor.check([], snapshot.take(study.folder.snapshots))
    assert error == "the jobs could not be checked 3 times: its worker ended with status 1 (it left no word)"
