"""The surrogate's value and derivatives against the enumerated expectation of whole stories.

A method is made to give each outcome in turn, with its probability: the probability-weighted sum of what the story
gives is its expectation.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Distribution, Normal, kl_divergence

import stochastic_graph as storch
from estimators.nodes.base import Method
from stochastic_graph.method import Expect, Infer, Reparameterization, ScoreFunction
from stochastic_graph.tensor import plain

Story = Callable[[Callable[[str, Distribution], storch.StochasticTensor]], None]
DTYPE = torch.float64


class Script:
    """Gives the draws of a story one after another, every combination of values once."""

    def __init__(self) -> None:
        self.choices: list[int] = []
        self.at = 0
        self.sizes: list[int] = []
        self.probability = 1.0

    def runs(self) -> Iterator["Script"]:
        while True:
            self.at, self.probability, self.sizes = 0, 1.0, []
            yield self
            while self.choices and self.choices[-1] + 1 == self.sizes[len(self.choices) - 1]:
                self.choices.pop()
            if not self.choices:
                return
            self.choices[-1] += 1

    def draw(self, distribution: Distribution, n: int) -> Tensor:
        """Return one of all the values of n independent draws of every variable of a distribution."""
        values = distribution.enumerate_support(expand=False).flatten()
        shape = (n, *distribution.batch_shape)
        size = torch.Size(shape).numel()
        if self.at == len(self.choices):
            self.choices.append(0)
        digits, index = [], self.choices[self.at]
        self.sizes.append(len(values) ** size)
        self.at += 1
        for _ in range(size):
            index, digit = divmod(index, len(values))
            digits.append(digit)
        points = values[digits].reshape(shape)
        self.probability *= distribution.log_prob(points).sum().exp().item()
        return points


class Scripted(ScoreFunction):
    """The score function, its draws read from a script."""

    def __init__(self, script: Script, name: str, n_samples: int, baseline: str):
        super().__init__(name, n_samples, baseline)
        self.script = script

    def draw(self, distribution: Distribution, num_plates: int) -> Tensor:
        return self.script.draw(distribution, self.n_samples)


def parameters() -> Tensor:
    return torch.tensor([0.3, -0.7, 0.5, 0.2, -0.4], dtype=DTYPE, requires_grad=True)


def bernoulli(logits: Tensor) -> Bernoulli:
    return Bernoulli(logits=logits)


# A story takes sample(name, distribution), which draws, and the parameters.


def chain(sample: Callable, t: Tensor) -> None:
    """z1 -> z2 -> z3, costs on the way."""
    z1 = sample("z1", bernoulli(t[0]))
    storch.add_cost((z1 - t[1]) ** 2, "first")
    z2 = sample("z2", bernoulli(t[1] * z1 + t[2]))
    storch.add_cost(z1 * z2 * t[3], "second")
    z3 = sample("z3", bernoulli(t[3] - 2 * z2 + t[4] * z1))
    storch.add_cost((z3 + z2 * t[0] - 0.3) ** 2, "third")


def diamond(sample: Callable, t: Tensor) -> None:
    """z1 -> (z2, z3) -> cost, and a cost on one of its sides."""
    z1 = sample("z1", bernoulli(t[0]))
    z2, z3 = sample("z2", bernoulli(t[1] + z1)), sample("z3", bernoulli(t[2] - 2 * z1))
    storch.add_cost(z2 * z3 * t[3] + (z1 - z3) ** 2 * t[4], "both")
    storch.add_cost((z2 - 0.4) ** 2, "side")


def with_data(sample: Callable, t: Tensor) -> None:
    """A shared z, one z to an observation, costs on the plate of one, of both and of none."""
    x = storch.denote_independent(torch.tensor([0.5, -1.0], dtype=DTYPE), 0, "data")
    shared = sample("shared", bernoulli(t[0]))
    z = sample("z", bernoulli(t[1] * x + shared))
    storch.add_cost((z - x * shared + t[2]) ** 2, "both")
    storch.add_cost(x * t[3] ** 2, "data alone")
    storch.add_cost((shared * t[4]).exp(), "shared alone")
    storch.add_cost(t[0] * t[1], "none")


def weighted(sample: Callable, t: Tensor) -> None:
    """A weighted plate, named twice, its second name later than the sample that is on it."""
    weight = torch.tensor([0.2, 0.5], dtype=DTYPE)
    x = storch.denote_independent(torch.tensor([0.5, -1.0], dtype=DTYPE), 0, "data", weight)
    z = sample("z", bernoulli(t[1] * x + t[0]))
    y = storch.denote_independent(torch.tensor([1.5, 2.0], dtype=DTYPE), 0, "data", weight)
    storch.add_cost((z * y - t[2]) ** 2, "cost")
    storch.add_cost(y * t[3], "later")


def two_plates(sample: Callable, t: Tensor) -> None:
    """Two variables of a node, on two nested plates."""
    x = storch.denote_independent(torch.tensor([[0.5], [-1.0]], dtype=DTYPE), 0, "rows")
    x = storch.denote_independent(x, 1, "columns")
    z = sample("z", bernoulli(torch.stack([t[0] * x, t[1] + 0 * x], -1)))
    storch.add_cost((z.sum(-1) - t[2] * x) ** 2, "cost")


STORIES = {each.__name__: each for each in (chain, diamond, with_data, weighted, two_plates)}


def expected(story: Callable, t: Tensor) -> Tensor:
    """Return the enumerated expectation of a story's total cost, by loops over the values of every sample."""
    total = torch.zeros((), dtype=DTYPE)
    script = Script()
    for run in script.runs():
        with storch.Graph() as graph:
            logs: list[Tensor] = []

            def sample(name: str, distribution: Bernoulli, run: Script = run, logs: list = logs) -> Tensor:
                raw = Bernoulli(logits=plain(distribution.logits))
                value = run.draw(raw, 1)[0]
                logs.append(raw.log_prob(value).sum())
                return storch.tensor.wrap(value, storch.tensor.plates_of(distribution.logits))

            story(sample, t)
            total = total + torch.stack(logs).sum().exp() * graph.surrogate_loss()
    return total


