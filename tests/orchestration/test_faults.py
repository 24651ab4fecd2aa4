"""Every file is the old or the new one, whichever call that changes it fails, and wherever its writer is killed."""

import json
import shutil

import numpy as np
import pytest

from errors import CorruptFileError
from orchestration.queue import Manager, Queue, Row
from orchestration.run_directory import ExperimentFolder, MetricsFile, RunDirectory
from orchestration.storage import sweep, write_atomically
from tests.faults import Faults, run_in_child

FAULTS = ["kill", "ENOSPC", "EIO", "short", "partial"]
RECORD: dict = {"name": "study", "file": "grid: {seed: 1}", "overrides": [], "snapshot": "s1", "user_dir": None}
ROWS = [Row(name, [f"seed={name}"]) for name in "abcdefgh"]


def folder_of(root):
    return ExperimentFolder(root, "study")


def job_of(root):
    return folder_of(root).job("a")


def queue_of(root):
    return Queue(folder_of(root))


def rows_of(root):
    try:
        return queue_of(root).rows()
    except CorruptFileError:
        return "unreadable"


def content_of(path):
    return path.read_bytes() if path.exists() else None


def arrays_of(path):
    return {name: array.tolist() for name, array in np.load(path).items()} if path.exists() else None


def save_arrays(root, value):
    arrays = {name: np.full(100, value) for name in "xy"}
    write_atomically(job_of(root).gradients, lambda file: np.savez_compressed(file, **arrays))  # type: ignore


def damage(root):
    path = folder_of(root).queue
    path.write_bytes(path.read_bytes()[:-20])
    job_of(root).write_status({"state": "done", "attempt": 3})


# What is written: how it comes to be there, how it is replaced, how it is read.
OPERATIONS = {
    "queue": (lambda root: None, lambda root: queue_of(root).renew_snapshot("s2"), rows_of),
    "queue_of_more": (lambda root: None, lambda root: queue_of(root).add(ROWS), rows_of),
    "queue_rebuilt": (damage, lambda root: queue_of(root).rebuild(ROWS[:3]), rows_of),
    "record": (
        lambda root: folder_of(root).write_record(RECORD),
        lambda root: folder_of(root).write_record({**RECORD, "overrides": ["steps=3"]}),
        lambda root: folder_of(root).read_record(),
    ),
    "first_record": (
        lambda root: None,
        lambda root: folder_of(root).write_record(RECORD),
        lambda root: folder_of(root).read_record(),
    ),
    "status": (
        lambda root: job_of(root).write_status({"state": "running", "attempt": 1}),
        lambda root: job_of(root).write_status({"state": "done", "attempt": 1}),
        lambda root: job_of(root).read_status(),
    ),
    "config": (
        lambda root: None,
        lambda root: job_of(root).write_config({"seed": 1, "estimator": {"iw": 5}}),
        lambda root: content_of(job_of(root).config),
    ),
    "gradients": (
        lambda root: save_arrays(root, 1.0),
        lambda root: save_arrays(root, 2.0),
        lambda root: arrays_of(job_of(root).gradients),
    ),
}


@pytest.fixture
def started(memory_path):
    """Return a function that makes a folder with an experiment of three jobs and what an operation finds there."""

    def start(name, prepare):
        root = memory_path / name
        job_of(root).path.mkdir(parents=True)
        queue_of(root).rebuild(ROWS[:3])
        prepare(root)
        return root

    return start


def faulty(root, operate, at, fault):
    """Run the operation in a process of its own that meets the fault; return its exit status."""

    def run():
        with Faults(root, at, fault):
            try:
                operate(root)
            except OSError as error:
                return 1 if error.filename and "\n" not in str(error) else 2
        return 0

    return run_in_child(run)


def number_of_calls(root, operate):
    with Faults(root) as faults:
        operate(root)
    return len(faults.calls)


