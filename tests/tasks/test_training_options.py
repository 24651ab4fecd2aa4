import itertools
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis.active_units import ActiveUnits
from errors import UserError
from orchestration.configuration import compose
from orchestration.run_directory import RunDirectory
from seeding import derive_seed
from tasks import checkpoint
from tasks.build import build_dataset, build_model
from tasks.context import Context
from tasks.evaluation import evaluate_bound
from tasks.train import check, run

SMALL = ["steps=12", "eval_every=4", "checkpoint_every=6", "evaluation.iw=5", "evaluation.points=20", "batch_size=10"]
SMALL += ["analysis.num_replicates=10", "estimator.iw=3"]
TOY = ["model=gaussian_toy", "model.dim=2", "dataset.dim=2", "dataset.num_points=45"]
VAE = ["model=vae", "dataset=shapes", "dataset.num_points=200", "model.latents=3", "model.hidden=[8]"]
VAE += ["analysis.num_replicates=2"]


def configured(*overrides):
    return OmegaConf.create(compose([*SMALL, *overrides]).config)


def train(path, *overrides):
    """Run the job in `path`; return what it called progress with."""
    path.mkdir(exist_ok=True)
    told = []
    run(configured(*overrides), Context(RunDirectory(path), progress=lambda step, steps: told.append((step, steps))))
    return told


def rows(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], row["split"], row["name"]): row["value"] for row in found if not row["name"].startswith("time/")
    }


def parameters(path):
    state = checkpoint.load(RunDirectory(path), torch.device("cpu")) or {}
    return state["parts"]["model"]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_epochs_are_passes_over_the_training_points(tmp_path):
    told = train(tmp_path / "epochs", *TOY, "task.epochs=3", "steps=7")
    assert told == [(step, 12) for step in range(1, 13)]  # 45 points fill 4 batches of 10
    train(tmp_path / "steps", *TOY)
    assert rows(tmp_path / "epochs") == rows(tmp_path / "steps")


def test_a_warmup_sets_alpha_for_training_and_for_the_gradients_statistics(tmp_path):
    warmup = ["task.warmup_alpha=0.9", "task.warmup_steps=8", "task.warmup_offset=2"]
    train(tmp_path / "warmup", *warmup)
    train(tmp_path / "high", "estimator.alpha=0.9")
    train(tmp_path / "low")
    train(tmp_path / "two", *warmup, "steps=2")
    train(tmp_path / "high two", "estimator.alpha=0.9", "steps=2")
    warmed, high, low = (rows(tmp_path / name) for name in ("warmup", "high", "low"))
    names = {name for _, _, name in warmed if name.startswith("grads/")}
    assert all(warmed[0, "train", name] == high[0, "train", name] for name in names)
    assert warmed[0, "train", "grads/snr"] != low[0, "train", "grads/snr"]
    assert_equal(parameters(tmp_path / "two"), parameters(tmp_path / "high two"))
    alphas = [warmed[step, "train", "schedule/alpha"] for step in (0, 4, 8, 12)]
    assert alphas == pytest.approx([0.9, 1 - 0.1**0.75, 1 - 0.1**0.25, 0.0], rel=1e-12)
    assert not any(name.startswith("schedule/") for _, _, name in high)


def test_beta_warms_up_and_one_that_stays_is_none(tmp_path):
    train(tmp_path / "constant", "estimator.beta=0.5")
    train(tmp_path / "warmup", "estimator.beta=0.5", "task.warmup_beta=0.5", "task.warmup_steps=8")
    assert_equal(parameters(tmp_path / "constant"), parameters(tmp_path / "warmup"))


def test_a_learning_rate_is_reduced_from_its_step_on(tmp_path):
    sgd = ["optimizer=sgd", "optimizer.lr=0.5", "estimator=reinforce-baseline", "optimizer.estimator_lr=0.25"]
    train(tmp_path / "stopped", *sgd, "task.lr_steps=[10]", "task.lr_factor=1e-30")
    train(tmp_path / "ten", *sgd, "steps=10")
    train(tmp_path / "twelve", *sgd)
    assert_equal(parameters(tmp_path / "stopped"), parameters(tmp_path / "ten"))
    assert not all(map(torch.equal, parameters(tmp_path / "ten").values(), parameters(tmp_path / "twelve").values()))
    rates = [rows(tmp_path / "stopped")[step, "train", "schedule/lr"] for step in (0, 4, 8, 12)]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.5e-30])
    groups = (checkpoint.load(RunDirectory(tmp_path / "stopped"), torch.device("cpu")) or {})["parts"]["optimizer"]
    assert [group["lr"] for group in groups["param_groups"]] == pytest.approx([0.5e-30, 0.25e-30])


