"""run.py as its users see it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import run as program

SOURCE = Path(__file__).resolve().parents[1]
TALLY = ["--user_dir", "tests/tally", "task=tally", "steps=3"]


def run(*arguments):
    return subprocess.run([sys.executable, "run.py", *arguments], cwd=SOURCE, capture_output=True, text=True)


def run_here(*arguments):
    """Run it in this process, for what runs no job; return its exit status."""
    try:
        return program.main(list(arguments))
    except SystemExit as end:
        return end.code


def only_job(root):
    (job,) = (root / "single" / "jobs").iterdir()
    return job


def test_one_job_runs_and_is_not_run_again(tmp_path):
    first = run(*TALLY, f"root={tmp_path}")
    assert first.returncode == 0, first.stderr
    job = only_job(tmp_path)
    assert first.stdout.splitlines() == [job.name, str(job), "counting, greeting one", "done"]
    assert (job / "run.log").read_text() == "counting, greeting one\n"
    assert json.loads((job / "status.json").read_text())["state"] == "done"
    assert yaml.safe_load((job / "config.yaml").read_text())["choices"]["task"] == "tally"
    again = run(*TALLY, f"root={tmp_path}")
    assert again.returncode == 0
    assert again.stdout == f"done already: {job}\n"


def test_a_failure_leaves_its_traceback_and_status_1(tmp_path):
    result = run(*TALLY, "task.fail_at=1", f"root={tmp_path}")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "failed: RuntimeError: told to fail at step 1"
    assert "Traceback" in (only_job(tmp_path) / "run.log").read_text()


def test_an_interrupted_job_goes_on_from_its_checkpoint(tmp_path):
    command = [sys.executable, "run.py", *TALLY, "task.nap=0.2", "steps=20", f"root={tmp_path}"]
    process = subprocess.Popen(command, cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("counting"):
            break
    second = run(*TALLY, "task.nap=0.2", "steps=20", f"root={tmp_path}")
    assert second.returncode == 2
    assert f"pid {process.pid}" in second.stderr
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert output.splitlines()[-1] == "stopped at a checkpoint: the same command goes on from there"
    assert process.returncode == 130
    job = only_job(tmp_path)
    done = json.loads((job / "checkpoint.pt").read_text())["step"]
    assert 0 < done < 20
    assert json.loads((job / "status.json").read_text())["state"] == "queued"
    assert run(*TALLY, "task.nap=0.2", "steps=20", f"root={tmp_path}").returncode == 0
    steps = [json.loads(line)["step"] for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(20))
    assert json.loads((job / "status.json").read_text())["attempt"] == 2


@pytest.mark.parametrize("pause", [0.0, 0.005, 0.3])
def test_a_second_interrupt_stops_at_once(tmp_path, pause):
    command = [sys.executable, "run.py", *TALLY, "task.nap=30", f"root={tmp_path}"]
    process = subprocess.Popen(command, cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith("counting"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    if not pause:  # two signals that nobody has taken yet are one: wait until the first has been answered
        process.stderr.readline()
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert run(*TALLY, f"root={tmp_path}").returncode == 0


@pytest.mark.parametrize("mode", ["interrupt", "generator_exit", "surrogate", "unprintable", "fork_and_raise"])
def test_an_odd_job_ends_with_its_status(tmp_path, mode):
    result = run(*TALLY, f"task.mode={mode}", f"root={tmp_path}")
    state = "done" if mode == "fork_and_raise" else "failed"
    assert result.returncode == (state == "failed")
    assert result.stdout.splitlines()[-1].startswith(state)
    assert result.stderr == ""
    assert json.loads((only_job(tmp_path) / "status.json").read_text())["state"] == state
    assert ("Traceback" in (only_job(tmp_path) / "run.log").read_text()) == (state == "failed")


@pytest.mark.parametrize("mode", ["print_surrogate", "close_output"])
def test_odd_output_is_no_failure(tmp_path, mode):
    result = run(*TALLY, f"task.mode={mode}", f"root={tmp_path}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "done"


def test_the_configuration_can_be_printed(tmp_path, capsys):
    assert run_here("--cfg", "estimator=ovis-gamma0.37", "estimator.iw=5", f"root={tmp_path}") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["estimator"]["id"] == "ovis-gamma0.37"
    assert config["choices"]["dataset"] == "gaussian_mixture"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["estimator=vimco-arithmetik"], "vimco-arithmetic"),
        (["estimator.iv=3"], "estimator.iw"),
        (["seed=abc"], "seed=abc"),
        (["modle=gmm"], "model"),
        (["estimator.iw=0"], "at least 1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1"),
        (["estimator=ovis-S0"], "ovis-S0"),
        (["estimator=vimco-arithmetic", "estimator.iw=1"], "vimco-arithmetic"),
        (["analysis.parameters=[decoder]"], "decoder"),
        (["estimator=pathwise-iwae"], "pathwise-iwae"),
        (["seed"], "key=value"),
        (["--confg"], "--cfg"),
        (["--root", "X"], "give root=X"),
        (["--root=X", "seed=3"], "give root=X"),
        (["--estimator.iw", "5"], "give estimator.iw=5"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, arguments, words):
    assert run_here(f"root={tmp_path}", *arguments) == 2
    out, error = capsys.readouterr()
    assert words in error
    assert len(error.splitlines()) == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_made_is_one_line_and_status_1(tmp_path):
    (tmp_path / "file").touch()
    result = run(*TALLY, f"root={tmp_path / 'file' / 'runs'}")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: Not a directory: {tmp_path / 'file' / 'runs'}")