def temporaries(root):
    return list(root.rglob("*.tmp"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_file_is_the_old_or_the_new_one_whichever_call_fails(started, operation):
    prepare, operate, load = OPERATIONS[operation]
    root = started("whole", prepare)
    old = load(root)
    count = number_of_calls(root, operate)
    new = load(root)
    assert old != new
    assert count >= (4 if operation == "config" else 5)  # open, write, fsync, replace, fsync of the folder
    seen = []
    for fault in FAULTS:
        for at in range(1, count + 1):
            root = started(f"{fault}-{at}", prepare)
            status = faulty(root, operate, at, fault)
            assert status == (-9 if fault == "kill" else status)
            assert status in (-9, 0, 1), f"{fault} at call {at}"
            found = load(root)
            assert found == new if status == 0 else found in (old, new), f"{fault} at call {at}"
            seen.append(found)
            if fault != "kill":
                assert temporaries(root) == [], f"{fault} at call {at}"
            operate(root)
            assert load(root) == new, f"{fault} at call {at}, once more"
            sweep(folder_of(root).path)
            job_of(root).sweep()
            assert temporaries(root) == []
            shutil.rmtree(root)
    assert old in seen
    assert new in seen


@pytest.mark.parametrize("fault", FAULTS)
def test_metrics_hold_whole_rows_up_to_the_kept_length_whichever_call_fails(memory_path, fault):
    def rows(run, length=None):
        return [json.loads(line) for line in run.metrics.read_bytes()[:length].splitlines()]

    def write(run):
        metrics = MetricsFile(run.metrics)
        try:
            metrics.keep(kept)
            for step in (1, 2, 3):
                metrics.append(step, "train", {"loss/L_k": step / 3, "loss/elbo": 1.0})
            metrics.sync()
        finally:
            metrics.close()

    def start(name):
        run = RunDirectory(memory_path / name)
        run.path.mkdir()
        metrics = MetricsFile(run.metrics)
        metrics.append(0, "train", {"loss/L_k": 0.5})
        lengths.add(metrics.sync())
        metrics.append(1, "train", {"loss/L_k": 7.0})  # past the checkpoint, and then a torn row
        metrics.close()
        with open(run.metrics, "ab") as file:
            file.write(b'{"step": 2, "spl')
        return run

    lengths: set[int] = set()
    whole = start("whole")
    (kept,) = lengths
    with Faults(whole.path) as faults:
        write(whole)
    assert any(call.startswith("truncate") for call in faults.calls)
    for at in range(1, len(faults.calls) + 1):
        run = start(f"{fault}-{at}")
        before = rows(run, kept)

        def act(run=run, at=at):
            with Faults(run.path, at, fault):
                try:
                    write(run)
                except OSError:
                    return 1
            return 0

        run_in_child(act)
        assert rows(run, kept) == before
        write(run)
        assert run.metrics.read_bytes() == whole.metrics.read_bytes()


@pytest.mark.parametrize("fault", ["kill", "ENOSPC", "EIO"])
def test_a_cleared_run_is_never_a_checkpoint_without_its_metrics(memory_path, fault):
    def start(name):
        run = RunDirectory(memory_path / name)
        (run.tensorboard / "deep").mkdir(parents=True)
        for path in (run.checkpoint, run.metrics, run.gradients, run.tensorboard / "deep" / "events"):
            path.touch()
        return run

    with Faults(memory_path) as faults:
        start_run = start("whole")
        made = len(faults.calls)
        start_run.clear()
    count = len(faults.calls) - made
    assert list(start_run.path.iterdir()) == []
    for at in range(1, count + 1):
        run = start(f"{fault}-{at}")

        def act(run=run, at=at):
            with Faults(run.path, at, fault):
                try:
                    run.clear()
                except OSError:
                    return 1
            return 0

        assert run_in_child(act) == (-9 if fault == "kill" else 1)  # a refusal is told, not passed over
        assert run.metrics.exists() or not run.checkpoint.exists()
        run.clear()
        assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_claim_is_all_or_nothing_and_runs_no_job_twice(started, fault):
    def claim(root):
        manager = Manager(folder_of(root))
        try:
            queue_of(root).claim(manager, 2)
        finally:
            manager.close()

    root = started("whole", lambda root: None)
    count = number_of_calls(root, claim)
    for at in range(1, count + 1):
        root = started(f"{fault}-{at}", lambda root: None)
        faulty(root, claim, at, fault)
        attempts = [row.attempt for row in queue_of(root).rows()]
        assert attempts in ([0, 0, 0], [1, 1, 0])
        manager = Manager(folder_of(root))
        claimed, counts = queue_of(root).claim(manager, 3)
        manager.close()
        assert [row.id for row in claimed] == ["a", "b", "c"]
        assert counts == {"running": 3}
        assert [row.attempt for row in claimed] == [attempt + 1 for attempt in attempts]
        queue_of(root).sweep()
        assert temporaries(root) == []
