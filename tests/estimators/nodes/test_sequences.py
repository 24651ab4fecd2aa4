"""Sequences of an autoregressive model, by enumerating all of them: 3 symbols, at most 3 of them."""

import itertools

import pytest
import torch
from torch import Tensor

import stochastic_graph as storch
from estimators.nodes.score_function import ScoreFunction
from estimators.nodes.score_function_wor import ScoreFunctionWOR
from estimators.nodes.sequences import Sequences
from estimators.nodes.unordered_set import UnorderedSetEstimator
from stochastic_graph.tensor import plain, wrap
from tests.estimators.nodes.draws import in_order

END, SYMBOLS, LENGTH = 2, 3, 3
ALL = torch.tensor(
    sorted({(*each[: each.index(END)], *[END] * (LENGTH - each.index(END))) if END in each else each
            for each in itertools.product(range(SYMBOLS), repeat=LENGTH)})
)  # fmt: skip
COST = torch.linspace(-1, 2, len(ALL), dtype=torch.float64) ** 2 + 0.3
TABLE = torch.tensor([[0.7, -0.4, 0.1], [-0.2, 0.5, -0.6], [0.3, 0.2, 0.0]], dtype=torch.float64)


def step(context: Tensor, prefix: Tensor) -> Tensor:
    """Logits that depend on the context, on how long the prefix is and on each of its symbols."""
    weights = torch.arange(1, prefix.shape[1] + 1, dtype=torch.float64)
    return context + (TABLE[prefix] * weights.unsqueeze(-1)).sum(1) - 0.2 * prefix.shape[1]


def model(context: Tensor) -> Sequences:
    return Sequences(step, context, SYMBOLS, END, LENGTH)


def leaf(*batch: int) -> Tensor:
    return torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64).expand(*batch, 3).clone().requires_grad_()


def cost_of(sequences: Tensor) -> Tensor:
    codes = (ALL * torch.tensor([9, 3, 1])).sum(-1)
    return COST[torch.searchsorted(codes, (sequences * torch.tensor([9, 3, 1])).sum(-1))]


def exact(context: Tensor) -> Tensor:
    return (model(context).log_prob(ALL).exp() * COST).sum()


def test_the_probabilities_of_all_sequences_sum_to_one():
    assert len(ALL) == model(leaf()).num_values == 15
    torch.testing.assert_close(model(leaf()).log_prob(ALL).exp().sum(), torch.ones((), dtype=torch.float64))
    assert model(leaf()).log_prob(torch.tensor([END, 0, END])) == -torch.inf


def test_samples_have_the_frequencies_of_their_probabilities():
    torch.manual_seed(1)
    q = model(leaf(2)).log_prob(ALL.unsqueeze(1)).exp()[:, 0]
    draws = model(leaf(2)).sample(torch.Size([10_000])).flatten(0, 1)
    counts = (draws.unsqueeze(1) == ALL).all(-1).double().mean(0)
    assert ((counts - q).abs() < 4.5 * (q * (1 - q) / len(draws)).sqrt()).all()


def test_sequences_without_replacement_come_in_the_order_of_draws_one_by_one():
    """The pair of the first two, of 20 000, is as likely as drawing one after the other without replacement."""
    torch.manual_seed(2)
    num = 20_000
    sequences, perturbed = model(leaf(num).detach()).without_replacement(4)
    assert (perturbed.diff(dim=0) < 0).all()
    q = model(leaf()).log_prob(ALL).exp().detach()
    found = (sequences[:2].unsqueeze(2) == ALL).all(-1).double().argmax(-1)
    pairs = torch.tensor(list(itertools.permutations(range(len(ALL)), 2)))
    expected = in_order(q[pairs])
    counts = torch.bincount(found[0] * len(ALL) + found[1], minlength=len(ALL) ** 2) / num
    ours = counts[pairs[:, 0] * len(ALL) + pairs[:, 1]]
    assert ((ours - expected).abs() < 4.5 * (expected * (1 - expected) / num).sqrt() + 1e-9).all()
    assert len(model(leaf().detach()).without_replacement(99)[0]) == len(ALL)


def test_the_unordered_set_is_exact():
    """Over all sets of two sequences, by their probabilities; and has no variance for the set of all."""
    pairs = torch.tensor(list(itertools.combinations(range(len(ALL)), 2)))
    copies = leaf(len(pairs))
    q = model(leaf()).log_prob(ALL).exp().detach()
    weight = in_order(q[pairs]) + in_order(q[pairs.flip(-1)])
    method = UnorderedSetEstimator("z", 2)
    sample = method.place(model(copies), 1, (ALL[pairs].movedim(1, 0), torch.zeros(len(pairs))))
    estimate = method.estimate(sample, cost_of(sample.points).unsqueeze(-1)).squeeze(-1)
    ours = torch.autograd.grad((weight * estimate).sum(), copies)[0].sum(0)
    expected = torch.autograd.grad(exact(context := leaf()), context)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    method, context = UnorderedSetEstimator("z", len(ALL)), leaf()
    sample = method.propose(model(context), 0)
    drawn = torch.autograd.grad(method.estimate(sample, cost_of(sample.points).unsqueeze(-1)).sum(), context)[0]
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize(
    "method",
    [ScoreFunction("z", 2, "batch_average"), ScoreFunctionWOR("z", 3), UnorderedSetEstimator("z", 3)],
    ids=lambda each: type(each).__name__,
)
def test_estimates_over_sequences_have_the_right_mean(method):
    """10 000 of them, in a stochastic graph: 4.5 standard errors."""
    torch.manual_seed(3)
    num = 10_000
    context = leaf(num)
    sequences = method(model(storch.denote_independent(context, 0, "data")))
    storch.add_cost(wrap(cost_of(plain(sequences)), sequences.plates), "f")
    value = storch.backward()
    assert context.grad is not None
    estimates = context.grad * num
    expected = torch.autograd.grad(exact(one := leaf()), one)[0]
    error = estimates.std(0) / num**0.5
    assert ((estimates.mean(0) - expected).abs() < 4.5 * error).all()
    assert (value - exact(leaf())).abs() < 0.1


def test_more_sequences_than_there_are_and_bad_settings_are_refused():
    with pytest.raises(ValueError, match="node 'z': UnorderedSetEstimator with k = 16 wants as many different values"):
        UnorderedSetEstimator("z", 16).propose(model(leaf()), 0)
    with pytest.raises(ValueError, match="end=3, max_length=3, expected"):
        Sequences(step, leaf(), 3, 3, 3)
