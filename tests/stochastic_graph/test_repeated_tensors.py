"""Tensors that repeat: every function gives what it gives for all items, and nothing sees that they have no numbers."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Bernoulli, Categorical, OneHotCategorical
from torch.nn import functional as F

import stochastic_graph as storch
from stochastic_graph import names, rules
from stochastic_graph.method import ScoreFunction
from stochastic_graph.repeated import Repeated, valid_repeats
from stochastic_graph.tensor import plain
from tests.stochastic_graph import test_functions as functions

DTYPE = torch.float64


def repeats(num_values: int = 9, event: tuple[int, ...] = (3,), requires_grad: bool = False) -> Repeated:
    """Return a tensor [40, 8, *event] on plates z and data, without its numbers yet, that repeats."""
    x = storch.denote_independent(torch.zeros(8, num_values, dtype=DTYPE), 0, "data")
    z = ScoreFunction("z", 40)(OneHotCategorical(logits=x))
    table = torch.rand(num_values, *event, dtype=DTYPE, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    h = z @ table.requires_grad_(requires_grad).reshape(num_values, -1)
    h = h.unflatten(-1, event) if event else h[..., 0]
    assert isinstance(h, Repeated)
    assert valid_repeats(h) is not None
    assert h.shape == (40, 8, *event)
    return h


def ordinary(h: torch.Tensor) -> storch.Tensor:
    return storch.tensor.wrap(plain(h), storch.tensor.plates_of(h))


@pytest.fixture(autouse=True)
def story() -> Iterator[None]:
    torch.manual_seed(0)
    with storch.Graph():
        yield


def assert_same(given: Any, wanted: Any) -> None:
    assert given.plates == wanted.plates
    torch.testing.assert_close(plain(given), plain(wanted), equal_nan=True, check_stride=False)


def random_names() -> set[str]:
    return functions.RANDOM - {"normal"} | {"bernoulli"}


def test_random_functions_are_known() -> None:
    assert random_names() <= names.RANDOM
    assert rules.RULES.keys() >= names.RANDOM


@pytest.mark.parametrize("name", sorted(names.ELEMENTWISE - names.RANDOM))
def test_functions_of_numbers(name: str) -> None:
    """Of one that repeats, of two, with a plain tensor, and with one on other plates."""
    h, count = repeats(event=(functions.N,)), functions.arity(name)
    others = [h * 0.5, functions.plain_draw(functions.N), functions.draw("a", seed=2)]
    for other in others[: 3 if count > 1 else 1]:
        args = (h, other, functions.plain_draw(functions.N, seed=5))[:count]
        call = functions.TERNARY.get(name) or (lambda *args: functions.call(name, *args))
        given = call(*args)
        assert isinstance(given, Repeated) == (other is not others[2])
        wanted = call(*[ordinary(each) if isinstance(each, storch.Tensor) else each for each in args])
        assert_same(given, wanted)


@pytest.mark.parametrize("name", sorted(functions.ALONG))
def test_functions_along_dimensions(name: str) -> None:
    h, function = repeats(event=(functions.N, functions.N)), functions.ALONG[name]
    for d in (-1, -2, 2, 3):
        given = function(h, d)
        assert isinstance(given, Repeated) == (name not in names.RANDOM)
        assert_same(given, function(ordinary(h), d))
    for d, plate in ((0, "'z' of size 40, dimension 0"), (1, "'data' of size 8, dimension 1")):
        with pytest.raises(ValueError, match=plate):
            function(h, d)


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("name", functions.WITHOUT_DIMENSIONS)
def test_what_loses_plates_is_refused_in_the_same_words(name: str) -> None:
    function, h = functions.WITHOUT_DIMENSIONS[name], repeats(9, (3,))
    given, wanted = outcome(function, h), outcome(function, ordinary(h))
    if isinstance(wanted, storch.Tensor):
        assert_same(given, wanted)
    else:
        assert given == wanted


def outcome(function: Callable, h: torch.Tensor) -> Any:
    """Return what a function gives, or its error in words."""
    try:
        return function(h)
    except Exception as error:
        return type(error).__name__, str(error)


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reshape": lambda x: x.reshape(40, 8, 6),
    "reshape to a tuple": lambda x: torch.reshape(x, (*x.shape[:-2], 6)),
    "reshape the rest": lambda x: x.reshape(40, 8, -1),
    "reshape first": lambda x: x.reshape(-1, 8, 3, 2),
    "view": lambda x: x.view((40, -1, 6)),
    "expand": lambda x: x[..., :1].expand(-1, 8, 2, 5),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "mT": lambda x: x.mT,
    "index": lambda x: x[:, :, 0],
    "list": lambda x: x[..., [0, 0, 1]],
    "einsum": lambda x: torch.einsum("...ij,jk->...ik", x, torch.ones(3, 2, dtype=DTYPE)),
    "view_as": lambda x: x.view_as(torch.zeros(40, 8, 6)),
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "max": lambda x: x.max(-1).values,
    "vectors": lambda x: x @ torch.ones(3, dtype=DTYPE),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    h = repeats(event=(2, 3))
    given = SHAPES[name](h)
    assert isinstance(given, Repeated) == (name != "view_as")
    wanted = SHAPES[name](ordinary(h))
    assert given.shape == wanted.shape
    assert given.dtype == wanted.dtype
    assert_same(given, wanted)


@pytest.mark.parametrize("shape", [(-1,), (320,), (9, 1), (8, 40), (40, 4, -1), (-1, -1), (40, 8, 1, 2)])
def test_shapes_of_the_values_are_no_shapes(shape: tuple[int, ...]) -> None:
    h = repeats(event=())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        h.reshape(shape)
    with pytest.raises(type(caught.value)) as wanted:
        ordinary(h).reshape(shape)
    assert str(caught.value) == str(wanted.value)


def test_types() -> None:
    """Only what is plain has no plates; a cast of another by one that repeats does not repeat."""
    h = repeats()
    other = storch.tensor.wrap(torch.zeros(2), ())
    assert other.to(h).shape == (2,)
    assert other.to(h).dtype == DTYPE
    assert torch.zeros(2).to(h).shape == (2,)


def test_what_is_asked_without_torch_sees_all_items() -> None:
    h = repeats(event=(3,))
    wanted = plain(ordinary(h)).clone()
    asked: dict[str, Callable[[Any], Any]] = {
        "numpy": lambda x: torch.from_numpy(x.numpy()),
        "array": lambda x: torch.tensor(memoryview(__import__("numpy").asarray(x)).tolist(), dtype=DTYPE),
        "list": lambda x: torch.tensor(x.tolist(), dtype=DTYPE),
        "data": lambda x: plain(x.data),
        "detach": lambda x: plain(x.detach()),
        "_tensor": lambda x: x._tensor,
        "subclass": lambda x: x.as_subclass(torch.Tensor),
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "copy": lambda x: plain(copy.copy(x)),
        "deepcopy": lambda x: plain(copy.deepcopy(x)),
        "storage": lambda x: torch.tensor(x.untyped_storage().tolist(), dtype=torch.uint8).view(DTYPE).reshape(x.shape),
        "vmap": lambda x: torch.vmap(lambda a: a + plain(x))(torch.zeros(1, dtype=DTYPE))[0],
        "vmap of it": lambda x: torch.vmap(lambda a: plain(x * a))(torch.ones(1, dtype=DTYPE))[0],
        "func.grad": lambda x: torch.func.grad(lambda a: plain(x * a).sum())(torch.ones(40, 8, 3, dtype=DTYPE)[0, 0]),
    }
    for name, ask in asked.items():
        fresh = h * 1.0
        if name == "func.grad":
            torch.testing.assert_close(ask(fresh), wanted.sum((0, 1)))
        else:
            torch.testing.assert_close(ask(fresh), wanted, check_stride=False)
        assert_same(fresh, h)
    fresh = h * 1.0
    assert repr(fresh) == repr(ordinary(h))
    assert len(h) == 40
    assert (h.dim(), h.ndim, h.numel(), h.size(1), h.size()) == (3, 3, 960, 8, (40, 8, 3))
    assert h.event_shape == (3,)
    assert f"{(h * 1.0).sum(-1)}" == f"{ordinary(h).sum(-1)}"
    assert (h > -1).all()
    assert not h.requires_grad
    with torch.inference_mode():
        assert_same(h * 2.0, ordinary(h) * 2.0)


@torch.jit.script
def scripted(h: torch.Tensor) -> torch.Tensor:
    return h + 0


def by_grad_outputs(h: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(h.shape, dtype=h.dtype, requires_grad=True)
    return torch.autograd.grad(ones * 1, ones, grad_outputs=h)[0]


UNASKED: dict[str, Callable[[Any], torch.Tensor]] = {
    "tensor": torch.tensor,
    "new_tensor": torch.zeros(2).new_tensor,
    "copy": lambda h: torch.asarray(h, copy=True, requires_grad=False),
    "TorchScript": scripted,
    "vmap": torch.vmap(lambda h: h + 0),
    "nested": lambda h: torch.nested.nested_tensor([h]).to_padded_tensor(0.0)[0],
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("ask", UNASKED.values(), ids=list(UNASKED))
def test_what_does_not_ask_torch_function_finds_numbers_of_all_items(ask: Callable[[Any], torch.Tensor]) -> None:
    for h in (repeats(), repeats(requires_grad=True)):
        wanted = plain(ordinary(h)).detach()
        torch.testing.assert_close(ask(h * 1.0).detach().to(DTYPE), wanted, check_stride=False)
        assert torch.equal(ask(h.argmax(-1)).long(), wanted.argmax(-1))
        assert torch.equal(h.new_tensor(h * 1.0), wanted)
        torch.testing.assert_close(by_grad_outputs(h * 1.0).detach(), wanted)
        gradients = torch.func.grad(lambda a: a.square().sum())(h * 1.0)
        torch.testing.assert_close(gradients.detach(), 2 * wanted)


def test_a_change_is_one_of_the_items() -> None:
    h = repeats()
    doubled, view, wanted = h * 2.0, h.unflatten(-1, (3, 1)), plain(h * 2.0).clone()
    h[..., 0] = 7.0
    assert valid_repeats(doubled) is not None
    assert (h[..., 0] == 7).all()
    assert not isinstance(h * 1.0, Repeated)
    torch.testing.assert_close(plain(doubled), wanted)
    with pytest.raises(ValueError, match="used after __setitem__ has changed a view of it"):
        view + 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.mul_(2.0),
        lambda z: plain(z).mul_(2.0),
        lambda z: z.data.mul_(2.0),
        lambda z: z.numpy().__imul__(2.0),
        lambda z: z.requires_grad_(),
        lambda z: setattr(z, "requires_grad", True),
    ],
)
def test_samples_that_are_changed_repeat_no_more(change: Callable[[Any], Any]) -> None:
    z = ScoreFunction("z", 300)(Bernoulli(probs=torch.tensor(0.5)))
    assert isinstance(z * 1.0, Repeated)
    change(z)
    assert not isinstance(z * 1.0, Repeated)
    torch.testing.assert_close(plain(z * 1.0), plain(z))


class Double(torch.autograd.Function):
    """A function of a user's own, whose forward runs without gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 2.0


