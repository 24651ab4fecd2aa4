"""Samples of few values: what follows from them is computed once a value, and is what it is for each sample."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    OneHotCategorical,
    kl_divergence,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_graph as storch
from stochastic_graph import repeated
from stochastic_graph.method import (
    ARM,
    REBAR,
    DisARM,
    Expect,
    GumbelSoftmax,
    ImportanceSampling,
    LocalExpectation,
    MuProp,
    RaoBlackwellSF,
    ScoreFunction,
    UnorderedSetEstimator,
)
from stochastic_graph.repeated import valid_repeats
from stochastic_graph.tensor import plain
from tests.stochastic_graph.test_repeated_tensors import repeats

DTYPE = torch.float64
NUM_DATA = 5


@contextmanager
def one_by_one() -> Iterator[None]:
    """Compute everything once a sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeated, "LEAST", 10**9)
        yield


def method(num_samples: int = 80) -> storch.method.Method:
    return ScoreFunction("z", num_samples, "batch_average")


class Model(nn.Module):
    """Something to train, built as the story needs it."""

    decoder: nn.Module
    target: nn.Module
    table: nn.Module

    def __init__(self, **parts: nn.Module):
        super().__init__()
        self.encoder = nn.Linear(4, 6)
        for name, part in parts.items():
            self.add_module(name, part)
        self.double()


def data() -> torch.Tensor:
    return storch.denote_independent(torch.rand(NUM_DATA, 4, dtype=DTYPE).round(), 0, "data")


def one_hot(model: Model, x: torch.Tensor) -> torch.Tensor:
    return method()(OneHotCategorical(logits=model.encoder(x).reshape((*x.shape[:-1], 2, 3))))


def decoded(model: Model, z: torch.Tensor) -> torch.Tensor:
    return model.decoder(z.reshape((*z.shape[:-2], 6)))


def bce(model: Model) -> None:
    x = data()
    reconstruction = decoded(model, one_hot(model, x))
    storch.add_cost(nn.BCELoss(reduction="none")(reconstruction, x).sum(-1), "cost")


def bce_dense(model: Model) -> None:
    """A gradient that differs from number to number."""
    x = data()
    loss = F.binary_cross_entropy(decoded(model, one_hot(model, x)), x, reduction="none")
    storch.add_cost((loss**2).sum(-1), "cost")


def bce_of_learned(model: Model) -> None:
    """A target with a gradient, on the samples' plate too."""
    x = data()
    z = one_hot(model, x)
    loss = F.binary_cross_entropy(decoded(model, z), (model.target(x) * z[..., 0, 1:2]).sigmoid(), reduction="none")
    storch.add_cost(loss.sum(-1), "cost")


def squares(model: Model) -> None:
    x = data()
    storch.add_cost(((decoded(model, one_hot(model, x)) - x) ** 2).sum(-1), "cost")


def images(model: Model) -> None:
    x = data()
    h = one_hot(model, x).flatten(-2).unflatten(2, (6, 1, 1))
    storch.add_cost((model.decoder(h).flatten(-3)[..., :4] - x).abs().sum(-1), "cost")


def with_features(model: Model) -> None:
    x = data()
    z = one_hot(model, x)
    wide = torch.cat([z.flatten(-2).tanh(), x], -1)
    storch.add_cost(model.decoder(wide).square().sum(-1), "cost")


def categories(model: Model) -> None:
    x = data()
    z = method()(Categorical(logits=model.encoder(x)))
    storch.add_cost((model.decoder(model.table(z)) - x).square().sum(-1), "cost")


def bits(model: Model) -> None:
    x = data()
    z = method()(Independent(Bernoulli(logits=model.encoder(x)[..., :3]), 1))
    log_p = Independent(Bernoulli(probs=torch.full((3,), 0.3, dtype=DTYPE)), 1).log_prob(z)
    storch.add_cost((model.decoder(z) - x).square().sum(-1) - log_p, "cost")


def two_nodes(model: Model) -> None:
    x = data()
    first = one_hot(model, x)
    q = Bernoulli(logits=decoded(model, first)[..., :2])
    second = ScoreFunction("y", 4, "batch_average")(q)
    storch.add_cost(kl_divergence(q, Bernoulli(logits=torch.zeros_like(q.logits))).sum(-1), "kl")
    storch.add_cost((second.sum(-1) - first.sum((-1, -2)) * x.sum(-1)) ** 2, "cost")


