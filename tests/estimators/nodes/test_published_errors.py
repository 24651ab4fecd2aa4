"""What published implementations of node estimators get wrong, each as a regression test."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, OneHotCategorical, OneHotCategoricalStraightThrough

from estimators.nodes.disarm import DisARM
from estimators.nodes.expect import Expect
from estimators.nodes.pathwise import Infer, Reparameterization
from estimators.nodes.score_function import ScoreFunction
from estimators.nodes.score_function_wor import ScoreFunctionWOR


def gradient(value, leaf, **options):
    return torch.autograd.grad(value.sum(), leaf, **options)[0]


def test_the_moving_average_is_read_before_it_is_updated():
    """Read afterwards, a decay of 0.95 scales the gradient by 0.95."""
    method = ScoreFunction("z")
    logits = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sample = method.place(Bernoulli(logits=logits), 0, torch.ones(1, dtype=torch.float64))
    score = (1 - logits.sigmoid()).detach()
    first = gradient(method.estimate(sample, torch.tensor([[3.0]]).double()), logits)
    torch.testing.assert_close(first, 3 * score)
    second = gradient(method.estimate(sample, torch.tensor([[1.0]]).double()), logits)
    torch.testing.assert_close(second, (1 - 3) * score)
    third = gradient(method.estimate(sample, torch.tensor([[1.0]]).double()), logits)
    torch.testing.assert_close(third, (1 - (0.95 * 3 + 1) / 1.95) * score)


def test_disarm_returns_numbers_that_are_weighed():
    """Booleans, whose weighting was lost, gave a mean of 0."""
    logits = torch.tensor([0.3, -0.8], requires_grad=True)
    method = DisARM("z")
    sample = method.propose(Bernoulli(logits=logits), 1)
    assert sample.points.dtype == logits.dtype
    assert method.weigh(sample).sum(0).tolist() == [1]
    pair = method.place(Bernoulli(logits=logits), 1, torch.full((1, 2), 0.05))  # b = 0 and b~ = 1
    assert pair.points.tolist() == [[0, 0], [1, 1]]
    cost = pair.points.unsqueeze(-1)
    expected = 0.5 * logits.detach().abs().sigmoid()
    torch.testing.assert_close(gradient(method.estimate(pair, cost), logits), expected)


def test_samples_without_replacement_multiply_the_cost_once():
    """With the cost in twice, the estimate of a cost of 5 is one of 25."""
    logits = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    method = ScoreFunctionWOR("z", 3)
    sample = method.propose(OneHotCategorical(logits=logits), 0)
    costs = (sample.points @ torch.tensor([5.0, 2.0, -1.0]).double()).unsqueeze(-1)
    value = method.estimate(sample, costs)
    expected = logits.softmax(-1) @ torch.tensor([5.0, 2.0, -1.0]).double()
    torch.testing.assert_close(value[0], expected)
    torch.testing.assert_close(gradient(value, logits), gradient(expected, logits))


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
@pytest.mark.parametrize("num_plates", [0, 1, 2])
def test_enumeration_takes_batches_of_any_rank(shape, num_plates):
    logits = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    if num_plates > len(shape) - 1:
        return
    method = Expect("z", budget=3**8)
    sample = method.propose(Categorical(logits=logits), num_plates)
    rest = shape[num_plates:-1]
    assert len(sample.points) == 3 ** torch.Size(rest).numel()
    costs = sample.points.double().flatten(1 + num_plates).sum(-1) if rest else sample.points.double()
    value = method.estimate(sample, costs.unsqueeze(-1)).squeeze(-1)
    mean = logits.softmax(-1) @ torch.arange(3).double()
    torch.testing.assert_close(value, mean.flatten(num_plates).sum(-1) if rest else mean)


def test_infer_does_not_choose_a_biased_relaxation_in_silence():
    distribution = OneHotCategoricalStraightThrough(logits=torch.tensor([0.5, -0.3, 0.1], requires_grad=True))
    assert distribution.has_rsample
    method = Infer("z", 5)
    sample = method.propose(distribution, 0)
    assert not sample.points.requires_grad
    assert method.estimate(sample, sample.points[:, :1]).requires_grad
    with pytest.raises(ValueError, match="node 'z': OneHotCategoricalStraightThrough cannot be reparameterised"):
        Reparameterization("z").check(distribution)


def test_a_constant_cost_has_no_hessian_under_the_leave_one_out_baseline():
    """With the node in its own baseline's box, the Hessian was -0.52."""
    logits = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    distribution, method = Bernoulli(logits=logits), ScoreFunction("z", 2, "batch_average")
    total = torch.zeros(()).double()
    for points in torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double():
        sample = method.place(distribution, 0, points)
        weight = distribution.log_prob(points).sum().exp().detach()
        total = total + weight * method.estimate(sample, torch.ones(2, 1).double()).sum()
    first = gradient(total, logits, create_graph=True)
    assert first.item() == pytest.approx(0, abs=1e-12)
    assert gradient(first, logits).item() == pytest.approx(0, abs=1e-12)


def test_log_probabilities_are_summed_over_the_variables_of_a_node():
    logits = torch.zeros(4, 2, 3)
    sample = ScoreFunction("z", 5).propose(OneHotCategorical(logits=logits), 1)
    assert sample.log_prob.shape == (5, 4)
    torch.testing.assert_close(sample.log_prob, torch.full((5, 4), -2 * torch.tensor(3.0).log().item()))
