"""A job that is killed anywhere, and goes on, ends with the numbers of one that was never interrupted, bit for bit."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestration.run_directory import RunDirectory
from tasks import checkpoint

SOURCE = Path(__file__).resolve().parents[2]
USER_DIR = SOURCE / "tests" / "resumable"
SMALL = ["steps=12", "eval_every=4", "checkpoint_every=3", "batch_size=10", "evaluation.iw=3", "evaluation.points=10"]
SMALL += ["analysis.num_replicates=10", "analysis.block_size=4", "estimator.iw=3", "threads=1", "device=cpu"]
KILLED, DONE = -9, ["done", ""]
SLOW = {"momentum", "pathwise", "plateau", "rmsprop"}  # of the jobs: they differ from others in little
JOBS = {
    "adam": ["model=gmm", "estimator=ovis-gamma1"],
    "pathwise": ["model=gaussian_toy", "estimator=pathwise-iwae"],
    "momentum": ["model=gmm", "estimator=vimco-arithmetic", "optimizer=sgd", "optimizer.momentum=0.9"],
    "baseline": ["model=gmm", "estimator=reinforce-baseline"],
    "running_scale": ["model=gmm", "estimator=nvil"],
    "dropout_schedule": ["model=noisy", "estimator=ovis-gamma1", "optimizer=scheduled"],
    "images": [
        "model=pictured",
        "estimator=pathwise-iwae",
        "estimator.alpha=0.1",
        "dataset.num_points=60",
        "steps=99",
        "task.epochs=2",  # of 6 batches
        "task.lr_steps=[3,7]",
        "task.lr_patience=1",
        "task.warmup_alpha=0.9",
        "task.warmup_beta=0",
        "task.warmup_steps=6",
        "task.warmup_offset=2",
        "task.temperature_rate=0.1",
        "task.temperature_minimum=0.5",
    ],
    "plateau": ["model=gmm", "estimator=wake-wake", "optimizer=adamax", "task.lr_patience=1", "optimizer.lr=0.1"],
    "rmsprop": ["model=gmm", "estimator=rloo", "optimizer=rmsprop", "optimizer.momentum=0.5"],
    "study": [
        "task=gradient_study",
        "model=gaussian_toy",
        "estimator=ovis-gamma1",
        "task.compare=[reinforce,pathwise-iwae]",
    ],
}


class Zygote:
    """Runs attempts of jobs in processes of their own, which may be killed."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(USER_DIR)],
            cwd=SOURCE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, path, job, attempt=1, **fault):
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"path": str(path), "overrides": [*SMALL, *JOBS[job]], "attempt": attempt, **fault}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def zygote():
    started = Zygote()
    yield started
    started.process.communicate()


class Uninterrupted:
    """What each job ends with when nothing happens, computed once."""

    def __init__(self, zygote, root):
        self.zygote, self.root, self._found = zygote, root, {}

    def __getitem__(self, job):
        if job not in self._found:
            path = self.root / job
            said = self.zygote.run(path, job)
            assert said["outcome"] == DONE, said
            self._found[job] = said["calls"], results(path)
        return self._found[job]


@pytest.fixture(scope="module")
def uninterrupted(zygote, tmp_path_factory):
    return Uninterrupted(zygote, tmp_path_factory.mktemp("uninterrupted"))


def plain(state):
    """Return a state as nested lists and numbers, which are equal only bit for bit."""
    if isinstance(state, torch.Tensor | np.ndarray):
        array = state.numpy() if isinstance(state, torch.Tensor) else state
        return [str(array.dtype), list(array.shape), array.tobytes()]
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