def test_a_plateau_of_the_test_bound_reduces_the_rate(tmp_path):
    train(tmp_path, "eval_every=1", "optimizer.lr=0.1", "task.lr_patience=2", "steps=15")
    found = rows(tmp_path)
    bounds = [found[step, "test", "loss/L_k"] for step in range(16)]
    rates, best, waited, rate = [], -float("inf"), 0, 0.1
    for bound in bounds:
        rates.append(rate)  # that of the step's evaluation; what it decides shows at the next one
        best, waited = (bound, 0) if bound > best else (best, waited + 1)
        if waited == 2:
            rate, waited = rate / 2, 0
    assert rates[-1] < 0.1
    assert [found[step, "train", "schedule/lr"] for step in range(16)] == rates


def test_the_best_model_by_the_test_bound_is_kept_and_evaluated_in_the_end(tmp_path):
    # At this rate the bound falls again after its best, which is neither the first evaluation nor the last.
    options = [*TOY, "eval_every=1", "optimizer.lr=0.3", "steps=10"]
    train(tmp_path, *options)
    found = rows(tmp_path)
    bounds = [found[step, "test", "loss/L_k"] for step in range(11)]
    best = torch.load(RunDirectory(tmp_path).best)
    assert best["value"] == max(bounds)
    assert bounds.index(best["value"]) == best["step"]
    assert 0 < best["step"] < 10

    config = configured(*options)
    dataset = build_dataset(config)
    model = build_model(config, torch.device("cpu"), dataset)
    model.load_state_dict(best["model"])
    x = dataset.points("valid")[:20]
    values = evaluate_bound(model, x, 5, derive_seed(1, "valid", 10))
    values |= {name: value.item() for name, value in model.diagnostics(x, dataset).items()}
    valid = {name: value for (step, split, name), value in found.items() if split == "valid"}
    assert {step for step, split, _ in found if split == "valid"} == {10}
    assert valid == values
    last = parameters(tmp_path)
    assert not torch.equal(last["mu"], best["model"]["mu"])  # the checkpoint's is the last one
    model.load_state_dict(last)
    values = evaluate_bound(model, dataset.points("test")[:20], 5, derive_seed(1, "test", 10))
    assert values["loss/L_k"] == bounds[10]


def test_the_gap_is_that_of_a_finite_data_set(tmp_path):
    train(tmp_path / "finite", *TOY)
    found = rows(tmp_path / "finite")
    for step in (0, 4, 8, 12):
        gap = found[step, "train", "loss/L_k"] - found[step, "test", "loss/L_k"]
        assert found[step, "test", "loss/gap"] == gap
    train(tmp_path / "stream")
    assert not any(name == "loss/gap" for _, _, name in rows(tmp_path / "stream"))


def test_a_model_of_images_leaves_pictures_and_counts_its_active_units(tmp_path):
    train(tmp_path, *VAE, "eval_every=2", "steps=11")
    run_directory = RunDirectory(tmp_path)
    steps = [0, 2, 4, 8, 11]  # evaluations 0, 1, 2, 4 and the last
    names = {f"{name}-{step:010d}.png" for name, step in itertools.product(("prior", "reconstruction"), steps)}
    assert {file.name for file in run_directory.samples.iterdir()} == names
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(board.Tags()["images"]) == {"samples/prior", "samples/reconstruction"}
    images = board.Images("samples/prior")
    assert [image.step for image in images] == steps
    content = (run_directory.samples / "prior-0000000011.png").read_bytes()
    assert images[-1].encoded_image_string == content
    with Image.open(run_directory.samples / "prior-0000000011.png") as picture:
        assert picture.size == (images[-1].width, images[-1].height) == (8 * 28 + 9 * 2, 8 * 28 + 9 * 2)
        assert np.asarray(picture).max() <= 255

    found = rows(tmp_path)
    config = configured(*VAE)
    dataset = build_dataset(config)
    model = build_model(config, torch.device("cpu"), dataset)
    model.load_state_dict(parameters(tmp_path))
    units = ActiveUnits()
    evaluate_bound(model, dataset.points("test")[:20], 5, derive_seed(1, "test", 11), units)
    assert found[11, "test", "active_units/au"] == units.summary()["active_units/au"]
    assert {split for _, split, name in found if name == "active_units/au"} == {"train", "test", "valid"}