def nested(model: Model) -> None:
    weight = torch.tensor([0.2, 0.3, 0.5], dtype=DTYPE)
    x = storch.denote_independent(torch.rand(3, 2, 4, dtype=DTYPE), 0, "groups", weight)
    x = storch.denote_independent(x, 1, "members")
    centre = storch.denote_independent(torch.rand(3, 4, dtype=DTYPE), 0, "groups", weight)
    z = one_hot(model, centre)
    storch.add_cost((decoded(model, z) - x).square().sum(-1), "cost")


def alone(model: Model) -> None:
    """A node on no other plate."""
    z = method(300)(OneHotCategorical(logits=model.encoder.bias.reshape(2, 3)))
    storch.add_cost(decoded(model, z).square().sum(-1), "cost")


def noisy(model: Model) -> None:
    """Masks differ among samples of one value."""
    x = data()
    h = decoded(model, one_hot(model, x))
    storch.add_cost((F.dropout(h, 0.5) + torch.rand_like(h) - x).square().sum(-1), "cost")


def changed(model: Model) -> None:
    x = data()
    h = decoded(model, one_hot(model, x))
    h[..., 0] = 2.0
    h += x
    storch.add_cost(h.square().sum(-1), "cost")


def mlp(inputs: int = 6, last: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 7), nn.ReLU(), nn.Linear(7, 4), last())


def in_place() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 7), nn.Unflatten(-1, (7, 1)), nn.ReLU(inplace=True), nn.Flatten(-2), nn.Linear(7, 4)
    )


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 4), nn.Softmax(-1))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(6, 4, 2), nn.GELU(), nn.Conv2d(4, 3, 2, 1, 1))


STORIES: dict[str, tuple[Callable[[Model], None], Callable[[], dict[str, nn.Module]]]] = {
    "binary cross-entropy": (bce, lambda: {"decoder": mlp()}),
    "squares of binary cross-entropy": (bce_dense, lambda: {"decoder": mlp()}),
    "binary cross-entropy of a learned target": (bce_of_learned, lambda: {"decoder": mlp(), "target": nn.Linear(4, 4)}),
    "squares": (squares, lambda: {"decoder": mlp()}),
    "layer norm": (squares, lambda: {"decoder": norms()}),
    "in place": (squares, lambda: {"decoder": in_place()}),
    "convolutions": (images, lambda: {"decoder": convolutions()}),
    "features": (with_features, lambda: {"decoder": mlp(10)}),
    "categories": (categories, lambda: {"decoder": mlp(), "table": nn.Embedding(6, 6)}),
    "bits": (bits, lambda: {"decoder": mlp(3)}),
    "two nodes": (two_nodes, lambda: {"decoder": mlp(last=nn.Identity)}),
    "nested plates": (nested, lambda: {"decoder": mlp()}),
    "alone": (alone, lambda: {"decoder": mlp()}),
    "dropout": (noisy, lambda: {"decoder": mlp()}),
    "changed": (changed, lambda: {"decoder": mlp(last=nn.Identity)}),
}


def derivatives(name: str) -> list[torch.Tensor]:
    """Return a story's costs, and the gradients and a product of the Hessian of its surrogate."""
    tell, parts = STORIES[name]
    torch.manual_seed(3)
    model = Model(**parts())
    with storch.Graph():
        tell(model)
        parameters = list(model.parameters())
        costs = list(storch.costs().values())
        first = storch.grad(parameters, create_graph=True)
        dot = torch.cat([plain(each).flatten() for each in first]).cos().sum()
        second = torch.autograd.grad(dot, parameters, allow_unused=True, materialize_grads=True)
        return [plain(each) for each in (*costs, *first, *second)]


@pytest.mark.parametrize("name", STORIES)
def test_all_is_as_it_is_one_by_one(name: str) -> None:
    own = derivatives(name)
    with one_by_one():
        wanted = derivatives(name)
    for given, expected in zip(own, wanted, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-10)


