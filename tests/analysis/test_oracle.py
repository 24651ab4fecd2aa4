import itertools
import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

import analysis.oracle
from analysis.cost import LiveTensors
from analysis.gradients import gradient_statistics
from analysis.oracle import NoExactGradient, Oracles, oracle_gradient
from errors import UserError
from estimators import get_estimator
from models import GaussianMixture, GaussianToy
from models.template import LogDensities
from tests import oracles
from tests.analysis.problems import ImportanceWeighted
from tests.oracles import Settings

X = torch.zeros(3, 1, dtype=torch.float64)


class Drawable(oracles.EnumerableModel):
    """A model of tests/oracles.py that draws z and takes it: z is what `values` [V, ...] of each layer says."""

    layers: tuple[torch.Tensor, ...]
    is_binary = True

    def log_prob(self, x, z, stop_phi=False):
        index = torch.zeros(z[0].shape[:3], dtype=torch.int64)
        for v in range(self.num_configurations):
            pairs = zip(z, self.layers, strict=True)
            same = [(layer == values[v]).reshape(*layer.shape[:3], -1).all(-1) for layer, values in pairs]
            index = index + v * torch.stack(same).all(0)
        tables = self.tables()
        return LogDensities(
            tables.log_px[0][index],
            tuple(table[0][index] for table in tables.log_pz),
            tuple(table[0][index] for table in tables.log_qz),
        )

    def forward(self, x, reparam=False, sample_shape=(1, 1), **kwargs):
        log_q = torch.stack(self.tables().log_qz).sum(0)[0].detach()
        index = Categorical(logits=log_q).sample((*sample_shape, len(x)))
        z = [values[index] for values in self.layers]
        qz: list[Distribution] = [Categorical(logits=log_q)]
        if self.is_binary:
            qz = [Bernoulli(logits=torch.zeros(layer.shape)) for layer in z]
        return self.log_prob(x, z)._asdict() | {"z": z, "qz": qz, "reparam": False}


class ThreeWay(Drawable, oracles.ThreeWay):
    layers = (torch.arange(3),)
    is_binary = False


class TwoBits(Drawable, oracles.TwoBits):
    layers = (torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),)


class Hierarchy(Drawable, oracles.Hierarchy):
    layers = (torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0]))


SETTINGS = [Settings(), Settings(0.3, 0.7), Settings(0.0, 1.4, -0.2)]


def oracle(id, model, K, settings=SETTINGS[0], x=X, parameters="phi,theta", **options):
    return oracle_gradient(get_estimator(id, 1, K, *settings), model, x, parameters, **options)


def sides(bound_of_theta, objective_of_phi, model):
    """Minus the gradient of one scalar by theta and of another by phi."""
    num_phi = model.phi.shape[-1]
    theta, phi = (oracles.gradient(scalar, model) for scalar in (bound_of_theta, objective_of_phi))
    return -torch.cat([phi[:num_phi], theta[num_phi:]])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [ThreeWay, TwoBits, Hierarchy])
@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_bounds_are_those_of_every_outcome(kind, settings, num_particles):
    model = kind()
    result = oracle("reinforce", model, num_particles, settings)
    expected = -oracles.gradient(oracles.expected_bound(model, num_particles, settings), model)
    assert result.method == "enumerated"
    assert (result.se == 0).all()
    torch.testing.assert_close(result.gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [ThreeWay, Hierarchy])
def test_each_side_has_its_own_objective(kind, settings):
    model = kind()
    three, two = (oracles.expected_bound(model, num, settings) for num in (3, 2))
    torch.testing.assert_close(oracle("ovis-S1", model, 3, settings).gradient, sides(three, two, model))

    log_w, log_q = oracles.values(model, settings)[:2]
    weights = (log_q + (1 - settings.alpha) * log_w).detach().exp()
    wake = (weights / weights.sum() * log_q).sum()
    torch.testing.assert_close(oracle("wake-wake", model, 3, settings).gradient, sides(three, wake, model))


