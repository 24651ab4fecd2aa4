"""The network and the running moments of reinforce-baseline and nvil: built in place, learnt apart, saved whole."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from analysis.gradients import gradient_statistics
from estimators import get_estimator
from estimators.bounds.baseline import Baseline
from estimators.bounds.nvil import DECAY, Nvil
from models import GaussianMixture
from tests.oracles import Hierarchy
from tests.simple_model import SimpleModel

IDS = ("reinforce-baseline", "nvil")


class Images(SimpleModel):
    """x [batch, 1, 28, 28], p(x|z) over the flattened."""

    def __init__(self) -> None:
        super().__init__(784, 3)

    def forward(self, x: Tensor, zgrads: bool = False, **kwargs):
        return super().forward(x.flatten(1), zgrads)


def images() -> Tensor:
    return torch.bernoulli(torch.full((4, 1, 28, 28), 0.2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("built_first", [False, True])
@pytest.mark.parametrize("id", IDS)
def test_an_optimizer_may_be_given_the_parameters_before_or_after_the_first_x(id: str, built_first: bool, fused: bool):
    model, estimator = Images(), get_estimator(id, iw=3)
    assert all(map(is_lazy, estimator.parameters()))
    if built_first:
        estimator(model, images())
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters())},
        {"params": list(estimator.parameters()), "lr": 0.1},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=fused)
    estimator(model, images())[0].backward()
    before = [parameter.detach().clone() for parameter in estimator.parameters()]
    optimizer.step()
    changes = [(new - old).abs().max() for new, old in zip(estimator.parameters(), before, strict=True)]
    assert all(0.09 < change < 0.11 for change in changes)


@pytest.mark.parametrize("id", IDS)
def test_the_state_of_one_makes_another_the_same(id: str):
    model, estimator = Images(), get_estimator(id, iw=3)
    for _ in range(3):
        estimator(model, images())
    copies = [copy.deepcopy(estimator), get_estimator(id, iw=3), copy.deepcopy(get_estimator(id, iw=3))]
    for each in copies:
        each.load_state_dict(estimator.state_dict())
    for each in (estimator, *copies):
        torch.manual_seed(0)
        each.zero_grad()
        each(model, 1 - images())[0].backward()
    for each in copies:
        assert all(map(torch.equal, each.state_dict().values(), estimator.state_dict().values()))
        for actual, expected in zip(each.parameters(), estimator.parameters(), strict=True):
            assert actual.grad is not None
            assert expected.grad is not None
            assert torch.equal(actual.grad, expected.grad)


@pytest.mark.parametrize("id", IDS)
def test_a_float64_estimator_has_a_float64_network(id: str):
    estimator = get_estimator(id, iw=2).double()
    loss, _, _ = estimator(SimpleModel(4, 2).double(), torch.ones(3, 4, dtype=torch.float64))
    loss.backward()
    assert {tensor.dtype for tensor in estimator.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("freebits", [None, 0.2])
@pytest.mark.parametrize("id", IDS)
def test_the_network_learns_the_squared_error_and_nothing_else_does(id: str, freebits: float | None):
    """Its gradient is that of mean_{k,l} (d_{k,l} - mean - c)^2; the model's is what it is with c held fixed."""
    assignments, x = torch.tensor([[0, 3], [1, 2], [3, 3]]).unsqueeze(0), torch.tensor([[0.2], [0.9]]).double()
    torch.manual_seed(0)
    estimator = get_estimator(id, iw=3, alpha=0.3, beta=0.7, freebits=freebits).double().eval()
    model = Hierarchy(2).assign(assignments)
    if id == "nvil":
        for name, value in (("mean_sum", 0.3), ("variance_sum", 1.125), ("weight_sum", 0.5)):
            estimator.get_buffer(name).fill_(value)
    mean = 0.6 if id == "nvil" else 0.0
    loss, _, _ = estimator(model, x)
    loss.backward()

    log_px, log_pz, log_qz = model.tables()
    log_ratio = torch.stack(log_qz) - torch.stack(log_pz)
    slope = torch.ones_like(log_ratio) if freebits is None else (log_ratio >= freebits).double()
    log_w = log_px - 0.7 * (log_ratio if freebits is None else log_ratio.clamp(min=freebits)).sum(0)
    log_w, slope = (
        table.detach().gather(-1, assignments[0].T.expand(*table.shape[:-2], -1, -1)) for table in (log_w, slope)
    )
    bound = (torch.logsumexp(0.7 * log_w, -1, keepdim=True) - math.log(3)) / 0.7
    signal = bound - 0.7 * slope * (0.7 * log_w).softmax(-1)  # [layers, batch, iw]
    baseline = estimator.get_submodule("baseline")
    c = baseline(x, torch.float64).unsqueeze(-1)
    error = (signal - mean - c).square().mean((0, 2)).mean()
    expected = torch.autograd.grad(error, list(baseline.parameters()))
    for parameter, gradient in zip(baseline.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)

    fixed = Hierarchy(2).assign(assignments)
    for parameter in estimator.parameters():
        parameter.requires_grad_(False)
    estimator(fixed, x)[0].backward()
    for actual, of_fixed in zip(model.parameters(), fixed.parameters(), strict=True):
        assert actual.grad is not None
        assert of_fixed.grad is not None
        assert torch.equal(actual.grad, of_fixed.grad)


