"""Every method for one stochastic node, by all that it may draw: one row each.

To add a method: a row in METHODS, or in rows.py. It names what makes it, the rule of what it draws (draws.py, or one
of your own), the nodes it is held to, and, where it is biased by design, the expectation that it states instead of the
exact one.
"""

import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    Normal,
)

from estimators.nodes.arm import ARM
from estimators.nodes.base import Method, base_of
from estimators.nodes.disarm import DisARM
from estimators.nodes.expect import Expect
from estimators.nodes.gumbel_softmax import GumbelSoftmax
from estimators.nodes.importance_sampling import ImportanceSampling
from estimators.nodes.pathwise import Infer, Reparameterization
from estimators.nodes.rao_blackwell import RaoBlackwellSF
from estimators.nodes.score_function import ScoreFunction
from estimators.nodes.score_function_wor import ScoreFunctionWOR
from estimators.nodes.straight_through import StraightThrough
from estimators.nodes.unordered_set import UnorderedSetEstimator
from tests.estimators.nodes.draws import (
    normals,
    outside_the_top,
    proposed,
    relaxations,
    sets,
    uniforms,
    values,
)
from tests.estimators.nodes.frame import (
    BERNOULLI,
    CATEGORICAL,
    DISCRETE,
    FEW,
    NODES,
    NUM_COSTS,
    ONE_HOT,
    RELAXED_NODES,
    SMALL,
    Costs,
    Node,
    Row,
    first_order,
    plates_of,
    squashed,
)
from tests.estimators.nodes.rows import CONTROLLED


def warmed(method: Method) -> Method:
    """A moving average that has a past."""
    assert isinstance(method, ScoreFunction)
    method.averages(torch.tensor([0.8, 1.7], dtype=torch.float64), "")
    return method


def relaxed(temperature: float) -> Callable[[Tensor, Node, Costs], Tensor]:
    """The expected cost of a relaxed sample."""

    def stated(parameter: Tensor, node: Node, costs: Costs) -> Tensor:
        q = node.build(parameter)
        noise, weight = relaxations(RELAXED_NODES)(q, node.num_plates, 1)
        y = squashed(q, noise, temperature)
        return (weight.unsqueeze(-1) * costs(y[0], 1 + node.num_plates)).sum(0)

    return stated


def hard_with_relaxed_jacobian(parameter: Tensor, node: Node, costs: Costs) -> Tensor:
    """The expected cost, with E[grad f(hard) dy/dl] for its gradient."""
    q = node.build(parameter)
    noise, weight = relaxations(RELAXED_NODES)(q, node.num_plates, 1)
    y = squashed(q, noise, 0.8)
    hard = y.detach().round() if isinstance(base_of(q), Bernoulli) else (y == y.max(-1, keepdim=True)[0]).double()
    return first_order(hard[0], y[0], weight, node, costs)


def hard_with_jacobian_of_mean(parameter: Tensor, node: Node, costs: Costs) -> Tensor:
    """The expected cost, with E[grad f(b)] dp/dl for its gradient."""
    q = node.build(parameter)
    hard, weight = values(q, node.num_plates, 1)
    return first_order(hard[0], base_of(q).mean.expand_as(hard[0]), weight.detach(), node, costs)


def flatter(q: Distribution) -> Distribution:
    """A proposal: half the logits."""
    if isinstance(q, Independent):
        return Independent(flatter(q.base_dist), q.reinterpreted_batch_ndims)
    return type(q)(logits=q.logits.detach() / 2)  # type: ignore[attr-defined, call-arg]


