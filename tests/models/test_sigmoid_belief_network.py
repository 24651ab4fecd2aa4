from collections.abc import Callable
from itertools import product

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from analysis.gradients import Measurement, compare_gradients, gradient_statistics
from analysis.oracle import oracle_gradient
from estimators import get_estimator
from models import SigmoidBeliefNetwork
from models.particles import draw_particles
from orchestration.configuration import compose
from seeding import derive_seed
from tasks.build import build_dataset, build_model
from tests import oracles
from tests.estimators.test_bounds_enumeration import ROWS, Row, unbiased
from tests.oracles import EnumerableModel, Settings, Tables

SHAPE = (2, 3)  # mc, iw
BATCH, PIXELS = 4, 6


def network(latents=(3, 2, 4), hidden=(), activation="tanh", shape=(1, 2, 3)) -> SigmoidBeliefNetwork:
    torch.manual_seed(1)
    model = SigmoidBeliefNetwork(shape, latents, hidden, activation).double()
    model.adapt(torch.tensor([[0.2, 0.9, 0.5, 0.0, 1.0, 0.3]], dtype=torch.float64)[:, : model.num_pixels])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.7)
    return model


KINDS = {
    "one layer": {"latents": (3,)},
    "three layers": {},
    "three layers with tanh": {"hidden": (5,)},
    "two layers with two of elu": {"latents": (2, 3), "hidden": (5, 4), "activation": "elu"},
}
ACTIVATIONS: dict[int, Callable] = {1: torch.tanh, 2: F.elu}  # in KINDS, by the number of hidden layers


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request) -> SigmoidBeliefNetwork:
    return network(**request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randint(0, 2, (BATCH, 1, 2, 3), generator=torch.Generator().manual_seed(3)).double()


def reference(model, x, z):
    """Return log p(x|z), and log p and log q of each layer, written out with torch.distributions."""

    def arrow(layer, h):
        for linear in layer.hidden:
            h = ACTIVATIONS[len(layer.hidden)](h @ linear.weight.T + linear.bias)
        return Bernoulli(logits=h @ layer.output.weight.T + layer.output.bias)

    rows = x.flatten(1)
    values = [rows, *z]
    above = [None, *(2 * layer - 1 for layer in z)]
    log_p = [
        arrow(layer, above[i + 1]).log_prob(values[i]).sum(-1) for i, layer in enumerate(model.generative_model)
    ] + [Bernoulli(logits=model.prior.logits).log_prob(z[-1]).sum(-1)]
    below = [rows - model.mean_x, *above[1:]]
    log_q = [arrow(layer, below[i]).log_prob(z[i]).sum(-1) for i, layer in enumerate(model.inference_network)]
    return log_p[0], log_p[1:], log_q


def gradients(model, value):
    parameters = list(model.parameters())
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("stop_phi", [None, False, True], ids=["forward", "log_prob", "log_prob stop_phi"])
def test_densities_and_their_gradients_are_those_of_torch_distributions(model, x, stop_phi):
    output = model(x, sample_shape=SHAPE)
    densities = [output["log_px"], *output["log_pz"], *output["log_qz"]]
    if stop_phi is not None:
        log_px, log_pz, log_qz = model.log_prob(x, [layer.clone() for layer in output["z"]], stop_phi=stop_phi)
        densities = [log_px, *log_pz, *log_qz]
    log_px, log_pz, log_qz = reference(model, x, output["z"])
    expected = [log_px, *log_pz, *([log_q.detach() for log_q in log_qz] if stop_phi else log_qz)]
    assert len(densities) == len(expected) == 1 + 2 * len(output["z"])
    for value, wanted in zip(densities, expected, strict=True):
        assert value.shape == (*SHAPE, BATCH)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)
        assert value.requires_grad == wanted.requires_grad
        if value.requires_grad:
            weights = torch.randn_like(value)
            got, right = (gradients(model, (weights * each).sum()) for each in (value, wanted))
            for g, w in zip(got, right, strict=True):
                torch.testing.assert_close(g, w, rtol=0, atol=1e-10)


