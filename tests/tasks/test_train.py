import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from datasets.gaussian_mixture import GaussianMixtureData
from errors import CorruptFileError, UserError
from estimators import registry
from orchestration.configuration import compose
from orchestration.run_directory import RunDirectory
from tasks import checkpoint
from tasks.build import build_dataset, build_estimator, build_model, build_networks, build_optimizer
from tasks.context import Context, Interrupted
from tasks.train import check, run
from tests.tasks.stepwise import interruptible

SMALL = ["steps=30", "eval_every=10", "checkpoint_every=7", "evaluation.iw=5", "evaluation.points=20"]
SMALL += ["analysis.num_replicates=20", "estimator.iw=3"]


def configured(*overrides):
    return OmegaConf.create(compose([*SMALL, *overrides]).config)


def rows(path, timed=False):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if timed or not row["name"].startswith("time/")]


def saved(path):
    return checkpoint.load(RunDirectory(path), torch.device("cpu")) or {}


def train(path, *overrides, stop_at=math.inf):
    """Run the job in `path`, asking it to stop once it has done `stop_at` steps."""
    context, _ = interruptible(path, stop_at)
    run(configured(*overrides), context)


def test_every_evaluation_is_recorded(tmp_path):
    train(tmp_path)
    found = rows(tmp_path, timed=True)
    assert all(set(row) == {"step", "split", "name", "value"} for row in found)
    assert {row["step"] for row in found} == {0, 10, 20, 30}
    names = {split: {row["name"] for row in found if row["split"] == split} for split in ("train", "test")}
    shared = {"loss/L_k", "loss/elbo", "loss/kl", "loss/nll", "loss/kl_q_p", "loss/ess"}
    shared |= {"gmm/posterior_mse", "gmm/prior_mse"}
    gradients = {f"grads/{name}{end}" for name in ("snr", "dsnr", "variance", "magnitude") for end in ("", "_se")}
    assert names["test"] == shared
    percentiles = {f"snr/p{percent}" for percent in (5, 25, 50, 75, 95)}
    assert names["train"] == shared | gradients | percentiles | {"grads/num_constant", "time/step_ms"}
    assert len({(row["step"], row["split"], row["name"]) for row in found}) == len(found)
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("overrides", [(), ("model=gaussian_toy", "estimator=pathwise-iwae", "optimizer=sgd")])
def test_training_raises_the_bound(tmp_path, overrides):
    options = ["steps=300", "eval_every=300", "evaluation.points=500", "evaluation.iw=3", "analysis.num_replicates=2"]
    train(tmp_path, *overrides, *options, "optimizer.lr=0.01")
    values = [row["value"] for row in rows(tmp_path) if (row["split"], row["name"]) == ("test", "loss/L_k")]
    assert values[-1] > values[0] + 0.05


@pytest.mark.parametrize("stops", [[0], [1], [7, 8], [10], [13, 20, 29]])
def test_a_resumed_job_ends_with_the_same_numbers(tmp_path, stops):
    train(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", stop_at=stop)
    train(tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.parametrize("id", ["reinforce-baseline", "nvil"])
def test_what_an_estimator_learns_goes_on_with_the_same_numbers(tmp_path, id):
    options = (f"estimator={id}", "optimizer.estimator_lr=0.01")
    train(tmp_path / "whole", *options)
    for stop in (1, 13):
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", *options, stop_at=stop)
    train(tmp_path / "parts", *options)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    whole, parts = (saved(tmp_path / name)["parts"]["estimator"] for name in ("whole", "parts"))
    assert {"baseline.hidden.weight", "baseline.location"} <= whole.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


NODES = [family for family in registry.families() if "layer_posterior" in family.needs]
TINY = {
    "belief network": ("model=sbn", "model.latents=[3,2]"),
    "categories": ("model=vae", "model.hidden=[3]", "model.latent=categorical", "model.latents=2"),
    "normals": ("model=vae", "model.hidden=[3]", "model.latents=2"),
}


def model_for(family):
    if "can be reparameterised" in family.needs:
        return "normals"
    return "belief network" if "Bernoulli" in family.needs else "categories"


LEARNING = ("relax", "lax", "rodeo")


@pytest.mark.filterwarnings("ignore:the gradient of .* is drawn one replicate at a time")
@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if each.name in LEARNING else pytest.mark.slow, id=each.name) for each in NODES],
)
def test_every_method_for_single_nodes_trains_and_goes_on_with_the_same_numbers(tmp_path, family):
    """With the statistics of its gradients, and networks in every layer where it has some."""
    options = (*TINY[model_for(family)], f"estimator={family.examples[0]}", "estimator.iw=2", "dataset=shapes")
    options += ("steps=4", "eval_every=2", "batch_size=3", "analysis.num_replicates=3")
    train(tmp_path / "whole", *options)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", *options, stop_at=3)
    train(tmp_path / "parts", *options)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    has_variance = any(row["name"] == "grads/variance" for row in rows(tmp_path / "whole"))
    assert has_variance == (family.name != "expect")
    networks = [name for name in saved(tmp_path / "whole")["parts"]["estimator"] if name.endswith("network.0.weight")]
    assert len(networks) == {"relax": 2, "lax": 1, "rodeo": 2}.get(family.name, 0)


