"""Every estimator of a multi-sample bound is, exactly, what it declares.

All outcomes of its particles are enumerated on models small enough; the mean of its output, weighted by their
probabilities, equals the expectation in its row of ROWS to 1e-10. A new estimator joins with one row; those of a folder
of your own (`pytest --user_dir DIR`) that declare `unbiased` join with their examples.
"""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import combinations_with_replacement
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from estimators import get_estimator, registry
from tests import oracles
from tests.oracles import MODELS, EnumerableModel, Settings, TwoBits

Expectation = Callable[[type[EnumerableModel], int, Settings], Tensor]


@cache
def grad_bound(kind: type[EnumerableModel], num_particles: int, settings: Settings) -> Tensor:
    model = kind()
    return oracles.gradient(oracles.expected_bound(model, num_particles, settings), model)


@cache
def weighted_score(kind: type[EnumerableModel], num_particles: int, settings: Settings) -> Tensor:
    return oracles.expected_weighted_score(kind(), num_particles, settings)


def phi_and_theta(phi: Tensor, theta: Tensor, kind: type[EnumerableModel]) -> Tensor:
    num_phi = len(kind.start_phi)
    return torch.cat([phi[:num_phi], theta[num_phi:]])


def unbiased(kind: type[EnumerableModel], num_particles: int, settings: Settings) -> Tensor:
    return grad_bound(kind, num_particles, settings)  # type: ignore[arg-type]


def unbiased_with_held_out(num_auxiliary: int) -> Expectation:
    def expectation(kind, num_particles, settings):
        phi = grad_bound(kind, num_particles - num_auxiliary, settings)
        return phi_and_theta(phi, grad_bound(kind, num_particles, settings), kind)

    return expectation


def biased_by_weighted_score(gamma: float) -> Expectation:
    def expectation(kind, num_particles, settings):
        bias = gamma * settings.beta * weighted_score(kind, num_particles, settings)
        return grad_bound(kind, num_particles, settings) + bias

    return expectation


def wake(kind, num_particles, settings):
    phi = weighted_score(kind, num_particles, settings)
    return phi_and_theta(phi, grad_bound(kind, num_particles, settings), kind)


def thermodynamic(*ends: float, rule: str = "left") -> Expectation:
    def expectation(kind, num_particles, settings):
        terms = oracles.riemann_terms(ends, rule)
        return oracles.expected_thermodynamic_gradient(kind(), num_particles, settings, terms)

    return expectation


def unbiased_for_the_elbo(kind, num_particles, settings):
    return grad_bound(kind, 1, settings)


def scaled_in_phi(scale: float) -> Expectation:
    def expectation(kind, num_particles, settings):
        truth = grad_bound(kind, num_particles, settings)
        return phi_and_theta(truth / scale, truth, kind)

    return expectation


NO_STATE: Mapping[str, float] = MappingProxyType({})


class Row(NamedTuple):
    id: str
    expectation: Expectation
    least_particles: int = 2
    takes_alpha: bool = True
    takes_beta: bool = True
    takes_freebits: bool = True
    state: Mapping[str, float] = NO_STATE  # of the estimator's buffers

    def takes(self, settings: Settings) -> bool:
        alpha, beta, freebits = settings
        taken = (self.takes_alpha or not alpha, self.takes_beta or beta == 1, self.takes_freebits or freebits is None)
        return all(taken)


USERS = [family for family in registry.families() if family.file.parent != registry.SOURCE]
UNPROVEN = [family for family in USERS if family.declares != "unbiased"]

# A running mean of 0.6 and variance of 2.25, hence a scale of 1.5, after a few batches.
NVIL_STATE = {"mean_sum": 0.3, "variance_sum": 1.125, "weight_sum": 0.5}