def test_with_stopped_phi_the_gradient_flows_through_z_alone(x):
    model = network()
    z = [torch.rand(*SHAPE, BATCH, size, dtype=torch.float64, requires_grad=True) for size in (3, 2, 4)]
    of_all, of_z = (model.log_prob(x, z, stop_phi=stop_phi).log_qz for stop_phi in (False, True))
    for whole, stopped in zip(of_all, of_z, strict=True):
        wanted = torch.autograd.grad(whole.sum(), z, retain_graph=True, allow_unused=True, materialize_grads=True)
        got = torch.autograd.grad(stopped.sum(), z, retain_graph=True, allow_unused=True, materialize_grads=True)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=1e-10)
        assert all(g.abs().max() == 0 for g in gradients(model, stopped.sum()))


def test_the_distributions_of_the_output_agree_with_its_densities(model, x):
    output = model(x, reparam=True, sample_shape=SHAPE)
    assert output["px"].mean.shape == (*SHAPE, *x.shape)
    torch.testing.assert_close(output["px"].log_prob(x).flatten(3).sum(-1), output["log_px"])
    for name in ("pz", "qz"):
        assert len(output[name]) == len(output["z"])
        for distribution, z, log_prob in zip(output[name], output["z"], output[f"log_{name}"], strict=True):
            torch.testing.assert_close(distribution.log_prob(z).sum(-1), log_prob)
    assert draw_particles(model, x, *SHAPE, reparam=True).with_gradient == (False,)
    with pytest.raises(ValueError, match=r"^dreg: needs z .* that of SigmoidBeliefNetwork has none: it is discrete"):
        get_estimator("dreg", iw=2)(model, x)


# --- Gradients of bounds, by enumeration ------------------------------------------------------------------------------

LATENTS = (2, 2)
BITS = list(product((0.0, 1.0), repeat=4))
OBSERVATION = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)


def two_by_two() -> SigmoidBeliefNetwork:
    return network(LATENTS, shape=(1, 1, 3))


def is_of_q(name: str) -> bool:
    return name.startswith("inference_network.")


class TwoByTwo(EnumerableModel):
    """The tables of the network of two layers of two bits, by torch.distributions, for the oracles."""

    num_configurations = 16
    start_phi = torch.cat([p.detach().flatten() for n, p in two_by_two().named_parameters() if is_of_q(n)]).tolist()
    start_theta = torch.cat(
        [p.detach().flatten() for n, p in two_by_two().named_parameters() if not is_of_q(n)]
    ).tolist()

    def tables(self) -> Tables:
        flat, model = {True: self.phi[0], False: self.theta[0]}, two_by_two()
        parameters = {}
        for name, parameter in model.named_parameters():
            of_q = is_of_q(name)
            parameters[name] = flat[of_q][: parameter.numel()].view_as(parameter)
            flat[of_q] = flat[of_q][parameter.numel() :]
        configurations = torch.tensor(BITS, dtype=torch.float64)
        log_px, log_pz, log_qz = functional_call(
            _Reference(model), {f"model.{name}": p for name, p in parameters.items()}, (configurations.split(2, -1),)
        )
        return Tables(log_px[None], tuple(p[None] for p in log_pz), tuple(q[None] for q in log_qz))


class _Reference(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z):
        return reference(self.model, OBSERVATION.expand(16, -1), z)


class _Loss(nn.Module):
    def __init__(self, estimator, model):
        super().__init__()
        self.estimator, self.model = estimator, model

    def forward(self, x):
        return self.estimator(self.model, x)[0]


