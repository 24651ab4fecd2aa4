"""Kills and rivals: managers, workers and jobs die by kill -9 at random, managers start within milliseconds.

Every job must end once, no two attempts of a job may overlap in time, and nothing is done between but to give the same
command again. Only processes that a storm started are killed, by their pid.
"""

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from orchestration.locks import is_free
from tests.orchestration.study import Study

SPARED = 2  # a job whose worker dies three times in a row is aborted, rightly: a storm kills no job's worker so often


class Storm:
    """Managers of one experiment, and somebody who kills them and their workers."""

    def __init__(self, study: Study, seed: int, managers: int, workers: int):
        self.study, self.random, self.workers = study, random.Random(seed), workers
        self.managers = [self.start() for _ in range(managers)]
        self.kills = {"managers": 0, "workers": 0}
        self.statuses: list[int] = []

    def start(self):
        log = open(self.study.folder.root.parent / "managers.log", "ab")  # noqa: SIM115
        with log:
            return self.study.start("--processes", str(self.workers), output=log)

    def rage(self, seconds, interval):
        """Kill something about every `interval` seconds; start a manager again where one has died."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.keep_up():
            time.sleep(self.random.uniform(0, 2 * interval))
            if self.random.random() < 0.2:
                self.kill_a_manager()
            else:
                self.kill_a_worker()

    def keep_up(self):
        """Start each killed manager anew; say whether any has not ended by itself."""
        for index, manager in enumerate(self.managers):
            if manager.poll() == -signal.SIGKILL:
                self.managers[index] = self.start()
            elif manager.poll() is not None:
                self.statuses.append(manager.returncode)
        return any(manager.poll() is None for manager in self.managers)

    def kill_a_manager(self):
        manager = self.random.choice(self.managers)
        if manager.poll() is None:
            manager.kill()
            manager.wait()
            self.kills["managers"] += 1

    def kill_a_worker(self):
        """Kill the process of a job, or a worker that has none or whose manager is dead."""
        pids = sorted(self.study.worker_pids())
        if not pids:
            return
        pid = self.random.choice(pids)
        job = next((name for name, worker in self.study.running().items() if worker == pid), None)
        weak = {row.id for row in self.study.rows if row.deaths >= SPARED}
        if weak and (job is None or job in weak):
            return  # a worker that is just starting may hold any job
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.kills["workers"] += 1

    def calm(self):
        """Let what is left come to its end; return the managers' exit statuses."""
        self.keep_up()
        return [manager.wait(timeout=300) for manager in self.managers]

    def end(self):
        for pid in [manager.pid for manager in self.managers if manager.poll() is None] + self.study.worker_pids():
            os.kill(pid, signal.SIGKILL)
        for manager in self.managers:
            manager.wait()


def attempts(run):
    """Return for each attempt of a job, in order, when it was seen alive: at its start and after each step."""
    found = [[int(line) for line in file.read_text().split("\n")[:-1]] for file in (run.path / "beats").iterdir()]
    return sorted(beats for beats in found if beats)  # one that was killed at its start may have left none


def assert_each_job_ended_once(study, jobs, steps):
    rows = study.rows
    assert len({row.id for row in rows}) == len(rows) == jobs
    assert {row.state for row in rows} == {"done"}
    for row in rows:
        run = study.folder.job(row.id)
        assert run.read_status()["state"] == "done"
        assert run.read_status()["attempt"] == row.attempt
        metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        seed = int(row.id.split("seed")[1].split("-")[0])
        assert [(metric["step"], metric["value"]) for metric in metrics] == [(s, s * s + seed) for s in range(steps)]
        spans = attempts(run)
        assert 1 <= len(spans) <= row.attempt
        for before, after in itertools.pairwise(spans):
            assert before[-1] < after[0], f"{row.id}: two attempts at once"
        assert sum(len(beats) - 1 for beats in spans) <= steps, f"{row.id}: a step was taken twice"
        assert is_free(run.lock)
    assert not study.worker_pids()


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def storm(study, seed, jobs, seconds, interval, managers=1, workers=8, nap=0.005):
    steps = 2
    created = study.run("--max_jobs", "1", f"seed=range(1,{jobs + 1})", f"steps={steps}", f"task.nap={nap}")
    assert created.returncode == 3, created.stderr
    raging = Storm(study, seed, managers, workers)
    try:
        raging.rage(seconds, interval)
        statuses = raging.calm()
    finally:
        raging.end()
    print(f"seed {seed}: {raging.kills}, attempts {sum(row.attempt for row in study.rows)}")
    log = Path(study.folder.root.parent, "managers.log").read_text()
    assert statuses == [0] * managers, log[-2000:]
    assert "Traceback" not in log
    assert_each_job_ended_once(study, jobs, steps)
    return raging.kills


def test_a_short_storm(study):
    kills = storm(study, seed=1, jobs=150, seconds=8, interval=0.5, workers=4, nap=0.1)
    assert sum(kills.values()) > 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_storm_over_two_thousand_jobs(study, seed):
    kills = storm(study, seed, jobs=2000, seconds=100, interval=0.4, managers=1 + seed % 2, nap=0.2)
    assert kills["managers"] > 2
    assert kills["workers"] > 5


@pytest.mark.parametrize("delay", [0.003, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.0, 0.03, 0.3))])
def test_managers_that_start_together_create_and_finish_one_experiment(study, delay):
    for _ in range(2):  # at first they create it, then they resume it
        managers = []
        for _ in range(2):
            managers.append(study.start("seed=range(1,13)", "steps=2"))
            time.sleep(delay)
        for manager in managers:
            output, _ = manager.communicate(timeout=60)
            assert manager.returncode == 0, output
        assert_each_job_ended_once(study, jobs=12, steps=2)
        assert {row.attempt for row in study.rows} == {1}


def test_managers_that_resume_together_share_what_is_left(study):
    assert study.run("seed=range(1,25)", "steps=2", "--max_jobs", "3").returncode == 3
    managers = [study.start() for _ in range(2)]
    for manager in managers:
        output, _ = manager.communicate(timeout=60)
        assert manager.returncode == 0, output
    assert_each_job_ended_once(study, jobs=24, steps=2)
    assert {row.attempt for row in study.rows} == {1}
