"""The VAE of each kind of latents: its densities, its exact gradients by enumeration and by quadrature, its options."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.func import functional_call, grad, vmap

from analysis.gradients import compare_gradients, gradient_statistics
from estimators import get_estimator
from models import VAE
from models.particles import densities_with_stopped_q, draw_particles

SHAPE = (2, 3)  # mc, iw
BATCH = 4
KINDS: dict[str, dict[str, Any]] = {
    "normal": {"latent": "normal", "latents": 3},
    "normal, learnt prior": {"latent": "normal", "latents": 3, "learn_prior": True},
    "bernoulli": {"latent": "bernoulli", "latents": 3, "learn_prior": True},
    "categorical": {"latent": "categorical", "latents": 2, "categories": 3, "learn_prior": True},
    "categorical, keys": {"latent": "categorical", "latents": 2, "categories": 3, "keys": 2},
}


def network(latent="normal", latents=3, shape=(1, 2, 3), hidden=(4,), **options) -> VAE:
    torch.manual_seed(1)
    model = VAE(shape, latent, latents, hidden=hidden, **options).double()
    model.adapt(torch.tensor([[0.2, 0.9, 0.5, 0.0, 1.0, 0.3]], dtype=torch.float64)[:, : model.num_pixels])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return model


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request) -> VAE:
    return network(**request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randint(0, 2, (BATCH, 1, 2, 3), generator=torch.Generator().manual_seed(3)).double()


def parts(network: Any) -> Any:
    return network


def decode(model: VAE, z: Tensor) -> Tensor:
    """The logits of x, written out."""
    first, _, last = parts(model.generative_model)
    flat = z.flatten(-len(model.latents.shape))
    return torch.tanh(flat @ first.weight.T + first.bias) @ last.weight.T + last.bias


def encode(model: VAE, x: Tensor) -> Tensor:
    """The features of q, written out."""
    first, _, last = parts(model.inference_network)
    h = torch.tanh((x.flatten(1) - model.mean_x) @ first.weight.T + first.bias)
    if isinstance(last, torch.nn.Linear):
        return h @ last.weight.T + last.bias
    query = (h @ last.query.weight.T + last.query.bias).view(len(x), 2, 1, 2)
    return ((query * last.keys).sum(-1) / math.sqrt(2)).flatten(1)


def gradients(model, value):
    parameters = list(model.parameters())
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same(model, got, wanted, atol=1e-9):
    assert got.shape == (*SHAPE, BATCH)
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)
    weights = torch.randn_like(got)
    assert got.requires_grad == wanted.requires_grad
    if not got.requires_grad:
        return
    pairs = zip(*(gradients(model, (weights * value).sum()) for value in (got, wanted)), strict=True)
    for g, w in pairs:
        torch.testing.assert_close(g, w, rtol=0, atol=atol)


@pytest.mark.parametrize("reparam", [False, True])
def test_log_px_and_its_gradients_are_those_of_torch_distributions(model, x, reparam):
    output = model(x, reparam=reparam, sample_shape=SHAPE)
    (z,) = output["z"]
    expected = Bernoulli(logits=decode(model, z)).log_prob(x.flatten(1)).sum(-1)
    assert_same(model, output["log_px"], expected)
    assert_same(model, model.log_prob(x, [z]).log_px, expected)
    assert z.requires_grad == reparam
    assert draw_particles(model, x, *SHAPE, reparam=reparam).with_gradient == (reparam,)


@pytest.mark.parametrize("reparam", [False, True])
def test_q_and_p_have_the_features_that_the_networks_give(model, x, reparam):
    output = model(x, reparam=reparam, sample_shape=SHAPE)
    (z,), (qz,), (pz,) = output["z"], output["qz"], output["pz"]
    features = encode(model, x)
    prior = torch.zeros_like(features[0]) if model.prior is None else parts(model.prior).features
    relaxed = reparam and not isinstance(qz, Normal)
    expected_q, expected_p = (model.latents.log_prob(row, z, model.temperature) for row in (features, prior))
    # A relaxed z near to 1 has fewer digits than its logit, which the densities of the draw are computed from.
    assert_same(model, output["log_qz"][0], expected_q, atol=1e-7)
    assert_same(model, output["log_pz"][0], expected_p, atol=1e-7)
    for got, wanted in zip(model.log_prob(x, [z])[1:], (expected_p, expected_q), strict=True):
        assert_same(model, got[0], wanted)
    distribution_of_y = [distribution.base_dist if relaxed else distribution for distribution in (qz, pz)]
    value = (z.logit() if z.dim() == 4 else z.log()) if relaxed else z
    for distribution, log_prob in zip(distribution_of_y, (expected_q, expected_p), strict=True):
        torch.testing.assert_close(distribution.log_prob(value).flatten(3).sum(-1), log_prob)


@pytest.mark.parametrize("reparam", [False, True])
def test_with_stopped_phi_the_gradient_flows_through_z_alone(model, x, reparam):
    z = model(x, reparam=reparam, sample_shape=SHAPE)["z"][0].detach().requires_grad_()
    whole, stopped = (model.log_prob(x, [z], stop_phi=stop_phi).log_qz[0] for stop_phi in (False, True))
    assert torch.equal(whole, stopped)
    if reparam:
        by_z = [torch.autograd.grad(each.sum(), z, retain_graph=True)[0] for each in (whole, stopped)]
        torch.testing.assert_close(*by_z)
    assert any(g.any() for g in gradients(model, whole.sum()))
    if stopped.requires_grad:
        assert not any(g.any() for g in gradients(model, stopped.sum()))


# --- Discrete latents: every outcome enumerated -----------------------------------------------------------------------

X = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
ENUMERABLE: dict[str, tuple[dict[str, Any], list]] = {
    "bernoulli": ({"latent": "bernoulli", "latents": 3}, list(product((0.0, 1.0), repeat=3))),
    "categorical": (
        {"latent": "categorical", "latents": 2, "categories": 3, "keys": 2},
        [(*torch.eye(3)[i].tolist(), *torch.eye(3)[j].tolist()) for i, j in product(range(3), repeat=2)],
    ),
}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in gradient.values()], 1)


def estimates(estimator, model, patch: Callable[[Tensor], None], draws: Tensor) -> Tensor:
    """The gradient of the bound for each of `draws`, made the model's noise by `patch`: [draws, parameters]."""
    loss = Loss(estimator, model)
    parameters = {f"model.{name}": p.detach() for name, p in model.named_parameters()}

    def gradient(draw: Tensor) -> dict[str, Tensor]:
        patch(draw)
        return grad(lambda values: functional_call(loss, values, (X,)))(parameters)

    return -flat(vmap(gradient)(draws))


