import math

import pytest
import torch

from estimators import get_estimator
from estimators.bounds.diagnostics import NAMES, Diagnostics
from models import Template
from models.particles import Particles
from tests import oracles
from tests.oracles import Hierarchy

X = torch.zeros(2, 1, dtype=torch.float64)
ASSIGNMENTS = torch.tensor([[[0, 3], [1, 1], [2, 2]], [[3, 2], [0, 1], [2, 0]]])  # [mc, iw, batch]


def expected() -> dict[str, float]:
    """Each particle in turn, at alpha = 0 and beta = 1."""
    tables = Hierarchy().tables()
    log_px = tables.log_px[0].tolist()
    kl = (torch.stack(tables.log_qz).sum(0) - torch.stack(tables.log_pz).sum(0))[0].tolist()
    sums = dict.fromkeys(NAMES, 0.0)
    for m in range(2):
        for b in range(2):
            z = ASSIGNMENTS[m, :, b].tolist()
            log_w = [log_px[i] - kl[i] for i in z]
            bound, elbo = oracles.renyi(log_w, 0.0), sum(log_w) / 3
            sums["loss/L_k"] += bound / 4
            sums["loss/elbo"] += elbo / 4
            sums["loss/kl"] += sum(kl[i] for i in z) / 3 / 4
            sums["loss/nll"] -= sum(log_px[i] for i in z) / 3 / 4
            sums["loss/kl_q_p"] += (bound - elbo) / 4
            sums["loss/ess"] += 1 / sum(v**2 for v in oracles.softmax(log_w, 0.0)) / 4
    return sums


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("id", ["reinforce", "ovis-gamma1", "ovis-S1", "wake-wake"])
def test_they_are_of_the_plain_weights_whatever_the_bound(id: str, alpha: float):
    estimator = get_estimator(id, mc=2, iw=3, alpha=alpha, beta=0.3, freebits=0.2)
    _, diagnostics, _ = estimator(Hierarchy().assign(ASSIGNMENTS), X)
    assert {name: value.item() for name, value in diagnostics.items()} == pytest.approx(expected(), abs=1e-12)


def test_particles_beside_those_of_the_bound_do_not_count():
    extra = torch.full((2, 2, 2), 3)
    model = Hierarchy().assign(torch.cat([ASSIGNMENTS, extra], 1))
    _, diagnostics, _ = get_estimator("ovis-S2-exclusive", mc=2, iw=3)(model, X)
    assert {name: value.item() for name, value in diagnostics.items()} == pytest.approx(expected(), abs=1e-12)


def test_pathwise_ones_are_of_all_particles():
    log_px = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 2, 1)
    zero = torch.zeros_like(log_px)
    diagnostics = Diagnostics(Particles(log_px, (zero,), (zero,), {}, Template(), torch.zeros(1)), 2)
    assert diagnostics["loss/L_k"].item() == pytest.approx(math.log(2))
    assert diagnostics["loss/ess"].item() == pytest.approx(1 / (0.25**2 + 0.75**2))


def test_they_are_scalars_without_gradient_and_computed_when_read():
    _, diagnostics, _ = get_estimator("ovis-gamma1", mc=2, iw=3)(Hierarchy().assign(ASSIGNMENTS), X)
    assert tuple(diagnostics) == NAMES
    assert len(diagnostics) == len(NAMES)
    assert "_values" not in vars(diagnostics)
    for value in diagnostics.values():
        assert value.shape == ()
        assert not value.requires_grad
    assert diagnostics["loss/ess"] is diagnostics["loss/ess"]


@pytest.mark.parametrize("spread", [0.0, 1e3])
def test_the_effective_sample_size_lies_between_one_and_k(spread: float):
    log_px = spread * torch.arange(4.0).view(1, 4, 1)
    zero = torch.zeros_like(log_px)
    ess = Diagnostics(Particles(log_px, (zero,), (zero,), {}, Template(), torch.zeros(1)), 4)["loss/ess"].item()
    assert ess == pytest.approx(4.0 if spread == 0 else 1.0)
