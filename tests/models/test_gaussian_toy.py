from math import sqrt

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.func import functional_call, grad, vmap

from datasets.gaussian_toy import GaussianToyData
from models import GaussianToy
from models.gaussian_toy import _Product
from models.particles import draw_particles

SHAPE = (2, 3)  # mc, iw


@pytest.fixture
def model() -> GaussianToy:
    torch.manual_seed(1)
    model = GaussianToy(dim=4).double()
    torch.nn.init.normal_(model.b)
    torch.nn.init.normal_(model.mu)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(5, 4, dtype=torch.float64) + 1


def reference(model, x, z, mean):
    """Return log p(x|z), log p(z) and log q(z|x) by torch.distributions."""
    return (
        Independent(Normal(z, 1.0), 1).log_prob(x),
        Independent(Normal(model.mu, 1.0), 1).log_prob(z),
        Independent(Normal(mean, model.std), 1).log_prob(z),
    )


def gradients(model, value):
    """Return the gradients of `value` by A, b and mu, zero where it does not depend on them."""
    value = value + 0 * model.mu.sum()
    return torch.autograd.grad(
        value, [model.A, model.b, model.mu], retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("reparam", [False, True])
@pytest.mark.parametrize("scale", ["std", "variance"])
def test_densities_and_their_gradients_are_those_of_torch_distributions(model, x, reparam, scale):
    model.std = GaussianToy(scale=scale).std
    output = model(x, reparam=reparam, sample_shape=SHAPE)
    mean = x @ model.A.T + model.b
    # The same noise, so that z depends on the parameters of q exactly where it is reparameterised.
    eps = ((output["z"][0] - mean) / model.std).detach()
    z = (mean if reparam else mean.detach()) + model.std * eps
    densities = output["log_px"], *output["log_pz"], *output["log_qz"]
    for value, expected in zip(densities, reference(model, x, z, mean), strict=True):
        assert value.shape == (*SHAPE, 5)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
        weights = torch.randn_like(value)
        for got, wanted in zip(
            gradients(model, (weights * value).sum()), gradients(model, (weights * expected).sum()), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reparam", [False, True])
def test_the_distributions_of_the_output_agree_with_its_densities(model, x, reparam):
    output = model(x, reparam=reparam, sample_shape=SHAPE)
    (z,), (pz,), (qz,) = output["z"], output["pz"], output["qz"]
    assert z.shape == (*SHAPE, 5, 4)
    assert z.requires_grad == reparam
    assert output["z"][0] is z
    torch.testing.assert_close(output["px"].log_prob(x).sum(-1), output["log_px"])
    torch.testing.assert_close(pz.log_prob(z).sum(-1), output["log_pz"][0])
    torch.testing.assert_close(qz.log_prob(z).sum(-1), output["log_qz"][0])


def test_float32_keeps_six_digits_of_the_densities():
    torch.manual_seed(3)
    model, x = GaussianToy(), GaussianToyData().points("train")[:50]
    output = model(x, sample_shape=(1, 20))
    exact = GaussianToy().double()
    exact.load_state_dict(model.state_dict())
    expected = exact.log_prob(x.double(), [output["z"][0].double()])
    for got, wanted in zip(
        (output["log_px"], *output["log_pz"], *output["log_qz"]),
        (expected.log_px, *expected.log_pz, *expected.log_qz),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=2e-5)


def test_log_prob_is_that_of_a_given_z(model, x):
    z = torch.randn(*SHAPE, 5, 4, dtype=torch.float64)
    densities = model.log_prob(x, [z])
    expected = reference(model, x, z, x @ model.A.T + model.b)
    for got, wanted in zip((densities.log_px, *densities.log_pz, *densities.log_qz), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_log_prob_with_stop_phi_is_constant_in_the_parameters_of_q_but_not_in_z(model, x):
    z = torch.randn(*SHAPE, 5, 4, dtype=torch.float64, requires_grad=True)
    stopped, plain = model.log_prob(x, [z], stop_phi=True), model.log_prob(x, [z])
    assert torch.equal(stopped.log_qz[0], plain.log_qz[0])
    by_z, by_A, by_b = torch.autograd.grad(
        stopped.log_qz[0].sum(), [z, model.A, model.b], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(by_z, torch.autograd.grad(plain.log_qz[0].sum(), z)[0])
    assert not by_A.any()
    assert not by_b.any()


def test_z_is_drawn_from_q_for_every_observation_copy_and_particle(model, x):
    mc, iw = 40, 500
    z = model(x, sample_shape=(mc, iw))["z"][0].detach()
    mean = (x @ model.A.T + model.b).detach()
    error = model.std / sqrt(mc * iw)
    assert (z.mean((0, 1)) - mean).abs().max() < 4.5 * error
    assert (z.std((0, 1)) - model.std).abs().max() < 4.5 * error / sqrt(2)
    flat = (z - mean).permute(1, 2, 3, 0).flatten(0, 2)  # 10,000 numbers for each copy
    assert (torch.corrcoef(flat.T) - torch.eye(mc)).abs().max() < 5 / sqrt(10_000)


def test_the_scale_is_a_standard_deviation_or_a_variance():
    assert GaussianToy(scale="std").std == 2 / 3
    assert GaussianToy(scale="variance").std ** 2 == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="unknown scale 'sd'; choose from std, variance"):
        GaussianToy(scale="sd")  # type: ignore[arg-type]


def test_samples_from_the_prior_are_centred_at_mu(model):
    output = model.sample_from_prior(20_000)
    (z,) = output["z"]
    assert z.shape == (20_000, 4)
    assert (z.mean(0) - model.mu).abs().max() < 4.5 / sqrt(20_000)
    assert torch.equal(output["px"].mean, z)
    assert output["pz"][0].batch_shape == (20_000, 4)


def test_diagnostics_are_the_mean_squared_distances_to_the_optimum(model):
    dataset = GaussianToyData(dim=4, num_points=30)
    metrics = model.diagnostics(dataset.points("test"), dataset)
    assert set(metrics) == {"gaussian_toy/mse_A", "gaussian_toy/mse_b", "gaussian_toy/mse_mu"}
    mean = dataset.points("train").double().sum(0) / 30
    squares = [(model.A[i, j] - (0.5 if i == j else 0.0)).item() ** 2 for i in range(4) for j in range(4)]
    assert metrics["gaussian_toy/mse_A"].item() == pytest.approx(sum(squares) / 16)
    b = sum((model.b[i] - mean[i] / 2).item() ** 2 for i in range(4)) / 4
    mu = sum((model.mu[i] - mean[i]).item() ** 2 for i in range(4)) / 4
    assert metrics["gaussian_toy/mse_b"].item() == pytest.approx(b, rel=1e-5)
    assert metrics["gaussian_toy/mse_mu"].item() == pytest.approx(mu, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_placing_at_the_optimum_perturbs_the_parameters_and_leaves_the_optimum():
    dataset = GaussianToyData(seed=3)
    mu = dataset.mu.clone()
    model = GaussianToy()
    model.place_at_optimum(dataset)
    assert all(value == 0 for value in model.diagnostics(dataset.points("test"), dataset).values())

    model.place_at_optimum(dataset, perturbation=0.01, seed=5)
    assert model.diagnostics(dataset.points("test"), dataset)["gaussian_toy/mse_A"].item() == pytest.approx(
        1e-4, rel=0.3
    )
    assert torch.equal(dataset.mu, mu)
    assert torch.equal(dataset.A, torch.eye(20) / 2)
    assert torch.equal(dataset.b, mu / 2)

    placed = model.A.clone()
    model.place_at_optimum(dataset, perturbation=0.01, seed=6)
    assert not torch.equal(model.A, placed)
    model.place_at_optimum(dataset, perturbation=0.01, seed=5)
    assert torch.equal(model.A, placed)


def test_the_exact_posterior_mean_is_the_optimum_of_q(model):
    dataset = GaussianToyData(dim=4, num_points=40)
    model.place_at_optimum(dataset)
    x = dataset.points("train").double()
    # KL(q | p(z|x)) has a zero gradient by q's mean where that is (x + mu)/2, whatever the variance of q.
    torch.testing.assert_close(x @ model.A.T + model.b, (x + model.mu) / 2)


def test_points_of_another_dimension_are_refused(model):
    with pytest.raises(ValueError, match=r"GaussianToy was given x of shape \[7, 3\], expected \[batch, 4\]"):
        model(torch.zeros(7, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"GaussianToy was given x of shape \[1024, 3\]"):
        model.place_at_optimum(GaussianToyData(dim=3))
    with pytest.raises(ValueError, match="dim must be at least 1, not 0"):
        GaussianToy(dim=0)


@pytest.mark.parametrize("reparam", [False, True])
def test_vmap_of_grad_equals_a_loop_of_grads_on_the_same_noise(model, x, reparam, monkeypatch):
    noise = torch.randn(6, 5, SHAPE[0] * SHAPE[1], 4, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, eps):
        monkeypatch.setattr(torch, "randn", lambda *shape, **options: eps)
        forward = Forward(model, reparam)
        return functional_call(forward, {f"model.{name}": value for name, value in parameters.items()}, (x,))

    batched = vmap(grad(loss), in_dims=(None, 0))(parameters, noise)
    for index, eps in enumerate(noise):
        for name, value in grad(loss)(parameters, eps).items():
            torch.testing.assert_close(batched[name][index], value, rtol=0, atol=1e-10)


class Forward(torch.nn.Module):
    """A scalar of all the densities of the particles, differently weighted."""

    def __init__(self, model, reparam):
        super().__init__()
        self.model, self.reparam = model, reparam

    def forward(self, x):
        particles = draw_particles(self.model, x, *SHAPE, reparam=self.reparam)
        log_w = particles.log_px + particles.log_pz[0] - particles.log_qz[0]
        return torch.logsumexp(log_w, 1).sum() + (log_w.detach() * particles.log_qz[0]).sum()


@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 0), (1, 2)])
def test_products_with_noise_are_vectorised(in_dims):
    generator = torch.Generator().manual_seed(0)
    shapes = [[3, 2, 4], [3, 4, 5]]
    for shape, dim in zip(shapes, in_dims, strict=True):
        if dim is not None:
            shape.insert(dim, 6)
    gradient, eps = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    torch.testing.assert_close(vmap(_Product.apply, in_dims)(gradient, eps), vmap(torch.bmm, in_dims)(gradient, eps))


def test_log_densities_have_second_derivatives(model, x):
    def densities(A, b, mu):
        torch.manual_seed(0)
        output = functional_call(model, {"A": A, "b": b, "mu": mu}, (x,), {"reparam": True, "sample_shape": SHAPE})
        return output["log_px"], *output["log_pz"], *output["log_qz"]

    parameters = [each.detach().requires_grad_() for each in (model.A, model.b, model.mu)]
    assert torch.autograd.gradcheck(densities, parameters)
    assert torch.autograd.gradgradcheck(densities, parameters)
