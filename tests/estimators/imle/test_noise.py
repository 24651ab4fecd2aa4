"""The laws of the noise: exact moments, and Kolmogorov-Smirnov tests with a fixed seed."""

from math import log

import numpy as np
import pytest
import torch
from scipy import stats

from estimators.imle import GumbelNoiseDistribution, NoiseDistribution, SumOfGammaNoiseDistribution
from estimators.imle.noise import draw

N = 3000


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("k", "s"), [(1, 1), (1, 100), (3, 1), (3, 10), (10, 30)])
def test_the_sum_of_k_draws_is_the_largest_of_s_exponentials(k, s):
    total = SumOfGammaNoiseDistribution(k, s).sample(torch.Size((N, k)), dtype=torch.float64).sum(1).numpy()
    orders = np.arange(1, s + 1)
    mean, variance = (1 / orders).sum() - log(s), (1 / orders**2).sum()
    assert total.mean() == pytest.approx(mean, abs=4 * (variance / N) ** 0.5)
    fourth = ((total - mean) ** 4).mean()
    assert total.var() == pytest.approx(variance, abs=4 * ((fourth - variance**2) / N) ** 0.5)
    law = stats.kstest(total, lambda x: np.clip(1 - np.exp(-np.maximum(x + log(s), 0)), 0, 1) ** s)
    assert law.pvalue > 1e-3


def test_it_is_not_the_gumbel_limit():
    total = SumOfGammaNoiseDistribution(3, 1).sample(torch.Size((N, 3)), dtype=torch.float64).sum(1).numpy()
    assert stats.kstest(total, "gumbel_r").pvalue < 1e-6


@pytest.mark.parametrize("k", [0.5, 2.5])
def test_moments_of_a_draw_whose_k_is_no_integer(k):
    s = 7
    draws = SumOfGammaNoiseDistribution(k, s).sample(torch.Size((N,)), dtype=torch.float64)
    orders = torch.arange(1, s + 1, dtype=torch.float64)
    mean, variance = ((1 / orders).sum().item() - log(s)) / k, (1 / orders**2).sum().item() / k
    assert draws.mean().item() == pytest.approx(mean, abs=4 * (variance / N) ** 0.5)
    assert draws.var().item() == pytest.approx(variance, rel=0.2)


def test_the_gumbel_law():
    draws = GumbelNoiseDistribution(0.5, 2.0).sample(torch.Size((N,)), dtype=torch.float64).numpy()
    assert stats.kstest(draws, "gumbel_r", args=(0.5, 2.0)).pvalue > 1e-3


@pytest.mark.parametrize("noise", [SumOfGammaNoiseDistribution(2), GumbelNoiseDistribution()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_drawn_in_its_dtype(noise, dtype):
    sample = noise.sample(torch.Size((50, 3)), dtype=dtype, device="cpu")
    assert sample.dtype == dtype
    assert sample.isfinite().all()
    assert len(sample.unique()) == 150  # float64 has digits of its own, not those of float32
    assert isinstance(noise, NoiseDistribution)
    if dtype == torch.float64:
        assert (sample != sample.float().double()).all()


def test_half_precision_noise_is_drawn_in_float32():
    like = torch.zeros(1000, dtype=torch.bfloat16)
    torch.manual_seed(1)
    found = draw(GumbelNoiseDistribution(), like)
    torch.manual_seed(1)
    assert torch.equal(found, GumbelNoiseDistribution().sample(like.shape).bfloat16())
    assert draw(None, like).shape == ()
    for noise in (GumbelNoiseDistribution(), SumOfGammaNoiseDistribution(2)):
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(1)
            half = noise.sample(like.shape, dtype=dtype)
            torch.manual_seed(1)
            assert torch.equal(half, noise.sample(like.shape).to(dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SumOfGammaNoiseDistribution(0), "k=0, nb_iterations=10: expected k above 0"),
        (lambda: SumOfGammaNoiseDistribution(1, 0), "at least 1 iteration"),
        (lambda: GumbelNoiseDistribution(scale=0), "scale=0"),
    ],
)
def test_options_that_no_noise_has(make, message):
    with pytest.raises(ValueError, match=message):
        make()