def test_functions_of_ones_own_and_checkpoints_keep_their_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    for run in (
        Double.apply,
        lambda x: checkpoint(lambda y: y * 2.0, x, use_reentrant=False),
        lambda x: checkpoint(lambda y: y * 2.0, x, use_reentrant=True),
    ):
        found = []
        for is_ordinary in (False, True):
            torch.manual_seed(0)
            storch.reset()
            h: torch.Tensor = repeats(requires_grad=True)
            theta = torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE, requires_grad=True)
            h = (ordinary(h) if is_ordinary else h) * theta
            total = (plain(run(h).square()) * torch.arange(8.0, dtype=DTYPE).reshape(8, 1)).sum()
            total.backward()
            found.append(theta.grad)
        torch.testing.assert_close(*found)


def test_gradients_of_the_items() -> None:
    """They are those of all items where the tensor is told before it is used; else they are refused."""
    weight = storch.denote_independent(torch.arange(8.0, dtype=DTYPE), 0, "data")

    def total(h: torch.Tensor) -> torch.Tensor:
        return plain((h.square() * 3.0).sum(-1) * weight).sum()

    kept: list[torch.Tensor] = []
    for name, argument in (("retain_grad", ()), ("register_hook", (kept.append,))):
        h: torch.Tensor = repeats(requires_grad=True)
        getattr(h, name)(*argument)
        loss = total(h)
        loss.backward(retain_graph=True)
        found = h.grad if name == "retain_grad" else kept[0]
        assert found is not None
        given = plain(found).clone()
        (asked,) = torch.autograd.grad(loss, [h])
        wanted = 6 * plain(h) * weight._tensor.unsqueeze(-1)
        torch.testing.assert_close(plain(asked), wanted)
        torch.testing.assert_close(given, wanted)
    h = repeats(requires_grad=True)
    storch.add_cost((h.square() * 3.0).sum(-1) * weight, "cost")
    with pytest.raises(ValueError, match=r"\[40, 8, 3\] whose items repeat.*retain_grad\(\) before it is used"):
        storch.grad(h)
    for name in ("retain_grad", "register_hook"):
        with pytest.raises(ValueError, match=f"{name} of a tensor"):
            getattr(h, name)(*((print,) if name == "register_hook" else ()))


