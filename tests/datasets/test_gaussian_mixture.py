import pytest
import torch

from datasets.gaussian_mixture import GaussianMixtureData


def test_the_true_prior_is_that_of_the_paper():
    prior = GaussianMixtureData().true_prior
    assert prior.shape == (20,)
    for z, probability in enumerate(prior.tolist()):
        assert probability == pytest.approx((5 + z) / 290, abs=1e-15)


@pytest.mark.parametrize("source", ["points", "batch"])
def test_x_has_the_distribution_of_the_mixture(source):
    num_points = 200_000
    dataset = GaussianMixtureData(num_points=num_points)
    x = dataset.points("train") if source == "points" else dataset.batch(5, num_points, seed=2)
    assert x.shape == (num_points, 1)
    assert x.dtype == torch.float32
    # The distribution function of x at several places, within four standard errors.
    means = 10 * torch.arange(20, dtype=torch.float64)
    for place in (-5.0, 3.0, 50.0, 111.0, 160.0, 195.0):
        expected = dataset.true_prior @ torch.special.ndtr((place - means) / 5)
        error = (expected * (1 - expected) / num_points).sqrt()
        assert abs((x <= place).double().mean() - expected) < 4 * error


def test_the_batches_of_neighbouring_blocks_and_steps_are_independent():
    dataset = GaussianMixtureData()
    batches = torch.stack([dataset.batch(step, 500, seed=1).squeeze(1) for step in range(60, 72)])
    correlations = torch.corrcoef(batches) - torch.eye(len(batches))
    assert correlations.abs().max() < 5 / 500**0.5


def test_a_batch_larger_than_a_block_is_drawn_whole():
    assert GaussianMixtureData().batch(1, 50_000, seed=1).unique().numel() > 49_000


@pytest.mark.parametrize("arguments", [{"num_components": 1}, {"num_points": 0}])
def test_sizes_without_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match="num_components must be at least 2 and num_points 1"):
        GaussianMixtureData(**arguments)