ROWS = (
    Row("reinforce", unbiased, least_particles=1),
    Row("vimco-arithmetic", unbiased),
    Row("vimco-geometric", unbiased),
    Row("ovis-gamma0", unbiased),
    Row("ovis-gamma0.4", biased_by_weighted_score(0.4)),
    Row("ovis-gamma1", biased_by_weighted_score(1.0)),
    Row("ovis-arithmetic-gamma0", unbiased),
    Row("ovis-arithmetic-gamma0.4", biased_by_weighted_score(0.4)),
    Row("ovis-geometric-gamma0", unbiased),
    Row("ovis-geometric-gamma0.4", biased_by_weighted_score(0.4)),
    Row("ovis-geometric-gamma1", biased_by_weighted_score(1.0)),
    Row("reinforce-baseline", unbiased, least_particles=1),
    Row("nvil", unbiased, least_particles=1),
    Row("nvil", scaled_in_phi(1.5), least_particles=1, state=NVIL_STATE),
    Row("rloo", unbiased_for_the_elbo, takes_alpha=False, takes_freebits=False),
    Row("vargrad", unbiased_for_the_elbo, takes_alpha=False, takes_beta=False, takes_freebits=False),
    Row("ovis-S1", unbiased_with_held_out(1)),
    Row("ovis-S2", unbiased_with_held_out(2), least_particles=3),
    Row("ovis-S1-exclusive", unbiased, least_particles=1),
    Row("ovis-S2-exclusive", unbiased, least_particles=1),
    Row("wake-wake", wake, least_particles=1),
    Row("tvo-part2-beta1", thermodynamic(0.0, 0.1, 1.0), takes_alpha=False),
    Row("tvo-part3-beta1", thermodynamic(0.0, 0.1, 0.1**0.5, 1.0), takes_alpha=False),
    Row("tvo-part3", thermodynamic(0.0, 1e-10, 1e-5, 1.0), takes_alpha=False),
    Row("tvo-part3-beta1-right", thermodynamic(0.0, 0.1, 0.1**0.5, 1.0, rule="right"), takes_alpha=False),
    Row("tvo-part2-beta1-trapz", thermodynamic(0.0, 0.1, 1.0, rule="trapz"), takes_alpha=False),
    Row("tvo-part3-config1", thermodynamic(0.0, 0.05, 0.05**0.5, 1.0), takes_alpha=False),
    Row("tvo-part2-config2", thermodynamic(0.0, 0.01, 1.0), takes_alpha=False),
    Row("tvo-part2-config1-trapz", thermodynamic(0.0, 0.05, 1.0, rule="trapz"), takes_alpha=False),
    Row("tvo-part2-linear", thermodynamic(0.0, 0.5, 1.0), takes_alpha=False),
    Row("tvo-part3-linear-right", thermodynamic(0.0, 1 / 3, 2 / 3, 1.0, rule="right"), takes_alpha=False),
    *(Row(id, unbiased) for family in USERS if family not in UNPROVEN for id in family.examples),
)

SETTINGS = [Settings(alpha, beta, freebits) for alpha in (0.0, 0.5) for beta in (1.0, 0.7) for freebits in (None, 0.2)]


def name_of(row: Row, kind: type[EnumerableModel], settings: Settings) -> str:
    options = [f"{name[0]}{value}" for name, value in settings._asdict().items()]
    return "-".join([row.id, *(["scaled"] if row.state else []), kind.__name__, *options])


CASES = [
    pytest.param(row, kind, settings, id=name_of(row, kind, settings))
    for row in ROWS
    for kind in MODELS
    for settings in SETTINGS
    if row.takes(settings)
]


def mean_estimate(
    id: str, kind: type[EnumerableModel], mc: int, iw: int, settings: Settings, state: Mapping[str, float] = NO_STATE
) -> Tensor:
    torch.manual_seed(0)  # of what the estimator builds
    estimator = get_estimator(id, mc, iw, *settings).double()  # in float32, c(x) differs in its last digit by row
    for name, value in state.items():
        estimator.get_buffer(name).fill_(value)
    enumerated = oracles.enumerate_estimates(estimator, kind)
    torch.testing.assert_close(enumerated.probabilities.sum().item(), 1.0)
    return enumerated.probabilities @ enumerated.estimates


def assert_exact(id: str, actual: Tensor, expected: Tensor) -> None:
    worst = (actual - expected).abs().argmax()
    if not (actual - expected).abs().max() < 1e-10:
        pytest.fail(
            f"the mean of {id} is not what it declares: {actual[worst]:.6f} where {expected[worst]:.6f} is expected",
            pytrace=False,
        )


@pytest.mark.parametrize("actual", [1.1, float("nan")])
def test_what_is_not_exact_is_one_line(actual: float):
    with pytest.raises(pytest.fail.Exception, match="the mean of mine is not what it declares") as failed:
        assert_exact("mine", torch.tensor([actual]), torch.ones(1))
    assert not failed.value.pytrace


if UNPROVEN:

    @pytest.mark.parametrize("family", UNPROVEN, ids=lambda family: family.name)
    def test_a_family_of_a_folder_of_your_own_can_be_proven(family: registry.Family):
        pytest.fail(f"{family.name} declares {family.declares!r}: only 'unbiased' is proven without a row in ROWS")