def derivatives(value: Tensor, t: Tensor, second: bool = True) -> list[Tensor]:
    """Return a scalar, its gradient and its Hessian."""
    (gradient,) = torch.autograd.grad(value, t, create_graph=second, materialize_grads=True)
    found = [value.detach(), gradient.detach()]
    if second:
        rows = [torch.autograd.grad(each, t, retain_graph=True, materialize_grads=True)[0] for each in gradient]
        found.append(torch.stack(rows))
    return found


def mean_of_draws(story: Callable, kinds: Sequence[str], second: bool = True) -> list[Tensor]:
    """Return the mean, over all that may be drawn, of the surrogate and its derivatives; `kinds`: a method each."""
    t = parameters()
    script, sums = Script(), None
    for run in script.runs():
        with storch.Graph() as graph:
            turn = itertools.cycle(kinds)

            def sample(name: str, distribution: Distribution, run: Script = run, turn: Iterator = turn) -> Tensor:
                return method(next(turn), name, run)(distribution)

            story(sample, t)
            found = derivatives(graph.surrogate_loss(), t, second)
        scaled = [run.probability * each for each in found]
        sums = scaled if sums is None else [a + b for a, b in zip(sums, scaled, strict=True)]
    assert sums is not None
    return sums


def method(kind: str, name: str, script: Script) -> Method:
    if kind == "expect":
        return Expect(name)
    samples, baseline = {"score": (1, "None"), "moving": (1, "moving_average"), "batch": (2, "batch_average")}[kind]
    return Scripted(script, name, samples, baseline)


MIXTURES = [
    ("expect",),
    ("score",),
    ("moving",),
    ("expect", "score"),
    ("score", "expect"),
    ("batch", "expect", "expect"),
]


@pytest.mark.parametrize("kinds", MIXTURES, ids="-".join)
@pytest.mark.parametrize("name", STORIES)
def test_stories_against_enumeration(name: str, kinds: Sequence[str]) -> None:
    """Value, gradient and Hessian of any mixture of methods are those of the enumerated expectation."""
    t = parameters()
    second = not (kinds[0] == "batch" and name == "two_plates")
    exact = derivatives(expected(STORIES[name], t), t, second)
    for own, wanted in zip(mean_of_draws(STORIES[name], kinds, second), exact, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)


