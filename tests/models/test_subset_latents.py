"""k of N bits: densities, draws and marginals against the enumerated law, and the I-MLE draws."""

from math import comb, log

import pytest
import torch

from models import VAE
from models.solvers import subsets
from models.subset_latents import Subset, SubsetLatents, draw_subsets

N, K = 5, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_densities_are_those_of_all_subsets(k, scale):
    theta = scale * torch.randn(3, N, dtype=torch.float64)
    z = subsets(N, k)
    exact = (theta @ z.t()).log_softmax(-1)
    found = Subset(theta.unsqueeze(1), k).log_prob(z)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(Subset(theta, k).mean, exact.exp() @ z)
    latents = SubsetLatents(N, k)
    torch.testing.assert_close(latents.density(None, z), torch.full((len(z),), -log(comb(N, k)), dtype=torch.float64))
    torch.testing.assert_close(latents.density(torch.zeros(N, dtype=torch.float64), z), latents.density(None, z))


def test_the_gradient_of_the_density_is_finite():
    theta = torch.zeros(2, N, requires_grad=True)
    Subset(theta, K).log_prob(subsets(N, K)[:2].float()).sum().backward()
    torch.testing.assert_close(theta.grad, subsets(N, K)[:2].float() - K / N)


def test_draws_have_their_law():
    theta, num = torch.tensor([[0.5, -1.0, 2.0, 0.1, -0.3], [0, 0, 0, 3.0, 3.0]]), 20_000
    z = draw_subsets(theta, K, (num,))
    assert z.shape == (num, 2, N)
    assert (z.sum(-1) == K).all()
    all_subsets = subsets(N, K).float()
    for row in range(2):
        share = (z[:, row] @ all_subsets.t() == K).float().mean(0)
        exact = (theta[row] @ all_subsets.t()).softmax(-1)
        assert ((share - exact).abs() < 4.5 * (exact * (1 - exact) / num).sqrt() + 1e-6).all()


def test_samples_of_a_vae_carry_a_gradient_under_reparam_alone():
    model = VAE(shape=(1, 4, 4), latent="subset", latents=N, chosen=K, hidden=(8,))
    x = (torch.rand(3, 1, 4, 4) < 0.5).float()
    for reparam in (False, True):
        output = model(x, reparam=reparam, sample_shape=(2, 4))
        (z,) = output["z"]
        assert z.shape == (2, 4, 3, N)
        assert (z.sum(-1) == K).all()
        assert z.requires_grad == reparam
        found = model.log_prob(x, [z.detach()])
        torch.testing.assert_close(found.log_qz[0], output["log_qz"][0])
    output["log_px"].mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    weight = dict(model.inference_network.named_parameters())["2.weight"]
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    assert model.sample_from_prior(6)["z"][0].shape == (6, N)


def test_an_items_samples_are_of_its_own_scores():
    features = torch.tensor([[9.0, 9, 0, 0, 0], [0, 0, 0, 9.0, 9]]) * 10
    z = SubsetLatents(N, K).draw(features, None, (2, 3), True, 1.0).z
    assert torch.equal(z, (features > 0).float().expand(2, 3, 2, N))


def test_as_many_cannot_be_chosen():
    with pytest.raises(ValueError, match="chosen = 6 of latents = 5, expected 1 to 5"):
        VAE(latent="subset", latents=5, chosen=6)
