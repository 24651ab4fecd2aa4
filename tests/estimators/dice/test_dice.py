"""The derivatives of DiCE surrogates: their mean over all outcomes is the derivative of the exact expectation."""

import itertools
from math import factorial

import pytest
import torch
from torch import Tensor

from estimators import dice

NUM = 3  # categories
ORDERS = (1, 2, 3)
COSTS = torch.tensor([[0.7, -1.2, 0.4], [2.0, 0.3, -0.5], [1.1, -0.8, 1.6]], dtype=torch.float64)  # of both actions
OUTCOMES = torch.tensor(list(itertools.product(range(NUM), repeat=2)))


@pytest.fixture
def theta():
    return torch.tensor([0.3, -0.4, 0.2, 0.5], dtype=torch.float64, requires_grad=True)


def policy(theta: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities [...] of two actions [..., 2]; the second's logits depend on the first."""
    first = torch.stack([theta[0], theta[1] * theta[2], theta[2].sin()]).log_softmax(-1)
    table = torch.outer(torch.tensor([1.0, -0.5, 2.0], dtype=theta.dtype), torch.stack([theta[3], theta[0], theta[1]]))
    second = table.log_softmax(-1)
    return first[actions[..., 0]], second[actions[..., 0], actions[..., 1]]


def derivatives(value: Tensor, theta: Tensor, order: int) -> list[Tensor]:
    """All derivatives of a scalar up to an order, each flat."""
    found = []
    current = value.reshape(1)
    for _ in range(order):
        rows = [
            torch.autograd.grad(each, theta, create_graph=True, allow_unused=True, materialize_grads=True)[0]
            for each in current
        ]
        current = torch.cat([row + 0 * theta.nan_to_num().sum() for row in rows])
        found.append(current)
    return found


def exact(theta: Tensor, costs: Tensor = COSTS) -> list[Tensor]:
    first, second = policy(theta, OUTCOMES)
    return derivatives(((first + second).exp() * costs[OUTCOMES[:, 0], OUTCOMES[:, 1]]).sum(), theta, max(ORDERS))


def mean_over_batches(theta: Tensor, surrogate, batch: int) -> list[Tensor]:
    """The mean derivatives of surrogate(costs [batch, N], logps of [batch, N]) over all N batches of outcomes."""
    actions = OUTCOMES[torch.tensor(list(itertools.product(range(len(OUTCOMES)), repeat=batch))).t()]
    first, second = policy(theta, actions)
    probability = (first + second).sum(0).exp().detach()
    values = surrogate(COSTS[actions[..., 0], actions[..., 1]], [first, second])
    return derivatives((probability * values).sum(), theta, max(ORDERS))


def baseline_of_first(costs, logps):
    """A baseline of each node that depends on what was drawn before it: for the second action, on the first."""
    first = COSTS.mean(1)[(costs.unsqueeze(-1) == COSTS.flatten()).long().argmax(-1) // NUM]
    return [torch.full_like(costs, 0.6), first]


SURROGATES = {
    "plain": lambda c, logps: dice.cost_node(c, logps).mean(0),
    "constant baseline": lambda c, logps: (
        dice.cost_node(c, logps) + dice.baseline_term(torch.full_like(c, 0.7), logps)
    ).mean(0),
    "any order": lambda c, logps: (
        dice.cost_node(c, logps) + dice.any_order_baseline_term(baseline_of_first(c, logps), logps)
    ).mean(0),
    "moving average": lambda c, logps: (dice.cost_node(c, logps) + warm_baseline()(c, logps)).mean(0),
}


def warm_baseline():
    baseline = dice.EMABaseline(0.9).double()
    baseline.update(torch.tensor([0.2, 0.8]))
    return baseline


@pytest.mark.parametrize("name", SURROGATES)
def test_the_mean_of_each_derivative_is_the_exact_one(theta, name):
    for order, ours, expected in zip(ORDERS, mean_over_batches(theta, SURROGATES[name], 1), exact(theta), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * factorial(order))


@pytest.mark.parametrize("of_surrogates", [False, True], ids=["of costs", "of surrogates"])
def test_the_leave_one_out_baseline_is_unbiased_to_the_third_derivative(theta, of_surrogates):
    def surrogate(c, logps):
        losses = dice.cost_node(c, logps)
        return (losses + dice.batch_baseline_term(losses if of_surrogates else c, logps)).mean(0)

    for ours, expected in zip(mean_over_batches(theta, surrogate, 2), exact(theta), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def variances(theta: Tensor, surrogate, order: int) -> Tensor:
    """The summed variance over outcomes of the derivatives of one order."""
    found, weights = [], []
    for actions in OUTCOMES:
        logps = policy(theta, actions[None])
        weights.append((logps[0] + logps[1]).exp().detach())
        found.append(derivatives(surrogate(COSTS[actions[:1], actions[1:]], list(logps)), theta, order)[-1].detach())
    values, weight = torch.stack(found), torch.stack(weights)
    mean = (weight * values).sum(0)
    return (weight * (values - mean) ** 2).sum()


def test_a_baseline_of_any_order_lowers_the_variance_of_the_hessian_below_that_of_the_first_order(theta):
    baseline = COSTS.mean()
    surrogates = {
        "none": lambda c, logps: dice.cost_node(c + 5, logps).sum(),
        "first": lambda c, logps: (
            dice.cost_node(c + 5, logps) + dice.baseline_term((baseline + 5).expand_as(c), logps)
        ).sum(),
        "any": lambda c, logps: (
            dice.cost_node(c + 5, logps) + dice.any_order_baseline_term((baseline + 5).expand_as(c), logps)
        ).sum(),
    }
    none, first, any_order = (variances(theta, surrogate, 2) for surrogate in surrogates.values())
    assert any_order < 0.5 * first
    assert first < none


def test_a_constant_cost_has_no_derivative_in_any_draw_under_its_own_any_order_baseline(theta):
    for actions in OUTCOMES:
        logps = list(policy(theta, actions))
        cost = torch.tensor(3.0, dtype=torch.float64)
        value = dice.cost_node(cost, logps) + dice.any_order_baseline_term(cost, logps)
        for derivative in derivatives(value, theta, 3):
            torch.testing.assert_close(derivative, torch.zeros_like(derivative), rtol=0, atol=1e-12)


def test_a_constant_cost_has_zero_mean_derivatives_under_the_leave_one_out_baseline(theta):
    def surrogate(c, logps):
        return (dice.cost_node(torch.ones_like(c), logps) + dice.batch_baseline_term(torch.ones_like(c), logps)).mean(0)

    for derivative in mean_over_batches(theta, surrogate, 2):
        torch.testing.assert_close(derivative, torch.zeros_like(derivative), rtol=0, atol=1e-12)


def advantages(theta: Tensor, actions: Tensor) -> Tensor:
    """Q - V of both actions, exact: [..., 2]."""
    table = policy(theta, OUTCOMES)
    second = table[1].exp().view(NUM, NUM)
    q_first = (second * COSTS).sum(1)
    v_first = (policy(theta, OUTCOMES)[0].exp().view(NUM, NUM)[:, 0] * q_first).sum()
    q_second = COSTS[actions[..., 0], actions[..., 1]]
    return torch.stack([q_first[actions[..., 0]] - v_first, q_second - q_first[actions[..., 0]]], -1).detach()


def test_loaded_dice_gives_the_gradient_and_a_decay_of_zero_keeps_it(theta):
    for decay in (1.0, 0.5, 0.0):
        total = torch.zeros_like(theta)
        for actions in OUTCOMES:
            logp = torch.stack(policy(theta, actions))
            value = dice.loaded_dice(logp, advantages(theta, actions), decay=decay)
            assert value.item() == 0
            total += logp.sum().exp().detach() * derivatives(value, theta, 1)[0].detach()
        torch.testing.assert_close(total, exact(theta)[0].detach(), rtol=0, atol=1e-12)


def test_loaded_dice_gives_the_hessian_of_costs_that_come_at_the_end(theta):
    """With the cost itself as the advantage of each action, E sum_t (box(w_t) - box(v_t)) c = J - E[c]: any order."""
    total = torch.zeros((), dtype=theta.dtype)
    for actions in OUTCOMES:
        logp = torch.stack(policy(theta, actions))
        costs = COSTS[actions[0], actions[1]].expand(2)
        total = total + logp.sum().exp().detach() * dice.loaded_dice(logp, costs)
    for ours, expected in zip(derivatives(total, theta, 3), exact(theta), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_discounts_weigh_the_steps():
    logp = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    value = dice.loaded_dice(logp, torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), discount=0.5)
    (gradient,) = torch.autograd.grad(value, logp)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 5.0, 25.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"decay=2, expected a number in \[0, 1\]"):
        dice.loaded_dice(logp, logp, decay=2)
    with pytest.raises(ValueError, match=r"logp \[3\] and advantages \[2\]"):
        dice.loaded_dice(logp, logp[:2])


def test_the_moving_average_is_read_before_it_is_updated_and_has_no_bias_of_its_start():
    baseline, logp = dice.EMABaseline(decay=0.9), torch.zeros(2, requires_grad=True)
    (first,) = torch.autograd.grad(baseline(torch.tensor([4.0, 8.0]), [logp]).sum(), logp)
    assert first.tolist() == [0, 0]
    assert baseline.mean.item() == pytest.approx(6)
    (second,) = torch.autograd.grad(baseline(torch.tensor([0.0, 0.0]), [logp]).sum(), logp)
    assert second.tolist() == pytest.approx([-6, -6])
    assert baseline.mean.item() == pytest.approx(0.9 * 6 / 1.9)
    other = dice.EMABaseline(decay=0.9)
    other.load_state_dict(baseline.state_dict())
    assert other.mean == baseline.mean


@pytest.mark.parametrize(
    ("cost", "logp", "expected"),
    [
        ((), (4, 3), 12),  # one cost of all samples
        ((4,), (4, 3), 3),  # an item's steps
        ((4, 3), (4, 3), 1),
        ((4, 3), (4,), 1),  # an item's sample and all of its steps
        ((4,), (), 1),  # one sample and all items
        ((1, 3), (4, 3), 4),
    ],
)
def test_shapes_meet_from_the_left(cost, logp, expected):
    logps = torch.full(logp, 0.1, requires_grad=True)
    for surrogate in (dice.cost_node, lambda c, ls: -dice.baseline_term(c, ls)):
        value = surrogate(torch.ones(cost), [logps])
        assert value.shape == cost
        per_cost = torch.autograd.grad(value.sum(), logps)[0].sum() / value.numel()
        assert per_cost.item() == pytest.approx(expected)


def test_what_cannot_meet_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"cost of shape \[4\] and a log-probability of shape \[3\] cannot meet"):
        dice.cost_node(torch.ones(4), [torch.zeros(3)])
    for one in (torch.tensor(1.0), torch.ones(1), torch.ones(1, 5)):
        with pytest.raises(ValueError, match=r"at least two items"):
            dice.batch_baseline_term(one, [torch.zeros(1)])
    with pytest.raises(ValueError, match=r"logits \[2, 3\] and actions \[3\]"):
        dice.logp_categorical(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"2 baselines and 1 logps"):
        dice.any_order_baseline_term([torch.ones(2)] * 2, [torch.zeros(2)])
    with pytest.raises(ValueError, match=r"baselines of \[\[\], \[3\]\], expected one shape"):
        dice.any_order_baseline_term([torch.ones(()), torch.ones(3)], [torch.zeros(3)] * 2)
    with pytest.raises(ValueError, match="decay=1"):
        dice.EMABaseline(decay=1)


def test_the_mean_of_the_other_items_leaves_out_every_step_of_an_item():
    cost, logp = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]), torch.zeros(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(dice.batch_baseline_term(cost, [logp]).sum(), logp)
    torch.testing.assert_close(gradient, -torch.tensor([[4.0, 6.5], [3.0, 5.5], [2.0, 3.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_drawn_from_and_differentiated_without_bias(dtype):
    torch.manual_seed(0)
    probabilities = torch.tensor([0.55, 0.3, 0.149, 0.001])
    logits = probabilities.log().to(dtype)
    actual = logits.float().softmax(-1)
    logp, actions = dice.sample_categorical(logits.expand(200_000, 4))
    assert logp.dtype == torch.float32
    counts = actions.bincount(minlength=4) / 200_000
    assert ((counts - actual).abs() < 4.5 * (actual * (1 - actual) / 200_000).sqrt()).all()
    leaf = logits.clone().requires_grad_()
    dice.cost_node(torch.ones(()), [dice.logp_categorical(leaf, torch.tensor(1))]).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(
        leaf.grad.float(), torch.tensor([0, 1.0, 0, 0]) - actual, rtol=0, atol=2 * torch.finfo(dtype).eps
    )


def test_impossible_actions_are_never_drawn_and_give_no_nan():
    torch.manual_seed(0)
    for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1]):
        logits = torch.tensor([0.2, -torch.inf, -0.3])[order]
        _, actions = dice.sample_categorical(logits.expand(10_000, 3))
        assert set(actions.tolist()) == {0, 1, 2} - {order.index(1)}
    logits = torch.tensor([0.2, -torch.inf, -0.3], requires_grad=True)
    logp = dice.logp_categorical(logits.expand(2, 3), torch.tensor([1, 0]))
    value = dice.cost_node(torch.tensor([2.0, 3.0]), [logp])
    total = value + dice.batch_baseline_term(torch.tensor([2.0, 3.0]), [logp])
    total = total + dice.loaded_dice(logp, torch.ones(2), decay=0.0)
    assert value.tolist() == [2, 3]
    for derivative in derivatives(total.sum(), logits, 2):
        assert derivative.isfinite().all()


def test_the_same_generator_gives_the_same_actions():
    logits = torch.randn(50, 7)
    draws = [dice.sample_categorical(logits, torch.Generator().manual_seed(5))[1] for _ in range(2)]
    assert torch.equal(*draws)


def test_a_penalty_that_looks_left_has_the_mean_of_one_of_the_whole_sequence_and_less_variance():
    """Two steps; the cost of the first does not depend on the second action, and prefixes say so."""
    theta = torch.tensor([0.3, -0.4, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    penalties = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = {}
    for name in ("prefix", "whole"):
        gradients, weights = [], []
        for actions in OUTCOMES:
            logp = torch.stack(policy(theta, actions))
            cost = penalties[actions]
            nodes = [logp.cumsum(0)] if name == "prefix" else [logp.sum()]
            gradients.append(derivatives(dice.cost_node(cost, nodes).sum(), theta, 1)[0].detach())
            weights.append(logp.sum().exp().detach())
        weight, gradient = torch.stack(weights).unsqueeze(1), torch.stack(gradients)
        mean = (weight * gradient).sum(0)
        found[name] = mean, (weight * (gradient - mean) ** 2).sum()
    torch.testing.assert_close(found["prefix"][0], found["whole"][0], rtol=0, atol=1e-12)
    assert found["prefix"][1] < 0.8 * found["whole"][1]


def test_loaded_dice_with_the_exact_advantages_at_hand_gives_every_derivative(theta):
    """E sum_t (box(w_t) - box(v_t)) A_t = J - J(here), whatever the policy, by the lemma of performance differences."""
    total = torch.zeros((), dtype=theta.dtype)
    for actions in OUTCOMES:
        logp = torch.stack(policy(theta, actions))
        total = total + logp.sum().exp().detach() * dice.loaded_dice(logp, advantages(theta, actions))
    for ours, expected in zip(derivatives(total, theta, 3), exact(theta), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_a_decay_biases_the_hessian_of_loaded_dice_but_lowers_its_variance(theta):
    def surrogate(decay):
        return lambda actions, logps: dice.loaded_dice(torch.stack(logps), advantages(theta, actions), decay=decay)

    found = {}
    for decay in (1.0, 0.3):
        weights, hessians = [], []
        for actions in OUTCOMES:
            logps = list(policy(theta, actions))
            weights.append((logps[0] + logps[1]).exp().detach())
            hessians.append(derivatives(surrogate(decay)(actions, logps), theta, 2)[-1].detach())
        weight, hessian = torch.stack(weights).unsqueeze(1), torch.stack(hessians)
        mean = (weight * hessian).sum(0)
        found[decay] = (mean - exact(theta)[1].detach()).norm(), (weight * (hessian - mean) ** 2).sum()
    assert found[1.0][0] < 1e-10 < 1e-2 < found[0.3][0]
    assert found[0.3][1] < found[1.0][1]


@pytest.mark.parametrize("name", ["plain", "constant baseline", "any order"])
def test_transforms_of_torch_func_see_the_same_derivatives(theta, name):
    actions = torch.tensor([[0, 2], [1, 1], [2, 0]])
    costs = COSTS[actions[:, 0], actions[:, 1]]

    def surrogate(theta, actions, costs):
        return SURROGATES[name](costs[None], [logp[None] for logp in policy(theta, actions)])

    def total(theta):
        return torch.func.vmap(surrogate, (None, 0, 0))(theta, actions, costs).sum()

    first, second, third = derivatives(surrogate_sum(surrogate, theta, actions, costs), theta, 3)
    torch.testing.assert_close(torch.func.grad(total)(theta.detach()), first)
    torch.testing.assert_close(torch.func.hessian(total)(theta.detach()).flatten(), second)
    triple = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacrev(total)))(theta.detach())
    torch.testing.assert_close(triple.flatten(), third)


def surrogate_sum(surrogate, theta, actions, costs):
    return torch.stack([surrogate(theta, *pair) for pair in zip(actions, costs, strict=True)]).sum()


def test_costs_of_another_type_than_the_log_probabilities():
    for cost in (torch.tensor([4, 8]), torch.tensor([4.0, 8.0]).half(), torch.tensor([4.0, 8.0]).bfloat16()):
        logp = torch.zeros(2, requires_grad=True)
        baseline = dice.EMABaseline(decay=0.5)
        baseline.update(torch.tensor([2.5]))
        losses = dice.cost_node(cost, [logp]) + baseline(cost, [logp])
        (gradient,) = torch.autograd.grad(losses.sum(), logp)
        assert losses.tolist() == [4, 8]
        assert gradient.tolist() == [1.5, 5.5]


def test_a_tensor_in_the_place_of_a_list_is_refused():
    cost, logp = torch.ones(3), torch.zeros(3)
    terms = (dice.baseline_term, dice.any_order_baseline_term, dice.batch_baseline_term, dice.EMABaseline())
    for surrogate in (dice.cost_node, *terms):
        with pytest.raises(ValueError, match=r"logps is a tensor of shape \[3\], expected a list of them"):
            surrogate(cost, logp)


def test_no_log_probabilities_leave_a_cost_as_it_is_and_an_iterator_serves_once():
    cost = torch.tensor([1.0, 2.0])
    assert torch.equal(dice.cost_node(cost, []), cost)
    logp = torch.zeros(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(dice.cost_node(cost, iter([logp])).sum(), logp)
    assert torch.equal(gradient, cost)


def test_a_decay_grows_with_the_age_of_an_action():
    logp = torch.tensor([-0.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    value = dice.loaded_dice(logp, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), decay=0.5)
    with_own, before = torch.tensor([0.25, 0.5, 1.0]).double(), torch.tensor([0.25, 0.5, 0.0]).double()
    expected = torch.outer(with_own, with_own) - torch.outer(before, before)
    torch.testing.assert_close(derivatives(value, logp, 2)[1].view(3, 3), expected)
