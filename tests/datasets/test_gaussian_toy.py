import pytest
import torch

from datasets.gaussian_toy import GaussianToyData


def test_the_optimum_belongs_to_the_training_points():
    dataset = GaussianToyData(dim=3, num_points=50, seed=4)
    x = dataset.points("train")
    assert x.shape == (50, 3)
    assert x.dtype == torch.float32
    torch.testing.assert_close(dataset.mu, x.sum(0) / 50)
    assert torch.equal(dataset.A, torch.eye(3) / 2)
    assert torch.equal(dataset.b, dataset.mu / 2)


def test_the_published_sizes_are_the_defaults():
    assert GaussianToyData().points("train").shape == (1024, 20)


def test_the_points_of_all_splits_have_variance_two_around_one_centre():
    dataset = GaussianToyData(dim=4, num_points=50_000)
    train, test = dataset.points("train"), dataset.points("test")
    # Standard errors: of a mean (2/N)^0.5, of their difference (4/N)^0.5, of a variance 2 (2/N)^0.5.
    assert (train.mean(0) - test.mean(0)).abs().max() < 4 * (4 / 50_000) ** 0.5
    assert (train.var(0) - 2).abs().max() < 4 * 2 * (2 / 50_000) ** 0.5


@pytest.mark.parametrize("arguments", [{"dim": 0}, {"num_points": 0}])
def test_sizes_without_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match="dim and num_points must be at least 1"):
        GaussianToyData(**arguments)