@pytest.mark.parametrize(("row", "kind", "settings"), CASES)
def test_the_mean_is_what_is_declared(row: Row, kind: type[EnumerableModel], settings: Settings):
    for iw in range(row.least_particles, 4):
        assert_exact(
            row.id, mean_estimate(row.id, kind, 1, iw, settings, row.state), row.expectation(kind, iw, settings)
        )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
@pytest.mark.parametrize("kind", MODELS)
def test_copies_are_averaged(row: Row, kind: type[EnumerableModel]):
    settings = Settings(
        alpha=0.5 if row.takes_alpha else 0.0,
        beta=0.7 if row.takes_beta else 1.0,
        freebits=0.2 if row.takes_freebits else None,
    )
    iw = max(row.least_particles, 1 if row.id.endswith("-exclusive") else 2)
    assert_exact(row.id, mean_estimate(row.id, kind, 2, iw, settings, row.state), row.expectation(kind, iw, settings))


@pytest.mark.parametrize("kind", MODELS)
def test_freebits_hold_back_some_configurations_of_each_layer(kind: type[EnumerableModel]):
    for unclamped in oracles.values(kind(), Settings(freebits=0.2)).unclamped:
        assert 0 < unclamped.sum() < len(unclamped)


@pytest.mark.parametrize(
    "id", ["ovis-gamma1", "ovis-geometric-gamma0.4", "wake-wake", "tvo-part2-beta1", "ovis-S1", "rloo", "vargrad"]
)
def test_a_biased_estimator_does_not_pass_for_an_unbiased_one(id: str):
    bias = mean_estimate(id, TwoBits, 1, 3, Settings()) - unbiased(TwoBits, 3, Settings())
    assert bias.abs().max() > 1e-3


def wake_limit(kind: type[EnumerableModel]) -> Tensor:
    """E_{p(z|x)}[grad_phi log q(z|x)] and grad_theta log p(x)."""
    model = kind()
    log_w, log_q = oracles.values(model, Settings())[:2]
    log_joint = log_w + log_q
    inclusive = (log_joint.softmax(0).detach() * log_q).sum()
    return phi_and_theta(oracles.gradient(inclusive, model), oracles.gradient(log_joint.logsumexp(0), model), kind)


def thermodynamic_limit(*ends: float, rule: str = "left") -> Callable[[type[EnumerableModel]], Tensor]:
    def limit(kind: type[EnumerableModel]) -> Tensor:
        model, terms = kind(), oracles.riemann_terms(ends, rule)
        return oracles.gradient(oracles.thermodynamic_integral(model, Settings(), terms), model)

    return limit


@pytest.mark.parametrize(
    ("id", "limit"),
    [
        ("wake-wake", wake_limit),
        ("tvo-part2-beta1", thermodynamic_limit(0.0, 0.1, 1.0)),
        ("tvo-part3-beta1-right", thermodynamic_limit(0.0, 0.1, 0.1**0.5, 1.0, rule="right")),
        ("tvo-part2-beta1-trapz", thermodynamic_limit(0.0, 0.1, 1.0, rule="trapz")),
        ("tvo-part4-linear", thermodynamic_limit(0.0, 0.25, 0.5, 0.75, 1.0)),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_consistent_estimators_bias_halves_as_k_doubles(id: str, limit: Callable, kind: type[EnumerableModel]):
    """Exact: the order of particles does not matter, so each multiset of K is one outcome of known multiplicity."""
    biases = []
    for num_particles in (12, 24, 48):
        assignments, multiplicity = multisets(kind.num_configurations, num_particles)
        enumerated = oracles.estimates_of(get_estimator(id, iw=num_particles), kind, assignments)
        probabilities = multiplicity * enumerated.probabilities
        torch.testing.assert_close(probabilities.sum().item(), 1.0)
        biases.append((probabilities @ enumerated.estimates - limit(kind)).norm())
    assert biases[1] < 0.6 * biases[0]
    assert biases[2] < 0.6 * biases[1]


def multisets(num_values: int, size: int) -> tuple[Tensor, Tensor]:
    """All multisets of values, [1, size, multisets], and in how many orders each can be drawn."""
    members = torch.tensor(list(combinations_with_replacement(range(num_values), size)))
    counts = torch.stack([(members == value).sum(-1) for value in range(num_values)], -1).double()
    log_orders = torch.lgamma(torch.tensor(size + 1.0, dtype=torch.float64)) - torch.lgamma(counts + 1).sum(-1)
    return members.T.unsqueeze(0), log_orders.exp()
