import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

from analysis.cost import LiveTensors
from analysis.gradients import Measurement
from errors import UserError
from estimators import registry
from orchestration.configuration import compose
from orchestration.experiment import expand, load
from tasks import gradient_study
from tasks.context import Interrupted
from tasks.gradient_study import check, run
from tests.tasks.stepwise import interruptible

SOURCE = Path(__file__).resolve().parents[2]
SMALL = ["task=gradient_study", "model=gaussian_toy", "model.dim=2", "dataset.dim=2", "dataset.num_points=40"]
SMALL += ["batch_size=10", "estimator.iw=3", "analysis.num_replicates=23", "analysis.block_size=5"]
SMALL += ["evaluation.iw=5", "evaluation.points=20", "task.perturbation=0.1", "task.oracle=none"]
COMPARED = "task.compare=[ovis-gamma0,pathwise-iwae]"  # OVIS on common particles, ten blocks of two measurements


def configured(*overrides):
    return OmegaConf.create(compose([*SMALL, *overrides]).config)


def rows(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len({row["name"] for row in found}) == len(found)
    assert {(row["step"], row["split"]) for row in found} == {(0, "train")}
    return {row["name"]: row["value"] for row in found}


def arrays(path):
    with np.load(path / "gradients.npz") as file:
        return dict(file)


def study(path, *overrides, stop_at=math.inf):
    """Run the study in `path`, asking it to stop once it has drawn `stop_at` blocks."""
    context, blocks = interruptible(path, stop_at)
    run(configured(*overrides), context)
    return blocks


def assert_same(first, second):
    assert rows(first) == rows(second)
    assert (first / "gradients.npz").read_bytes() == (second / "gradients.npz").read_bytes()


def test_the_summary_of_each_estimator_is_recorded(tmp_path):
    assert study(tmp_path, COMPARED) == list(range(11))
    found = rows(tmp_path)
    names = {"loss/L_k", "loss/elbo", "loss/kl", "loss/nll", "loss/kl_q_p", "loss/ess"}
    names |= {f"gaussian_toy/mse_{name}" for name in ("A", "b", "mu")}
    summary = {f"grads/{name}{end}" for name in ("snr", "dsnr", "variance", "magnitude") for end in ("", "_se")}
    summary |= {f"snr/p{percent}" for percent in (5, 25, 50, 75, 95)} | {"grads/num_constant"}
    others = {f"{id}/{name}" for id in ("ovis-gamma0", "pathwise-iwae") for name in summary}
    assert set(found) == names | summary | others
    assert found["grads/snr"] != found["ovis-gamma0/grads/snr"]
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_gradients_are_written_with_what_they_amount_to(tmp_path):
    study(tmp_path, COMPARED, "task.kept_replicates=17", "task.kept_parameters=3")
    found, summary = arrays(tmp_path), rows(tmp_path)
    assert list(found["names"]) == ["A[0,0]", "A[0,1]", "A[1,0]", "A[1,1]", "b[0]", "b[1]"]
    statistics = {f"{name}{end}" for name in ("mean", "variance", "snr") for end in ("", "_se")}
    ids = ("ovis-gamma1", "ovis-gamma0", "pathwise-iwae")
    assert set(found) == {"names"} | {f"{id}/{name}" for id in ids for name in (*statistics, "replicates")}
    for id in ids:
        assert found[f"{id}/replicates"].shape == (17, 3)
        assert found[f"{id}/replicates"].dtype == np.float32
        assert all(found[f"{id}/{name}"].shape == (6,) for name in statistics)
    assert summary["grads/variance"] == pytest.approx(found["ovis-gamma1/variance"].mean())
    assert summary["pathwise-iwae/grads/snr"] == pytest.approx(found["pathwise-iwae/snr"].mean())


def test_the_replicates_are_those_of_the_statistics(tmp_path):
    study(tmp_path)
    found = arrays(tmp_path)
    replicates = found["ovis-gamma1/replicates"]
    assert replicates.shape == (23, 6)
    assert found["ovis-gamma1/mean"] == pytest.approx(replicates.mean(0), rel=1e-4)
    assert found["ovis-gamma1/variance"] == pytest.approx(replicates.var(0, ddof=1), rel=1e-4)


def test_an_estimator_that_is_compared_has_the_gradients_that_it_has_alone(tmp_path):
    study(tmp_path / "together", COMPARED)
    together = arrays(tmp_path / "together")
    for id in ("ovis-gamma0", "pathwise-iwae"):
        study(tmp_path / id, f"estimator={id}")
        alone = arrays(tmp_path / id)
        assert together[f"{id}/replicates"] == pytest.approx(alone[f"{id}/replicates"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stops", [[0], [1], [4, 5], [6], [2, 7, 9]])
def test_a_resumed_study_ends_with_the_same_numbers(tmp_path, capsys, stops):
    study(tmp_path / "whole", COMPARED)
    for stop in stops:
        with pytest.raises(Interrupted):
            study(tmp_path / "parts", COMPARED, stop_at=stop)
    assert study(tmp_path / "parts", COMPARED) == [0, *range(stops[-1] + 1, 11)]
    assert f"going on from block {stops[-1]}\n" in capsys.readouterr().out
    assert_same(tmp_path / "parts", tmp_path / "whole")


KILLED = """\
import os, signal, sys
from omegaconf import OmegaConf
from orchestration.configuration import compose
from orchestration.run_directory import RunDirectory
from pathlib import Path
from tasks import gradient_study
from tasks.context import Context

gradient_study.CHECKPOINT_SECONDS = 0.0
kill = lambda step, total: step == 8 and os.kill(os.getpid(), signal.SIGKILL)
run = RunDirectory(Path(sys.argv[1]))
gradient_study.run(OmegaConf.create(compose(sys.argv[2:]).config), Context(run, progress=kill))
"""


def test_a_killed_study_ends_with_the_same_numbers(tmp_path, capsys):
    study(tmp_path / "whole", COMPARED)
    (tmp_path / "parts").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "parts"), *SMALL, COMPARED]
    assert subprocess.run(command, cwd=SOURCE, capture_output=True).returncode == -9
    study(tmp_path / "parts", COMPARED)
    assert "going on from block 7\n" in capsys.readouterr().out  # that at which it was killed is lost
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_damaged_checkpoint_starts_the_study_anew(tmp_path, capsys):
    study(tmp_path / "whole")
    with pytest.raises(Interrupted):
        study(tmp_path / "parts", stop_at=3)
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    study(tmp_path / "parts")
    assert "starting from the first block" in capsys.readouterr().out
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_gradients_that_are_too_many_to_keep_are_drawn_anew_and_say_the_same(tmp_path, monkeypatch):
    study(tmp_path / "kept", COMPARED)
    monkeypatch.setattr(gradient_study, "KEPT_BYTES", 0)
    with pytest.raises(Interrupted):
        study(tmp_path / "drawn", COMPARED, stop_at=8)
    assert not (tmp_path / "drawn" / "checkpoint.pt").exists()
    assert max(study(tmp_path / "drawn", COMPARED)) == 3 * 10
    assert_same(tmp_path / "drawn", tmp_path / "kept")


def test_memory_does_not_grow_with_replicates_that_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_study, "KEPT_BYTES", 0)
    dimensions = ["model.dim=30", "dataset.dim=30"]  # 930 parameters, 3,720 bytes a gradient

    def peak(num_replicates):
        with LiveTensors() as live:
            study(tmp_path, *dimensions, f"analysis.num_replicates={num_replicates}", "task.kept_replicates=5")
        return live.peak

    # What is left are a few sums over parameters for each replicate.
    assert peak(200) - peak(100) < 100 * 200