class Rows(TorchDispatchMode):
    """Counts the rows of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rows += [max(each.shape) for each in args[-2:]]
        return func(*args, **kwargs)


@pytest.mark.parametrize("tell", [bce, squares])
def test_a_decoder_sees_each_value_once(tell: Callable[[Model], None]) -> None:
    """Forwards and backwards: nine values, five observations."""
    with storch.Graph(), Rows() as counted:
        tell(Model(decoder=mlp()))
        storch.backward()
    assert len(counted.rows) > 12
    assert max(counted.rows) <= 9
    with storch.Graph(), Rows() as counted, one_by_one():
        tell(Model(decoder=mlp()))
        storch.backward()
    assert max(counted.rows) == 80 * NUM_DATA


@pytest.fixture(autouse=True)
def story() -> Iterator[None]:
    torch.manual_seed(0)
    with storch.Graph():
        yield


def test_gradients_of_parameters_that_depend_on_samples() -> None:
    """Known where the node is sampled before anything is computed of its distribution, and refused where not."""
    for tell in ("after", "before"):
        torch.manual_seed(0)
        q = OneHotCategorical(logits=repeats(requires_grad=True))
        prior = OneHotCategorical(logits=torch.zeros(3, dtype=DTYPE))
        kl = kl_divergence(q, prior) if tell == "before" else None
        y = ScoreFunction("y", 2)(q)
        storch.add_cost(kl_divergence(q, prior) if kl is None else kl, "kl")
        storch.add_cost(y[..., 0] * 3.0, "cost")
        storch.backward()
        if kl is not None:
            with pytest.raises(KeyError, match=r"node 'y': the gradient of 'logits' is not known.*sample first"):
                y.param_grads["logits"]
            continue
        given = plain(y.param_grads["logits"])
        torch.manual_seed(0)
        with one_by_one():
            z = ScoreFunction("z", 40)(
                OneHotCategorical(logits=storch.denote_independent(torch.zeros(8, 9, dtype=DTYPE), 0, "data"))
            )
            table = torch.rand(9, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
            q = OneHotCategorical(logits=z @ table.requires_grad_())
            y = ScoreFunction("y", 2)(q)
            storch.add_cost(kl_divergence(q, prior), "kl")
            storch.add_cost(y[..., 0] * 3.0, "cost")
            storch.backward()
        torch.testing.assert_close(given, plain(y.param_grads["logits"]))


METHODS: dict[str, Callable[[], storch.method.Method]] = {
    "ScoreFunction": lambda: ScoreFunction("z", 40, "moving_average"),
    "Expect": lambda: Expect("z"),
    "RaoBlackwellSF": lambda: RaoBlackwellSF("z", 3, 20),
    "UnorderedSetEstimator": lambda: UnorderedSetEstimator("z", 3),
    "ImportanceSampling": lambda: ImportanceSampling("z", lambda q: Bernoulli(probs=q.mean * 0.5 + 0.25), 30),
    "DisARM": lambda: DisARM("z", 20),
    "ARM": lambda: ARM("z", 20),
    "REBAR": lambda: REBAR("z", 20),
    "MuProp": lambda: MuProp("z", 20),
    "LocalExpectation": lambda: LocalExpectation("z", 20),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_replicates", [0, 30])
def test_methods(name: str, num_replicates: int) -> None:
    """Each estimate, a story's and those of replicates, is what it is one by one."""

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        x = storch.denote_independent(torch.linspace(-1, 1, 30, dtype=DTYPE).reshape(10, 3).requires_grad_(), 0, "data")
        with storch.replicates(num_replicates, "r") if num_replicates else storch.Graph():
            z = METHODS[name]()(Bernoulli(logits=x * 1.0))
            h = (z @ torch.arange(12.0, dtype=DTYPE).reshape(3, 4)).sin()
            storch.add_cost((h - x.sum(-1, keepdim=True)).square().sum(-1), "cost")
            storch.backward()
        return plain(z.param_grads["logits"])

    given = gradient()
    with one_by_one():
        torch.testing.assert_close(given, gradient())


class Spins(ScoreFunction):
    """Points that are no values of the distribution."""

    def draw(self, distribution: Distribution, num_plates: int) -> torch.Tensor:
        return 20 * torch.randn_like(super().draw(distribution, num_plates))


def test_what_does_not_repeat() -> None:
    """Relaxed samples, even without gradients; samples of many values; those with gradients; few of them."""
    logits = torch.zeros(50, 2, dtype=DTYPE)
    x = storch.denote_independent(logits, 0, "data")
    for how, q in (
        (GumbelSoftmax("z", 10), OneHotCategorical(logits=x)),
        (GumbelSoftmax("z", 10), Bernoulli(logits=x)),
        (ScoreFunction("z", 10), Bernoulli(logits=x.repeat(1, 20))),
        (ScoreFunction("z", 10), Bernoulli(logits=x.repeat(1, 100))),
        (ScoreFunction("z", 2), Bernoulli(logits=x)),
        (ScoreFunction("z", 10), Normal(x, 1.0)),
        (ScoreFunction("z", 10), Bernoulli(logits=x[..., :0])),
        (Spins("z", 10), Bernoulli(logits=x)),
    ):
        assert valid_repeats(how(q)) is None
    assert valid_repeats(ScoreFunction("z", 10)(Bernoulli(logits=x))) is not None
