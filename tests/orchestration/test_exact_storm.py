"""Real training jobs under kill -9 and real managers: their metrics are those of runs that nothing interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from orchestration.locks import is_free
from orchestration.run_directory import ExperimentFolder
from tests.orchestration.study import SOURCE, Study
from tests.orchestration.test_storm import Storm

PATIENCE = 600  # seconds: a machine that others use trains slowly
pytestmark = pytest.mark.slow
SMALL = ["evaluation.points=50", "evaluation.iw=5", "analysis.num_replicates=50", "device=cpu"]
ONE = ["seed=1", "estimator=vimco-arithmetic", "estimator.iw=5"]
LONG = [*ONE, "steps=3000", "eval_every=500", "checkpoint_every=50"]
ALL = ["steps=1000", "eval_every=100", "checkpoint_every=50"]


class Quickstart(Study):
    """The experiment `quickstart` in a folder of its own, with smaller jobs."""

    def __init__(self, path):
        self.folder = ExperimentFolder(path / "runs", "quickstart")
        self.folder.root.mkdir(parents=True)

    def command(self, *arguments):
        root = ["--root", str(self.folder.root)]
        return [sys.executable, "manager.py", "--exp", "quickstart", *root, "--processes", "2", *arguments]

    def run(self, *arguments):
        return subprocess.run(self.command(*arguments), cwd=SOURCE, capture_output=True, text=True, timeout=PATIENCE)

    def metrics(self):
        """The rows that a rerun reproduces, as text: each job's, in their order."""
        return {row.id: self.job_metrics(row.id) for row in self.rows}

    def job_metrics(self, name):
        lines = self.folder.job(name).metrics.read_text().splitlines()
        return [line for line in lines if not json.loads(line)["name"].startswith(("time/", "memory/"))]

    def assert_nothing_is_twice(self):
        for row in self.rows:
            found = [json.loads(line) for line in self.folder.job(row.id).metrics.read_text().splitlines()]
            keys = [(metric["step"], metric["split"], metric["name"]) for metric in found]
            assert len(set(keys)) == len(keys)
            assert is_free(self.folder.job(row.id).lock)
        assert self.worker_pids() == []


def uninterrupted(path, *overrides):
    study = Quickstart(path)
    result = study.run(*SMALL, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "lost  " not in result.stdout  # a job that was claimed ahead and sent back has a second attempt too
    return study.metrics()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert rows
        assert found[name] == rows, name


@pytest.mark.parametrize("seed", [1, 2])
def test_a_worker_killed_again_and_again_trains_to_the_same_numbers(tmp_path, seed):
    expected = uninterrupted(tmp_path / "whole", *LONG)
    moments, study = random.Random(seed), Quickstart(tmp_path / "killed")
    manager = study.start(*SMALL, *LONG)
    try:
        study.wait_for(lambda: study.folder.queue.exists() and study.rows)
        run = study.folder.job(study.rows[0].id)
        killed: list[int] = []
        checkpoint = ""
        while len(killed) < 6:
            # Three deaths in a row without a new checkpoint would abort the job, rightly.
            study.wait_for(lambda: run.checkpoint_identity() != checkpoint or manager.poll() is not None)  # noqa: B023
            time.sleep(moments.uniform(0, 0.4))
            assert manager.poll() is None, "the job was done before it was killed often enough"
            if pids := set(study.running().values()) - set(killed):
                killed += pids
                os.kill(killed[-1], signal.SIGKILL)
                study.wait_for(lambda: study.rows[0].attempt > len(killed))  # noqa: B023
                checkpoint = run.checkpoint_identity()
        output, _ = manager.communicate(timeout=PATIENCE)
    finally:
        manager.kill()
        manager.wait()
    assert manager.returncode == 0, output
    assert output.count("lost  ") == 6
    assert study.rows[0].attempt == 7
    assert_same(study.metrics(), expected)
    study.assert_nothing_is_twice()


@pytest.mark.parametrize("seed", [1, 2])
def test_quickstart_comes_through_a_storm_with_the_same_numbers(tmp_path, seed):
    expected = uninterrupted(tmp_path / "whole", *ALL)
    assert len(expected) == 12
    study = Quickstart(tmp_path / "storm")
    assert study.run(*SMALL, *ALL, "--max_jobs", "1").returncode == 3
    storm = Storm(study, seed, managers=2, workers=2)
    try:
        storm.rage(90, 2.0)
        statuses = storm.calm()
    finally:
        storm.end()
    print(f"seed {seed}: {storm.kills}, attempts {sum(row.attempt for row in study.rows)}")
    assert statuses == [0, 0], (tmp_path / "storm" / "managers.log").read_text()[-2000:]
    assert storm.kills["workers"] > 3
    assert {row.state for row in study.rows} == {"done"}
    assert_same(study.metrics(), expected)
    study.assert_nothing_is_twice()