@pytest.mark.parametrize("settings", [Settings(), Settings(0.0, 0.7), Settings(0.0, 1.4, -0.2)])
@pytest.mark.parametrize("kind", [TwoBits, Hierarchy])
def test_riemann_sums(kind, settings):
    model = kind()
    terms = oracles.RiemannTerms([0.0, 0.01, 0.1], [0.01, 0.09, 0.9])
    expected = -oracles.gradient(oracles.thermodynamic_integral(model, settings, terms), model)
    result = oracle("tvo-part3-beta2", model, 4, settings)
    assert result.method == "enumerated"
    torch.testing.assert_close(result.gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("id", "settings"), [("reinforce", SETTINGS[0]), ("ovis-S1", SETTINGS[1])])
def test_chunks_make_no_difference(monkeypatch, id, settings):
    whole = oracle(id, TwoBits(), 3, settings)
    monkeypatch.setattr(analysis.oracle, "_CHUNK", 39)  # three multisets
    torch.testing.assert_close(oracle(id, TwoBits(), 3, settings).gradient, whole.gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("id", "K"), [("reinforce", 1), ("reinforce", 3), ("wake-wake", 3), ("tvo-part3-beta2", 3)])
def test_references_agree_with_enumeration(monkeypatch, id, K):
    """Within 4.5 standard errors, beside the bias of order 1/K of what is consistent only."""
    exact = oracle(id, Hierarchy(), K)
    monkeypatch.setattr(analysis.oracle, "_CONFIGURATIONS", 0)
    monkeypatch.setattr(analysis.oracle, "_MANY_PARTICLES", 1000)
    result = oracle(id, Hierarchy(), K, num_reference=1000)
    assert (exact.method, result.method) == ("enumerated", "reference")
    assert (result.se > 0).sum() == 7  # the gradient of a constant in log p(x|z) is constant
    bias = 1e-9 if id == "reinforce" else 2e-3
    assert ((result.gradient - exact.gradient).abs() < 4.5 * result.se + bias).all()
    assert result.se.max() < 0.05


def test_the_statistics_say_what_is_biased():
    """bias_z is a chi of the parameters over its root, about 1: below 2 for 8 of them but once in a million."""
    model, x = GaussianMixture(num_components=4, hidden=2), torch.tensor([0.0, 7.0, 12.0, 31.0])
    for parameter in model.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    bias_z, cosine = {}, {}
    for id in ("reinforce", "ovis-gamma0", "ovis-S2-exclusive", "ovis-gamma1", "wake-wake"):
        estimator = get_estimator(id, iw=3)
        exact = oracle_gradient(estimator, model, x, "inference_network,prior")
        assert exact.method == "enumerated"
        stats = gradient_statistics(estimator, model, x, 3000, "inference_network,prior", oracle=exact)
        bias_z[id], cosine[id] = stats.summary()["grads/bias_z"], stats.summary()["grads/cosine"]
    for id in ("reinforce", "ovis-gamma0", "ovis-S2-exclusive"):
        assert 0.3 < bias_z[id] < 2, id
        assert cosine[id] > 0.9, id
    assert bias_z["ovis-gamma1"] > 3
    assert bias_z["wake-wake"] > 3