def samples_of_samples(sample: Callable, t: Tensor) -> None:
    z1 = sample("z1", bernoulli(t[0]))
    z2 = sample("z2", bernoulli(t[1] + z1 * t[2]))
    storch.add_cost((z2 - 0.2 * z1) ** 2 + t[3] * z1, "cost")


def test_samples_of_samples() -> None:
    """Two samples of z1 and two of z2 for each: sixty-four outcomes."""
    t = parameters()
    exact = derivatives(expected(samples_of_samples, t), t)
    for own, wanted in zip(mean_of_draws(samples_of_samples, ("batch",)), exact, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)


def test_reparameterised_nodes_within_a_story() -> None:
    """b ~ Bernoulli, x ~ N(m + b, s): b enumerated, the pathwise gradient is that of each x, to second order."""
    t = torch.tensor([0.3, 0.7, -0.2], dtype=DTYPE, requires_grad=True)
    torch.manual_seed(0)
    with storch.Graph() as graph:
        b = Expect("b")(Bernoulli(logits=t[0]))
        x = Reparameterization("x", n_samples=4)(Normal(t[1] + b, t[2].exp()))
        assert [plate.name for plate in x.plates] == ["x", "b"]
        storch.add_cost((x - 1) ** 2 * b + x * t[1], "cost")
        own = derivatives(graph.surrogate_loss(), t)
    noise = ((plain(x) - t[1] - torch.tensor([0.0, 1.0])) / t[2].exp()).detach()
    p, value = t[0].sigmoid(), torch.tensor([0.0, 1.0], dtype=DTYPE)
    points = t[1] + value + t[2].exp() * noise
    costs = ((points - 1) ** 2 * value + points * t[1]).mean(0)
    for a, b in zip(own, derivatives((1 - p) * costs[0] + p * costs[1], t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_infer_reparameterises_where_it_can() -> None:
    m = torch.zeros((), requires_grad=True)
    assert Infer("x")(Normal(m, 1.0)).requires_grad
    assert not Infer("b")(Bernoulli(logits=m)).requires_grad
    storch.reset()


def test_credit_is_given_only_to_what_a_cost_depends_on() -> None:
    """Pruned equals unpruned in mean, and varies less."""

    def costs_of(sample: Callable, t: Tensor) -> tuple[Tensor, ...]:
        z1, z2 = sample("z1", bernoulli(t[0])), sample("z2", bernoulli(t[1]))
        return z1, z2, 10 * (z1 - 0.45) ** 2 * t[3], 7 * (z2 - 0.45) ** 2 * t[4].abs()

    def pruned(sample: Callable, t: Tensor) -> None:
        for cost in costs_of(sample, t)[2:]:
            storch.add_cost(cost, "cost")

    def unpruned(sample: Callable, t: Tensor) -> None:
        z1, z2, *costs = costs_of(sample, t)
        for cost in costs:
            storch.add_cost(cost + 0 * z1 + 0 * z2, "of the same value, on both plates")

    def moments(story: Callable) -> tuple[Tensor, Tensor]:
        t, script = parameters(), Script()
        first, second = torch.zeros(5, dtype=DTYPE), torch.zeros(5, dtype=DTYPE)
        for run in script.runs():
            with storch.Graph() as graph:
                story(lambda name, q, run=run: Scripted(run, name, 1, "None")(q), t)
                (gradient,) = graph.grad([t])
            first += run.probability * plain(gradient)
            second += run.probability * plain(gradient) ** 2
        return first, second - first**2

    (mean, variance), (other_mean, other_variance) = moments(pruned), moments(unpruned)
    torch.testing.assert_close(mean, other_mean)
    assert (variance[:2] < 0.5 * other_variance[:2]).all()


def test_param_grads_are_those_of_the_expectation() -> None:
    """For what was given: gradients with respect to probs and logits, normalised or not by the distribution."""
    raw = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=DTYPE, requires_grad=True)
    for name in ("probs", "logits"):
        given = (raw if name == "probs" else raw.log()).detach().requires_grad_()
        with storch.Graph():
            value = storch.denote_independent(given, 0, "data")
            q = Categorical(probs=value) if name == "probs" else Categorical(logits=value)
            z = Expect("z")(q)
            storch.add_cost(kl_divergence(q, Categorical(logits=torch.zeros_like(q.logits))), "kl")
            storch.add_cost((z * z).double() - 3 * z, "cost")
            storch.backward()
        torch.testing.assert_close(plain(z.param_grads[name]), given.grad, rtol=1e-12, atol=1e-12)
        with pytest.raises(KeyError, match="'z' was built of"):
            z.param_grads["probs" if name == "logits" else "logits"]


def test_param_grads_of_a_beta_are_those_of_both_its_concentrations() -> None:
    one, zero = (torch.tensor([1.5, 0.7], dtype=DTYPE, requires_grad=True) for _ in range(2))
    with storch.Graph() as graph:
        z = Reparameterization("z", 3)(Beta(one, zero))
        graph.add_cost((z**2).sum(-1), "f")
        graph.backward()
    assert one.grad is not None
    assert zero.grad is not None
    torch.testing.assert_close(plain(z.param_grads["concentration"]), torch.stack([one.grad, zero.grad], -1))


def test_param_grads_of_leaf_parameters_of_several_graphs() -> None:
    """Two graphs at once do not disturb each other; second derivatives do not overwrite param_grads."""
    t = torch.tensor([0.3, -0.4], dtype=DTYPE, requires_grad=True)
    first, second = storch.Graph(), storch.Graph()
    with first:
        a = Expect("z")(Bernoulli(logits=t[0]))
        with second:
            b = Expect("z")(Bernoulli(logits=t[1]))
            storch.add_cost(3 * b, "cost")
        storch.add_cost(2 * a, "cost")
    assert first.costs().keys() == {"cost"}
    with pytest.raises(ValueError, match="in another graph"):
        first.add_cost(1.0 * b, "stray")
    with second:
        (gradient,) = storch.grad(t, create_graph=True)
    kept = b.param_grads["logits"]._tensor.clone()
    gradient.sum().backward()
    torch.testing.assert_close(b.param_grads["logits"]._tensor, kept)
    first.backward()
    p = t.detach().sigmoid()
    torch.testing.assert_close(plain(a.param_grads["logits"]), 2 * p[0] * (1 - p[0]))
    torch.testing.assert_close(plain(gradient.detach()), torch.stack([0 * p[1], 3 * p[1] * (1 - p[1])]))


def test_the_value_of_backward_is_the_weighted_mean_of_all_costs() -> None:
    x = storch.denote_independent(torch.tensor([1.0, 3.0]), 0, "data", torch.tensor([0.25, 0.75]))
    storch.add_cost(x, "a")
    storch.add_cost(torch.tensor(2.0, requires_grad=True), "b")
    assert storch.costs().keys() == {"a", "b"}
    assert storch.backward().item() == pytest.approx(4.5)
    assert not storch.costs()


def test_costs_of_one_name_are_numbered() -> None:
    with storch.Graph() as graph:
        for _ in range(3):
            storch.add_cost(torch.ones(()), "cost")
        assert list(graph.costs()) == ["cost", "cost_1", "cost_2"]


def test_nodes_of_one_name_are_numbered() -> None:
    with storch.Graph():
        q = Bernoulli(logits=torch.zeros(()))
        names = [Expect("z")(q).name for _ in range(2)] + [Expect("z_1")(q).name]
    assert names == ["z", "z_1", "z_1_1"]


def test_samples_keep_what_they_were_drawn_from() -> None:
    with storch.Graph():
        q, how = Bernoulli(logits=torch.zeros(3)), ScoreFunction("z", 2)
        z = how(q)
        assert z.name == "z"
        assert z.distribution is q
        assert z.method is how
        assert isinstance(z, storch.Tensor)
        assert type(z * 2) is storch.Tensor
        assert z.event_shape == (3,)