def rows(path):
    """Return the metrics that a rerun reproduces, as text, without the length of the lines that it does not."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if not json.loads(line)["name"].startswith(("time/", "memory/"))]


def board(path):
    """Return what TensorBoard shows: the steps of each curve and its values, the steps and contents of pictures."""
    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if "/time/" not in name]
    curves = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
    pictures = {
        name: [(image.step, image.encoded_image_string) for image in events.Images(name)]
        for name in events.Tags()["images"]
    }
    return curves | pictures


def results(path):
    """Return all that a job leaves and that a rerun reproduces."""
    run = RunDirectory(path)
    state = checkpoint.load(run, torch.device("cpu")) or {}
    state.pop("metrics_length", None)  # time/* differs in the number of its digits
    arrays = dict(np.load(run.gradients)) if run.gradients.exists() else {}
    best = torch.load(run.best) if run.best.exists() else {}
    pictures = {file.name: file.read_bytes() for file in run.samples.glob("*")}
    found = {"rows": rows(path), "board": board(path), "state": plain(state), "arrays": plain(arrays)}
    return {**found, "best": plain(best), "pictures": pictures}


def assert_as_if_uninterrupted(path, job, uninterrupted):
    found, whole = results(path), uninterrupted[job][1]
    for name in whole:
        assert found[name] == whole[name], f"{job}: {name}"
    keys = [
        (row["step"], row["split"], row["name"])
        for row in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    ]
    assert len(set(keys)) == len(keys)  # time/* too is recorded once
    for name, points in found["board"].items():
        assert len({step for step, _ in points}) == len(points), name
    assert list(path.rglob("*.tmp")) == []
    assert (RunDirectory(path).read_status() or {})["state"] == "done"


def spread(count, most):
    """Return up to `most` of the numbers from 1 to `count`, the first and the last among them, by a fixed draw."""
    middle = random.Random(count).sample(range(2, count), max(0, min(most, count) - 2))
    return [1, *sorted(middle), count]


def kill_at_calls(zygote, uninterrupted, root, job, most):
    calls = uninterrupted[job][0]
    for at in spread(len(calls), most):
        path = root / f"{job}-{at}"
        assert zygote.run(path, job, at=at, fault="kill")["status"] == KILLED
        assert zygote.run(path, job, attempt=2)["outcome"] == DONE
        try:
            assert_as_if_uninterrupted(path, job, uninterrupted)
        except AssertionError as error:
            raise AssertionError(f"{job}, killed at call {at} ({calls[at - 1]})") from error


@pytest.mark.parametrize("job", [job for job in JOBS if job not in SLOW])
def test_a_job_killed_at_a_call_that_changes_a_file_ends_with_the_same_numbers(zygote, uninterrupted, memory_path, job):
    kill_at_calls(zygote, uninterrupted, memory_path, job, most=3)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_killed_at_any_call_that_changes_a_file_ends_with_the_same_numbers(
    zygote, uninterrupted, memory_path, job
):
    kill_at_calls(zygote, uninterrupted, memory_path, job, most=10_000)


BETWEEN: list[dict] = [{"step": 1}, {"call": "tasks.train.evaluate_bound 1"}, {"step": 5}, {"step": 8}]
BETWEEN += [{"call": "tasks.train.gradient_statistics 1"}, {"step": 12}, {"call": "tasks.train.evaluate_bound 3"}]


@pytest.mark.parametrize("job", ["dropout_schedule", "images", "baseline"])
def test_a_job_killed_between_its_checkpoints_again_and_again_ends_with_the_same_numbers(
    zygote, uninterrupted, memory_path, job
):
    for attempt, fault in enumerate(BETWEEN, start=1):
        assert zygote.run(memory_path / job, job, attempt, **fault)["status"] == KILLED
    assert zygote.run(memory_path / job, job, attempt=9)["outcome"] == DONE
    assert_as_if_uninterrupted(memory_path / job, job, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in JOBS if job != "study"])
@pytest.mark.parametrize("step", range(1, 13))
def test_a_job_killed_after_any_step_ends_with_the_same_numbers(zygote, uninterrupted, memory_path, job, step):
    assert zygote.run(memory_path / job, job, step=step)["status"] == KILLED
    assert zygote.run(memory_path / job, job, attempt=2)["outcome"] == DONE
    assert_as_if_uninterrupted(memory_path / job, job, uninterrupted)


def refuse_at_calls(zygote, uninterrupted, root, job, fault, most):
    calls = uninterrupted[job][0]
    for at in spread(len(calls), most):
        path = root / f"{job}-{at}"
        state, error = zygote.run(path, job, at=at, fault=fault)["outcome"]
        where = f"{job}, {fault} at call {at} ({calls[at - 1]}): {state} {error}"
        # What only removes what is there no more may be refused without harm; a job is never failed by its disk.
        assert state in (["done"] if fault == "partial" else ["refused", "done"]), where
        if state == "refused":
            assert "refused by the test" in error, where
            assert "\n" not in error, where
            if (RunDirectory(path).read_status() or {}).get(
                "state"
            ) == "done":  # the last call of all: the folder's sync
                assert results(path) == uninterrupted[job][1], where
        assert zygote.run(path, job, attempt=2)["outcome"] == DONE, where
        try:
            assert_as_if_uninterrupted(path, job, uninterrupted)
        except AssertionError as found:
            raise AssertionError(where) from found


@pytest.mark.parametrize("fault", ["ENOSPC", "short"])
def test_a_refused_call_is_no_failure_and_the_job_goes_on_to_the_same_numbers(
    zygote, uninterrupted, memory_path, fault
):
    refuse_at_calls(zygote, uninterrupted, memory_path, "adam", fault, most=5)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short", "partial"])
@pytest.mark.parametrize("job", ["adam", "dropout_schedule", "images", "study"])
def test_no_refused_call_is_a_failure_and_the_job_goes_on_to_the_same_numbers(
    zygote, uninterrupted, memory_path, job, fault
):
    refuse_at_calls(zygote, uninterrupted, memory_path, job, fault, most=10_000)