@pytest.mark.parametrize("perturbation", ["0", "0.1", "null"])
def test_the_errors_are_those_to_the_optimum_of_the_data_set(tmp_path, perturbation):
    study(tmp_path, f"task.perturbation={perturbation}", "model.dim=30", "dataset.dim=30")
    found = rows(tmp_path)
    if perturbation == "0":
        assert [found[f"gaussian_toy/mse_{name}"] for name in ("A", "b", "mu")] == [0, 0, 0]
    elif perturbation == "0.1":
        # A mean of 900 squares of N(0, 0.01): its standard error is 5%.
        assert found["gaussian_toy/mse_A"] == pytest.approx(0.01, rel=0.15)
    else:
        assert found["gaussian_toy/mse_A"] > 0.015  # rows of A start with norm one


def test_the_same_seed_perturbs_in_the_same_way_whatever_the_estimator(tmp_path):
    for name, overrides in {"a": [], "b": ["estimator=reinforce", "estimator.iw=7"], "c": ["seed=2"]}.items():
        study(tmp_path / name, *overrides)
    errors = [rows(tmp_path / name)["gaussian_toy/mse_mu"] for name in "abc"]
    assert errors[0] == errors[1] != errors[2]


def test_the_cost_is_measured_when_asked(tmp_path):
    study(tmp_path, "task.cost=true", "task.compare=[ovis-gamma0]")
    found = rows(tmp_path)
    for prefix in ("", "ovis-gamma0/"):
        assert found[f"{prefix}time/evaluation_ms"] > 0
        assert found[f"{prefix}time/evaluation_ms_se"] > 0
        assert found[f"{prefix}memory/evaluation_mb"] > 0
        seconds = found[f"{prefix}time/evaluation_ms"] / 1e3
        work = found[f"{prefix}grads/variance"] * seconds
        assert found[f"{prefix}time/work_normalised_variance"] == pytest.approx(work)


