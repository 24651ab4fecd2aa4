from pathlib import Path

import pytest

from errors import UserError
from reporting.load import flatten, load, states
from tests.reporting.synthetic import config, line, write_experiment, write_queue, write_run

ROWS = line([0.9, 0.5, 0.2])
DEEP = 100_000 * "["


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "study"


def read(folder: Path):
    return load(folder.name, folder.parent)


def test_reads_runs_with_their_values_and_state(folder):
    write_run(folder, "a", config("reinforce", 5, 1), ROWS)
    write_run(folder, "b", config("ovis-gamma1", 10, 2), line([0.8]), state="running")
    study = read(folder)
    assert [(job.id, job.state, job.started) for job in study.jobs] == [("a", "done", True), ("b", "running", True)]
    assert study.jobs[1].config["estimator"] == "ovis-gamma1"
    assert study.jobs[1].config["estimator.iw"] == 10
    assert study.warnings == []
    of_a = study.values[study.values["id"] == "a"]
    assert of_a["step"].tolist() == [0, 1000, 2000]
    assert of_a["value"].tolist() == [0.9, 0.5, 0.2]
    assert set(study.values["split"]) == {"test"}


def test_the_last_row_of_a_step_counts(folder):
    write_run(folder, "a", config(), [*ROWS, (1000, "test", "gmm/posterior_mse", 0.4)])
    assert read(folder).values["value"].tolist() == [0.9, 0.4, 0.2]


@pytest.mark.parametrize("content", [None, "", "choices: {a: ", "choices: {}\n", "- 1\n", "seed: 1\n", "a: &a {b: *a}"])
def test_a_missing_or_cut_config_costs_its_job_only(folder, content):
    write_run(folder, "good", config(), ROWS)
    cut = write_run(folder, "bad", config(), ROWS)
    if content is None:
        (cut / "config.yaml").unlink()
    else:
        (cut / "config.yaml").write_text(content)
    study = read(folder)
    assert [warning for warning in study.warnings if warning.startswith("job bad: config.yaml: ")] == study.warnings
    assert len(study.warnings) == 1
    assert set(study.values["id"]) == {"good"}
    assert {job.id for job in study.jobs} == {"good", "bad"}


@pytest.mark.parametrize("content", [None, "", '{"state": "do', "[1, 2]", "3", DEEP])
def test_a_missing_or_cut_status_is_named_and_the_queue_believed(folder, content):
    run = write_run(folder, "a", config(), ROWS)
    if content is None:
        (run / "status.json").unlink()
    else:
        (run / "status.json").write_text(content)
    assert read(folder).jobs[0].state == "unknown"
    write_queue(folder, {"a": "done"})
    study = read(folder)
    assert study.jobs[0].state == "done"
    assert [warning.split(": ")[:2] for warning in study.warnings] == [["job a", "status.json"]]
    assert len(study.values) == 3


def test_lines_that_are_no_metric_are_left_out_and_counted(folder):
    run = write_run(folder, "a", config(), ROWS)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    garbage = [
        "\x00\x00\x00",
        '{"step": 1, "split": "test"}',
        '{"step": "1", "split": "a", "name": "b", "value": 1}',
        "7",
        '{"step": 100000000000000000000000, "split": "test", "name": "loss/L_k", "value": 1}',
        f'{{"step": 1, "split": "test", "name": "loss/L_k", "value": {400 * "1"}}}',
        f'{{"step": 1, "split": "test", "name": "loss/L_k", "value": {5000 * "1"}}}',
        DEEP,
    ]
    (run / "metrics.jsonl").write_text("\n".join([lines[0], *garbage, lines[1], lines[2][:20]]))
    study = read(folder)
    assert study.values["value"].tolist() == [0.9, 0.5]
    assert study.warnings == ["job a: metrics.jsonl: 9 of 11 lines cut or no metric; left out"]


def test_a_finished_run_without_metrics_is_named(folder):
    write_run(folder, "empty", config(), [])
    missing = write_run(folder, "missing", config(), [])
    (missing / "metrics.jsonl").unlink()
    write_run(folder, "young", config(), [], state="running")
    assert read(folder).warnings == ["job empty: metrics.jsonl: empty", "job missing: metrics.jsonl: missing"]


