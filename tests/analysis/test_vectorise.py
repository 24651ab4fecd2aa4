import pytest
import torch
from torch.distributions import Distribution, Normal
from torch.func import vmap
from torch.nn.functional import one_hot

from analysis.vectorise import LargestTensor, distributions_under_vmap


def mapped(function, count=4):
    def body(index):
        with distributions_under_vmap(index):
            return function()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vmap(body, randomness="different")(torch.zeros(count))


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1000),
        lambda: torch.empty((1000,), dtype=torch.float64),
        lambda: torch.empty_like(torch.zeros(1000)),
        lambda: torch.zeros(2).new_empty((1000,)),
        lambda: torch.zeros(2).new(1000),
        lambda: torch.zeros(2).new(torch.Size([1000])),
    ],
)
def test_each_replicate_fills_a_tensor_of_its_own(allocate):
    def noise():
        tensor = allocate()
        tensor.normal_()
        return tensor

    draws = mapped(noise)
    assert draws.dtype == allocate().dtype
    correlation = torch.corrcoef(draws)
    assert (correlation - torch.eye(4)).abs().max() < 5 / 1000**0.5


def test_new_still_copies_values():
    assert mapped(lambda: torch.zeros(2).new([1.0, 2.0])).tolist() == [[1.0, 2.0]] * 4


def test_one_hot_of_samples():
    draws = mapped(lambda: one_hot(torch.randint(3, (5,)), 3))
    assert draws.shape == (4, 5, 3)
    assert draws.dtype == torch.int64
    assert (draws.sum(-1) == 1).all()
    assert (draws[0] != draws[1]).any()


def test_clamp_in_place():
    def clamped():
        tensor = torch.randn(100)
        result = tensor.detach().clamp_(min=-0.5, max=0.2)
        return tensor, result

    tensor, result = mapped(clamped)
    assert torch.equal(tensor, result)
    assert tensor.min() == -0.5
    assert tensor.max() == torch.tensor(0.2)
    assert mapped(lambda: torch.randn(100).clamp_(0.3)).min() == torch.tensor(0.3)


@pytest.mark.parametrize("validate", [True, False])
def test_validation_comes_back(validate):
    before = Distribution._validate_args
    Distribution.set_default_validate_args(validate)
    try:
        mapped(lambda: Normal(torch.randn(2), 1.0).log_prob(torch.randn(2)))
        assert Distribution._validate_args is validate
        with pytest.raises(ZeroDivisionError):
            mapped(lambda: 1 / 0)
        assert Distribution._validate_args is validate
    finally:
        Distribution.set_default_validate_args(before)


def test_largest_tensor():
    with LargestTensor() as largest:
        (torch.ones(3, 1) * torch.ones(7)).sum()
    torch.ones(100)
    assert largest.nbytes == 4 * 21
