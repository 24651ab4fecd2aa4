"""Joint values of several variables: the likeliest, draws without replacement, ratios of the unordered set."""

import itertools

import pytest
import torch
from torch import Tensor

from estimators.nodes.joint import likeliest, without_replacement
from estimators.nodes.unordered_set import _enumerated, _integrated, leave_out_ratios
from tests.estimators.nodes.draws import in_order

LOG_PROBS = torch.tensor(
    [[[0.45, -0.3, 0.1], [1.0, 0.2, -0.4]], [[0.1, 0.0, -0.2], [-0.3, 0.8, 0.6]]], dtype=torch.float64
).log_softmax(-1)  # [plates, D, C]


def joint(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """All joint values [V, D] and their log-probabilities [V, *plates]."""
    size = log_probs.shape[-1]
    rows = torch.tensor(list(itertools.product(range(size), repeat=log_probs.shape[-2])))
    return rows, torch.stack([log_probs[..., torch.arange(rows.shape[1]), row].sum(-1) for row in rows])


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_likeliest_values_are_found_without_enumeration(k):
    rows, log_prob = joint(LOG_PROBS)
    order = log_prob.argsort(0, descending=True)[:k]
    assert torch.equal(likeliest(LOG_PROBS, k), rows[order])


def test_more_of_the_likeliest_than_there_are_gives_all():
    assert len(likeliest(LOG_PROBS, 20)) == 9


def test_draws_without_replacement_have_the_law_of_one_after_the_other():
    """Each ordered pair and its threshold's exponential, which has rate 1 - q(S): 4.5 standard errors."""
    num = 40_000
    torch.manual_seed(3)
    categories, perturbed = without_replacement(LOG_PROBS[:1].expand(num, -1, -1), 3)
    assert (perturbed[0] >= perturbed[1]).all()
    assert (perturbed[1] >= perturbed[2]).all()
    log_prob = joint(LOG_PROBS[0])[1]
    index = (categories[:2] * torch.tensor([3, 1])).sum(-1)  # [2, num]
    for i, j in itertools.permutations(range(9), 2):
        expected = in_order(log_prob.exp()[[i, j]].unsqueeze(0)).item()
        found = ((index[0] == i) & (index[1] == j)).double().mean().item()
        assert abs(found - expected) < 4.5 * (expected * (1 - expected) / num) ** 0.5
    left = 1 - log_prob.exp()[index].sum(0)
    # Given the set, the threshold is the first of the others, or the last of all three clocks: memoryless.
    time = (-perturbed[2]).exp() - (-perturbed[1]).exp()
    assert abs((time * left).mean().item() - 1) < 4.5 / num**0.5
    first = (-perturbed[0]).exp()
    assert abs(first.mean().item() - 1) < 4.5 / num**0.5


def test_impossible_values_come_last_and_without_nan():
    log_probs = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.float64).log()
    categories, perturbed = without_replacement(log_probs, 5)
    assert {tuple(each) for each in categories[:2, 0].tolist()} == {(0, 0), (1, 0)}
    assert perturbed[:2].isfinite().all()
    assert (perturbed[2:] == -torch.inf).all()


def by_orders(prob: Tensor) -> tuple[Tensor, Tensor]:
    """The ratios by the definition: sums over all orders of the set, P(order | it begins with s [and then s'])."""
    k = len(prob)
    first, both, total = torch.zeros(k), torch.zeros(k, k), torch.zeros(())
    first, both, total = first.double(), both.double(), total.double()
    for order in itertools.permutations(range(k)):
        chance = in_order(prob[list(order)].unsqueeze(0))[0]
        total += chance
        first[order[0]] += chance
        both[order[0], order[1]] += chance
    weights = first / total  # q(s) R(S, s): the chance that s was the first
    # q(s') P(S | s, s') / P(S | s): the chance of s' as the second, with replacement, is (1 - q(s)) times that without
    seconds = both / first.unsqueeze(1) * (1 - prob).unsqueeze(1)
    return weights, seconds + prob.diag()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_ratios_are_those_of_all_orders(k):
    prob = torch.tensor([0.3, 0.05, 0.2, 0.11, 0.02], dtype=torch.float64)[:k]
    for ours, expected in zip(leave_out_ratios(prob), by_orders(prob), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 5, 8])
@pytest.mark.parametrize("left", [0.6, 1e-3, 1e-9])
def test_the_integral_agrees_with_the_enumeration(k, left):
    torch.manual_seed(k)
    prob = torch.rand(k, 3, dtype=torch.float64) ** 4
    prob = prob / prob.sum(0) * (1 - left)
    ours, expected = _integrated(prob), _enumerated(prob)
    off_diagonal = ~torch.eye(k, dtype=torch.bool)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours[1][off_diagonal], expected[1][off_diagonal], rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [2, 8, 9, 20, 60])
@pytest.mark.parametrize("left", [0.9, 1e-12, 0.0])
def test_weights_and_baselines_sum_to_one(k, left):
    torch.manual_seed(k)
    prob = torch.randn(k, 4, dtype=torch.float64).mul(5).softmax(0) * (1 - left)
    prob[0, 0] = 0
    weights, seconds = leave_out_ratios(prob)
    torch.testing.assert_close(weights.sum(0), torch.ones(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(seconds.sum(1), torch.ones(k, 4).double(), rtol=0, atol=1e-9)
