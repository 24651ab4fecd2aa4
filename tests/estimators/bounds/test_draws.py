"""Each draw of the score function estimators is that of their formulas, written out particle by particle.

With every outcome the same, so is every moment: the variance as well as the mean.
"""

import pytest
import torch

from estimators import get_estimator
from tests import oracles
from tests.oracles import MODELS, EnumerableModel, Settings

ALL_SETTINGS = [Settings(), Settings(alpha=0.5, beta=0.7, freebits=0.2), Settings(alpha=0.3), Settings(freebits=0.2)]

CONTROL_VARIATES = {
    "reinforce": oracles.NoControlVariate,
    "vimco-arithmetic": oracles.VimcoArithmetic,
    "vimco-geometric": oracles.VimcoGeometric,
    "ovis-gamma0": lambda settings: oracles.OvisGamma(settings, 0.0),
    "ovis-gamma0.4": lambda settings: oracles.OvisGamma(settings, 0.4),
    "ovis-gamma1": lambda settings: oracles.OvisGamma(settings, 1.0),
    # The arithmetic form is ovis-gamma, draw by draw.
    "ovis-arithmetic-gamma0": lambda settings: oracles.OvisGamma(settings, 0.0),
    "ovis-arithmetic-gamma0.4": lambda settings: oracles.OvisGamma(settings, 0.4),
    "ovis-arithmetic-gamma1": lambda settings: oracles.OvisGamma(settings, 1.0),
    "ovis-geometric-gamma0": lambda settings: oracles.OvisVimco(oracles.VimcoGeometric(settings), 0.0),
    "ovis-geometric-gamma0.4": lambda settings: oracles.OvisVimco(oracles.VimcoGeometric(settings), 0.4),
    "ovis-geometric-gamma1": lambda settings: oracles.OvisVimco(oracles.VimcoGeometric(settings), 1.0),
}


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("id", CONTROL_VARIATES)
def test_with_the_other_particles(id: str, kind: type[EnumerableModel], settings: Settings):
    enumerated = oracles.enumerate_estimates(get_estimator(id, 1, 3, *settings), kind)
    control_variate, of = CONTROL_VARIATES[id](settings), oracles.configurations(kind(), settings)
    expected = [
        oracles.score_function_estimate(of, z, settings, control_variate)
        for z in enumerated.assignments.squeeze(0).T.tolist()
    ]
    torch.testing.assert_close(enumerated.estimates, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("id", ["reinforce-baseline", "nvil"])
def test_with_a_learnt_baseline(id: str, kind: type[EnumerableModel], settings: Settings):
    """c(x) and, of nvil, a running mean of 0.6 and a running scale of 1.5."""
    torch.manual_seed(0)
    estimator = get_estimator(id, 1, 2, *settings).double()
    mean, scale = (0.6, 1.5) if id == "nvil" else (0.0, 1.0)
    if id == "nvil":
        for name, value in (("mean_sum", 0.3), ("variance_sum", 1.125), ("weight_sum", 0.5)):
            estimator.get_buffer(name).fill_(value)
    enumerated = oracles.enumerate_estimates(estimator, kind)
    baseline = estimator.get_submodule("baseline")
    c = baseline(torch.zeros(1, 1, dtype=torch.float64), torch.float64).item()
    assert c != 0
    control_variate, of = oracles.Constant(settings, c + mean), oracles.configurations(kind(), settings)
    num_phi = len(kind.start_phi)
    for z, actual in zip(enumerated.assignments.squeeze(0).T.tolist(), enumerated.estimates, strict=True):
        expected = oracles.score_function_estimate(of, z, settings, control_variate)
        expected[:num_phi] /= scale
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("id", "beta"), [("rloo", 1.0), ("rloo", 0.7), ("vargrad", 1.0)])
def test_with_the_mean_of_the_others(id: str, kind: type[EnumerableModel], beta: float):
    settings = Settings(beta=beta)
    enumerated = oracles.enumerate_estimates(get_estimator(id, 1, 3, *settings), kind)
    of = oracles.configurations(kind(), settings)
    expected = [oracles.leave_one_out_elbo_estimate(of, z) for z in enumerated.assignments.squeeze(0).T.tolist()]
    torch.testing.assert_close(enumerated.estimates, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("iw", [1, 2])
def test_with_auxiliary_particles(kind: type[EnumerableModel], iw: int, settings: Settings):
    enumerated = oracles.enumerate_estimates(get_estimator("ovis-S2-exclusive", 1, iw, *settings), kind)
    of = oracles.configurations(kind(), settings)
    expected = [
        oracles.score_function_estimate(
            of, z[:iw], settings, oracles.OvisMonteCarlo(settings, auxiliary=z[iw:], log_w_of=of.log_w)
        )
        for z in enumerated.assignments.squeeze(0).T.tolist()
    ]
    torch.testing.assert_close(enumerated.estimates, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_with_auxiliary_particles_held_out_of_k(kind: type[EnumerableModel], settings: Settings):
    enumerated = oracles.enumerate_estimates(get_estimator("ovis-S1", 1, 3, *settings), kind)
    of, num_phi = oracles.configurations(kind(), settings), len(kind.start_phi)
    for z, actual in zip(enumerated.assignments.squeeze(0).T.tolist(), enumerated.estimates, strict=True):
        held_out = oracles.OvisMonteCarlo(settings, auxiliary=z[2:], log_w_of=of.log_w)
        for_phi = oracles.score_function_estimate(of, z[:2], settings, held_out)
        for_theta = oracles.score_function_estimate(of, z, settings, oracles.NoControlVariate(settings))
        expected = torch.cat([for_phi[:num_phi], for_theta[num_phi:]])
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
@pytest.mark.parametrize(
    "id", [*CONTROL_VARIATES, "reinforce-baseline", "nvil", "wake-wake", "ovis-S1", "ovis-S1-exclusive"]
)
def test_the_loss_is_minus_the_bound(id: str, settings: Settings):
    enumerated = oracles.enumerate_estimates(get_estimator(id, 1, 2, *settings), oracles.Hierarchy)
    log_w = oracles.values(oracles.Hierarchy(), settings).log_w.tolist()
    bounds = [oracles.renyi([log_w[i] for i in z], settings.alpha) for z in enumerated.assignments[0, :2].T.tolist()]
    assert enumerated.loss.item() == pytest.approx(-sum(bounds) / len(bounds), abs=1e-12)


@pytest.mark.parametrize("id", ["rloo", "vargrad"])
def test_the_loss_is_minus_the_elbo(id: str):
    enumerated = oracles.enumerate_estimates(get_estimator(id, 1, 2), oracles.Hierarchy)
    log_w = oracles.values(oracles.Hierarchy(), Settings()).log_w
    assert enumerated.loss.item() == pytest.approx(-log_w.mean().item(), abs=1e-12)


@pytest.mark.parametrize("rule", ["left", "right", "trapz"])
def test_the_loss_is_minus_the_riemann_sum(rule: str):
    enumerated = oracles.enumerate_estimates(get_estimator(f"tvo-part2-linear-{rule}", 1, 2), oracles.Hierarchy)
    log_w = oracles.values(oracles.Hierarchy(), Settings()).log_w.detach()
    points, widths = oracles.riemann_terms((0.0, 0.5, 1.0), rule)
    sums = [
        sum((width * (t * log_w[z]).softmax(0) @ log_w[z]).item() for t, width in zip(points, widths, strict=True))
        for z in enumerated.assignments.squeeze(0).T
    ]
    assert enumerated.loss.item() == pytest.approx(-sum(sums) / len(sums), abs=1e-12)


@pytest.mark.parametrize(("iw", "few", "percent"), [(9, 0.05, 0.01), (10, 0.2, 0.02), (29, 0.2, 0.02), (30, 0.3, 0.03)])
def test_the_first_point_of_a_partition_follows_k(iw: int, few: float, percent: float):
    for id, first in (("tvo-part4-config1", few), ("tvo-part4-config2", percent)):
        points = get_estimator(id, iw=iw).get_buffer("points")
        torch.testing.assert_close(points[:2].tolist(), [0.0, first])
        torch.testing.assert_close((points[3] / points[2]).item(), (points[2] / points[1]).item())
