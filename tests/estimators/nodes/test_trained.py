"""What trains the control variates: their parameters get the gradient of the variance; measure-valued gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Distribution,
    Exponential,
    Independent,
    LogNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    RelaxedBernoulli,
)

import stochastic_graph as storch
from estimators.nodes.base import Method, logits_of
from estimators.nodes.double_cv import DoubleCV
from estimators.nodes.measure_valued import MeasureValued
from estimators.nodes.rebar import REBAR
from estimators.nodes.relax import LAX, RELAX
from estimators.nodes.rodeo import RODEO
from tests.estimators.nodes.draws import Rule, relaxations, values
from tests.estimators.nodes.frame import NODES, Costs, Node, plates_of
from tests.estimators.nodes.rows import randomly_set

TRAINED = {
    "REBAR": (lambda: REBAR("z", eta=0.7), relaxations(3), "bernoulli"),
    "REBAR, temperature": (lambda: REBAR("z", eta=0.7, train_temperature=True), relaxations(3), "bernoulli"),
    "REBAR, categories": (lambda: REBAR("z", eta=0.7, train_temperature=True), relaxations(2), "one-hot"),
    "RELAX": (lambda: randomly_set(RELAX("z", 1)), relaxations(3), "bernoulli"),
    "DoubleCV": (lambda: DoubleCV("z", 2, 0.3), values, "one-hot"),
    "RODEO": (lambda: randomly_set(RODEO("z")), values, "bernoulli three"),
}


def second_moment(method: Method, rule: Rule, node: Node) -> Tensor:
    """The mean square of the gradient by the logits."""
    parameter = node.leaf()
    noise, weight = rule(node.build(parameter), node.num_plates, method.n_samples)
    q = node.build(parameter.detach().expand(len(weight), *parameter.shape).clone().requires_grad_())
    sample = method.place(q, node.num_plates + 1, noise)
    estimate = method.estimate(sample, Costs(plates_of(node))(sample.points, 2 + node.num_plates)[..., :1])
    (found,) = torch.autograd.grad(estimate.sum(), logits_of(q))
    return (weight.detach() * found.square().reshape(len(weight), -1).sum(-1)).sum()


@pytest.mark.parametrize("name", TRAINED)
def test_backward_gives_the_parameters_the_gradient_of_the_variance(name):
    """Over some outcomes with weights: what they leave, each drawn alone, is the slope of their mean square."""
    make, rule, at = TRAINED[name]
    node, method = NODES[at], make().to(torch.float64)
    chosen = [each for each in method.parameters() if each.requires_grad]
    step = 1e-5
    for each, ours in zip(chosen, mean_training_gradients(method, rule, node, chosen), strict=True):
        flat = each.data.view(-1)
        for i in range(min(3, len(flat))):
            moments = []
            for sign in (1, -1):
                flat[i] += sign * step
                moments.append(second_moment(method, rule, node))
                flat[i] -= sign * step
            torch.testing.assert_close(ours.view(-1)[i], (moments[0] - moments[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def mean_training_gradients(method: Method, rule: Rule, node: Node, parameters: list) -> list[Tensor]:
    """The weighted sum of the gradients that the outcomes leave, each drawn alone."""
    leaf = node.leaf()
    noise, weight = rule(node.build(leaf), node.num_plates, method.n_samples)
    totals = [torch.zeros_like(each) for each in parameters]
    for r in range(len(weight)):
        sample = method.place(node.build(leaf), node.num_plates, noise[:, r])
        estimate = method.estimate(sample, Costs(plates_of(node))(sample.points, 1 + node.num_plates)[..., :1])
        for total, found in zip(totals, torch.autograd.grad(estimate.sum(), parameters), strict=True):
            total += weight[r].detach() * found
    return totals


@pytest.mark.parametrize("kind", ["REBAR", "RELAX", "DoubleCV", "LAX"])
def test_an_optimiser_that_has_the_parameters_lowers_the_variance(kind):
    """In a stochastic graph, with what backward() leaves; a checkpoint restores what was trained."""
    torch.manual_seed(6)
    makes = {
        "REBAR": lambda: REBAR("z", eta=3.0),
        "RELAX": lambda: RELAX("z", 2),
        "DoubleCV": lambda: DoubleCV("z", 3, alpha=2.0),
        "LAX": lambda: LAX("z", 2),
    }
    method = makes[kind]()
    optimiser = torch.optim.Adam(method.parameters(), lr=0.05)

    def gradients() -> Tensor:
        logits = torch.tensor([0.3, -0.6]).expand(128, 2).clone().requires_grad_()
        q = storch.denote_independent(logits, 0, "data")
        z = method(Normal(q, 0.5) if kind == "LAX" else Bernoulli(logits=q))
        storch.add_cost(((z - torch.tensor([0.4, 0.1])) ** 2).sum(-1) + 3, "f")
        method.zero_grad()
        storch.backward()
        assert logits.grad is not None
        return logits.grad * 128

    before = gradients().var(0).sum()
    for _ in range(40):
        gradients()
        optimiser.step()
    after = gradients().var(0).sum()
    assert after < 0.8 * before
    again = makes[kind]()
    again.load_state_dict(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), method.parameters(), strict=True))


MADE_OF_OTHERS = {
    "Beta": lambda x: Beta(x.exp(), 1 + x.exp()),
    "LogNormal": lambda x: LogNormal(x, 0.5),
    "RelaxedBernoulli": lambda x: RelaxedBernoulli(torch.tensor(0.7), logits=x),
    "Independent": lambda x: Independent(LogNormal(x, 0.5), 1),
}


@pytest.mark.parametrize("kind", MADE_OF_OTHERS)
def test_lax_trains_its_network_for_distributions_that_are_made_of_others(kind):
    torch.manual_seed(8)
    layer = torch.nn.Linear(2, 1)
    method, logits = (
        LAX("z", 2, network=torch.nn.Sequential(layer, torch.nn.Tanh())),
        torch.tensor([0.3, -0.6], requires_grad=True),
    )
    with storch.Graph():
        z = method(MADE_OF_OTHERS[kind](logits))
        storch.add_cost((z.sum(-1) - 0.4) ** 2, "f")
        storch.backward()
    assert logits.grad is not None
    assert logits.grad.abs().min() > 0
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


PARTS = {
    "Normal": (lambda x: Normal(x[..., 0], x[..., 1]), [0.7, 1.3]),
    "Exponential": (lambda x: Exponential(x[..., 0]), [1.7]),
    "Poisson": (lambda x: Poisson(x[..., 0]), [2.1]),
    "Bernoulli": (lambda x: Bernoulli(probs=x[..., 0]), [0.3]),
}


def expected_cost(kind: str, x: Tensor) -> Tensor:
    """E[(x_1 + 2 x_2)^2 x_1] of two independent, equal variables, by their moments."""
    if kind == "Normal":
        m, s = x[0], x[1]
        first, second, third = m, m**2 + s**2, m**3 + 3 * m * s**2
    elif kind == "Exponential":
        first, second, third = (math.factorial(k) / x[0] ** k for k in (1, 2, 3))
    elif kind == "Poisson":
        r = x[0]
        first, second, third = r, r + r**2, r + 3 * r**2 + r**3
    else:
        first = second = third = x[0]
    return third + 4 * second * first + 4 * first * second


@pytest.mark.parametrize("kind", PARTS)
def test_the_measure_valued_gradient_is_unbiased(kind):
    """40 000 draws of two variables, one parameter for both: 4.5 standard errors."""
    build, at = PARTS[kind]
    num = 40_000
    torch.manual_seed(7)
    x = torch.tensor(at, dtype=torch.float64).expand(num, 2, -1).clone().requires_grad_()
    method = MeasureValued("z")
    q: Distribution = build(x)
    sample = method.propose(q, 1)
    cost = (sample.points[..., 0] + 2 * sample.points[..., 1]) ** 2 * sample.points[..., 0]
    estimate = method.estimate(sample, cost.unsqueeze(-1))
    (found,) = torch.autograd.grad(estimate.sum(), x)
    found = found.sum(1)
    leaf = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = expected_cost(kind, leaf)
    (expected,) = torch.autograd.grad(value, leaf)
    assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) / num**0.5).all()
    assert (estimate.mean() - value).abs() < 4.5 * estimate.std() / num**0.5
    assert found.std() < 40 * expected.abs().max(), "the parts are coupled"


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="node 'z': LAX takes what can be reparameterised, not Bernoulli; use RELAX"):
        LAX("z", 1).check(Bernoulli(logits=torch.zeros(2)))
    with pytest.raises(ValueError, match="node 'z': RELAX was given in_dim = 3, and a sample has 2 numbers"):
        storch.method.RELAX("z", 3).estimate(
            RELAX("z", 3).propose(Bernoulli(logits=torch.zeros(2, requires_grad=True)), 0), torch.ones(1, 1)
        )
    q = OneHotCategorical(logits=torch.zeros(3))
    with pytest.raises(ValueError, match="node 'z': REBAR needs costs that are differentiable functions"):
        REBAR("z").estimate(REBAR("z").propose(q, 0), torch.ones(2, 1))
    for make, message in (
        (lambda: REBAR("z", temperature=0), r"REBAR\('z'\): temperature = 0, expected a positive number"),
        (lambda: DoubleCV("z", 1), r"DoubleCV\('z'\): n_samples = 1, expected at least 2"),
        (lambda: RELAX("z", 0), r"RELAX\('z'\): in_dim = 0, expected at least 1"),
        (lambda: storch.method.ARMS("z", 1), r"ARMS\('z'\): n_samples = 1, expected at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
