"""Replicates: each has the gradient that a story of its own would have."""

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, OneHotCategorical, kl_divergence

import stochastic_graph as storch
from stochastic_graph.method import Expect, Reparameterization, ScoreFunction
from stochastic_graph.tensor import plain

DTYPE = torch.float64


def story(t: torch.Tensor, first: storch.method.Method, second: storch.method.Method) -> list[storch.StochasticTensor]:
    """Two roots, the parameters of one made of the other's, and a node below them."""
    x = storch.denote_independent(torch.tensor([0.5, -1.0], dtype=DTYPE), 0, "data")
    q = Bernoulli(logits=t[0] * x)
    p = Bernoulli(logits=q.logits * t[1])
    a, b = first(q), second(p)
    c = Expect("c")(Bernoulli(logits=a * t[2] + b))
    storch.add_cost((a - b * c + x) ** 2, "cost")
    storch.add_cost(kl_divergence(q, p), "kl")
    storch.add_cost(t[0] ** 2, "constant")
    return [a, b, c]


def test_exact_gradients_of_every_replicate() -> None:
    t = torch.tensor([0.3, -0.7, 0.5], dtype=DTYPE, requires_grad=True)
    with storch.Graph():
        nodes = story(t, Expect("a"), Expect("b"))
        value = storch.backward()
    expected = [plain(node.param_grads["logits"]) for node in nodes]
    with storch.replicates(4, "r"):
        nodes = story(t, Expect("a"), Expect("b"))
        torch.testing.assert_close(storch.backward(), value)
    for node, wanted in zip(nodes, expected, strict=True):
        own = node.param_grads["logits"]
        assert "r" in [plate.name for plate in own.plates]
        at = [plate.name for plate in own.plates].index("r")
        for each in plain(own).unbind(at):
            torch.testing.assert_close(each, wanted)


def test_one_replicate_is_one_pass() -> None:
    """The same noise gives the same gradient."""
    t = torch.tensor([0.3, -0.7, 0.5], dtype=DTYPE, requires_grad=True)
    methods = ScoreFunction("a", 3, "batch_average"), Reparameterization("b", 2)

    def tell() -> list[storch.StochasticTensor]:
        x = storch.denote_independent(torch.tensor([0.5, -1.0], dtype=DTYPE), 0, "data")
        q = Independent(Normal(t[0] * x, t[1].exp()), 0)
        a = methods[0](Bernoulli(logits=t[2] * x))
        b = methods[1](q)
        storch.add_cost((a - b) ** 2 + storch.log_prob(q, b), "cost")
        return [a, b]

    torch.manual_seed(1)
    with storch.Graph():
        nodes = tell()
        storch.backward()
    expected = [node.param_grads for node in nodes]
    torch.manual_seed(1)
    with storch.replicates(1):
        nodes = tell()
        storch.backward()
    for node, wanted in zip(nodes, expected, strict=True):
        assert node.param_grads.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(plain(node.param_grads[name])[0], plain(gradient))


def test_parameters_of_before_cannot_be_mixed_with_samples() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    with storch.replicates(5):
        value = storch.denote_independent(logits, 0, "data") * 1.0
        q = OneHotCategorical(logits=value)
        before = q.logits
        z = ScoreFunction("z")(q)
        storch.add_cost((before * z).sum(-1), "mixed")
        with pytest.raises(ValueError, match="node 'z' as they were before"):
            storch.backward()


def test_nothing_else_changes() -> None:
    """No .grad, no moving average, no graph of another story."""
    theta, how = torch.zeros((), requires_grad=True), ScoreFunction("z", baseline_factory="moving_average")
    state = str(how.state_dict())
    storch.add_cost(torch.ones(()), "outside")
    with storch.replicates(3):
        storch.add_cost(how(Bernoulli(logits=theta)) * 2.0, "cost")
        storch.backward()
    assert theta.grad is None
    assert str(how.state_dict()) == state
    assert list(storch.costs()) == ["outside"]
    storch.reset()
    with pytest.raises(ValueError, match="at least one"):
        storch.replicates(0)
    with storch.replicates(2), pytest.raises(ValueError, match="cannot be differentiated again"):
        storch.backward(create_graph=True)