def test_a_network_is_drawn_from_the_seed_alone_and_learns_at_its_own_rate():
    def built(*overrides):
        config = configured("estimator=reinforce-baseline", *overrides)
        cpu = torch.device("cpu")
        model, estimator = build_model(config, cpu, build_dataset(config)), build_estimator(config, cpu)
        torch.rand(len(overrides))
        before = torch.get_rng_state()
        build_networks(config, estimator, model, 100 * torch.rand(3, 1, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), before)
        assert estimator.training
        return estimator.state_dict(), build_optimizer(config, model, estimator)

    (one, optimizer), (again, faster), (other, _) = (
        built(),
        built("optimizer.estimator_lr=0.1"),
        built("seed=2"),
    )
    assert all(torch.equal(one[name], value) for name, value in again.items())
    assert not torch.equal(one["baseline.output.weight"], other["baseline.output.weight"])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert [group["lr"] for group in faster.param_groups] == [1e-3, 0.1]


def test_a_baseline_learns_the_learning_signal(tmp_path):
    options = ("estimator=reinforce-baseline", "estimator.iw=1", "steps=300", "eval_every=300")
    fitted = {}
    for rate in (1e-2, 1e-9):
        train(tmp_path / str(rate), *options, f"optimizer.estimator_lr={rate}", "optimizer.lr=1e-9")
        variances = [row["value"] for row in rows(tmp_path / str(rate)) if row["name"] == "grads/variance"]
        fitted[rate] = variances[-1] / variances[0]
    assert fitted[1e-2] < 0.8 * fitted[1e-9]


def test_a_job_killed_between_checkpoints_ends_with_the_same_numbers(tmp_path):
    train(tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step, steps):
        if step == 25:
            raise Killed

    (tmp_path / "parts").mkdir()
    with pytest.raises(Killed):
        run(configured(), Context(RunDirectory(tmp_path / "parts"), progress=kill))
    assert rows(tmp_path / "parts")[-1]["step"] == 20
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 22, "spl')  # the line that a crash tore
    train(tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def cut(content, share):
    return content[: int(share * len(content))]


def flipped(content, share):
    place = int(share * len(content))
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "share"),
    [
        ("metrics.jsonl", cut, 0),
        *(("checkpoint.pt", cut, share) for share in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)),
        ("checkpoint.pt", lambda content, share: b"garbage", 0),
    ],
)
def test_a_damaged_file_starts_the_job_anew(tmp_path, capsys, name, damage, share):
    train(tmp_path)
    whole = rows(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes(), share))
    train(tmp_path)
    assert "starting from the first step" in capsys.readouterr().out
    assert rows(tmp_path) == whole


def test_no_flipped_bit_of_a_checkpoint_changes_what_is_loaded(tmp_path):
    train(tmp_path)
    whole, content = saved(tmp_path), (tmp_path / "checkpoint.pt").read_bytes()
    noticed = 0
    for place in range(0, len(content), 97):
        (tmp_path / "checkpoint.pt").write_bytes(flipped(content, place / len(content)))
        try:
            found = saved(tmp_path)
        except CorruptFileError:
            noticed += 1
            continue
        assert found["step"] == whole["step"]
        for name, tensor in whole["parts"]["model"].items():
            assert torch.equal(found["parts"]["model"][name], tensor)
    assert noticed > 50


def test_evaluating_does_not_change_the_training(tmp_path):
    train(tmp_path / "often", "eval_every=3")
    train(tmp_path / "once", "eval_every=30", "analysis.num_replicates=7", "evaluation.points=3")
    often, once = (saved(tmp_path / name)["parts"]["model"] for name in ("often", "once"))
    for a, b in zip(often.values(), once.values(), strict=True):
        assert torch.equal(a, b)


def test_seeds_give_different_runs(tmp_path):
    train(tmp_path / "one", "seed=1")
    train(tmp_path / "two", "seed=2")
    one, two = ({(r["step"], r["split"], r["name"]): r["value"] for r in rows(tmp_path / n)} for n in ("one", "two"))
    assert one[0, "test", "loss/L_k"] != two[0, "test", "loss/L_k"]


def test_a_nan_fails_with_the_step_and_the_quantity_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    batch = GaussianMixtureData.batch
    monkeypatch.setattr(GaussianMixtureData, "batch", lambda self, step, *rest: batch(self, step, *rest) / (step != 12))
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|-?inf) at step 13"):
        train(tmp_path)
    assert saved(tmp_path)["step"] == 7


def test_training_that_overflows_fails_with_the_step_and_the_quantity(tmp_path):
    with pytest.raises(FloatingPointError, match=r"(is|is not) (nan|-?inf|finite) (at|after) step \d+"):
        train(tmp_path, "optimizer=sgd", "optimizer.lr=1e38")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["estimator=vimco-arithmetic", "estimator.iw=1"], "vimco-arithmetic"),
        (["estimator=pathwise-iwae"], "pathwise-iwae"),
        (["analysis.parameters=[decoder]"], "decoder"),
        (["model=gaussian_toy", "batch_size=5000"], "5000"),
        (["device=gpu"], "device=gpu"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(overrides, words):
    with pytest.raises((UserError, ValueError), match=words):
        check(configured(*overrides))