class Loss(torch.nn.Module):
    def __init__(self, estimator, model):
        super().__init__()
        self.estimator, self.model = estimator, model

    def forward(self, x):
        return self.estimator(self.model, x)[0]


@pytest.mark.parametrize("id", ["reinforce", "vimco-arithmetic", "vimco-geometric", "ovis-gamma0"])
@pytest.mark.parametrize("kind", list(ENUMERABLE))
def test_the_mean_of_unbiased_estimators_is_the_gradient_of_the_exact_bound(kind, id, monkeypatch):
    options, configurations = ENUMERABLE[kind]
    model = network(**options, shape=(1, 1, 3), learn_prior=True)
    points = torch.tensor(configurations, dtype=torch.float64)
    shape = model.latents.shape
    pairs = list(product(range(len(points)), repeat=2))
    z = points[torch.tensor(pairs)].view(len(pairs), 1, 2, 1, *shape)  # [outcomes, mc, iw, batch, ...]

    # By torch.distributions: tables of all values of one particle, then the bound of every pair.
    features, prior = encode(model, X[:, None, None]), parts(model.prior).features
    log_px = Bernoulli(logits=decode(model, points.view(-1, *shape))).log_prob(X).sum(-1)
    log_q, log_p = (
        model.latents.distribution(row).log_prob(points.view(-1, *shape)).reshape(len(points), -1).sum(-1)
        for row in (features, prior)
    )
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    log_w = (log_px + log_p - log_q)[torch.tensor(pairs)]
    probabilities = log_q[torch.tensor(pairs)].sum(-1).exp()
    bound = (probabilities * (log_w.logsumexp(-1) - math.log(2))).sum()
    expected = torch.cat([g.flatten() for g in gradients(model, bound)])

    estimator = get_estimator(id, iw=2)
    drawn = estimates(
        estimator,
        model,
        lambda draw: monkeypatch.setattr(model.latents, "_draw_discrete", lambda features, num: draw),
        z,
    )
    mean = probabilities.detach() @ drawn
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-10)
    assert (drawn.std(0) > 1e-3).any()