def test_rows_of_gradients_at_once() -> None:
    h = repeats(requires_grad=True)
    theta = torch.ones(3, dtype=DTYPE, requires_grad=True)
    x = storch.denote_independent(torch.rand(8, 3, dtype=DTYPE), 0, "data")
    for loss in ((h * theta).sum(-1), F.binary_cross_entropy(h * theta, x, reduction="none").sum(-1)):
        sums = plain(loss).sum(0)
        (given,) = torch.autograd.grad(sums, theta, torch.eye(8, dtype=DTYPE), is_grads_batched=True, retain_graph=True)
        wanted = [torch.autograd.grad(each, theta, retain_graph=True)[0] for each in sums]
        torch.testing.assert_close(given, torch.stack(wanted))


class Relu(torch.autograd.Function):
    """Keeps what it returns, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.clamp(min=0.4)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * (ctx.saved_tensors[0] > 0.4)


class Hundred(torch.autograd.Function):
    """The identity, computed with gradients on, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 100 * gradients[0]


@pytest.mark.parametrize("function", [Relu, Hundred])
def test_functions_that_keep_or_differentiate_what_they_compute(function: type[torch.autograd.Function]) -> None:
    found = []
    for repeated in (True, False):
        table = torch.linspace(0.1, 0.9, 9, dtype=DTYPE, requires_grad=True)
        torch.manual_seed(0)
        z = ScoreFunction("z", 400)(OneHotCategorical(logits=torch.zeros(9, dtype=DTYPE)))
        h = (z if repeated else ordinary(z)) @ table
        assert isinstance(h, Repeated) == repeated
        loss = plain(function.apply(h).square() * 3.0).sum()
        found.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("touch", ["data", "is_sparse", "is_inference", "data_ptr", "untyped_storage", "numpy"])