def test_a_toy_has_no_units_and_no_pictures(tmp_path):
    for name, options in (("toy", TOY), ("gmm", [])):
        train(tmp_path / name, *options)
        assert not any(metric.startswith("active_units/") for _, _, metric in rows(tmp_path / name))
        assert not RunDirectory(tmp_path / name).samples.exists()


def test_a_checkpoint_with_other_parts_starts_the_job_anew(tmp_path, capsys):
    train(tmp_path)
    whole, path = rows(tmp_path), RunDirectory(tmp_path).checkpoint
    state = torch.load(path, weights_only=False)
    del state["parts"]["best"]
    torch.save(state, path)
    train(tmp_path)
    assert (
        "has other parts: model, estimator, optimizer, plateau: starting from the first step" in capsys.readouterr().out
    )
    assert rows(tmp_path) == whole


@pytest.mark.parametrize("name", ["adam", "sgd", "adamax", "rmsprop"])
def test_every_optimizer_trains(tmp_path, name):
    train(tmp_path, *TOY, "steps=60", "eval_every=60", f"optimizer={name}", "optimizer.lr=0.01")
    found = rows(tmp_path)
    assert found[60, "test", "loss/L_k"] > found[0, "test", "loss/L_k"] + 0.5


WARMUP = ["task.warmup_alpha=0.99", "task.warmup_steps=5"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["estimator=tvo-part5", *WARMUP],
            r"task.warmup_alpha=0.99: tvo-part5: alpha = 0.99, expected 0: .* Rényi form",
        ),
        (["estimator=rloo", *WARMUP], r"task.warmup_alpha=0.99: rloo: alpha = 0.99, expected 0: .*"),
        (["task.warmup_alpha=0.9"], "task.warmup_steps=0: .*"),
        (["task.epochs=2"], "task.epochs=2: GaussianMixtureData is a stream without end: .* finite data set; .*"),
        ([*TOY, "task.epochs=2", "batch_size=46"], "task.epochs=2: batch_size 46 exceeds the 45 training points.*"),
        (["task.temperature_rate=1", "task.temperature_minimum=0.5"], ".*GaussianMixture has no temperature; give 0"),
        (["task.lr_steps=[5,5]"], r"task.lr_steps=\[5, 5\]: expected steps that increase"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=f"^{message}$") as caught:
        check(configured(*overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.epochs=0", "task.epochs=0: expected an integer of at least 1 or null"),
        ("task.lr_steps=[0]", r"task.lr_steps=\[0\]: expected a list, each an integer of at least 1"),
        ("task.lr_factor=1", "task.lr_factor=1: expected a number above 0 and below 1"),
        ("task.warmup_alpha=1", "task.warmup_alpha=1: expected a number of at least 0 and below 1 or null"),
        ("task.warmup_step=5", "task.warmup_step=5: no such key; did you mean 'task.warmup_steps'.*"),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.9: no such key.*"),
    ],
)
def test_values_out_of_range_are_refused_when_the_job_is_composed(override, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        compose([override])


def test_a_task_that_names_another_function_has_its_own_options():
    assert "epochs" not in compose(["task=gradient_study"]).config["task"]
    with pytest.raises(UserError, match=r"task.epochs=1: no such key"):
        compose(["task=gradient_study", "task.epochs=1"])


def test_options_at_their_defaults_rename_no_job():
    assert compose([]).id == compose(["task.epochs=null", "task.lr_steps=[]", "task.warmup_steps=0"]).id
    assert compose([]).id == "gmm-ovis-gamma1-iw10-seed1-" + compose([]).id.rpartition("-")[2]
    assert compose(["task.epochs=1"]).id != compose([]).id
