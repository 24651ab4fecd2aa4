import pytest
import torch
from torch.distributions import Categorical, Normal
from torch.func import functional_call, grad, vjp, vmap

from datasets.gaussian_mixture import GaussianMixtureData
from models import GaussianMixture
from models.gaussian_mixture import _Inversion, _NormalisedLookUp, draw_categorical
from models.particles import draw_particles

SHAPE = (2, 3)  # mc, iw


@pytest.fixture
def model() -> GaussianMixture:
    torch.manual_seed(1)
    model = GaussianMixture(num_components=5, hidden=4).double()
    torch.nn.init.normal_(model.prior.logits)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.tensor([[-3.0], [4.0], [11.0], [26.0], [31.0], [48.0], [9.0]], dtype=torch.float64)


def reference(model, x, z):
    """Return log p(x|z), log p(z) and log q(z|x) by torch.distributions."""
    return (
        Normal(10 * z.double(), 5.0).log_prob(x.squeeze(1)),
        Categorical(logits=model.prior.logits).log_prob(z),
        Categorical(logits=model.inference_network(x)).log_prob(z),
    )


def gradients(model, value):
    """Return the gradients of `value` by each parameter, zero where it does not depend on it."""
    parameters = list(model.parameters())
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("stop_phi", [None, False, True], ids=["forward", "log_prob", "log_prob stop_phi"])
def test_densities_and_their_gradients_are_those_of_torch_distributions(model, x, stop_phi):
    output = model(x, sample_shape=SHAPE)
    (z,) = output["z"]
    densities = (output["log_px"], output["log_pz"], output["log_qz"])
    if stop_phi is not None:
        densities = model.log_prob(x, [z.clone()], stop_phi=stop_phi)
    log_px, (log_pz,), (log_qz,) = densities
    px, pz, qz = reference(model, x, z)
    if stop_phi:
        qz = qz.detach()
    for value, expected in ((log_px, px), (log_pz, pz), (log_qz, qz)):
        assert value.shape == (*SHAPE, 7)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
        assert value.requires_grad == expected.requires_grad
        if value.requires_grad:
            weights = torch.randn_like(value)
            got = gradients(model, (weights * value).sum())
            wanted = gradients(model, (weights * expected).sum())
            for g, w in zip(got, wanted, strict=True):
                torch.testing.assert_close(g, w, rtol=0, atol=1e-10)


def test_the_distributions_of_the_output_agree_with_its_densities(model, x):
    output = model(x, reparam=True, sample_shape=SHAPE)
    (z,), (pz,), (qz,) = output["z"], output["pz"], output["qz"]
    assert z.dtype == torch.int64
    assert z.shape == (*SHAPE, 7)
    torch.testing.assert_close(output["px"].log_prob(x).squeeze(-1), output["log_px"])
    torch.testing.assert_close(pz.log_prob(z), output["log_pz"][0])
    torch.testing.assert_close(qz.log_prob(z), output["log_qz"][0])
    assert draw_particles(model, x, *SHAPE, reparam=True).with_gradient == (False,)