def mean_estimate(id: str, iw: int, settings: Settings, monkeypatch) -> Tensor:
    """Return the mean gradient of the bound over all outcomes of the draws, by phi and then theta."""
    model, estimator = two_by_two(), get_estimator(id, 1, iw, *settings)
    drawn = iw + estimator.num_extra
    outcomes = torch.cartesian_prod(*[torch.arange(16)] * drawn).view(-1, drawn)
    bits = torch.tensor(BITS, dtype=torch.float64)[outcomes]  # [outcomes, drawn, 4]
    with torch.no_grad():
        log_q = sum(reference(model, OBSERVATION.expand(16, -1), torch.tensor(BITS).double().split(2, -1))[2])
    probabilities = log_q[outcomes].sum(-1).exp()
    torch.testing.assert_close(probabilities.sum().item(), 1.0)
    parameters = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    loss = _Loss(estimator, model)

    def gradient(bits):
        layers = iter(bits.view(1, drawn, 1, 4).split(2, -1))
        # A uniform number of 0 draws one, the largest draws zero.
        monkeypatch.setattr(torch, "rand", lambda *shape, **options: (1 - next(layers)) * (1 - 2**-53))
        return grad(lambda parameters: functional_call(loss, parameters, (OBSERVATION,)))(parameters)

    found = vmap(gradient)(bits)
    monkeypatch.undo()
    of_q, of_p = (
        torch.cat([g.flatten(1) for name, g in found.items() if is_of_q(name.removeprefix("model.")) == side], 1)
        for side in (True, False)
    )
    return -probabilities @ torch.cat([of_q, of_p], 1)


IDS = (
    "reinforce",
    "rloo",
    "vargrad",
    "vimco-arithmetic",
    "vimco-geometric",
    "ovis-gamma0",
    "ovis-gamma1",
    "ovis-arithmetic-gamma0",
    "ovis-S1",
    "ovis-S1-exclusive",
    "wake-wake",
    "tvo-part2-config1",
    "tvo-part3-linear-right",
)
PLAIN, CHANGED = Settings(), Settings(alpha=0.5, beta=0.7, freebits=0.2)
CASES = [
    pytest.param(row, settings, id=f"{row.id}-{'plain' if settings == PLAIN else 'alpha, beta, freebits'}")
    for row in ROWS
    if row.id in IDS and not row.state
    for settings in (PLAIN, CHANGED)
    if row.takes(settings)
]


@pytest.mark.parametrize(("row", "settings"), CASES)
def test_the_mean_of_an_estimate_is_the_exact_gradient_of_two_layers_of_two_bits(row: Row, settings, monkeypatch):
    iw = 1 if row.id.endswith("-exclusive") else 2  # two particles are drawn in all
    expected = row.expectation(TwoByTwo, iw, settings)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(mean_estimate(row.id, iw, settings, monkeypatch), expected, rtol=0, atol=1e-10)


def test_freebits_hold_back_some_configurations_of_each_layer():
    for unclamped in oracles.values(TwoByTwo(), CHANGED).unclamped:
        assert 0 < unclamped.sum() < len(unclamped)


@pytest.mark.parametrize("id", ["ovis-gamma1", "wake-wake", "tvo-part2-config1"])
def test_a_biased_estimator_does_not_pass_for_an_unbiased_one(id, monkeypatch):
    bias = mean_estimate(id, 2, PLAIN, monkeypatch) - unbiased(TwoByTwo, 2, PLAIN)
    assert bias.abs().max() > 1e-3


def test_the_exact_oracle_of_gradient_studies_takes_the_network():
    model, estimator = two_by_two(), get_estimator("vimco-arithmetic", iw=2)
    oracle = oracle_gradient(estimator, model, OBSERVATION, ["inference_network", "generative_model", "prior"])
    assert oracle.method == "enumerated"
    torch.testing.assert_close(-oracle.gradient, unbiased(TwoByTwo, 2, PLAIN), rtol=0, atol=1e-10)


# --- Draws ------------------------------------------------------------------------------------------------------------


def frequencies(*layers: Tensor) -> Tensor:
    """Return how often each configuration of bits comes up, of layers [samples, bits]."""
    bits = torch.cat(layers, -1).long()
    index = (bits * 2 ** torch.arange(bits.shape[-1]).flip(0)).sum(-1)
    return torch.bincount(index, minlength=2 ** bits.shape[-1]) / len(index)


def assert_as_frequent(found: Tensor, expected: Tensor, num_samples: int) -> None:
    torch.testing.assert_close(expected.sum().item(), 1.0)
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / num_samples).sqrt()).all()


