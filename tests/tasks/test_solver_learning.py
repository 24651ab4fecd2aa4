"""The tasks top_k and shortest_path: exact numbers, resuming, and options that cannot be."""

import pytest
import torch
from omegaconf import OmegaConf

from errors import UserError
from orchestration.configuration import compose
from orchestration.run_directory import RunDirectory
from tasks import shortest_path, top_k
from tasks.context import Context, Interrupted

SMALL_MAPS = ["dataset.side=5", "dataset.num_points=16", "batch_size=4", "steps=4", "eval_every=2"]


def config_of(*overrides):
    return OmegaConf.create(compose(list(overrides)).config)


def run(task, path, config, stop_at=None):
    steps = [0]

    def should_stop():
        return steps[0] == stop_at

    def progress(step, total):
        steps[0] = step

    run_directory = RunDirectory(path)
    run_directory.make()
    task.run(config, Context(run_directory, should_stop, progress))
    return run_directory


def rows(directory):
    return [line for line in directory.metrics.read_text().splitlines() if "time/" not in line]


@pytest.mark.parametrize("method", top_k.METHODS)
def test_a_top_k_job_that_is_interrupted_ends_with_the_same_numbers(tmp_path, method):
    config = config_of("task=top_k", f"task.method={method}", "task.replicates=50", "steps=6", "eval_every=3")
    whole = run(top_k, tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        run(top_k, tmp_path / "parts", config, stop_at=4)
    assert rows(run(top_k, tmp_path / "parts", config)) == rows(whole)
    assert any("top_k/gap" in row for row in rows(whole))


def study(tmp_path, method, **options):
    overrides = [f"task.{key}={value}" for key, value in options.items()]
    config = config_of("task=top_k", f"task.method={method}", "task.replicates=20000", *overrides)
    torch.manual_seed(0)
    found = top_k.TopK(config, Context(RunDirectory(tmp_path)))
    theta = found.network.theta.detach().double().requires_grad_()
    z, b = found.subsets.double(), found.network.b.double()
    losses = (z - b).square().sum(1)
    expectation = (theta @ z.t()).softmax(0) @ losses
    expectation.backward()
    return found, expectation.item() - losses.min().item(), theta.grad


def test_the_score_function_is_unbiased_and_the_exact_gradient_exact(tmp_path):
    for method in ("exact", "score-function"):
        found, gap, exact = study(tmp_path, method)
        values = found.evaluate()["train"]
        assert values["top_k/gap"] == pytest.approx(gap, rel=1e-4)
        if method == "exact":
            assert values["grads/magnitude"] == pytest.approx(exact.abs().mean().item(), rel=1e-4)
        else:
            assert values["grads/bias"] < 2 * (values["grads/variance"] / 20_000) ** 0.5
        assert values["grads/cosine"] > (0.98 if method == "score-function" else 0.9999)


def test_the_gap_of_the_published_problem(tmp_path):
    _, gap, _ = study(tmp_path, "exact")
    assert gap == pytest.approx(4.114, abs=1e-3)


@pytest.mark.parametrize("method", shortest_path.METHODS)
def test_a_shortest_path_job_that_is_interrupted_ends_with_the_same_numbers(tmp_path, method, monkeypatch):
    monkeypatch.setattr(shortest_path, "draw_map", lambda *_: PIXEL)
    monkeypatch.setattr(shortest_path, "draw_paths", lambda *_: [PIXEL])
    monkeypatch.setattr(shortest_path, "SAMPLES", 3)
    config = config_of("task=shortest_path", f"task.method={method}", "task.nb_samples=2", *SMALL_MAPS)
    whole = run(shortest_path, tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        run(shortest_path, tmp_path / "parts", config, stop_at=3)
    assert rows(run(shortest_path, tmp_path / "parts", config)) == rows(whole)
    names = {path.name for path in whole.samples.iterdir()}
    assert {"map-0000000000.png", "map-0000000004.png", "training.gif", "paths.gif"} <= names


def _pixel():
    from io import BytesIO

    from PIL import Image

    content = BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    return content.getvalue()


PIXEL = _pixel()


def test_pictures_of_a_map_are_images():
    from tasks.map_pictures import animation, draw_map, draw_paths

    values = torch.rand(3, 3)
    path = torch.eye(3)
    png = draw_map(values, path, values, path, values - 0.5, 7)
    assert png.startswith(b"\x89PNG")
    frames = draw_paths(values, torch.stack([path, path.flip(1)]))
    assert len(frames) == 2
    assert animation(frames, 100).startswith(b"GIF89a")


def test_learning_finds_cheaper_paths(tmp_path):
    config = config_of("task=shortest_path", "dataset.side=5", "dataset.num_points=40", "batch_size=8")
    torch.manual_seed(0)
    found = shortest_path.ShortestPath(config, Context(RunDirectory(tmp_path)))
    found._draw = lambda: None  # type: ignore[method-assign]
    before = found.evaluate()["test"]
    for group in found.optimizer.param_groups:
        group["lr"] = 0.02
    for found.step in range(60):
        found.optimizer.zero_grad()
        found.loss().backward()
        found.optimizer.step()
    after = found.evaluate()["test"]
    assert after["path/excess_cost"] < 0.5 * before["path/excess_cost"]
    assert after["path/cost_correlation"] > 0.6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=top_k", "task.method=imlee"], "task.method=imlee.*imle"),
        (["task=top_k", "task.noise=gamma"], "task.noise=gamma"),
        (["task=top_k", "task.k=11"], "task.k=11: expected 1 to task.n=10"),
        (["task=top_k", "task.n=60"], "task.n=60: .* subsets"),
        (["task=shortest_path", "task.method=exact"], "task.method=exact"),
        (["task=shortest_path", "dataset=shapes"], "needs maps; use dataset=grid_maps"),
        (["task=top_k", "task.lambda_=0"], r"task.lambda_=0.0: expected a number above 0 for task.method=imle"),
        (["task=shortest_path", "task.method=blackbox", "task.lambda_=0"], "above 0 for task.method=blackbox"),
        (["task=shortest_path", "task.method=perturbed", "task.temperature=0"], "task.temperature=0.0: expected a"),
        (["task=top_k", "task.nb_samples=0"], "task.nb_samples=0: expected an integer of at least 1"),
        (["task=top_k", "task.replicates=1"], "task.replicates=1: expected an integer of at least 2"),
        (["task=top_k", "task.lambda_=-1"], "task.lambda_=-1: expected a number of at least 0"),
        (["task=shortest_path", "task.temperature=-1"], "task.temperature=-1: expected a number of at least 0"),
        (["task=shortest_path", "task.hidden=0"], "task.hidden=0: expected an integer of at least 1"),
    ],
)
def test_options_that_cannot_be(overrides, message):
    task = top_k if overrides[0] == "task=top_k" else shortest_path
    with pytest.raises(UserError, match=message):
        task.check(config_of(*overrides))