def test_z_is_drawn_from_q_for_every_observation(model, x):
    num_samples = 100_000
    z = model(x, sample_shape=(10, num_samples // 10))["z"][0]
    probabilities = model.inference_network(x).softmax(-1)
    frequencies = (z.flatten(0, 1).unsqueeze(-1) == torch.arange(5)).double().mean(0)
    error = (probabilities * (1 - probabilities) / num_samples).sqrt()
    assert ((frequencies - probabilities).abs() < 4.5 * error).all()


def test_particles_are_independent_of_each_other(model, x):
    first, second = model(x, sample_shape=(50_000, 2))["z"][0].unbind(1)
    joint = torch.zeros(7, 5, 5, dtype=torch.float64)
    for row in range(7):
        joint[row] = torch.bincount(5 * first[:, row] + second[:, row], minlength=25).view(5, 5) / 50_000
    probabilities = model.inference_network(x).softmax(-1)
    expected = probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    assert ((joint - expected).abs() < 5 * (expected * (1 - expected) / 50_000).sqrt()).all()


@pytest.mark.parametrize("num_values", [2, 20, 256, 257, 300])
def test_inverse_cumulative_sums_draw_every_value_as_often_as_its_probability(num_values):
    torch.manual_seed(0)
    probabilities = torch.rand(num_values, 2) + 0.1
    probabilities[1] = 0
    probabilities = probabilities / probabilities.sum(0)
    num_samples = 200_000
    z = draw_categorical(probabilities, num_samples)
    for column in range(2):
        frequencies = torch.bincount(z[:, column], minlength=num_values) / num_samples
        expected = probabilities[:, column]
        assert frequencies[1] == 0
        assert len(frequencies) == num_values
        assert ((frequencies - expected).abs() <= 4.5 * (expected * (1 - expected) / num_samples).sqrt()).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("excess", [1 - 1e-6, 1.0, 1 + 1e-6])
def test_the_extreme_draws_never_give_an_impossible_value(u, excess, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, u))
    # Sums that rounding leaves below or above one, with zeros at both ends.
    probabilities = excess * torch.tensor([[0.0], [0.7], [0.1], [0.2], [0.0], [1e-30]])
    assert draw_categorical(probabilities, 1).item() == (1 if u == 0 else 3)


def test_a_network_that_gives_nan_gives_nan_densities_and_no_error(model, x):
    with torch.no_grad():
        model.inference_network[0].weight.fill_(torch.nan)
    assert model(x, sample_shape=SHAPE)["log_qz"][0].isnan().all()


def test_x_may_come_without_its_last_dimension(model, x):
    torch.manual_seed(4)
    expected = model(x, sample_shape=SHAPE)["log_px"]
    torch.manual_seed(4)
    assert torch.equal(model(x.squeeze(1), sample_shape=SHAPE)["log_px"], expected)
    with pytest.raises(ValueError, match=r"GaussianMixture was given x of shape \[7, 2\], expected \[batch\]"):
        model(torch.zeros(7, 2))


def test_the_parameters_have_their_published_names_and_sizes():
    model = GaussianMixture()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "inference_network.0.weight": (16, 1),
        "inference_network.0.bias": (16,),
        "inference_network.2.weight": (20, 16),
        "inference_network.2.bias": (20,),
        "prior.logits": (20,),
    }
    torch.testing.assert_close(model.prior().exp(), torch.full((20,), 1 / 20))


def test_samples_from_the_prior_follow_it(model):
    output = model.sample_from_prior(50_000)
    (z,) = output["z"]
    expected = model.prior.logits.softmax(-1)
    frequencies = torch.bincount(z, minlength=5) / 50_000
    assert ((frequencies - expected).abs() < 4.5 * (expected * (1 - expected) / 50_000).sqrt()).all()
    assert torch.equal(output["px"].mean, 10 * z.unsqueeze(1).double())


def test_diagnostics_are_norms_between_probability_vectors(model, x):
    dataset = GaussianMixtureData(num_components=5, num_points=10)
    metrics = model.diagnostics(x, dataset)
    true_prior = [(5 + z) / 35 for z in range(5)]
    prior = model.prior.logits.softmax(-1).tolist()
    norms = []
    for (value,), q in zip(x.tolist(), model.inference_network(x).softmax(-1).tolist(), strict=True):
        joint = [
            p * Normal(10.0 * z, 5.0).log_prob(torch.tensor(value).double()).exp().item()
            for z, p in enumerate(true_prior)
        ]
        posterior = [p / sum(joint) for p in joint]
        norms.append(sum((a - b) ** 2 for a, b in zip(q, posterior, strict=True)) ** 0.5)
    assert set(metrics) == {"gmm/posterior_mse", "gmm/prior_mse"}
    assert metrics["gmm/posterior_mse"].item() == pytest.approx(sum(norms) / len(norms), rel=1e-10)
    expected = sum((a - b) ** 2 for a, b in zip(prior, true_prior, strict=True)) ** 0.5
    assert metrics["gmm/prior_mse"].item() == pytest.approx(expected, rel=1e-10)
    assert not any(value.requires_grad for value in metrics.values())