METHODS = {
    "Expect": Row(lambda: Expect("z"), lambda q, plates, n: (None, torch.ones(1, *q.batch_shape[:plates])), DISCRETE),
    "ScoreFunction": Row(lambda: ScoreFunction("z", baseline_factory="None"), values, DISCRETE),
    "ScoreFunction, two": Row(lambda: ScoreFunction("z", 2, "None"), values, FEW),
    "ScoreFunction, batch_average": Row(
        lambda: ScoreFunction("z", 2, "batch_average"), values, FEW, leave_one_out=True
    ),
    "ScoreFunction, moving_average": Row(lambda: warmed(ScoreFunction("z")), values, DISCRETE, scales=False),
    "ScoreFunction, Normal": Row(lambda: ScoreFunction("z"), normals(60, pathwise=False), ("normal",)),
    "Reparameterization": Row(
        lambda: Reparameterization("z"), normals(60, pathwise=True), ("normal",), draws_gradient=False
    ),
    "Infer, Normal": Row(lambda: Infer("z"), normals(60, pathwise=True), ("normal",), draws_gradient=False),
    "Infer, discrete": Row(lambda: Infer("z"), values, DISCRETE),
    "ARM": Row(lambda: ARM("z"), uniforms(2), BERNOULLI, leave_one_out=True),
    "ARM, two": Row(lambda: ARM("z", 2), uniforms(2), ("bernoulli",), leave_one_out=True),
    "DisARM": Row(lambda: DisARM("z"), uniforms(1), BERNOULLI, leave_one_out=True),
    "DisARM, two": Row(lambda: DisARM("z", 2), uniforms(1), ("bernoulli", "bernoulli probs"), leave_one_out=True),
    "GumbelSoftmax": Row(lambda: GumbelSoftmax("z"), relaxations(RELAXED_NODES), SMALL, relaxed(1.0)),
    "GumbelSoftmax, cool": Row(
        lambda: GumbelSoftmax("z", initial_temperature=0.5), relaxations(RELAXED_NODES), ("bernoulli",), relaxed(0.5)
    ),
    "GumbelSoftmax, two": Row(lambda: GumbelSoftmax("z", 2), relaxations(8), ("bernoulli",), relaxed(1.0)),
    "GumbelSoftmax, straight_through": Row(
        lambda: GumbelSoftmax("z", straight_through=True, initial_temperature=0.8),
        relaxations(RELAXED_NODES),
        SMALL,
        hard_with_relaxed_jacobian,
    ),
    "StraightThrough": Row(lambda: StraightThrough("z"), values, BERNOULLI + ONE_HOT, hard_with_jacobian_of_mean),
    "RaoBlackwellSF": Row(lambda: RaoBlackwellSF("z", 2), outside_the_top(2), DISCRETE[1:]),
    "RaoBlackwellSF, all": Row(lambda: RaoBlackwellSF("z", 2), outside_the_top(2), ("bernoulli",), leave_one_out=True),
    "RaoBlackwellSF, two of three": Row(lambda: RaoBlackwellSF("z", 3, 2), outside_the_top(3), FEW[1:]),
    "ScoreFunctionWOR": Row(lambda: ScoreFunctionWOR("z", 2), sets(120), DISCRETE),
    "ScoreFunctionWOR, no baseline": Row(lambda: ScoreFunctionWOR("z", 1, use_baseline=False), sets(120), DISCRETE),
    "UnorderedSetEstimator": Row(lambda: UnorderedSetEstimator("z", 2), sets(1), DISCRETE, leave_one_out=True),
    "UnorderedSetEstimator, three": Row(
        lambda: UnorderedSetEstimator("z", 3), sets(1), ("bernoulli three", *ONE_HOT, *CATEGORICAL), leave_one_out=True
    ),
    "UnorderedSetEstimator, no baseline": Row(
        lambda: UnorderedSetEstimator("z", 2, use_baseline=False), sets(1), DISCRETE
    ),
    "ImportanceSampling": Row(lambda: ImportanceSampling("z", flatter), proposed(flatter), DISCRETE),
    "ImportanceSampling, two": Row(lambda: ImportanceSampling("z", flatter, 2), proposed(flatter), ("one-hot probs",)),
    **CONTROLLED,
}


TYPICAL = ("bernoulli plates", "one-hot probs", "categorical", "normal")


def named(condition: Callable[[str], bool] = lambda name: True, everywhere: bool = False) -> pytest.MarkDecorator:
    """Run a test for every method that meets a condition, on each of its nodes or on a typical few of them."""
    pairs = []
    for name, row in METHODS.items():
        if condition(name):
            chosen = [node for node in row.nodes if everywhere or node in TYPICAL]
            pairs += [(name, node) for node in chosen or row.nodes[:1]]
    return pytest.mark.parametrize(("name", "node"), pairs, ids=[f"{name}-{node}" for name, node in pairs])


