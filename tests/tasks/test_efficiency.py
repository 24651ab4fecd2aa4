import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from analysis.cost import LiveTensors
from errors import UserError
from estimators import get_estimator
from orchestration.configuration import compose
from orchestration.experiment import expand, load
from orchestration.run_directory import RunDirectory
from tasks import checkpoint, efficiency
from tasks.build import build_dataset, build_model, build_optimizer
from tasks.context import Context, Interrupted
from tasks.efficiency import Times, check, run

SOURCE = Path(__file__).resolve().parents[2]
SMALL = ["task=efficiency", "model=gmm", "batch_size=10", "estimator.iw=4", "task.seconds=1e-9"]
CPU = torch.device("cpu")


def configured(*overrides):
    return OmegaConf.create(compose([*SMALL, *overrides]).config)


def measure(path, *overrides, stop_at=math.inf):
    """Measure in `path`, asking the task to stop once it has timed `stop_at` steps; return the steps it told of."""
    path.mkdir(exist_ok=True)
    told = [0]
    context = Context(
        RunDirectory(path), should_stop=lambda: told[-1] >= stop_at, progress=lambda step, total: told.append(step)
    )
    run(configured(*overrides), context)
    return told[1:]


def rows(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len({row["name"] for row in found}) == len(found)
    assert {(row["step"], row["split"]) for row in found} == {(0, "train")}
    return {row["name"]: row["value"] for row in found}


def test_a_measurement_is_recorded(tmp_path):
    assert measure(tmp_path) == list(range(1, 11))
    found = rows(tmp_path)
    assert found["time/steps"] == 10
    assert found["time/on_gpu"] == 0
    assert found["time/step_cpu_ms"] > 0
    assert 0 < found["time/step_ms"] <= found["time/step_ms_median"] <= found["time/step_ms_p90"]
    assert found["memory/step_mb"] == found["memory/step_mb_least"]
    assert found["memory/resident_mb"] > found["memory/step_mb"]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_times_are_summed_up(tmp_path, monkeypatch):
    times = iter([5.0, 4.0, 3.0, 2.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])

    def seconds_of(work, device):
        work()
        return next(times)

    monkeypatch.setattr(efficiency, "seconds_of", seconds_of)
    measure(tmp_path, "task.seconds=70")  # ten take 65
    found = rows(tmp_path)
    assert found["time/steps"] == 11
    assert (found["time/step_ms"], found["time/step_ms_median"], found["time/step_ms_p90"]) == (2000, 7000, 11000)


@pytest.mark.parametrize("id", ["ovis-gamma1", "reinforce-baseline"])
def test_the_memory_is_that_of_a_whole_step_and_of_what_stays(tmp_path, id):
    config = configured(f"estimator={id}")
    dataset = build_dataset(config)
    model, estimator = build_model(config, CPU, dataset), get_estimator(id, iw=4)
    x = dataset.batch(0, 10, 1)
    estimator(model, x)
    optimizer = build_optimizer(config, model, estimator)

    def step():
        loss, _, _ = estimator(model, x)  # the diagnostics and the output live as long as the step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveTensors() as live:
        step()
    measure(tmp_path, f"estimator={id}")
    found = rows(tmp_path)
    assert found["memory/step_mb"] == live.peak / 2**20
    # Adam keeps two numbers for each parameter, and a step count for each tensor of parameters.
    parameters = [*model.parameters(), *estimator.parameters()]
    buffers = [*model.buffers(), *estimator.buffers()]
    expected = 3 * sum(p.nbytes for p in parameters) + 4 * len(parameters) + sum(b.nbytes for b in buffers)
    assert found["memory/standing_mb"] == expected / 2**20


@pytest.mark.parametrize("stops", [[0], [1], [3, 7], [9]])
def test_an_interrupted_measurement_goes_on_with_its_times(tmp_path, capsys, stops):
    for stop in stops:
        with pytest.raises(Interrupted):
            measure(tmp_path, stop_at=stop)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=False)["parts"]["times"]
    kept = state["seconds"]
    assert len(kept) == len(state["cpu"]) == stops[-1]
    assert measure(tmp_path) == list(range(stops[-1] + 1, 11))
    assert f"going on from step {stops[-1]}\n" in capsys.readouterr().out
    found = rows(tmp_path)
    assert found["time/steps"] == 10
    assert found["time/step_ms"] <= 1e3 * min(kept, default=math.inf)