def test_a_data_set_of_another_number_of_components_is_refused(model, x):
    with pytest.raises(ValueError, match="GaussianMixture has 5 components, its data set 20"):
        model.diagnostics(x, GaussianMixtureData())
    with pytest.raises(ValueError, match="num_components must be at least 2 and hidden 1, not 1 and 16"):
        GaussianMixture(num_components=1)


def test_vmap_of_grad_equals_a_loop_of_grads_on_the_same_noise(model, x, monkeypatch):
    noise = torch.rand(6, SHAPE[0] * SHAPE[1], 7, dtype=torch.float64)
    parameters = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    forward = Forward(model)

    def loss(parameters, u):
        monkeypatch.setattr(torch, "rand", lambda *shape, **options: u)
        return functional_call(forward, parameters, (x,))

    batched = vmap(grad(loss), in_dims=(None, 0))(parameters, noise)
    for index, u in enumerate(noise):
        for name, value in grad(loss)(parameters, u).items():
            torch.testing.assert_close(batched[name][index], value, rtol=0, atol=1e-10)


class Forward(torch.nn.Module):
    """A scalar of all the densities of the particles, differently weighted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        particles = draw_particles(self.model, x, *SHAPE)
        log_w = particles.log_px + particles.log_pz[0] - particles.log_qz[0]
        return torch.logsumexp(log_w, 1).sum() + (log_w.detach() * particles.log_qz[0]).sum()


@pytest.mark.parametrize("piece", [1, 5, 2**16])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (None, None)])
@pytest.mark.parametrize(("num", "dtype"), [(4, torch.float32), (300, torch.float32), (300, torch.bfloat16)])
def test_inversion_counts_boundaries_in_pieces_and_under_vmap(piece, in_dims, num, dtype, monkeypatch):
    monkeypatch.setattr("models.pieces.PIECE", piece)
    u, boundaries = torch.rand(7, 3, 2).to(dtype), torch.rand(7, num, 1, 2).to(dtype).sort(1).values
    u[:, 0] = 1  # above all
    u, boundaries = (each if dim == 0 else each[0] for each, dim in zip((u, boundaries), in_dims, strict=True))
    expected = (u.unsqueeze(-3) >= boundaries).sum(-3)
    count = _Inversion.apply if in_dims == (None, None) else vmap(_Inversion.apply, in_dims)
    assert torch.equal(count(u, boundaries), expected)


def test_derivatives_of_the_look_up_are_those_of_the_log_softmax():
    """Of first and second order, and of many replicates at once."""
    logits, index = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (7, 4, 3))

    def reference(logits, index):
        return logits.log_softmax(-1).t().gather(0, index)

    assert torch.autograd.gradcheck(_NormalisedLookUp.apply, (logits, index[0]))
    assert torch.autograd.gradgradcheck(_NormalisedLookUp.apply, (logits, index[0]))
    torch.testing.assert_close(_NormalisedLookUp.apply(logits, index[0]), reference(logits, index[0]))
    for logits_dim in (None, 0):
        given = torch.randn(*([7] if logits_dim == 0 else []), 3, 5)
        by_own, by_reference = (
            vmap(grad(lambda logits, index, f=f: f(logits, index).square().sum()), (logits_dim, 0))(given, index)
            for f in (_NormalisedLookUp.apply, reference)
        )
        torch.testing.assert_close(by_own, by_reference)


def test_one_cotangent_may_serve_look_ups_of_many_indices():
    logits, index, cotangent = torch.randn(3, 5), torch.randint(5, (7, 4, 3)), torch.randn(4, 3)

    def pulled_back(index):
        return vjp(lambda logits: _NormalisedLookUp.apply(logits, index), logits)[1](cotangent)[0]

    torch.testing.assert_close(vmap(pulled_back)(index), torch.stack([pulled_back(each) for each in index]))


def test_a_z_of_another_batch_is_refused(model, x):
    with pytest.raises(ValueError, match=r"was given z of shape \[1, 1, 1\], expected \[mc, iw, \d+\]$"):
        model.log_prob(x, [torch.zeros(1, 1, 1, dtype=torch.int64)])