# --- Normal latents: the noise of K = 2 particles integrated by quadrature --------------------------------------------


def quadrature(num_nodes: int = 48) -> tuple[Tensor, Tensor]:
    """Nodes [rows, K = 2] of the noise and the weight of each row."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(num_nodes))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(-1)


@pytest.mark.parametrize("id", ["pathwise-iwae", "dreg", "stl", "vimco-arithmetic", "reinforce"])
def test_the_mean_over_all_noise_is_the_gradient_of_the_exact_bound(id, monkeypatch):
    model = network(latents=1, shape=(1, 1, 3), learn_prior=True)
    eps, weights = quadrature()

    def written_out(features: Tensor) -> tuple[Tensor, Tensor]:
        """log w and log q [rows, K], z carrying the gradient of `encode` and the density that of `features`."""
        mean, log_var = encode(model, X[:, None, None]).unbind(-1)
        z = mean + (log_var / 2).exp() * eps
        q, p = (Normal(row[..., 0], (row[..., 1] / 2).exp()) for row in (features, parts(model.prior).features))
        log_px = Bernoulli(logits=decode(model, z.unsqueeze(-1))).log_prob(X).sum(-1)
        return log_px + p.log_prob(z) - q.log_prob(z), q.log_prob(z)

    features = encode(model, X[:, None, None])
    log_w, _ = written_out(features)
    bound = (weights * (log_w.logsumexp(-1) - math.log(2))).sum()
    if id == "stl":  # sum_k v_k log w_k with q stopped: its own mean, which is not the gradient of the bound
        v = log_w.detach().softmax(-1)
        bound = (weights * (v * written_out(features.detach())[0]).sum(-1)).sum()
    expected = torch.cat([g.flatten() for g in gradients(model, bound)])

    def patch(draw: Tensor) -> None:
        monkeypatch.setattr(torch, "randn", lambda *shape, **options: draw.view(shape))

    drawn = estimates(get_estimator(id, iw=2), model, patch, eps)
    torch.testing.assert_close(weights @ drawn, expected, rtol=0, atol=1e-8)
    assert (drawn.std(0) > 1e-3).any()


# --- Relaxed latents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_relaxed_estimators_agree_in_their_mean(kind, x):
    """pathwise-iwae and dreg are both unbiased for the bound of the relaxed model, and dreg by another formula."""
    model = network(**KINDS[kind], temperature=0.6)
    pathwise, dreg = compare_gradients(
        [get_estimator(id, iw=3) for id in ("pathwise-iwae", "dreg")], model, x[:2], num_replicates=4000, seed=1
    )
    error = ((pathwise.variance + dreg.variance) / 4000).sqrt()
    assert ((pathwise.mean - dreg.mean).abs() < 4 * error).all()
    assert (pathwise.mean.abs() > 4 * error).any()


@pytest.mark.parametrize("id", ["stl", "dreg"])
def test_what_forward_keeps_for_stl_and_dreg_is_what_log_prob_evaluates_anew(model, x, id):
    estimator = get_estimator(id, iw=3, mc=2)
    torch.manual_seed(2)
    kept = gradients(model, estimator(model, x)[0])
    torch.manual_seed(2)
    anew = gradients(model, estimator(Anew(model), x)[0])
    assert any(g.any() for g in kept)
    for got, wanted in zip(kept, anew, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


class Anew(torch.nn.Module):
    """The model without what its forward keeps: stl and dreg ask log_prob."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, reparam=False, sample_shape=(1, 1)):
        output = self.model(x, reparam=reparam, sample_shape=sample_shape)
        return {key: output[key] for key in ("log_px", "log_pz", "log_qz", "z")}

    def log_prob(self, x, z, stop_phi=False):
        return self.model.log_prob(x, z, stop_phi)


def test_stopped_densities_of_the_first_particles_are_those_of_all_cut(model, x):
    particles = draw_particles(model, x, *SHAPE, reparam=True)
    scale = torch.rand(*SHAPE, BATCH, dtype=torch.float64)
    whole = densities_with_stopped_q(particles, scale).first(2)
    cut = densities_with_stopped_q(particles.first(2), scale[:, :2])
    for got, wanted in zip((cut.log_px, *cut.log_qz), (whole.log_px, *whole.log_qz), strict=True):
        torch.testing.assert_close(got, wanted)
        for g, w in zip(gradients(model, got.sum()), gradients(model, wanted.sum()), strict=True):
            torch.testing.assert_close(g, w)