def test_mixture_of_many_values():
    """20 values of z, K = 2: the sum over 400 pairs, written out."""
    model, x = GaussianMixture(), torch.tensor([33.0, 120.0], dtype=torch.float64)
    model.prior.logits.data.normal_(generator=torch.Generator().manual_seed(0))
    model.double()
    log_px, log_pz, logits = model._tables(x)
    log_qz = logits.log_softmax(-1).t()
    w, q = (log_px + log_pz - log_qz).exp(), log_qz.exp()
    bound = (q.unsqueeze(0) * q.unsqueeze(1) * ((w.unsqueeze(0) + w.unsqueeze(1)) / 2).log()).sum((0, 1)).mean()
    expected = torch.autograd.grad(-bound, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    result = oracle_gradient(get_estimator("vimco-arithmetic", iw=2), model.float(), x.float(), names)
    torch.testing.assert_close(
        result.gradient, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-5, check_dtype=False
    )


# --- Gaussians --------------------------------------------------------------------------------------------------------


def line(beta=1.0):
    """A one-dimensional toy with x, and log w, log q of z on a fine grid, in float64 and with graph."""
    model, x = GaussianToy(1).double(), torch.tensor([[-0.4], [1.3], [0.2]], dtype=torch.float64)
    for parameter, value in ((model.A, 0.3), (model.b, 0.4), (model.mu, -0.5)):
        parameter.data.fill_(value)
    z = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    log_q = Normal(x * model.A + model.b, model.std).log_prob(z)
    log_px, log_pz = Normal(x, 1.0).log_prob(z), Normal(model.mu, 1.0).log_prob(z)
    return model, x, log_px + beta * (log_pz - log_q), log_q, z[1] - z[0]


def derivatives(value, model):
    leaves = [model.A, model.b, model.mu]
    gradients = torch.autograd.grad(-value, leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("beta", [1.0, 0.6])
def test_closed_forms_are_integrals(beta):
    model, x, log_w, log_q, _ = line(beta)

    def compare(id, of_theta, of_phi, **settings):
        result = oracle_gradient(get_estimator(id, beta=beta, **settings), model, x, "A,b,mu")
        theta, phi = derivatives(of_theta, model), derivatives(of_phi, model)
        torch.testing.assert_close(result.gradient, torch.cat([phi[:2], theta[2:]]), rtol=1e-6, atol=1e-8)
        return result.method

    elbo = (log_q.softmax(-1) * log_w).sum(-1).mean()
    assert compare("reinforce", elbo, elbo, iw=1) == "closed form"
    assert compare("pathwise-iwae", elbo, elbo, iw=1) == "closed form"
    for alpha in (0.0, 0.4):
        wake = ((log_q + (1 - alpha) * log_w).softmax(-1).detach() * log_q).sum(-1).mean()
        assert compare("wake-wake", elbo, wake, iw=1, alpha=alpha) == "closed form"
    points = [0.0, 0.1, 1.0]
    riemann = sum(
        (after - t) * ((log_q + t * log_w).softmax(-1) * log_w).sum(-1).mean() for t, after in pairwise(points)
    )
    assert compare("tvo-part2-beta1", riemann, riemann, iw=5) == "closed form"


def test_the_sleep_phase_is_an_integral():
    model, x, *_ = line()
    z = torch.linspace(-9, 8, 700, dtype=torch.float64)
    joint = Normal(model.mu, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(z.unsqueeze(1))  # [x, z]
    log_q = Normal((z.unsqueeze(1) * model.A + model.b), model.std).log_prob(z)
    sleep = (joint.flatten().softmax(0).detach() * log_q.flatten()).sum()
    problem = analysis.oracle._Problem(get_estimator("wake-wake", iw=1), model, x, ["A", "b", "mu"], 0, 10)
    result = analysis.oracle._closed_form(problem, analysis.oracle.Objective("sleep"))
    assert result is not None
    torch.testing.assert_close(
        -result.phi[:2], torch.cat([g.flatten() for g in torch.autograd.grad(-sleep, [model.A, model.b])])
    )
    assert result.theta.abs().max() == 0


def three_dimensional():
    generator = torch.Generator().manual_seed(0)
    model, x = GaussianToy(3).double(), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model, x


def grid(num=33, width=6.5):
    """Points of R^3, [num^3, 3]: a sum over them is an integral, to rounding for what is smooth and falls off."""
    line = torch.linspace(-width, width, num, dtype=torch.float64)
    return torch.cartesian_prod(line, line, line)


def test_closed_forms_in_more_dimensions():
    """Sums over Gaussians of std s >= 0.66 at steps of h = 0.41 are off by exp(-2 pi^2 s^2 / h^2) < 1e-20; what lies
    outside, 5 stds and more away, weighs less than 1e-6.
    """
    model, x = three_dimensional()
    assert max(x.abs().max(), (x @ model.A.t() + model.b).abs().max()) < 3
    z = grid().unsqueeze(1)
    log_q = Normal(x @ model.A.t() + model.b, model.std).log_prob(z).sum(-1)
    log_px, log_pz = Normal(x, 1.0).log_prob(z).sum(-1), Normal(model.mu, 1.0).log_prob(z).sum(-1)
    log_w = log_px + log_pz - log_q
    num_phi = 12  # A and b

    def compare(id, of_theta, of_phi, **settings):
        result = oracle_gradient(get_estimator(id, **settings), model, x, "A,b,mu")
        theta, phi = derivatives(of_theta, model), derivatives(of_phi, model)
        expected = torch.cat([phi[:num_phi], theta[num_phi:]])
        torch.testing.assert_close(result.gradient, expected, rtol=1e-5, atol=1e-5)
        assert result.method == "closed form"

    elbo = (log_q.softmax(0) * log_w).sum(0).mean()
    compare("reinforce", elbo, elbo, iw=1)
    wake = ((log_q + log_w).softmax(0).detach() * log_q).sum(0).mean()
    compare("wake-wake", elbo, wake, iw=1)
    riemann = 0.1 * elbo + 0.9 * ((log_q + 0.1 * log_w).softmax(0) * log_w).sum(0).mean()
    compare("tvo-part2-beta1", riemann, riemann, iw=5)


def test_the_reference_of_the_sleep_phase(monkeypatch):
    """Unbiased: 12 z-scores, one beyond 4.5 once in 12,000 seeds; standard errors below a fifth."""
    model, x = three_dimensional()
    estimator = get_estimator("wake-sleep", iw=1)
    exact = oracle_gradient(estimator, model, x, "A,b")
    assert exact.method == "closed form"
    monkeypatch.setattr(analysis.oracle, "_closed_form", lambda problem, objective: None)
    result = oracle_gradient(estimator, model, x, "A,b", num_reference=1000)
    assert result.method == "reference"
    z = (result.gradient - exact.gradient) / result.se
    assert z.abs().max() < 4.5
    assert 0.5 < z.square().mean().sqrt() < 1.8
    assert (result.se < 0.2 * exact.gradient.abs().max()).all()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_quadrature_is_an_integral_over_pairs(alpha):
    model, x, log_w, log_q, _ = line(0.8)
    log_w, log_q = log_w[:, 150:-150:6], log_q[:, 150:-150:6]
    heat, p = 1 - alpha, log_q.softmax(-1)
    pairs = torch.logaddexp(heat * log_w.unsqueeze(-1), heat * log_w.unsqueeze(-2)) - math.log(2)
    bound = (p.unsqueeze(-1) * p.unsqueeze(-2) * pairs / heat).sum((-2, -1)).mean()
    estimator = get_estimator("ovis-gamma0", iw=2, alpha=alpha, beta=0.8)
    result = oracle_gradient(estimator, model, x, "A,b,mu")
    assert result.method == "quadrature"
    torch.testing.assert_close(result.gradient, derivatives(bound, model), rtol=1e-5, atol=1e-6)


def test_quadrature_of_one_particle_is_the_closed_form(monkeypatch):
    model, x, *_ = line()
    estimator = get_estimator("reinforce", iw=1, beta=0.7)
    exact = oracle_gradient(estimator, model, x, "A,b,mu")
    monkeypatch.setattr(analysis.oracle, "_closed_form", lambda problem, objective: None)
    nodes = oracle_gradient(estimator, model, x, "A,b,mu")
    assert nodes.method == "quadrature"
    torch.testing.assert_close(nodes.gradient, exact.gradient)


def test_what_is_not_asked_for_does_not_count():
    """b is of q alone: the bound of many particles, theta's, is not estimated for it."""
    model, x, *_ = line()
    assert oracle_gradient(get_estimator("wake-wake", iw=100), model, x, "b").method == "closed form"
    assert oracle_gradient(get_estimator("wake-wake", iw=100), model, x, "b,mu", num_reference=5).method == "reference"


@pytest.mark.parametrize(("num_values", "size"), [(5, 3), (3, 3), (3, 5), (1, 2), (4, 1)])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_multisets_are_all_counts_of_a_size(num_values, size, chunk):
    found = []
    for counts, members, times in analysis.oracle._multisets(num_values, size, chunk):
        assert len(counts) <= chunk
        assert members.shape == times.shape == (len(counts), min(num_values, size))
        assert torch.equal(torch.zeros_like(counts).scatter_add_(1, members, times), counts)
        found += counts.tolist()
    expected = [list(row) for row in itertools.product(range(size + 1), repeat=num_values) if sum(row) == size]
    assert sorted(found) == sorted(expected)


def test_many_multisets_are_enumerated_in_bounded_memory():
    """20 values, K = 5, 100 observations: 42,504 multisets x 100. The whole would take 34 MB a tensor of one member."""
    model, x = GaussianMixture(), torch.linspace(-5, 195, 100)
    with LiveTensors() as live:
        result = oracle_gradient(get_estimator("reinforce", iw=5), model, x, "inference_network,prior", num_reference=0)
    assert result.method == "enumerated"
    assert live.peak < 60e6


def test_more_nodes_are_tried_until_they_change_nothing(monkeypatch):
    model, x, *_ = line()
    numbers, by_nodes = [], analysis.oracle._by_nodes

    def counted(problem, objective, num_nodes):
        numbers.append(num_nodes)
        return by_nodes(problem, objective, num_nodes)

    monkeypatch.setattr(analysis.oracle, "_by_nodes", counted)
    assert oracle("ovis-gamma0", model, 2, x=x, parameters="A,b,mu").method == "quadrature"
    assert numbers == [12, 16, 24, 32, 48, 64][: len(numbers)]
    monkeypatch.setattr(analysis.oracle, "_QUADRATURE_ERROR", 0.0)
    monkeypatch.setattr(analysis.oracle, "_NODES_SUFFICE", 0.0)
    with pytest.raises(NoExactGradient, match="no exact gradient"):
        oracle("ovis-gamma0", model, 2, x=x, parameters="A,b,mu", num_reference=0)
    assert numbers[-6:] == [12, 16, 24, 32, 48, 64]


def test_what_estimators_have_in_common_is_computed_once(monkeypatch):
    model, solved, solve = Hierarchy(), [], analysis.oracle._solve

    def counted(problem, objective):
        solved.append(objective)
        return solve(problem, objective)

    monkeypatch.setattr(analysis.oracle, "_solve", counted)
    oracles_of_x = Oracles(model, X, "phi,theta")
    ids = ["reinforce", "ovis-gamma1", "ovis-S1", "wake-wake", "tvo-part3-beta2", "tvo-part3-beta1", "tvo-part3-beta2"]
    estimators = [get_estimator(id, iw=3) for id in ids] + [get_estimator("reinforce", iw=3, beta=0.7)]
    together = [oracles_of_x.of(estimator).gradient for estimator in estimators]
    assert [objective.kind for objective in solved] == ["bound", "bound", "wake", *["thermodynamic"] * 2, "bound"]
    for estimator, gradient in zip(estimators, together, strict=True):
        assert torch.equal(oracle_gradient(estimator, model, X, "phi,theta").gradient, gradient)


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_same_seed_same_numbers_and_nothing_changes():
    torch.manual_seed(0)
    model, x = GaussianToy(2), torch.randn(3, 2)
    estimator = get_estimator("ovis-gamma0", iw=5)
    state = torch.get_rng_state()
    first, second, other = (
        oracle_gradient(estimator, model, x, "A,b,mu", seed, num_reference=20) for seed in (1, 1, 2)
    )
    assert torch.equal(first.gradient, second.gradient)
    assert not torch.equal(first.gradient, other.gradient)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(oracle_gradient(estimator, model, x, "A,b,mu", 1, num_reference=20).gradient, first.gradient)


@pytest.mark.parametrize("K", [2, 40])
def test_frozen_parameters_have_no_gradient(K):
    model, x, *_ = line()
    model.b.requires_grad_(False)
    result = oracle_gradient(get_estimator("ovis-gamma0", iw=K), model.float(), x.float(), "A,b,mu", num_reference=10)
    assert (result.gradient == 0).tolist() == [False, True, False]


def test_estimators_without_objectives_are_refused():
    with pytest.raises(UserError, match="ImportanceWeighted has no objectives"):
        oracle_gradient(ImportanceWeighted(), GaussianToy(2), torch.ones(1, 2), "b")
    with pytest.raises(UserError, match="'c' matches none of GaussianToy"):
        oracle_gradient(get_estimator("reinforce"), GaussianToy(2), torch.ones(1, 2), "c")