def test_times_of_another_machine_do_not_count(tmp_path):
    times = Times("another")
    times.seconds = times.cpu = [1e-9] * 20
    checkpoint.save(RunDirectory(tmp_path), 20, 0, {"times": times})
    assert measure(tmp_path) == list(range(1, 11))
    assert rows(tmp_path)["time/step_ms"] > 1e-6


def test_a_damaged_checkpoint_starts_anew(tmp_path, capsys):
    with pytest.raises(Interrupted):
        measure(tmp_path, stop_at=3)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-50])
    assert measure(tmp_path) == list(range(1, 11))
    assert "starting from the first step" in capsys.readouterr().out


KILLED = """\
import os, signal, sys
from omegaconf import OmegaConf
from orchestration.configuration import compose
from orchestration.run_directory import RunDirectory
from pathlib import Path
from tasks import efficiency
from tasks.context import Context

efficiency.CHECKPOINT_SECONDS = 0.0
kill = lambda step, total: step == 8 and os.kill(os.getpid(), signal.SIGKILL)
efficiency.run(OmegaConf.create(compose(sys.argv[2:]).config), Context(RunDirectory(Path(sys.argv[1])), progress=kill))
"""


def test_a_killed_measurement_loses_what_it_was_at(tmp_path, capsys):
    command = [sys.executable, "-c", KILLED, str(tmp_path), *SMALL]
    assert subprocess.run(command, cwd=SOURCE, capture_output=True).returncode == -signal.SIGKILL
    assert measure(tmp_path) == [8, 9, 10]
    assert "going on from step 7\n" in capsys.readouterr().out


def test_rows_that_a_killed_attempt_left_are_replaced(tmp_path):
    measure(tmp_path)
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text()[:100])
    measure(tmp_path)
    assert rows(tmp_path)["time/steps"] == 10
    assert len(os.listdir(tmp_path / "tensorboard")) == 1


def test_what_is_no_number_ends_the_job(tmp_path, monkeypatch):
    class Broken(type(get_estimator("reinforce", iw=4))):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            loss, *rest = super().forward(*args, **kwargs)
            return loss * math.nan, *rest

    monkeypatch.setattr(efficiency, "build_estimator", lambda config, device: Broken(mc=1, iw=4))
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        measure(tmp_path)


def test_a_step_without_room_raises_what_torch_raises(tmp_path):
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        measure(tmp_path, "estimator.iw=1000000000000")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("task.warmup=-1", "expected a number of steps, at least 0"),
        ("task.seconds=0.0", "expected a time above 0"),
        ("task.least_steps=9", "expected a number from 10 to 1,000"),
        ("task.least_steps=1001", "expected a number from 10 to 1,000"),
    ],
)
def test_options_that_no_measurement_can_have_are_refused(tmp_path, option, expected):
    for refuse in (lambda: check(configured(option)), lambda: measure(tmp_path, option)):
        with pytest.raises(UserError, match=rf"{option}: {expected}"):
            refuse()


def test_check_takes_a_step():
    check(configured("estimator=reinforce-baseline"))
    with pytest.raises(ValueError, match="iw = 1, expected 2 or more particles"):
        check(configured("estimator=vimco-arithmetic", "estimator.iw=1"))


@pytest.mark.parametrize("name", ["efficiency", "efficiency-mini"])
def test_the_experiments_measure_each_estimator_at_each_number_of_particles(name):
    jobs = expand(load(name))
    points = {(job.config["estimator"]["id"], job.config["estimator"]["iw"]) for job in jobs}
    estimators, particles = ({point[i] for point in points} for i in (0, 1))
    assert len(points) == len(jobs) == len(estimators) * len(particles)
    assert {"ovis-gamma1", "vimco-arithmetic", "reinforce"} <= estimators
    if name == "efficiency":
        assert {10, 2506, 5000} <= particles
        assert {job.config["batch_size"] for job in jobs} == {24}