# --- Dropout, normalisation, gradient statistics ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradient_statistics_of_every_kind_are_vectorised(kind, x):
    """gradient_statistics warns where they cannot be, and a warning is an error."""
    for options in ({}, {"dropout": 0.3, "normalization": "layer"}):
        model = network(**KINDS[kind], **options)
        for id in ("ovis-gamma1", "tvo-part2-config1", "pathwise-iwae", "stl", "dreg"):
            statistics = gradient_statistics(get_estimator(id, iw=3), model, x, 4, parameters=["inference_network"])
            assert statistics.mean.isfinite().all()
            assert (statistics.variance > 0).any()


@pytest.mark.parametrize("id", ["ovis-gamma1", "dreg"])
@pytest.mark.parametrize("kind", ["normal", "bernoulli", "categorical, keys"])
def test_replicates_with_dropout_are_those_of_a_loop(kind, x, id):
    model = network(**KINDS[kind], dropout=0.3, normalization="layer")
    estimator, num = get_estimator(id, iw=3), (4000, 100)
    block, single = (
        gradient_statistics(estimator, model, x, n, block_size=size, seed=seed)
        for n, size, seed in zip(num, (500, 1), (1, 2), strict=True)
    )
    error = (block.variance / num[0] + block.variance / num[1]).sqrt()
    assert ((block.mean - single.mean).abs() <= 4.5 * error + 1e-12).all()
    # A mean over parameters is known better than each: the noise has the same size, masks included.
    assert (single.variance.mean() / block.variance.mean()).log().abs() < 1


def test_dropout_has_one_mask_for_each_observation_and_one_for_each_particle(x):
    model = network(dropout=0.5)
    output = model(x[:1].expand(2, -1, -1, -1), sample_shape=(1, 5))
    assert not torch.equal(*output["qz"][0].mean)
    torch.testing.assert_close(output["qz"][0].log_prob(output["z"][0]).sum(-1), output["log_qz"][0])
    z = torch.ones(1, 5, 2, 3, dtype=torch.float64)
    assert len(model._logits(z).sum(-1).flatten().unique()) > 2
    assert len(model.eval()._logits(z).sum(-1).flatten().unique()) == 1


@pytest.mark.parametrize("id", ["stl", "dreg"])
def test_stl_and_dreg_see_the_dropout_of_the_draw(id, x):
    """With p(x, z) = c q(z|x) under any mask, their gradient by q is zero: log w does not depend on z."""
    model = network(dropout=0.5)
    with torch.no_grad():
        for parameter in parts(model.inference_network)[-1].parameters():
            parameter[3:] = 0.0  # log-variances of 0, as those of the prior
        parts(model.generative_model)[-1].weight.zero_()
    output = model(x, reparam=True, sample_shape=(1, 4))
    constant, (z,) = output["log_qz"][0].detach(), output["z"]
    log_pz, log_qz = output["stopped"](lambda point: point.view_as(point))
    torch.testing.assert_close(log_qz, constant)
    (by_z,) = torch.autograd.grad((log_pz - log_qz).sum(), z, retain_graph=True)
    torch.testing.assert_close(by_z, -output["qz"][0].mean.expand_as(by_z))
    assert all(g.isfinite().all() for g in gradients(model, get_estimator(id, iw=4)(model, x)[0]))


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_dreams_come_from_the_prior(model):
    torch.manual_seed(5)
    dream = model.sample_from_prior(20_000)
    (z,), (pz,) = dream["z"], dream["pz"]
    assert z.shape == (20_000, *model.latents.shape)
    assert dream["px"].mean.shape == (20_000, 1, 2, 3)
    assert ((z.mean(0) - pz.mean[0]).abs() < 4.5 * pz.variance[0].sqrt() / 20_000**0.5).all()
    loss, _, _ = get_estimator("wake-sleep", iw=2)(model, torch.zeros(3, 1, 2, 3, dtype=torch.float64))
    assert any(g.any() for g in gradients(model, loss))