def test_nvil_reads_its_moments_before_it_updates_them():
    """Bias-corrected averages of the batches before; the published code's decay."""
    estimator, model, x = Nvil(iw=4).double(), SimpleModel(6, 3).double(), torch.ones(5, 6, dtype=torch.float64)
    means: list[float] = []
    variances: list[float] = []
    torch.manual_seed(0)
    for step in range(6):
        weights = [DECAY ** (step - 1 - i) for i in range(step)]
        mean = sum(w * m for w, m in zip(weights, means, strict=True)) / max(sum(weights), 1e-9)
        variance = sum(w * v for w, v in zip(weights, variances, strict=True)) / max(sum(weights), 1e-9)
        assert estimator.running_mean.item() == pytest.approx(mean)
        assert estimator.scale.item() == pytest.approx(max(1.0, math.sqrt(variance)))
        state = [estimator.mean_sum.item(), estimator.variance_sum.item()]
        estimator(model, x)
        means.append((estimator.mean_sum.item() - DECAY * state[0]) / (1 - DECAY))
        variances.append((estimator.variance_sum.item() - DECAY * state[1]) / (1 - DECAY))
    assert len(set(means)) == 6


def test_nvils_moments_are_those_of_the_signal_less_the_baseline():
    assignments, x = torch.tensor([[0, 3], [1, 2], [3, 3]]).unsqueeze(0), torch.zeros(2, 1, dtype=torch.float64)
    estimator, model = Nvil(iw=3).double(), Hierarchy().assign(assignments)
    estimator(model, x)
    log_px, log_pz, log_qz = model.tables()
    log_w = (log_px + sum(log_pz) - sum(log_qz))[0].detach()[assignments[0]]
    signal = torch.logsumexp(log_w, 0) - math.log(3) - log_w.softmax(0) - estimator.baseline(x, torch.float64).detach()
    assert estimator.running_mean.item() == pytest.approx(signal.mean().item())
    assert (estimator.variance_sum / estimator.weight_sum).item() == pytest.approx(signal.var(correction=0).item())
    estimator.mean_sum.fill_(5.0)  # what is subtracted is no part of what is averaged
    again = 0.8 * 5.0 + 0.2 * signal.mean().item()
    estimator(model, x)
    assert estimator.mean_sum.item() == pytest.approx(again)


def test_nvil_stands_still_in_evaluation_mode():
    estimator, model, x = Nvil(iw=2), GaussianMixture(), 100 * torch.rand(4, 1)
    estimator(model, x)
    before = copy.deepcopy(estimator.state_dict())
    estimator.eval()(model, x)
    gradient_statistics(estimator.train(), model, x, num_replicates=20)
    assert all(map(torch.equal, estimator.state_dict().values(), before.values()))


@pytest.mark.parametrize("id", IDS)
def test_gradients_are_measured_before_anything_is_built(id: str):
    estimator = get_estimator(id, iw=3)
    statistics = [
        gradient_statistics(estimator, GaussianMixture(), torch.tensor([[3.0], [70.0]]), num_replicates=20, seed=seed)
        for seed in (1, 1)
    ]
    assert all(map(is_lazy, estimator.parameters()))
    assert statistics[0].variance.isfinite().all()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 200.0), (-3000.0, 3000.0)])
def test_x_arrives_at_the_scale_of_the_units(low: float, high: float):
    torch.manual_seed(0)
    x = low + (high - low) * torch.rand(500, 7)
    baseline = Baseline()
    baseline(x, x.dtype)
    standardised = (x - baseline.location) / baseline.scale
    assert abs(standardised.mean().item()) < 1e-3
    assert standardised.std().item() == pytest.approx(1.0, abs=1e-3)
    before = baseline.location.clone(), baseline.scale.clone()
    baseline(2 * x, x.dtype)
    assert (baseline.location, baseline.scale) == before


@pytest.mark.parametrize("x", [torch.full((1, 1), 150.0), torch.zeros(3, 4), torch.tensor([3, 1, 2])])
def test_an_x_that_does_not_vary_is_no_trouble(x: Tensor):
    assert Baseline()(x, torch.float32).isfinite().all()


def test_an_x_of_another_size_is_refused():
    baseline = Baseline()
    baseline(torch.ones(2, 3), torch.float32)
    with pytest.raises(ValueError, match="built for x of 3 numbers a row, and was given 4"):
        baseline(torch.ones(2, 4), torch.float32)


def test_making_one_draws_nothing():
    before = torch.get_rng_state()
    estimator = get_estimator("nvil")
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(estimator, nn.Module)