def test_to_look_at_a_tensor_changes_nothing_of_what_its_gradient_lacks(touch: str) -> None:
    h = repeats(requires_grad=True)
    y = h * 2.0
    looked = getattr(h.detach() if touch == "numpy" else h, touch)
    if callable(looked):
        looked()
    with pytest.raises(ValueError, match="items repeat"):
        torch.autograd.grad(plain(y).sum() + plain(h).sum(), [h])


def test_gradients_that_lack_something_are_not_left_behind() -> None:
    h = repeats(requires_grad=True)
    loss = plain(h * 2.0).sum() + plain(h).sum()
    for backward in (loss.backward, partial(torch.autograd.backward, loss)):
        with pytest.raises(ValueError, match=r"backward of a tensor \[40, 8, 3\] whose items repeat"):
            backward(inputs=[h])
    kept = repeats(requires_grad=True)
    kept.retain_grad()
    plain(kept * 2.0).sum().backward()
    assert kept.grad is not None
    assert storch.tensor.plates_of(kept.grad) == kept.plates


def test_what_is_looked_at_before_a_node_is_sampled_is_no_use() -> None:
    """Neither without gradients nor detached; a distribution keeps the probs that it computed for it."""
    found = []
    for look in (None, "no_grad", "detach"):
        torch.manual_seed(0)
        q = Bernoulli(logits=repeats(requires_grad=True))
        if look == "no_grad":
            with torch.no_grad():
                storch.reduce_plates(q.entropy())
        elif look == "detach":
            assert 0 < plain(q.mean.detach()).mean().item() < 1
        torch.manual_seed(1)
        y = ScoreFunction("y", 3)(q)
        storch.add_cost(y.sum(-1).square(), "cost")
        storch.backward()
        assert list(y.param_grads) == ["logits"]
        found.append(plain(y.param_grads["logits"]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_tangents_pass_through() -> None:
    h, t = repeats(), torch.tensor(2.0, dtype=DTYPE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        tangent = forward_ad.unpack_dual(plain((h * dual).square()).sum()).tangent
    torch.testing.assert_close(tangent, 2 * t * plain(h).square().sum())


@pytest.mark.parametrize(("dtype", "num", "rtol"), [(torch.float32, 500_000, 1e-5), (torch.bfloat16, 20_000, 0.01)])
@pytest.mark.parametrize("is_entropy", [False, True])
def test_gradients_of_many_items_are_as_exact_as_a_mean(
    is_entropy: bool, dtype: torch.dtype, num: int, rtol: float
) -> None:
    z = ScoreFunction("z", num)(OneHotCategorical(logits=torch.zeros(4)))
    raw = torch.tensor([[0.1, 0.2], [0.4, 0.4], [0.8, 0.7]], dtype=dtype)
    x = storch.denote_independent(raw, 0, "data")
    table = torch.full((4, 2), 0.5, dtype=dtype, requires_grad=True)
    r = z.to(dtype) @ table
    losses = F.binary_cross_entropy(r, x, reduction="none") if is_entropy else r * x
    (gradient,) = torch.autograd.grad(plain(losses.sum(-1)).float().mean(), table)
    shares = plain(z).double().mean(0).unsqueeze(-1)
    slope = ((0.5 - raw.double()) / 0.25 if is_entropy else raw.double()).mean(0)
    torch.testing.assert_close(gradient.double(), shares * slope, rtol=rtol, atol=0)


def test_long_chains() -> None:
    h = repeats(requires_grad=True)
    y: torch.Tensor = h
    for _ in range(1500):
        y = y * 1.0
    storch.add_cost((y * storch.denote_independent(torch.rand(8, 3, dtype=DTYPE), 0, "data")).sum(-1), "cost")
    with pytest.raises(ValueError, match="items repeat"):
        storch.grad(h)


@pytest.mark.parametrize("event", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dense", [0, 32])
@pytest.mark.parametrize("piece", [5, 2**16])
def test_derivatives_of_binary_cross_entropy(
    event: tuple[int, ...], dense: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both orders, in both arguments, they are those of its formula, however the sums are taken."""
    monkeypatch.setattr("models.pieces.PIECE", piece)
    monkeypatch.setattr("stochastic_graph.losses.DENSE", dense)
    theta = torch.rand(event, dtype=DTYPE, requires_grad=True)
    raw = torch.rand(8, *event, dtype=DTYPE, requires_grad=True)
    r, x = repeats(event=event) * theta.cos(), storch.denote_independent(raw, 0, "data")

    def derivatives(loss: torch.Tensor) -> list[torch.Tensor]:
        own = plain(loss).reshape(40, 8, -1).sum(-1)
        total = (own * torch.linspace(0.5, 1, 8, dtype=DTYPE)).sum()
        first = torch.autograd.grad(total, [theta, raw], create_graph=True)
        return [own, *first, *torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), [theta, raw])]

    own = derivatives(F.binary_cross_entropy(r, x, reduction="none"))
    r = ordinary(r.detach()) / theta.detach().cos() * theta.cos()
    for given, wanted in zip(own, derivatives(-(x * r.log() + (1 - x) * (1 - r).log())), strict=True):
        torch.testing.assert_close(given, wanted)
    with pytest.raises(ValueError, match=r"expected probabilities"):
        F.binary_cross_entropy(repeats(event=event) * 2.0, x, reduction="none")


def test_what_counts_items_sees_them_all() -> None:
    """Gradients that are scaled by how often an entry is looked up, and running statistics."""
    z = ScoreFunction("z", 400)(Categorical(probs=torch.tensor([0.2, 0.3, 0.5])))
    found = []
    for indices in (z, ordinary(z)):
        table = nn.Embedding(3, 2, scale_grad_by_freq=True)
        nn.init.ones_(table.weight)
        norm = nn.InstanceNorm1d(2, track_running_stats=True)
        plain(norm(table(indices).unsqueeze(-1).expand(400, 2, 5) * torch.arange(5.0)).square()).sum().backward()
        found.append((table.weight.grad, norm.running_var))
    torch.testing.assert_close(*found)
    assert isinstance(nn.BatchNorm1d(3).eval()(repeats().float()), Repeated)


def test_nothing_is_left_behind() -> None:
    """Without the garbage collector's help."""
    gc.disable()
    try:
        h = repeats(requires_grad=True)
        y = (h * 2.0).exp()
        kept = [weakref.ref(each) for each in (h, y, valid_repeats(h), valid_repeats(y))]
        storch.add_cost(y.sum(-1), "cost")
        storch.backward()
        del h, y
        assert [each() for each in kept] == [None] * 4
    finally:
        gc.enable()
