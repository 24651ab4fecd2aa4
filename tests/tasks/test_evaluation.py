import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from analysis.active_units import ActiveUnits
from estimators.bounds.diagnostics import NAMES
from models import GaussianMixture, GaussianToy, Template
from tasks import evaluation
from tasks.evaluation import evaluate_bound


class Exact(Template):
    """q is the posterior of z ~ N(0, I), x|z ~ N(z, I): every weight is p(x) = N(x; 0, 2I), whatever is drawn."""

    def __init__(self):
        super().__init__()
        self.drawn: list[tuple[int, int]] = []

    def forward(self, x: Tensor, sample_shape=(1, 1)):
        self.drawn.append((sample_shape[1], len(x)))
        qz = Normal(x / 2, math.sqrt(0.5))
        z = qz.sample(sample_shape)
        return {"px": Normal(z, 1.0), "z": [z], "qz": [qz], "pz": [Normal(torch.zeros_like(x), 1.0)]}


@pytest.fixture
def limits(monkeypatch):
    def set_limits(particles, values):
        monkeypatch.setattr(evaluation, "MAX_PARTICLES", particles)
        monkeypatch.setattr(evaluation, "MAX_VALUES", values)

    return set_limits


@pytest.mark.parametrize(
    ("particles", "values", "iw", "drawn"),
    [
        (1000, 1000, 7, [(7, 5)]),
        (14, 1000, 7, [(7, 2), (7, 2), (7, 1)]),  # two points of 7 particles at once
        (1000, 42, 7, [(7, 2), (7, 2), (7, 1)]),  # the same by the 3 values that each particle's x has
        (1000, 9, 7, [(3, 1), (3, 1), (1, 1)] * 5),  # 7 particles of one point are too many
        (1000, 1, 2, [(1, 1), (1, 1)] * 5),  # even one is
    ],
)
def test_chunks_are_bounded_and_change_nothing_that_is_not_drawn(limits, particles, values, iw, drawn):
    limits(particles, values)
    x = torch.arange(15.0).view(5, 3) / 10
    log_px = Normal(0.0, math.sqrt(2)).log_prob(x).sum(-1)
    model = Exact()
    found = evaluate_bound(model, x, iw, seed=0)
    assert model.drawn == drawn
    assert set(found) == set(NAMES)
    assert found["loss/L_k"] == pytest.approx(log_px.mean().item(), rel=1e-6)
    assert found["loss/ess"] == pytest.approx(iw, rel=1e-5)
    assert found["loss/kl_q_p"] == pytest.approx(0, abs=1e-5)


def test_particles_of_one_point_in_parts_are_as_in_one(limits):
    torch.manual_seed(0)
    model, x = GaussianToy(dim=3), torch.randn(200, 3)
    whole = evaluate_bound(model, x, iw=40, seed=1)
    limits(12, 10**9)
    parts = evaluate_bound(model, x, iw=40, seed=2)
    # same bound, other noise: the difference of two means over 200 points, 4 standard errors
    assert parts != whole
    for name in NAMES:
        assert parts[name] == pytest.approx(whole[name], abs=0.35), name
    assert parts["loss/L_k"] > parts["loss/elbo"] + 0.5


def test_an_image_has_thousands_of_particles_in_one_pass():
    particles = evaluation.MAX_VALUES // 784
    assert particles >= 5000
    assert particles * 784 * 4 <= 16 * 2**20


def test_the_same_seed_gives_the_same_numbers_and_nothing_is_changed():
    model, x = GaussianMixture().train(), 50 * torch.rand(30, 1)
    before = torch.get_rng_state()
    first, again, other = (evaluate_bound(model, x, 5, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_units_are_counted_on_the_particles_of_the_evaluation(limits):
    x = torch.stack([torch.linspace(-1, 1, 50), torch.zeros(50), torch.linspace(-0.1, 0.1, 50)], 1)
    for particles in (10**6, 20, 3):  # all points, some, a part of one's particles
        limits(particles, 10**6)
        units = ActiveUnits()
        evaluate_bound(Exact(), x, 4, seed=0, units=units)
        assert units.counts() == [1]
