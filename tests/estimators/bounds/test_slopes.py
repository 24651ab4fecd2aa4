"""The derivatives of losses by log-densities: of every estimator whose coefficients are known those of autograd."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from estimators import get_estimator
from estimators.bounds import ovis_monte_carlo, tvo
from estimators.bounds.base import BoundEstimator, LinearEstimator
from estimators.bounds.weights import computed_once
from models.particles import Particles, densities_of, with_densities

IDS = (
    "reinforce",
    "vimco-arithmetic",
    "vimco-geometric",
    "ovis-gamma0",
    "ovis-gamma0.7",
    "ovis-gamma1",
    "ovis-arithmetic-gamma0.3",
    "ovis-geometric-gamma1",
    "ovis-S2",
    "ovis-S2-exclusive",
    "wake-wake",
    "rloo",
    "tvo-part3-beta1",
    "tvo-part5-config1-trapz",
)
MC, IW, BATCH = 2, 4, 3
SETTINGS: tuple[dict[str, float], ...] = ({}, {"beta": 0.6}, {"beta": 0.0}, {"alpha": 0.4}, {"freebits": 0.3})
LAYERS = (1, 2)


def particles(num: int, num_layers: int, scale: float = 1.0) -> Particles:
    """Random log-densities [MC, num, BATCH]."""
    generator = torch.Generator().manual_seed(0)

    def density() -> Tensor:
        return scale * torch.randn(MC, num, BATCH, dtype=torch.float64, generator=generator)

    log_pz, log_qz = (tuple(density() for _ in range(num_layers)) for _ in range(2))
    return Particles(density(), log_pz, log_qz, {}, nn.Module(), torch.empty(0))


def estimator_of(id: str, settings: Mapping[str, float]) -> LinearEstimator:
    estimator = get_estimator(id, mc=MC, iw=IW, **settings)
    assert isinstance(estimator, LinearEstimator)
    return estimator


def has_form(id: str, settings: Mapping[str, float]) -> bool:
    estimator = estimator_of(id, {})
    return all(getattr(estimator, f"takes_{name}") for name in settings)


PAIRS = [(id, settings) for id in IDS for settings in SETTINGS if has_form(id, settings)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("num_layers", LAYERS)
@pytest.mark.parametrize(("id", "settings"), PAIRS, ids=str)
def test_coefficients_are_the_derivatives_of_the_loss(id: str, settings: dict[str, float], num_layers: int):
    estimator = estimator_of(id, settings)
    for scale in (1.0, 40.0):
        given = particles(IW + estimator.num_extra, num_layers, scale)
        arguments = (given, estimator.alpha, estimator.beta)
        assert_same(estimator.slopes(*arguments), BoundEstimator.slopes(estimator, *arguments))


@pytest.mark.parametrize("id", IDS)
def test_weights_of_zero(id: str):
    """One particle, all others, all particles of an observation."""
    estimator = estimator_of(id, {})
    given = particles(IW + estimator.num_extra, 1)
    given.log_px[0, 1, 0] = given.log_px[0, 1:, 1] = given.log_px[1, :, 2] = -torch.inf
    with computed_once(sees_values=True):
        found = estimator.slopes(given, 0.0, 1.0)
    assert_same(found, BoundEstimator.slopes(estimator, given, 0.0, 1.0))
    assert all(slope.isfinite().all() for slope in found)


@pytest.mark.parametrize(("id", "settings"), PAIRS, ids=str)
def test_what_values_make_superfluous_changes_nothing(id: str, settings: dict[str, float]):
    estimator = estimator_of(id, settings)
    for scale in (1.0, 40.0):
        given = particles(IW + estimator.num_extra, 1, scale)
        with computed_once(sees_values=True):
            found = estimator.slopes(given, estimator.alpha, estimator.beta)
        assert_same(found, estimator.slopes(given, estimator.alpha, estimator.beta))


@pytest.mark.parametrize("id", ["reinforce", "wake-wake", "ovis-S1-exclusive"])
def test_one_particle_has_no_others(id: str):
    estimator = get_estimator(id, mc=MC, iw=1)
    given = particles(1 + estimator.num_extra, 1)
    with computed_once(sees_values=True):
        assert_same(estimator.slopes(given, 0.0, 1.0), BoundEstimator.slopes(estimator, given, 0.0, 1.0))


@pytest.mark.parametrize(("id", "settings"), PAIRS, ids=str)
def test_copies_that_are_said_to_be_independent_are(id: str, settings: dict[str, float]):
    estimator = estimator_of(id, settings)
    assert vars(type(estimator))["copies_are_independent"]
    given = particles(IW + estimator.num_extra, 2)
    whole = estimator.slopes(given, estimator.alpha, estimator.beta)
    for copy in range(MC):
        log_px, log_pz, log_qz = given[:3]
        log_pz, log_qz = (tuple(layer[copy : copy + 1] for layer in layers) for layers in (log_pz, log_qz))
        alone = given._replace(log_px=log_px[copy : copy + 1], log_pz=log_pz, log_qz=log_qz)
        found = estimator.slopes(alone, estimator.alpha, estimator.beta)
        assert_same(found, [slope[copy : copy + 1] for slope in whole])
    assert len(densities_of(given)) == len(whole)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("id", ["ovis-S2", "ovis-S3-exclusive"])
@pytest.mark.parametrize("piece", [1, 13, 40])
def test_pieces_change_nothing(id: str, settings: dict[str, float], piece: int, monkeypatch):
    """Of one copy and fewer, and products of few factors."""
    estimator = estimator_of(id, settings)
    given = particles(IW + estimator.num_extra, 2)
    whole = estimator.slopes(given, estimator.alpha, estimator.beta)
    monkeypatch.setattr(ovis_monte_carlo, "PIECE", piece)
    monkeypatch.setattr(ovis_monte_carlo, "_num_factors", lambda dtype: 2)
    assert_same(estimator.slopes(given, estimator.alpha, estimator.beta), whole)


@pytest.mark.parametrize("piece", [1, 2 * MC * IW * BATCH])
def test_terms_of_tvo_may_come_in_groups(piece: int, monkeypatch):
    """One by one, and by twos of which the last is alone."""
    estimator, given = estimator_of("tvo-part5-config1", {}), particles(IW, 2)
    whole = estimator.slopes(given, 0.0, 1.0)
    monkeypatch.setattr(tvo, "PIECE", piece)
    assert_same(estimator.slopes(given, 0.0, 1.0), whole)


def test_many_auxiliary_particles_in_float32():
    """Products of two hundred weights, each of which may be a half."""
    estimator = get_estimator("ovis-S200-exclusive", iw=3)
    given = particles(203, 1)
    found = estimator.slopes(given, 0.0, 1.0)
    single = [density.float() for density in densities_of(given)]
    for got, wanted in zip(estimator.slopes(with_densities(given, single), 0.0, 1.0), found, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