SMALLEST = ["model.dim=1", "dataset.dim=1", "estimator.iw=2"]


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ([*SMALLEST, "task.oracle=auto"], "quadrature"),
        (["estimator=pathwise-vae", "task.oracle=auto"], "closed form"),
        (["task.oracle=reference"], "reference"),
    ],
)
def test_gradients_are_compared_with_what_they_ought_to_be(tmp_path, capsys, overrides, method):
    study(tmp_path, *overrides)
    assert f"oracle ({method})" in capsys.readouterr().out
    id = "pathwise-vae" if "estimator=pathwise-vae" in overrides else "ovis-gamma1"
    found, summary = arrays(tmp_path), rows(tmp_path)
    bias = np.abs(found[f"{id}/mean"] - found[f"{id}/oracle"]).mean()
    assert summary["grads/bias"] == pytest.approx(bias, rel=1e-3)
    assert {"grads/bias_se", "grads/bias_z", "grads/cosine", "grads/cosine_se"} <= set(summary)


def test_an_unbiased_estimator_is_found_unbiased(tmp_path):
    options = [*SMALLEST, "task.oracle=auto", "analysis.num_replicates=2000", "analysis.block_size=500"]
    study(tmp_path, *options, "task.compare=[ovis-gamma0]")
    found = rows(tmp_path)
    assert found["ovis-gamma0/grads/bias_z"] < 3.5 < 10 < found["grads/bias_z"]


def test_where_no_exact_gradient_is_known_none_is_compared_with(tmp_path, capsys):
    study(tmp_path, "task.oracle=auto", "task.compare=[ovis-gamma0,pathwise-vae]")
    lines = [line for line in capsys.readouterr().out.splitlines() if "no exact gradient" in line]
    assert lines == ["no exact gradient on GaussianToy: ovis-gamma1, ovis-gamma0; task.oracle=reference estimates it"]
    assert "grads/bias" not in rows(tmp_path)
    assert "ovis-gamma1/oracle" not in arrays(tmp_path)


