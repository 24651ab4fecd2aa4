from itertools import pairwise

import numpy as np
import pytest
import torch

from datasets import images
from datasets.base import SPLITS
from datasets.images import BinaryImages, GreyImages, shuffled, split_off

LEVELS = np.arange(256, dtype=np.uint8)


def grey(binarization="draw", seed=0, num_images=60):
    pixels = np.random.default_rng(1).integers(0, 256, (num_images, 784), dtype=np.uint8)
    return GreyImages({split: np.roll(pixels, i) for i, split in enumerate(SPLITS)}, binarization, seed)


def counted(num_images):
    """Return images that differ: the first pixels of each are its number in binary digits."""
    bits = np.unpackbits(np.arange(num_images, dtype=">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.pad(bits, ((0, 0), (0, 784 - 32)))


def numbers(x):
    return (x.flatten(1)[:, :32].long() * 2 ** torch.arange(31, -1, -1)).sum(1).tolist()


@pytest.mark.parametrize("shape", [(-1, 784), (-1, 28, 28)])
def test_images_are_given_in_their_shape_as_zeros_and_ones(shape):
    pixels = np.random.default_rng(0).integers(0, 2, (9, 784), dtype=np.uint8)
    dataset = BinaryImages({split: pixels.reshape(shape) for split in SPLITS})
    for x in (dataset.points("valid"), dataset.batch(0, 9, seed=1)):
        assert x.shape == (9, 1, 28, 28)
        assert x.dtype == torch.float32
    np.testing.assert_array_equal(dataset.points("test").flatten(1), pixels)


def test_a_threshold_is_between_the_grey_levels_next_to_one_half():
    pixels = np.resize(LEVELS, (3, 784))
    dataset = GreyImages(dict.fromkeys(SPLITS, pixels), "threshold", 0)
    expected = torch.from_numpy(pixels / 255 > 0.5).float().view(3, 1, 28, 28)
    assert torch.equal(dataset.points("test"), expected)
    assert torch.equal(dataset.batch(0, 3, seed=1).sum(0), expected.sum(0))


def test_a_level_is_drawn_with_its_probability_over_all_words_that_can_come():
    class EveryWord:
        def random_raw(self, size):
            return np.arange(2**16, dtype=np.uint16).view(np.uint64)

    for level in LEVELS:
        drawn = images._draw(torch.full((2**16,), int(level), dtype=torch.uint8), EveryWord())  # type: ignore[arg-type]
        error = drawn.double().mean().item() - level / 255
        assert abs(error) < 2**-16
        if level in (0, 255):
            assert error == 0


def test_the_draws_of_a_level_have_its_mean_and_are_independent():
    dataset = GreyImages(dict.fromkeys(SPLITS, np.full((100, 784), 51, np.uint8)), "draw", 0)
    draws = torch.stack([dataset.batch(step, 100, seed=1).flatten() for step in range(20)])
    draws = torch.cat([draws, *(dataset.points(split).flatten()[None] for split in SPLITS)])
    num_pixels = draws.shape[1]
    assert ((draws.mean(1) - 0.2).abs() < 4.5 * (0.16 / num_pixels) ** 0.5).all()
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlations.abs().max() < 5 / num_pixels**0.5


def test_a_batch_is_drawn_afresh_from_seed_and_step_alone():
    dataset = grey()
    again = grey()
    batches = {step: dataset.batch(step, 60, seed=3) for step in (0, 1, 7)}
    for step in reversed(batches):
        again.batch(step + 1, 20, seed=5)
        assert torch.equal(again.batch(step, 60, seed=3), batches[step])
    # A batch of the whole set, sorted: the same images, with other pixels each time.
    assert len({batch.sum().item() for batch in batches.values()}) == 3
    assert not torch.equal(grey(seed=1).batch(0, 60, seed=3), batches[0])


def test_the_fixed_points_are_drawn_once_by_the_seed_of_the_data_set():
    for split in SPLITS:
        points = grey().points(split)
        assert torch.equal(grey().points(split), points)
        assert not torch.equal(grey(seed=1).points(split), points)
    assert torch.equal(grey("threshold").points("test"), grey("threshold", seed=1).points("test"))


def test_points_drawn_in_chunks_are_those_drawn_at_once(monkeypatch):
    whole = grey(num_images=50).points("train")
    monkeypatch.setattr(images, "CHUNK", 7)
    assert torch.equal(grey(num_images=50).points("train"), whole)


def test_the_draws_stay_the_same_from_release_to_release():
    assert grey().points("test")[0].sum() == 378
    assert grey().batch(5, 10, seed=2).sum() == 3969


def test_black_and_white_pixels_are_not_changed_by_drawing():
    pixels = counted(40)
    drawn = GreyImages(dict.fromkeys(SPLITS, pixels * np.uint8(255)), "draw", 3)
    fixed = BinaryImages(dict.fromkeys(SPLITS, pixels))
    for step in range(5):
        assert torch.equal(drawn.batch(step, 7, seed=2), fixed.batch(step, 7, seed=2))
    assert torch.equal(drawn.points("train"), fixed.points("train"))


def test_every_epoch_has_each_image_once():
    dataset = BinaryImages(dict.fromkeys(SPLITS, counted(300)))
    assert dataset.batches_per_epoch(24) == 12
    epochs = [numbers(torch.cat([dataset.batch(12 * e + i, 25, seed=1) for i in range(12)])) for e in range(3)]
    assert all(sorted(epoch) == list(range(300)) for epoch in epochs)
    assert all(before != after for before, after in pairwise(epochs))


def test_what_a_data_set_holds_moves_with_it():
    dataset = grey("threshold")
    dataset.batch(0, 10, seed=1)
    assert dataset.to("meta") is dataset
    assert dataset.batch(1, 10, seed=1).device.type == "meta"
    assert dataset.points("test").device.type == "meta"
    drawn = grey("draw")
    drawn.to("meta")
    assert drawn._grey is not None
    assert drawn._grey.device == drawn.points("test").device == torch.device("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("binarization", ["threshold", "draw"])
def test_the_numbers_are_the_same_on_a_gpu(binarization):
    here, there = grey(binarization), grey(binarization).to("cuda")
    for step in (0, 3, 9, 1):
        batch = there.batch(step, 10, seed=2)
        assert batch.device.type == "cuda"
        assert torch.equal(batch.cpu(), here.batch(step, 10, seed=2))
    assert torch.equal(there.points("valid").cpu(), here.points("valid"))


def test_splits_are_parted_without_rest_and_in_an_order_of_their_own():
    pixels = counted(1000)
    mixed = shuffled(pixels, "some purpose")
    rest, last = split_off(mixed, 100)
    assert (len(rest), len(last)) == (900, 100)
    first, second = (numbers(torch.from_numpy(part)) for part in (rest, last))
    assert sorted(first + second) == list(range(1000))
    assert 400 < np.mean(second) < 600
    np.testing.assert_array_equal(shuffled(pixels, "some purpose"), mixed)
    assert (shuffled(pixels, "another purpose") != mixed).any()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"^unknown binarization 'drawn'; did you mean 'draw'\?$"):
        grey("drawn")
    with pytest.raises(ValueError, match="seed must not be negative"):
        grey(seed=-1)
