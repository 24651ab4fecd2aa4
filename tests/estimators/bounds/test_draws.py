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
@pytest.mark.parametrize("id", [*CONTROL_VARIATES, "wake-wake", "ovis-S1", "ovis-S1-exclusive"])
def test_the_loss_is_minus_the_bound(id: str, settings: Settings):
    enumerated = oracles.enumerate_estimates(get_estimator(id, 1, 2, *settings), oracles.Hierarchy)
    log_w = oracles.values(oracles.Hierarchy(), settings).log_w.tolist()
    bounds = [oracles.renyi([log_w[i] for i in z], settings.alpha) for z in enumerated.assignments[0, :2].T.tolist()]
    assert enumerated.loss.item() == pytest.approx(-sum(bounds) / len(bounds), abs=1e-12)
