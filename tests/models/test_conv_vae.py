"""What the convolutional VAE has of its own: its two networks. The rest is ImageVAE's: test_vae.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli
from torch.func import functional_call, grad, vmap

from analysis.gradients import gradient_statistics
from estimators import get_estimator
from models import ConvVAE

SHAPE = (2, 3)  # mc, iw
BATCH = 4
KINDS: dict[str, dict[str, Any]] = {
    "normal": {"latents": 3},
    "bernoulli": {"latent": "bernoulli", "latents": 3, "learn_prior": True},
    "categorical": {"latent": "categorical", "latents": 2, "categories": 3, "keys": 2},
}


@pytest.fixture
def x() -> Tensor:
    return torch.randint(0, 2, (BATCH, 1, 8, 4), generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def model(request, x) -> ConvVAE:
    return network(x, **request.param)


def network(x: Tensor, **options) -> ConvVAE:
    torch.manual_seed(1)
    model = ConvVAE((1, 8, 4), channels=(2, 3), hidden=5, **options).double()
    model.adapt(x)
    return model


@pytest.mark.parametrize("reparam", [False, True])
def test_log_px_is_that_of_the_pixels_which_the_decoder_makes_of_one_z_after_another(model, x, reparam):
    output = model(x, reparam=reparam, sample_shape=SHAPE)
    (z,) = output["z"]
    rows = z.flatten(-len(model.latents.shape)).flatten(0, 2)
    logits = torch.cat([model.generative_model.network(row[None]).flatten(1) for row in rows])
    logits = logits.view(*SHAPE, BATCH, 32) + model.generative_model.bias
    expected = Bernoulli(logits=logits).log_prob(x.flatten(1)).sum(-1)
    torch.testing.assert_close(output["log_px"], expected)
    torch.testing.assert_close(model.log_prob(x, [z]).log_px, expected)
    torch.testing.assert_close(output["px"].log_prob(x).flatten(3).sum(-1), expected)
    parameters = list(model.generative_model.parameters())
    for got, wanted in zip(
        *(torch.autograd.grad(value.sum(), parameters, retain_graph=True) for value in (output["log_px"], expected)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_every_observation_has_the_q_that_it_has_alone(model, x):
    alone = torch.cat([model.inference_network(row[None].flatten(1) - model.mean_x) for row in x])
    together = model.inference_network(x.flatten(1) - model.mean_x)
    torch.testing.assert_close(together, alone)
    assert together.std(0).min() > 0
    output = model(x, sample_shape=SHAPE)
    expected = model.latents.log_prob(alone, output["z"][0], model.temperature)
    torch.testing.assert_close(output["log_qz"][0], expected)


def test_an_observation_moves_no_other_under_normalisation(x):
    model = network(x, latents=3, normalization="layer")
    moved = x.clone()
    moved[0] = 1 - moved[0]
    before, after = (model.inference_network(each.flatten(1) - model.mean_x) for each in (x, moved))
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:])


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradient_statistics_of_every_kind_are_vectorised(kind, x):
    """gradient_statistics warns where they cannot be vectorised, and a warning is an error."""
    for options in ({}, {"dropout": 0.3, "normalization": "layer"}):
        model = network(x, **KINDS[kind], **options)
        for id in ("ovis-gamma1", "pathwise-iwae", "dreg"):
            statistics = gradient_statistics(get_estimator(id, iw=3), model, x, 4)
            assert statistics.mean.isfinite().all()


@pytest.mark.parametrize("id", ["pathwise-iwae", "dreg"])
def test_vmap_of_grad_equals_a_loop_of_grads_on_the_same_noise(x, id, monkeypatch):
    loss = Loss(get_estimator(id, iw=3), network(x, latents=3, normalization="layer"))
    parameters = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    noise = torch.randn(5, 1, 3, BATCH, 3, dtype=torch.float64)

    def gradient(eps: Tensor) -> dict[str, Tensor]:
        monkeypatch.setattr(torch, "randn", lambda *shape, **options: eps.view(shape))
        return grad(lambda values: functional_call(loss, values, (x,)))(parameters)

    batched = vmap(gradient)(noise)
    for index, eps in enumerate(noise):
        for name, value in gradient(eps).items():
            torch.testing.assert_close(batched[name][index], value, rtol=0, atol=1e-10)


class Loss(torch.nn.Module):
    def __init__(self, estimator, model):
        super().__init__()
        self.estimator, self.model = estimator, model

    def forward(self, x):
        return self.estimator(self.model, x)[0]


def test_it_adapts_to_the_mean_of_the_training_points(model, x):
    torch.testing.assert_close(model.mean_x, x.flatten(1).mean(0))
    expected = model.mean_x.clamp(0.001, 0.999)
    torch.testing.assert_close(model.generative_model.bias.sigmoid(), expected)
    assert model.sample_from_prior(3)["px"].mean.shape == (3, 1, 8, 4)


def test_the_defaults_have_the_shape_of_mnist():
    model = ConvVAE()
    output = model(torch.zeros(2, 784), sample_shape=(1, 2))
    assert output["px"].mean.shape == (1, 2, 2, 1, 28, 28)
    assert output["z"][0].shape == (1, 2, 2, 200)
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"inference_network", "generative_model"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 28, 30)}, r"^shape = \[1, 28, 30\] with 2 channels, expected .* multiples of 4, and one entry"),
        ({"shape": (28, 28)}, r"^shape = \[28, 28\] with 2 channels, expected \[channels, height, width\]"),
        ({"channels": ()}, r"^shape = \[1, 28, 28\] with 0 channels, expected .* one entry of channels or more$"),
        ({"channels": (3, 0)}, r"^channels = \[3, 0\], expected sizes of at least 1$"),
        ({"hidden": 0}, r"^hidden = \[0\], expected sizes of at least 1$"),
        ({"normalization": "batch"}, r"^unknown normalization 'batch'; choose from none, layer"),
    ],
)
def test_options_that_make_no_model_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        ConvVAE(**options)
