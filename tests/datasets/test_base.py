import pytest
import torch

from datasets.base import FiniteDataset
from datasets.gaussian_mixture import GaussianMixtureData
from datasets.gaussian_toy import GaussianToyData


def finite(num_points: int) -> FiniteDataset:
    return FiniteDataset({split: torch.arange(num_points) for split in ("train", "valid", "test")})


DATASETS = {"streaming": GaussianMixtureData, "finite": GaussianToyData}


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
def test_a_batch_depends_on_the_seed_and_the_step_alone(build):
    steps = [0, 1, 7, 326, 327, 328, 5000]
    dataset = build()
    forward = [dataset.batch(step, 100, seed=3) for step in steps]
    for step, batch in reversed(list(zip(steps, forward, strict=True))):
        dataset.batch(step + 17, 50, seed=4)
        assert torch.equal(dataset.batch(step, 100, seed=3), batch)
        assert torch.equal(build().batch(step, 100, seed=3), batch)
    assert len({batch.sum().item() for batch in forward}) == len(steps)
    assert not torch.equal(forward[0], dataset.batch(0, 100, seed=4))


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
def test_the_points_depend_on_the_seed_of_the_data_set_and_differ_between_splits(build):
    for split in ("train", "valid", "test"):
        assert torch.equal(build().points(split), build(seed=0).points(split))
        assert not torch.equal(build().points(split), build(seed=1).points(split))
    assert not torch.equal(build().points("train"), build().points("test"))
    assert not torch.equal(build().points("valid"), build().points("test"))


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
def test_drawing_batches_leaves_the_global_random_states_alone(build):
    state = torch.get_rng_state()
    build().batch(0, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("build", DATASETS.values(), ids=DATASETS)
def test_what_no_batch_has_is_refused(build):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        build().batch(0, 0, seed=1)
    with pytest.raises(ValueError, match="step must not be negative, not -1"):
        build().batch(-1, 10, seed=1)
    with pytest.raises(ValueError, match="seed must not be negative, not -2"):
        build().batch(0, 10, seed=-2)
    with pytest.raises(ValueError, match="seed must not be negative"):
        build(seed=-1)
    with pytest.raises(ValueError, match="unknown split 'training'; choose from train, valid, test"):
        build().points("training")


def test_an_epoch_visits_every_point_at_most_once_and_in_another_order_each_time():
    dataset = finite(10)
    epochs = [torch.cat([dataset.batch(3 * epoch + index, 3, seed=1) for index in range(3)]) for epoch in range(40)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 40
    left_out = {(set(range(10)) - set(epoch.tolist())).pop() for epoch in epochs}
    assert len(left_out) > 5


def test_a_batch_of_the_whole_set_is_a_permutation_of_it_and_a_larger_one_is_refused():
    dataset = finite(10)
    assert sorted(dataset.batch(2, 10, seed=1).tolist()) == list(range(10))
    with pytest.raises(ValueError, match="batch_size 11 exceeds the 10 training points"):
        dataset.batch(0, 11, seed=1)


def test_an_epoch_has_as_many_batches_as_are_full_and_a_stream_has_none():
    assert [finite(10).batches_per_epoch(size) for size in (1, 3, 5, 6, 10)] == [10, 3, 2, 1, 1]
    with pytest.raises(ValueError, match="batch_size 11 exceeds the 10 training points"):
        finite(10).batches_per_epoch(11)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        finite(10).batches_per_epoch(0)
    with pytest.raises(ValueError, match="GaussianMixtureData is a stream without end: epochs need a finite data set"):
        GaussianMixtureData().batches_per_epoch(10)


def test_points_keep_their_type_but_bytes_which_are_given_as_floats():
    for given, expected in ((torch.uint8, torch.float32), (torch.float64, torch.float64), (torch.int64, torch.int64)):
        dataset = FiniteDataset({split: torch.arange(9, dtype=given) for split in ("train", "valid", "test")})
        assert dataset.points("test").dtype == dataset.batch(0, 4, seed=1).dtype == expected


def test_a_finite_set_answers_on_the_device_that_it_was_moved_to_and_a_stream_where_it_draws():
    dataset = finite(10)
    dataset.batch(0, 5, seed=1)
    assert dataset.to("meta") is dataset
    assert dataset._order(1, 0).device == torch.device("meta")
    assert dataset.batch(1, 5, seed=1).device == dataset.points("train").device == torch.device("meta")
    stream = GaussianMixtureData(num_points=10)
    assert stream.to("meta") is stream
    assert stream.batch(0, 5, seed=1).device.type == "cpu"