def is_of_any_order(name: str) -> bool:
    return METHODS[name].make().any_order


def exact(parameter: Tensor, node: Node, costs: Costs) -> Tensor:
    """The expectation, [*plates, m], by summing over all values."""
    distribution = node.build(parameter)
    rule = normals(60, pathwise=True) if isinstance(distribution, Normal) else values
    points, weight = rule(distribution, node.num_plates, 1)
    return (weight.unsqueeze(-1) * costs(points[0], 1 + node.num_plates)).sum(0)


def outcomes(row: Row, node: Node, costs: Costs, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every outcome's surrogate [R, *plates, m], its weight [R, *plates] and its own copy [R, ...] of the parameter."""
    method = row.make()
    method.check(node.build(parameter))
    noise, weight = row.rule(node.build(parameter), node.num_plates, method.n_samples)
    copies = parameter.expand(len(weight), *parameter.shape).clone()
    distribution = node.build(copies)
    if noise is None:  # nothing is random
        noise = method.draw(distribution, node.num_plates + 1)
    sample = method.place(distribution, node.num_plates + 1, noise)
    estimate = method.estimate(sample, costs(sample.points, 2 + node.num_plates))
    return estimate.expand(*weight.shape, -1), weight.detach(), copies


def mean(row: Row, node: Node, costs: Costs, parameter: Tensor) -> Tensor:
    """The expected surrogate, [*plates, m]."""
    estimate, weight, _ = outcomes(row, node, costs, parameter)
    return (weight.unsqueeze(-1) * estimate).sum(0)


def total(surrogate: Tensor) -> Tensor:
    """A sum in which every item and cost counts differently."""
    return (surrogate * torch.linspace(0.5, 1.5, surrogate.numel(), dtype=torch.float64).reshape(surrogate.shape)).sum()


def gradient(value: Tensor, parameter: Tensor, create_graph: bool = False) -> Tensor:
    return torch.autograd.grad(
        total(value),
        parameter,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )[0]


def hessian(surrogate: Callable[[Tensor], Tensor], parameter: Tensor) -> Tensor:
    first = gradient(surrogate(parameter), parameter, create_graph=True).flatten()
    rows = [
        torch.autograd.grad(each, parameter, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        if each.requires_grad
        else torch.zeros_like(parameter)
        for each in first
    ]
    return torch.stack(rows)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@named(everywhere=True)
def test_the_mean_value_and_gradient_are_exact(name, node):
    row, node = METHODS[name], NODES[node]
    costs, parameter = Costs(plates_of(node)), node.leaf()
    assert (row.make().declares == "biased") == (row.stated is not None), "what is biased states its expectation"
    expected = (row.stated or exact)(parameter, node, costs)
    ours = mean(row, node, costs, parameter)
    close(ours, expected)
    close(gradient(ours, parameter), gradient(expected, parameter))
    assert gradient(expected, parameter).abs().max() > 1e-3


@named(is_of_any_order)
def test_the_mean_hessian_is_exact(name, node):
    row, node = METHODS[name], NODES[node]
    costs, parameter = Costs(plates_of(node)), node.leaf()
    ours = hessian(lambda p: mean(row, node, costs, p), parameter)
    close(ours, hessian(lambda p: exact(p, node, costs), parameter), 1e-9)


@named(is_of_any_order)
def test_a_constant_cost_has_neither_gradient_nor_hessian(name, node):
    row, node = METHODS[name], NODES[node]
    costs, parameter = Costs(plates_of(node), scale=0, shift=3), node.leaf()
    ours = hessian(lambda p: mean(row, node, costs, p), parameter)
    close(ours, torch.zeros_like(ours))
    close(gradient(mean(row, node, costs, parameter), parameter), torch.zeros_like(parameter))


def each_draw(estimate: Tensor, copies: Tensor) -> Tensor:
    """Every outcome's gradient, [R, ...]."""
    weights = torch.linspace(0.5, 1.5, estimate[0].numel(), dtype=torch.float64).reshape(estimate[0].shape)
    return torch.autograd.grad(
        (estimate * weights).sum(), copies, retain_graph=True, allow_unused=True, materialize_grads=True
    )[0]


@named()
def test_scaled_costs_scale_the_gradient_and_shifted_ones_leave_its_mean(name, node):
    row, node = METHODS[name], NODES[node]
    parameter = node.leaf()
    runs = [outcomes(row, node, Costs(plates_of(node), *each), parameter) for each in ((1, 0), (-2.5, 0), (1, 10))]
    plain, scaled, shifted = (each_draw(estimate, copies) for estimate, _, copies in runs)
    if row.scales:
        torch.testing.assert_close(scaled, -2.5 * plain, rtol=1e-9, atol=1e-9)
    if row.leave_one_out:
        close(shifted, plain, 1e-9)
    means = [gradient((weight.unsqueeze(-1) * estimate).sum(0), parameter) for estimate, weight, _ in runs]
    close(means[1], -2.5 * means[0], 1e-9)
    close(means[2], means[0], 1e-9)


@named()
def test_costs_at_once_are_as_they_are_one_by_one(name, node):
    """Also costs that are the same for all items of the plates."""
    row, node = METHODS[name], NODES[node]
    parameter, plates = node.leaf(), plates_of(node)
    method = row.make()
    torch.manual_seed(5)
    sample = method.propose(node.build(parameter), node.num_plates)
    costs = Costs(plates)(sample.points, 1 + node.num_plates)
    together = row.make().estimate(sample, costs)
    for i in range(NUM_COSTS):
        alone = row.make().estimate(sample, costs[..., i : i + 1])
        if row.scales:
            close(alone, together[..., i : i + 1])
            close(gradient(alone, parameter), gradient(together[..., i : i + 1], parameter))
    shared = costs[(slice(None), *[slice(1)] * node.num_plates)]
    ours, expanded = (row.make().estimate(sample, each) for each in (shared, shared.expand_as(costs)))
    ours = ours.expand(*plates, NUM_COSTS)
    close(ours, expanded)
    close(gradient(ours, parameter), gradient(expanded, parameter))


NUM_DRAWS = 4000


@named()
def test_what_is_drawn_has_the_law_that_the_enumeration_assumes(name, node):
    """The mean of many draws, and their mean square, are those of the enumeration: 4.5 standard errors."""
    row, node = METHODS[name], NODES[node]
    costs, parameter = Costs(plates_of(node)), node.leaf()
    torch.manual_seed(zlib.crc32(name.encode()))
    estimate, weight, copies = outcomes(row, node, costs, parameter)
    drawn = parameter.detach().expand(NUM_DRAWS, *parameter.shape).clone().requires_grad_()
    method = row.make()
    sample = method.propose(node.build(drawn), node.num_plates + 1)
    ours = method.estimate(sample, costs(sample.points, 2 + node.num_plates)).expand(NUM_DRAWS, *plates_of(node), -1)
    in_law(ours.detach(), estimate.detach(), weight.unsqueeze(-1))
    if row.draws_gradient:
        ones = (1,) * (parameter.dim() - node.num_plates)
        in_law(each_draw(ours, drawn), each_draw(estimate, copies), weight.reshape(*weight.shape, *ones))


def in_law(draws: Tensor, values: Tensor, weight: Tensor) -> None:
    """Assert that draws [N, ...] have the first two moments of values [R, ...] with these weights."""
    for power in (1, 2):
        first, second = ((weight * values ** (i * power)).sum(0) for i in (1, 2))
        error = ((second - first**2).clamp(min=0) / len(draws)).sqrt()
        off = ((draws**power).mean(0) - first).abs() - 4.5 * error
        assert off.max() < 1e-9, f"moment {power} is off by {off.max() / error.max() + 4.5:.1f} standard errors"


@named(lambda name: not is_of_any_order(name) and METHODS[name].stated is None)
def test_what_has_no_second_derivative_says_so(name, node):
    row, node = METHODS[name], NODES[node]
    parameter = node.leaf()
    value = mean(row, node, Costs(plates_of(node)), parameter)
    first = gradient(value, parameter, create_graph=True)
    with pytest.raises(ValueError, match=f"{type(row.make()).__name__} estimates first derivatives alone"):
        gradient(first.sum(), parameter)