def test_z_is_drawn_from_q_layer_by_layer_for_every_observation():
    torch.manual_seed(0)
    model, num_samples = two_by_two(), 100_000
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    z = model(x, sample_shape=(10, num_samples // 10))["z"]
    configurations = torch.tensor(BITS, dtype=torch.float64).split(2, -1)
    for i in range(2):
        with torch.no_grad():
            log_q = reference(model, x[i].expand(16, -1), configurations)[2]
        found = frequencies(*(layer[:, :, i].flatten(0, 1) for layer in z))
        assert_as_frequent(found, (log_q[0] + log_q[1]).exp(), num_samples)


def test_samples_from_the_prior_are_those_of_the_joint():
    torch.manual_seed(0)
    model, num_samples = two_by_two(), 100_000
    sample = model.sample_from_prior(num_samples)
    assert [layer.shape for layer in sample["z"]] == [(num_samples, 2)] * 2
    assert sample["px"].mean.shape == (num_samples, 1, 1, 3)
    found = frequencies(*sample["z"], sample["px"].sample().flatten(1))
    bits = torch.tensor(list(product((0.0, 1.0), repeat=7)), dtype=torch.float64)
    z = bits[:, :4].split(2, -1)
    with torch.no_grad():
        log_px, log_pz, _ = reference(model, bits[:, 4:], z)
    assert_as_frequent(found, (log_px + log_pz[0] + log_pz[1]).exp(), num_samples)
    log_p = [pz.log_prob(layer).sum(-1) for pz, layer in zip(sample["pz"], sample["z"], strict=True)]
    _, expected, _ = reference(model, torch.zeros(num_samples, 3, dtype=torch.float64), sample["z"])
    for got, wanted in zip(log_p, expected, strict=True):
        torch.testing.assert_close(got, wanted)


# --- Replicates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["ovis-gamma1", "tvo-part2-config1", "wake-sleep"])
def test_vectorised_gradients_are_those_of_a_plain_loop_on_the_same_noise(id, model, x, monkeypatch):
    """One replicate after another by backward(), and all at once under vmap, each from noise of its own."""
    estimator, random = get_estimator(id, mc=2, iw=3), torch.rand
    monkeypatch.setattr(torch, "bernoulli", lambda probs, **options: (torch.rand(probs.shape) < probs).to(probs))
    noise = random(5, 10_000, dtype=torch.float64)

    def of_noise(row):
        used = 0

        def take(*shape, **options):
            nonlocal used
            size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
            used += size.numel()
            return row[used - size.numel() : used].view(size).clone()

        return take

    def gradient(row):
        monkeypatch.setattr(torch, "rand", of_noise(row))
        return grad(lambda parameters: functional_call(loss, parameters, (x,)))(parameters)

    loss = _Loss(estimator, model)
    parameters = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    batched = vmap(gradient)(noise)
    for i, row in enumerate(noise):
        monkeypatch.setattr(torch, "rand", of_noise(row))
        model.zero_grad()
        estimator(model, x)[0].backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(batched[f"model.{name}"][i], parameter.grad, rtol=0, atol=1e-10)


def test_gradient_statistics_are_vectorised_and_their_mean_is_exact():
    model, estimator = two_by_two(), get_estimator("vimco-arithmetic", iw=2)
    names = ["inference_network", "generative_model", "prior"]
    measurement = Measurement([estimator], model, OBSERVATION, 1000, names)
    assert measurement.block_size > 1
    statistics = gradient_statistics(estimator, model, OBSERVATION, 20_000, names)
    error = (-statistics.mean - unbiased(TwoByTwo, 2, PLAIN)).abs()
    assert (error < 5 * statistics.mean_se).all()


def test_statistics_of_single_replicates_are_those_of_a_loop_over_seeds(x):
    model, estimator = network(), get_estimator("ovis-gamma1", iw=5)
    measurement = Measurement([estimator], model, x, 4, "inference_network", seed=7, block_size=1)
    blocks = torch.cat([measurement.block(i)[0] for i in range(4)])
    wanted = []
    for i in range(4):
        torch.manual_seed(derive_seed("gradient_statistics", 7, i))
        model.zero_grad()
        estimator(model, x)[0].backward()
        grads = [p.grad for p in model.inference_network.parameters() if p.grad is not None]
        wanted.append(torch.cat([gradient.flatten() for gradient in grads]))
    torch.testing.assert_close(blocks, torch.stack(wanted), rtol=0, atol=1e-12)


def test_estimators_on_common_particles_agree_with_each_alone(x):
    estimators = [get_estimator(id, iw=4) for id in ("ovis-gamma1", "vimco-arithmetic", "tvo-part2-config1")]
    together = compare_gradients(estimators, network(), x, num_replicates=12, block_size=4)
    for estimator, found in zip(estimators, together, strict=True):
        alone = gradient_statistics(estimator, network(), x, num_replicates=12, block_size=4)
        torch.testing.assert_close(found.mean, alone.mean, rtol=0, atol=1e-10)


# --- What it is given -------------------------------------------------------------------------------------------------


def test_x_may_be_rows_or_images(model, x):
    results = []
    for given in (x, x.flatten(1)):
        torch.manual_seed(4)
        results.append(model(given, sample_shape=SHAPE)["log_px"])
    assert torch.equal(*results)
    for wrong in (x.squeeze(1), x[:, :, :1], x.flatten()):
        with pytest.raises(ValueError, match=r"SigmoidBeliefNetwork was given x of .* expected \[batch, 1, 2, 3\] or"):
            model(wrong)


def test_it_adapts_to_the_mean_of_the_training_points():
    torch.manual_seed(0)
    model, x = SigmoidBeliefNetwork((2, 2), (3,)), torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    assert model.mean_x.tolist() == [0.5] * 4
    model.adapt(x.repeat(4, 1).view(8, 2, 2))
    torch.testing.assert_close(model.mean_x, torch.tensor([0.0, 1.0, 0.5, 1.0]))
    bias = model.get_parameter("generative_model.0.output.bias")
    torch.testing.assert_close(bias.sigmoid(), torch.tensor([0.001, 0.999, 0.5, 0.999]))
    assert "mean_x" in model.state_dict()


def test_the_parameters_have_their_published_sizes():
    model = SigmoidBeliefNetwork()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "inference_network.0.output.weight": (200, 784),
        "inference_network.0.output.bias": (200,),
        "inference_network.1.output.weight": (200, 200),
        "inference_network.1.output.bias": (200,),
        "inference_network.2.output.weight": (200, 200),
        "inference_network.2.output.bias": (200,),
        "generative_model.0.output.weight": (784, 200),
        "generative_model.0.output.bias": (784,),
        "generative_model.1.output.weight": (200, 200),
        "generative_model.1.output.bias": (200,),
        "generative_model.2.output.weight": (200, 200),
        "generative_model.2.output.bias": (200,),
        "prior.logits": (200,),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": ()}, r"at least one layer of latents, .* not shape=\[1, 28, 28\], latents=\[\], hidden=\[\]"),
        ({"latents": (5, 0)}, r"sizes of at least 1: .* latents=\[5, 0\]"),
        ({"hidden": (0,)}, r"hidden=\[0\]"),
        ({"activation": "relu"}, "unknown activation 'relu'; choose from tanh, elu"),
    ],
)
def test_what_is_no_network_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SigmoidBeliefNetwork(**options)


def test_the_configuration_builds_the_published_network_adapted_to_its_data_set(tmp_path):
    config = OmegaConf.create(compose(["model=sbn", "dataset=shapes", f"data_root={tmp_path}"]).config)
    dataset = build_dataset(config)
    model = build_model(config, torch.device("cpu"), dataset)
    assert isinstance(model, SigmoidBeliefNetwork)
    torch.testing.assert_close(model.mean_x, dataset.points("train").flatten(1).mean(0))
    shapes = [parameter.shape for parameter in model.parameters()]
    assert shapes == [parameter.shape for parameter in SigmoidBeliefNetwork().parameters()]
    assert compose(["model=sbn"]).choices["dataset"] == "binarized_mnist"