def test_x_may_be_flat_and_another_shape_is_refused(model, x):
    torch.manual_seed(4)
    expected = model(x, sample_shape=SHAPE)
    torch.manual_seed(4)
    assert torch.equal(model(x.flatten(1), sample_shape=SHAPE)["log_px"], expected["log_px"])
    assert expected["px"].mean.shape == (*SHAPE, BATCH, 1, 2, 3)
    with pytest.raises(
        ValueError, match=r"^VAE was given x of shape \[4, 7\], expected \[batch, 1, 2, 3\] or \[batch, 6\]$"
    ):
        model(torch.zeros(4, 7))


def test_the_same_seed_gives_the_same_numbers(model, x):
    for reparam in (False, True):
        runs: tuple[list[Tensor], list[Tensor]] = [], []
        for numbers in runs:
            torch.manual_seed(6)
            output = model(x, reparam=reparam, sample_shape=SHAPE)
            numbers += [output["z"][0], output["log_px"], *output["log_qz"], *output["log_pz"]]
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_the_networks_run_as_often_as_they_must(model, x):
    rows: dict[str, list[int]] = {"inference_network": [], "generative_model": []}
    for name, calls in rows.items():
        first = getattr(model, name)[0]
        first.register_forward_hook(lambda _, args, __, calls=calls: calls.append(args[0].shape.numel()))
    get_estimator("dreg", iw=3, mc=2)(model, x)[0].backward()
    assert rows == {"inference_network": [BATCH * 6], "generative_model": [6 * BATCH * math.prod(model.latents.shape)]}


def test_it_adapts_to_the_mean_of_the_training_points():
    model = VAE((1, 2, 3), latents=2, hidden=(3,))
    points = torch.tensor([[1.0, 0, 1, 0, 1, 0], [1.0, 0, 0, 1, 1, 0]]).view(2, 1, 2, 3)
    model.adapt(points)
    assert torch.equal(model.mean_x, torch.tensor([1.0, 0, 0.5, 0.5, 1, 0]))
    expected = torch.tensor([0.999, 0.001, 0.5, 0.5, 0.999, 0.001])
    torch.testing.assert_close(parts(model.generative_model)[-1].bias.sigmoid(), expected)
    assert "mean_x" in model.state_dict()


def test_the_defaults_have_the_published_sizes():
    shapes = {name: tuple(p.shape) for name, p in VAE().named_parameters() if name.endswith("weight")}
    assert shapes == {
        "inference_network.0.weight": (200, 784),
        "inference_network.2.weight": (200, 200),
        "inference_network.4.weight": (400, 200),
        "generative_model.0.weight": (200, 200),
        "generative_model.2.weight": (200, 200),
        "generative_model.4.weight": (784, 200),
    }
    assert {name.partition(".")[0] for name, _ in VAE(latents=2, learn_prior=True).named_parameters()} == {
        "inference_network",
        "generative_model",
        "prior",
    }


def test_the_temperature_may_change_from_step_to_step(x):
    model = network("categorical", 2, categories=3, temperature=5.0)
    model.temperature = 0.01
    z = model(x, reparam=True, sample_shape=(5, 40))["z"][0]
    assert (z.amax(-1) > 0.99).double().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": "foo"}, r"^unknown latent 'foo'; choose from bernoulli, categorical, normal, subset$"),
        ({"latent": "categorical", "categories": 1}, r"^categories = 1, expected at least 2$"),
        ({"latents": 0}, r"^latents = 0, expected at least 1$"),
        ({"temperature": 0}, r"^temperature = 0, expected a number above 0$"),
        ({"temperature": math.nan}, r"^temperature = nan, expected a number above 0$"),
        ({"keys": 3}, r"^keys = 3: only categorical latents have keys, not normal ones; use keys=0$"),
        ({"latent": "categorical", "keys": -1}, r"^keys = -1, expected a dimension, or 0 for none$"),
        ({"shape": (1, 0, 3)}, r"^shape = \[1, 0, 3\], expected sizes of at least 1$"),
        ({"hidden": (3, 0)}, r"^hidden = \[3, 0\], expected sizes of at least 1$"),
        ({"activation": "tan"}, r"^unknown activation 'tan'; did you mean 'tanh'\?$"),
        (
            {"normalization": "batch"},
            r"^unknown normalization 'batch'; choose from none, layer \(over the batch, .*\)$",
        ),
        ({"dropout": 1.0}, r"^dropout = 1\.0, expected a number in \[0, 1\)$"),
    ],
)
def test_options_that_make_no_model_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        VAE(**options)
    assert "\n" not in str(caught.value)
