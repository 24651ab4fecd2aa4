"""Errors of published code, each found by exact enumeration: none of them may come back."""

import math

import pytest
import torch

from errors import UserError
from estimators import get_estimator, registry
from estimators.bounds.ovis_gamma import OvisGamma
from estimators.bounds.weights import weigh
from tests import oracles
from tests.oracles import Hierarchy, Settings, ThreeWay, TwoBits
from tests.simple_model import SimpleModel


def mean_estimate(id: str, kind: type[oracles.EnumerableModel], settings: Settings, iw: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    enumerated = oracles.enumerate_estimates(get_estimator(id, 1, iw, *settings).double(), kind)
    return enumerated.probabilities @ enumerated.estimates


def grad_bound(kind: type[oracles.EnumerableModel], settings: Settings, iw: int = 2) -> torch.Tensor:
    model = kind()
    return oracles.gradient(oracles.expected_bound(model, iw, settings), model)


@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_the_renyi_control_variate_of_ovis_gamma_depends_on_the_others_alone(alpha: float):
    """Without 1 / (1 - alpha) on its log-ratio, E = (1 - a) grad L^a + (g - a) E[sum v h]."""
    estimator = OvisGamma(iw=3, alpha=alpha, gamma=0.0)
    control_variates = []
    for log_w in (-2.0, 0.5, 3.0):
        weights = weigh(torch.tensor([log_w, 0.2, -0.7], dtype=torch.float64).view(1, 3, 1), alpha)
        control_variates.append((weights.shift + estimator.control_variate(weights, 1.0))[0, 0, 0].item())
    assert control_variates == pytest.approx([control_variates[0]] * 3, abs=1e-12)
    settings = Settings(alpha=alpha)
    torch.testing.assert_close(mean_estimate("ovis-gamma0", ThreeWay, settings), grad_bound(ThreeWay, settings))


@pytest.mark.parametrize("settings", [Settings(beta=0.3), Settings(beta=2.0), Settings(freebits=0.2)], ids=str)
@pytest.mark.parametrize(
    "id",
    [
        "reinforce",
        "reinforce-baseline",
        "vimco-arithmetic",
        "vimco-geometric",
        "ovis-gamma0",
        "ovis-arithmetic-gamma0",
        "ovis-geometric-gamma0",
        "ovis-S1-exclusive",
    ],
)
def test_beta_and_freebits_enter_the_learning_signal(id: str, settings: Settings):
    torch.testing.assert_close(mean_estimate(id, Hierarchy, settings), grad_bound(Hierarchy, settings))


@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_what_ovis_adds_to_vimco_is_divided_by_one_less_alpha_too(mean: str, alpha: float):
    settings = Settings(alpha=alpha)
    torch.testing.assert_close(mean_estimate(f"ovis-{mean}-gamma0", ThreeWay, settings), grad_bound(ThreeWay, settings))


def test_the_number_of_auxiliary_particles_is_an_integer():
    """As a float, `S10` silently meant 10 K."""
    assert registry.parse("ovis-S10").parameters == {"auxiliary": 10}
    assert get_estimator("ovis-S10-exclusive", iw=5).num_extra == 10
    with pytest.raises(UserError):
        registry.parse("ovis-S10.0")


@pytest.mark.parametrize("mc", [1, 3])
@pytest.mark.parametrize(
    "id",
    [
        "ovis-gamma1",
        "ovis-arithmetic-gamma1",
        "ovis-geometric-gamma0",
        "vimco-arithmetic",
        "vimco-geometric",
        "rloo",
        "vargrad",
        "tvo-part3-beta1",
        "tvo-part3-config1-trapz",
        "ovis-S1",
    ],
)
def test_one_particle_is_refused_by_what_needs_others(id: str, mc: int):
    """It gave NaN, or an error of shapes."""
    with pytest.raises(ValueError, match=f"^{id}: iw = 1, expected 2 or more particles"):
        get_estimator(id, mc=mc, iw=1)


@pytest.mark.parametrize("id", ["reinforce", "reinforce-baseline", "nvil", "ovis-S2-exclusive"])
def test_one_particle_gives_the_elbo(id: str):
    torch.testing.assert_close(mean_estimate(id, TwoBits, Settings(), iw=1), grad_bound(TwoBits, Settings(), iw=1))


def test_a_control_variate_at_an_effective_sample_size_of_one_is_exact():
    """An eps clamp on 1 - v_k gave -17.3 for -20."""
    log_w = torch.tensor([0.0, -20.0 + math.log(2)]).view(1, 2, 1)
    weights = weigh(log_w, 0.0)
    assert weights.w_norm[0, 0, 0] == 1.0
    control_variate = weights.shift + OvisGamma(iw=2, gamma=0.0).control_variate(weights, 1.0)
    assert control_variate[0, 0, 0].item() == pytest.approx(-20.0, abs=1e-5)


@pytest.mark.parametrize(
    "id", ["reinforce", "reinforce-baseline", "nvil", "wake-wake", "ovis-geometric-gamma1", "ovis-gamma1", "ovis-S1"]
)
@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_alpha_does_not_scale_the_gradient_of_theta(id: str, alpha: float):
    settings, num_phi = Settings(alpha=alpha), len(TwoBits.start_phi)
    actual = mean_estimate(id, TwoBits, settings)[num_phi:]
    torch.testing.assert_close(actual, grad_bound(TwoBits, settings)[num_phi:])


class Documented(SimpleModel):
    """A model whose sample_from_prior has the argument that the documentation defines, and no other."""

    def sample_from_prior(self, bs: int):  # type: ignore[override]
        return super().sample_from_prior(bs)


def test_wake_sleep_asks_for_dreams_as_the_documentation_defines_them():
    """It asked for `N=`, where the documentation has `bs`."""
    torch.manual_seed(0)
    model = Documented(4, 2)
    get_estimator("wake-sleep", mc=2, iw=3)(model, torch.ones(5, 4))[0].backward()
    assert model.inference_network.weight.grad is not None
    assert model.inference_network.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("id", ["reinforce-baseline", "nvil", "ovis-geometric-gamma1", "wake-wake"])
def test_diagnostics_are_of_plain_weights_whatever_the_bound(id: str):
    """elbo, kl and ess were those of the heated weights."""
    assignments = torch.tensor([0, 3, 1, 2]).view(1, -1, 1)
    x = torch.zeros(1, 1, dtype=torch.float64)

    def diagnostics(**options: float) -> dict[str, float]:
        _, found, _ = get_estimator(id, iw=4, **options)(Hierarchy().assign(assignments), x)  # type: ignore[arg-type]
        return {name: value.item() for name, value in found.items()}

    heated = diagnostics(alpha=0.9, beta=0.3, freebits=0.2)
    assert heated == diagnostics()
    log_w = oracles.values(Hierarchy(), Settings()).log_w.detach()[assignments.flatten()]
    assert heated["loss/ess"] == pytest.approx(1 / log_w.softmax(0).square().sum().item())
    assert heated["loss/elbo"] == pytest.approx(log_w.mean().item())
