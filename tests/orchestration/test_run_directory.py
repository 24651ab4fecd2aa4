import json

import pytest

from errors import CorruptFileError
from orchestration.run_directory import ExperimentFolder, MetricsFile, RunDirectory


def test_metrics_are_appended_and_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append(1, "train", {"grads/snr": 0.5, "loss/L_k": -1})
    length = metrics.sync()
    metrics.append(2, "test", {"loss/L_k": -0.25})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "split": "train", "name": "grads/snr", "value": 0.5},
        {"step": 1, "split": "train", "name": "loss/L_k", "value": -1.0},
        {"step": 2, "split": "test", "name": "loss/L_k", "value": -0.25},
    ]
    metrics = MetricsFile(path)
    metrics.keep(length)
    metrics.append(3, "test", {"loss/L_k": 0.0})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 3]


def test_metrics_shorter_than_promised_are_refused(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(CorruptFileError, match=r"metrics\.jsonl is shorter \(0 bytes\)"):
        metrics.keep(10)
    metrics.close()


BAD_STATUS = [None, "", "{", "[1]", '{"state": "do', '{"state": "done"}', '{"state": 1, "attempt": 1}', "[" * 100_000]
BAD_STATUS += [f'{{"state": "running", "attempt": {attempt}}}' for attempt in ("null", '"abc"', "true", "1.5")]


@pytest.mark.parametrize("content", BAD_STATUS, ids=range(len(BAD_STATUS)))
def test_a_status_that_cannot_be_read_is_none(tmp_path, content):
    run = RunDirectory(tmp_path)
    if content is not None:
        run.status.write_text(content)
    assert run.read_status() is None


def test_a_checkpoint_has_another_identity_each_time(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.checkpoint_identity() == ""
    run.checkpoint.write_bytes(b"1")
    first = run.checkpoint_identity()
    run.checkpoint.unlink()
    run.checkpoint.write_bytes(b"12")
    assert run.checkpoint_identity() not in ("", first)


def test_the_record_of_an_experiment(tmp_path):
    folder = ExperimentFolder(tmp_path, "study")
    assert folder.read_record() is None
    folder.path.mkdir()
    record: dict = {"name": "study", "file": "grid: {seed: 1}", "overrides": [], "snapshot": "s1", "user_dir": None}
    folder.write_record(record)
    assert folder.read_record() == record
    for damaged in ("{", "null", "[]", "{}", '{"name": "study"}', "[" * 100_000):
        folder.record.write_text(damaged)
        with pytest.raises(CorruptFileError, match=r"experiment\.json"):
            folder.read_record()


def test_an_experiment_set_aside_keeps_its_files_under_a_hidden_name(tmp_path):
    folder = ExperimentFolder(tmp_path, "study")
    folder.jobs.mkdir(parents=True)
    folder.queue_lock.touch()
    aside = folder.set_aside()
    assert aside.name.startswith(".study.removed-")
    assert (aside / "jobs").is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([folder.queue_lock, aside])
