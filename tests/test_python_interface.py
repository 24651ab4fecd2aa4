"""What a notebook may rely on, line by line."""

import pytest
import torch
from torch import zeros
from torch.distributions import Bernoulli

from analysis.gradients import gradient_statistics
from estimators import get_config, get_estimator
from models import GaussianMixture, GaussianToy
from tests.simple_model import SimpleModel


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_an_estimator_by_its_id_and_by_its_class():
    by_id = get_estimator("ovis-gamma1", mc=1, iw=16, alpha=0.0, beta=1.0, freebits=None)
    Estimator, config = get_config("ovis-gamma1")
    by_class = Estimator(mc=1, iw=16, **config)
    assert repr(by_id) == repr(by_class)


def test_the_loss_leaves_the_estimate_in_grad_and_its_value_is_minus_the_bound():
    model, x = GaussianMixture(), torch.rand(8, 1)
    loss, diagnostics, output = get_estimator("vimco-arithmetic", mc=2, iw=5)(model, x, alpha=None, beta=None)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-diagnostics["loss/L_k"].item(), rel=1e-5)
    assert output["z"][0].shape == (2, 5, 8)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_schedule_passes_its_own_alpha_and_beta():
    torch.manual_seed(1)
    model, x = GaussianMixture(), torch.rand(8, 1)
    heated = get_estimator("ovis-gamma0", iw=5, alpha=0.5, beta=0.7)
    plain = get_estimator("ovis-gamma0", iw=5)
    torch.manual_seed(2)
    expected = heated(model, x)[0]
    torch.manual_seed(2)
    assert torch.equal(plain(model, x, alpha=0.5, beta=0.7)[0], expected)


def test_gradient_statistics_of_named_parameters():
    estimator, model, x = get_estimator("ovis-gamma0", iw=4), GaussianMixture(), torch.rand(8, 1)
    arguments = {"num_replicates": 50, "parameters": "inference_network", "seed": 0}
    stats = gradient_statistics(estimator, model, x, **arguments)  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in model.inference_network.parameters())
    assert stats.mean.shape == stats.variance.shape == stats.snr.shape == (count,)
    assert {"grads/snr", "grads/dsnr", "grads/variance", "grads/magnitude", "snr/p50"} <= set(stats.summary())


def test_models_at_their_published_sizes():
    assert {name: tuple(p.shape) for name, p in GaussianToy().named_parameters()} == {
        "A": (20, 20),
        "b": (20,),
        "mu": (20,),
    }
    shapes = {name: tuple(p.shape) for name, p in GaussianMixture().named_parameters()}
    assert shapes["prior.logits"] == (20,)
    assert sorted(shapes[f"inference_network.{name}"] for name in ("0.weight", "2.weight")) == [(16, 1), (20, 16)]


def test_a_model_of_a_users_own_trains_in_a_loop_of_their_own():
    x = Bernoulli(logits=zeros((1, 10))).sample().expand(16, 10)
    model = SimpleModel(10, 10)
    assert set(model(x)) == {"px", "z", "qz", "pz"}
    assert model.sample_from_prior(1)["z"][0].shape == (1, 10)
    estimator = get_estimator("ovis-gamma1", mc=1, iw=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-1)
    bounds = []
    for _ in range(60):
        loss, diagnostics, _ = estimator(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bounds.append({name: value.item() for name, value in diagnostics.items()})
    assert bounds[-1]["loss/L_k"] > bounds[0]["loss/L_k"] + 2
    stats = gradient_statistics(estimator, model, x, num_replicates=10, parameters="inference_network")
    assert stats.summary()["grads/variance"] > 0