def test_single_gradients_are_histograms_in_tensorboard(tmp_path):
    study(tmp_path, "task.kept_parameters=2")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={HISTOGRAMS: 0}).Reload()
    assert events.Tags()["histograms"] == ["train/ovis-gamma1/A[0,0]", "train/ovis-gamma1/A[0,1]"]
    assert events.Histograms("train/ovis-gamma1/A[0,0]")[0].histogram_value.num == 23


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_fails_with_its_name(tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match="train loss/L_k is -inf"):
        study(tmp_path, "task.perturbation=1e30")
    block = Measurement.block
    monkeypatch.setattr(Measurement, "block", lambda self, i: block(self, i) / (i != 2))
    with pytest.raises(FloatingPointError, match="the mean or the variance of ovis-gamma1's gradient is not finite"):
        study(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=gmm", "task.perturbation=null", "estimator=pathwise-iwae"], "pathwise-iwae"),
        (["model=gmm", "task.perturbation=null", "task.compare=[pathwise-iwae]"], "pathwise-iwae"),
        (["estimator=ovis-S3"], "ovis-S3"),
        (["task.compare=[reinforce,ovis-S3]"], "ovis-S3"),
        (["estimator.iw=1", "estimator=reinforce", "task.compare=[vimco-arithmetic]"], "vimco-arithmetic: iw = 1"),
        (["task.compare=[tvo-part1-beta2]"], "tvo-part1-beta2: N = 1, expected 2 or more intervals"),
        (["task.compare=[tvo-part5-beta2]", "estimator.alpha=0.5"], "tvo-part5-beta2: alpha = 0.5"),
        (["analysis.parameters=[decoder]"], "decoder"),
        (["batch_size=41"], "41"),
        (["task.perturbation=-0.1"], "task.perturbation=-0.1: expected a standard deviation"),
        (["task.perturbation=much"], "task.perturbation=much: expected a standard deviation"),
        (["model=gmm", "task.perturbation=0.1"], "GaussianMixture has no place_at_optimum"),
        (["task.oracle=exact"], "task.oracle=exact"),
        (["task.kept_replicates=0"], "task.kept_replicates=0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(overrides, words):
    of_gmm = [override for override in SMALL if "dim" not in override and "model" not in override]
    small = of_gmm if "model=gmm" in overrides else SMALL
    with pytest.raises((UserError, ValueError), match=words):
        check(OmegaConf.create(compose([*small, *overrides]).config))


def test_every_family_of_estimators_is_in_the_zoo():
    found = {registry.parse(job.config["estimator"]["id"]).family for job in expand(load("estimator-zoo"))}
    # The methods for single nodes ask for models that say what their layers are; experiments/discrete-vae has those.
    assert found == {family.name for family in registry.families() if "layer_posterior" not in family.needs}


def test_what_can_work_is_not_refused():
    check(configured(COMPARED, "task.cost=true"))


def test_each_point_of_an_experiments_grid_is_checked_before_any_job_runs(tmp_path):
    (tmp_path / "user" / "experiments").mkdir(parents=True)
    (tmp_path / "user" / "experiments" / "study.yaml").write_text(
        "base: [task=gradient_study]\n"
        "variants:\n"
        "  - [estimator=reinforce, 'task.compare=[wake-wake,vimco-arithmetic]']\n"
        "  - [estimator=wake-wake, 'task.compare=[pathwise-iwae]']\n"
        "grid: {seed: 'range(20)', estimator.iw: '3,2,1'}\n"
    )
    command = [sys.executable, "manager.py", "--exp", "study", "--root", str(tmp_path / "runs")]
    command += ["--user_dir", str(tmp_path / "user")]
    result = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert result.returncode == 2
    assert "vimco-arithmetic: iw = 1, expected 2 or more particles" in result.stderr
    assert "(and 3 more like it); no job was queued" in result.stderr
    assert not (tmp_path / "runs" / "study").exists()