def test_values_that_are_not_finite_are_left_out_and_counted(folder):
    write_run(folder, "a", config(), line([0.9, float("nan"), float("inf")]))
    study = read(folder)
    assert study.values["value"].tolist() == [0.9]
    assert study.warnings == ["job a: gmm/posterior_mse: 2 values are not finite; left out"]


def test_jobs_that_have_not_started_come_from_the_queue_in_its_order(folder):
    write_run(folder, "b", config(), ROWS)
    write_run(folder, "stray", config(seed=2), ROWS)
    write_queue(folder, {"c": "queued", "b": "running", "a": "queued"}, {"c": ["estimator=tvo", "+tag=x"]})
    study = read(folder)
    assert [(job.id, job.state) for job in study.jobs] == [
        ("c", "queued"),
        ("b", "done"),
        ("a", "queued"),
        ("stray", "done"),
    ]
    assert study.jobs[0].config == {"estimator": "tvo", "tag": "x"}
    assert not study.jobs[0].started
    assert states(study.jobs) == {"done": 2, "queued": 2}


def test_the_queue_decides_between_running_and_failed(folder):
    write_run(folder, "a", config(), ROWS, state="running")
    write_queue(folder, {"a": "aborted"})
    assert read(folder).jobs[0].state == "aborted"


@pytest.mark.parametrize(
    "content", ["", '{"jobs": ', "[]", '{"jobs": [1]}', '{"other": {}}', '{"jobs": {"1": {}}}', DEEP]
)
def test_a_queue_that_cannot_be_read_is_named(folder, content):
    write_run(folder, "a", config(), ROWS)
    (folder / "queue.json").write_text(content)
    study = read(folder)
    assert [job.id for job in study.jobs] == ["a"]
    assert len(study.warnings) == 1
    assert "queue.json: cannot be read" in study.warnings[0]


def test_a_finished_job_without_a_folder_is_named(folder):
    write_run(folder, "a", config(), ROWS)
    write_queue(folder, {"a": "done", "b": "done", "c": "failed", "d": "queued", "e": "aborted"})
    assert read(folder).warnings == ["job b: its folder is missing", "job c: its folder is missing"]


def test_reads_the_stored_experiment_file_where_the_file_is_gone(folder):
    write_experiment(folder, {"ema": 0.5}, "A study.")
    study = read(folder)
    assert (study.description, study.report) == ("A study.", {"ema": 0.5})
    assert study.source.endswith("experiment.json")
    for content in ('{"name": "study", "fi', DEEP):
        (folder / "experiment.json").write_text(content)
        assert "experiment.json: cannot be read" in read(folder).warnings[0]


def test_an_edited_experiment_file_counts_at_once(folder, tmp_path):
    write_experiment(folder, {"ema": 0.5}, "A study.")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.yaml").write_text("description: Mine.\nreport: {ema: 0.1}\n")
    assert load("study", folder.parent, tmp_path).report == {"ema": 0.1}


def test_an_experiment_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.yaml").write_text("report: {")
    with pytest.raises(UserError, match=r"study.yaml: cannot be read"):
        load("study", tmp_path / "runs", tmp_path)


def test_an_unknown_experiment_names_the_near_ones(folder, tmp_path):
    write_run(folder, "a", config(), ROWS)
    with pytest.raises(UserError, match=r"unknown experiment 'studi'.*did you mean 'study'"):
        load("studi", folder.parent, tmp_path)
    with pytest.raises(UserError, match=r"unknown experiment '\.\./runs/study'"):
        load("../runs/study", folder.parent)


def test_reading_writes_nothing(folder):
    write_run(folder, "a", config(), ROWS)
    write_queue(folder, {"a": "done"})
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    read(folder)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


def test_flatten_keeps_choices_and_paths():
    flat = flatten({"choices": {"model": "gmm"}, "seed": 3, "analysis": {"parameters": ["A", "b"]}, "model": {"C": 20}})
    assert flat == {"model": "gmm", "seed": 3, "analysis.parameters": "A,b", "model.C": 20}
