"""Each torch function on tensors with plates is what it is for each item by itself, or refused by name.

All sizes are 3, so that a dimension that were taken for another would not be noticed by its size.
"""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stochastic_graph as storch
from stochastic_graph import names
from stochastic_graph.tensor import plain
from tests.stochastic_graph.items import assert_per_item, on_plates

N = 3


def draw(*names_of_plates: str, event: tuple[int, ...] = (N,), seed: int = 0) -> storch.Tensor:
    generator = torch.Generator().manual_seed(seed + 10 * len(names_of_plates))
    values = torch.rand(*(N,) * len(names_of_plates), *event, generator=generator, dtype=torch.float64)
    return on_plates(values * 0.8 + 0.1, *names_of_plates)


def plain_draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.8 + 0.1


def found(name: str) -> Callable:
    """Return the function of torch that reports itself by a name."""
    places = (torch.Tensor,) if name.startswith("__") else (F, torch, torch.Tensor, torch.special)
    for place in places:
        function = getattr(place, name.removeprefix("special_") if place is torch.special else name, None)
        if callable(function):
            return function
    raise AssertionError(name)


INTEGERS = {
    *("bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift"),
    *("gcd", "lcm", "__and__", "__or__", "__xor__", "__rand__", "__ror__", "__rxor__", "__lshift__", "__rshift__"),
    *("__rlshift__", "__rrshift__", "__invert__", "ldexp"),
}
RANDOM = {
    "rand_like",
    "randn_like",
    "randint_like",
    "empty_like",
    "rrelu",
    "dropout",
    "alpha_dropout",
    "native_dropout",
}
RANDOM |= {"poisson", "binomial", "normal"}
CALLS: dict[str, Callable] = {
    "full_like": lambda x: torch.full_like(x, 2.0),
    "threshold": lambda x: F.threshold(x, 0.5, 7.0),
    "_threshold": lambda x: F.threshold(x, 0.5, 7.0),
    "mvlgamma": lambda x: torch.mvlgamma(x + 2, 2),
    "special_multigammaln": lambda x: torch.special.multigammaln(x + 2, 2),
    "polygamma": lambda x: torch.polygamma(1, x),
    "special_polygamma": lambda x: torch.special.polygamma(1, x),
    "bernoulli": lambda x: torch.bernoulli((x > 0.5).double()),
    "frexp": lambda x: torch.frexp(x)[0],
    "acosh": lambda x: torch.acosh(x + 1),
    "imag": lambda x: torch.complex(x, x).imag,
    "log_sigmoid": F.logsigmoid,
    "special_round": torch.special.round,
    "special_zeta": lambda x, y: torch.special.zeta(x + 1, y),
}
TERNARY: dict[str, Callable] = {
    "where": lambda x, y, z: torch.where(x > 0.5, y, z),
    "masked_fill": lambda x, y, z: (x + y + z).masked_fill(x + y > 1.0, 2.0),
    "lerp": torch.lerp,
    "addcdiv": torch.addcdiv,
    "addcmul": torch.addcmul,
    "clamp": lambda x, y, z: torch.clamp(x, min=torch.minimum(y, z), max=torch.maximum(y, z)),
    "clip": lambda x, y, z: torch.clip(x, torch.minimum(y, z), torch.maximum(y, z)),
}


def call(name: str, *args: Any) -> Any:
    function = CALLS.get(name) or found(name)
    if name in INTEGERS:
        args = tuple((10 * each).long() for each in args)
    return function(*args)


def arity(name: str) -> int:
    """Return of how many tensors a function is."""
    if name in TERNARY:
        return 3
    for count in (1, 2):
        try:
            result = call(name, *[plain_draw(N, seed=i) for i in range(count)])
        except (TypeError, RuntimeError):
            continue
        if result is not NotImplemented:
            return count
    raise AssertionError(f"{name} can be called with neither one tensor nor two")


@pytest.mark.parametrize("name", sorted(names.ELEMENTWISE - RANDOM))
def test_functions_of_numbers(name: str) -> None:
    count = arity(name)
    if count == 1:
        assert_per_item(lambda x: call(name, x), draw("a", "b", event=(2, N)))
    elif count == 2:
        assert_per_item(lambda x, y: call(name, x, y), draw("a", "b"), draw("b", "c", event=(N, N), seed=1))
        assert_per_item(lambda x, y: call(name, x, y), draw("a", event=()), draw("b", seed=1))
        assert_per_item(lambda x, y: call(name, x, y), draw("a", "b"), plain_draw(N))
    else:
        function = TERNARY[name]
        assert_per_item(function, draw("a"), draw("b", event=(N, N), seed=1), draw("a", "c", event=(), seed=2))
        assert_per_item(function, draw("a"), plain_draw(N), draw("b", seed=2))


@pytest.mark.parametrize("name", sorted(RANDOM - {"normal"}))
def test_random_functions_keep_plates(name: str) -> None:
    x = draw("a", "b")
    args = {"randint_like": (5,), "binomial": (x,), "native_dropout": (0.5, True)}.get(name, ())
    result = found(name)(x, *args)
    result = result[0] if isinstance(result, tuple) else result
    assert result.shape == x.shape
    assert result.plates == x.plates


IN_PLACE_CALLS: dict[str, tuple] = {
    "fill_": (2.0,),
    "masked_fill_": (plain_draw(N) > 0.5, 2.0),
    "clamp_": (0.3, 0.6),
    "clip_": (0.3, 0.6),
    "lerp_": (plain_draw(N), 0.3),
    "addcdiv_": (plain_draw(N), plain_draw(N, seed=5)),
    "addcmul_": (plain_draw(N), plain_draw(N, seed=5)),
}
RANDOM_IN_PLACE = {
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
}


@pytest.mark.parametrize("name", sorted(names.IN_PLACE - RANDOM_IN_PLACE - {"__idiv__", "requires_grad_", "detach_"}))
def test_functions_in_place(name: str) -> None:
    """x.f_(y) changes each item's x; where y is on a plate that x is not on, it is refused by the plate's name."""
    integers = name.removeprefix("__i").removesuffix("__").removesuffix("_") in {
        *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "and", "or", "xor", "lshift", "rshift"),
    }

    def kind(x: torch.Tensor) -> torch.Tensor:
        return (10 * x).long() if integers else x.clone()

    operators = {
        f"__i{key}__": getattr(operator, f"i{key}", None)
        for key in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
    }
    method = operators.get(name) or found(name)

    def change(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        x = kind(x)
        before = x
        after = method(x, *(IN_PLACE_CALLS.get(name, ()) if y is None else (kind(y),)))
        assert after is before
        return x

    x = draw("a", "b", event=(2, N))
    try:
        change(plain_draw(2, N))
    except (TypeError, AssertionError):
        assert_per_item(change, x, draw("b", seed=1))
        assert_per_item(change, x, plain_draw(N))
        with pytest.raises(ValueError, match="'c' of size 3"):
            change(x, draw("c", seed=1))
        with pytest.raises(ValueError, match="'c' of size 3"):
            change(plain_draw(2, N), draw("c", seed=1))
    else:
        assert_per_item(change, x)


@pytest.mark.parametrize("name", sorted(RANDOM_IN_PLACE))
def test_noise_in_place(name: str) -> None:
    x = draw("a", "b")
    args = {"geometric_": (0.5,)}.get(name, ())
    assert getattr(x, name)(*args) is x


def of_torch(name: str, call: Callable[[Callable, torch.Tensor, int], Any]) -> Callable[[torch.Tensor, int], Any]:
    function = getattr(torch, name)
    return lambda x, d: call(function, x, d)


# Functions along dimensions: name, what they are called with, with `d` for the dimension.
ALONG: dict[str, Callable[[torch.Tensor, int], Any]] = {
    **{
        name: of_torch(name, lambda function, x, d: function(x, d))
        for name in ("sum", "mean", "prod", "amax", "amin", "logsumexp", "std", "var", "nansum", "nanmean", "argmax")
    },
    **{
        name: of_torch(name, lambda function, x, d: function(x, dim=d)[0])
        for name in ("median", "nanmedian", "std_mean", "var_mean", "cummax", "cummin", "sort", "mode", "max", "min")
    },
    **{
        name: of_torch(name, lambda function, x, d: function(x, dim=d))
        for name in (
            "argmin",
            "count_nonzero",
            "softmax",
            "log_softmax",
            "cumsum",
            "cumprod",
            "logcumsumexp",
            "argsort",
        )
    },
    "aminmax": lambda x, d: torch.aminmax(x, dim=d)[1],
    "softmin": lambda x, d: F.softmin(x, d),
    "special_softmax": torch.special.softmax,
    "special_log_softmax": torch.special.log_softmax,
    "special_logsumexp": torch.special.logsumexp,
    "flip": torch.Tensor.flip,
    "squeeze": lambda x, d: x.unsqueeze(d).squeeze(d),
    "flatten": lambda x, d: x.flatten(d, d),
    "unbind": lambda x, d: x.unbind(d)[1],
    "select": lambda x, d: x.select(d, 1),
    "index_select": lambda x, d: x.index_select(d, torch.tensor([2, 0])),
    "narrow": lambda x, d: x.narrow(d, 1, 2),
    "unflatten": lambda x, d: x.unflatten(d, (1, 3)),
    "unfold": lambda x, d: x.unfold(d, 2, 1),
    "glu": lambda x, d: F.glu(torch.cat([x, x], d), d),
    "topk": lambda x, d: x.topk(2, d)[0],
    "kthvalue": lambda x, d: x.kthvalue(2, d)[0],
    "diff": lambda x, d: x.diff(1, d),
    "split": lambda x, d: x.split(2, d)[1],
    "split_with_sizes": lambda x, d: x.split_with_sizes([1, 2], d)[1],
    "chunk": lambda x, d: x.chunk(2, d)[0],
    "tensor_split": lambda x, d: x.tensor_split(2, d)[0],
    "roll": lambda x, d: x.roll(1, d),
    "norm": lambda x, d: x.norm(2, d),
    "quantile": lambda x, d: x.quantile(0.4, d),
    "nanquantile": lambda x, d: x.nanquantile(0.4, d),
    "repeat_interleave": lambda x, d: x.repeat_interleave(2, d),
    "linalg_vector_norm": lambda x, d: torch.linalg.vector_norm(x, 2, d),
    "linalg_norm": lambda x, d: torch.linalg.norm(x, 2, d),
    "normalize": lambda x, d: F.normalize(x, dim=d),
    "gumbel_softmax": lambda x, d: F.gumbel_softmax(1e9 * x, hard=True, dim=d),
    "all": lambda x, d: (x > 0.4).all(d),
    "any": lambda x, d: (x > 0.4).any(d),
    "unsqueeze": lambda x, d: x.unsqueeze(d),
    "gather": lambda x, d: x.gather(d, torch.tensor([[0, 2, 1], [1, 0, 2], [2, 1, 0]])),
    "take_along_dim": lambda x, d: x.take_along_dim(x.argsort(d), d),
    "scatter": lambda x, d: x.scatter(d, torch.tensor([[0, 2, 1], [1, 0, 2], [2, 1, 0]]), 5.0),
    "cat": lambda x, d: torch.cat([x, 2 * x], d),
    "stack": lambda x, d: torch.stack([x, 2 * x], d),
    "transpose": lambda x, d: x.transpose(d, -1),
    "swapaxes": lambda x, d: x.swapaxes(-2, d),
    "movedim": lambda x, d: x.movedim(d, -1),
}


def test_all_functions_along_dimensions_are_tried() -> None:
    assert set(names.ALONG) <= set(ALONG)


@pytest.mark.parametrize("name", sorted(ALONG))
def test_functions_along_dimensions(name: str) -> None:
    """From the right or from the left, a plate's dimension is refused by its name, others give each item's result."""
    function, x = ALONG[name], draw("a", "b", event=(N, N))
    for d in (-1, -2):
        assert_per_item(lambda x, d=d: function(x, d), x)
    for d in (2, 3):
        expected = torch.stack([torch.stack([function(x._tensor[i, j], d - 2) for j in range(N)]) for i in range(N)])
        torch.testing.assert_close(function(x, d)._tensor, expected)
    for d, plate in ((0, x.plates[0]), (1, x.plates[1]), (-4, x.plates[0]), (-3, x.plates[1])):
        if name in ("unsqueeze", "stack", "squeeze"):
            d -= d < 0  # they count the dimensions of the result
        with pytest.raises(ValueError, match=f"{plate.name!r} of size 3, dimension {plate is x.plates[1]:d}"):
            function(x, d)


WITHOUT_DIMENSIONS: dict[str, Callable] = {
    **{
        name: getattr(torch.Tensor, name)
        for name in (
            *("sum", "mean", "prod", "std", "var", "nansum", "nanmean", "argmax", "argmin", "median", "max", "min"),
            *("norm", "flatten", "squeeze", "count_nonzero", "amax", "amin"),
        )
    },
    "quantiles": lambda x: x.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), -1),
    "roll": lambda x: x.roll(1),
    "softmax": lambda x: F.softmax(x),
    "repeat_interleave": lambda x: x.repeat_interleave(2),
    "var unbiased": lambda x: x.var(False),
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "H": lambda x: x[..., 0].H,
    "permute": lambda x: x.permute(1, 0, 2),
    "permute negative": lambda x: x.permute(0, -1, 1),
    "flip two": lambda x: x.flip(2, 0),
    "flip list": lambda x: x.flip([0, 2]),
    "view": lambda x: x.contiguous().view(-1, 3),
    "reshape": lambda x: x.reshape(-1),
    "reshape one": lambda x: x.reshape(1, 9, 3),
    "expand": lambda x: x.expand(3, 3, 3, 3),
    "broadcast_to": lambda x: x.broadcast_to(3, 3, 3, 3),
    "repeat": lambda x: x.repeat(3, 1, 1),
    "repeat before": lambda x: x.repeat(3, 1, 1, 1),
    "tile": lambda x: x.tile(3, 1, 1),
    "outer": lambda x: torch.outer(x[..., 0], x[..., 0]),
    "mm": lambda x: x.mm(x),
    "bmm": lambda x: torch.bmm(x, x),
    "dot": lambda x: x.dot(x),
    "einsum": lambda x: torch.einsum("abi,abi->ab", x, x),
    "tensordot": lambda x: torch.tensordot(x, x, 1),
    "cdist": lambda x: torch.cdist(x, x),
    "unique": lambda x: x.unique(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0.5),
    "trace": lambda x: x[..., 0].trace(),
    "diagonal": lambda x: x.diagonal(),
    "cross": lambda x: torch.cross(x, x, dim=0),
    "rot90": lambda x: x.rot90(),
    "fft": lambda x: torch.fft.fft(x),
    "multinomial": lambda x: x[..., 0].multinomial(1),
    "index": lambda x: x[0],
    "index plate": lambda x: x[:, 1],
    "slice": lambda x: x[1:],
    "new axis": lambda x: x[None],
    "list": lambda x: x[[0, 1]],
    "mask": lambda x: x[x > 0.5],
    "plain mask": lambda x: x[torch.tensor([True, False, True])],
    "own index": lambda x: x[..., x.argmax(-1)],
    "apart": lambda x: x.unsqueeze(-1).unsqueeze(-1)[:, :, [0, 1, 2], :, [0, 0, 0]],
    "iter": list,
    "in place": lambda x: x.transpose_(0, 1),
    "assign": lambda x: x.__setitem__(0, 1.0),
    "out": lambda x: torch.add(x, 1, out=torch.zeros(3, 3, 3, dtype=torch.float64)),
    "plain": lambda x: x + torch.zeros(3, 3, 3, dtype=torch.float64),
    "plain rows": lambda x: x[..., 0] * torch.zeros(3, dtype=torch.float64),
    "plain matrix": lambda x: torch.zeros(3, 3, 3, dtype=torch.float64) @ x,
    "loss": lambda x: F.mse_loss(x, x),
    "bce": lambda x: nn.BCELoss()(x, x),
    "loss of plain": lambda x: F.mse_loss(x, torch.zeros(3, 3, 3, dtype=torch.float64), reduction="none"),
    "cross entropy": lambda x: F.cross_entropy(x, x.argmax(-1)),
    "batch norm": lambda x: nn.BatchNorm1d(3).double()(x),
    "layer norm": lambda x: F.layer_norm(x, (3, 3)),
    "one_hot": lambda x: F.one_hot(x.argmax(-1)),
    "linear of nothing": lambda x: F.linear(x[..., 0], torch.zeros(2, 3, dtype=torch.float64)),
    "conv": lambda x: F.conv1d(x, torch.zeros(2, 3, 2, dtype=torch.float64)),
    "pad": lambda x: F.pad(x, (0, 0, 1, 1)),
    "tril": torch.tril,
    "inverse": torch.linalg.inv,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITHOUT_DIMENSIONS)
def test_what_would_lose_or_move_a_plate_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"'[ab]'") as caught:
        WITHOUT_DIMENSIONS[name](draw("a", "b"))
    assert "\n" not in str(caught.value)


SHAPES: dict[str, Callable] = {
    "reshape": lambda x: x.reshape(*x.shape[:-2], N * N),
    "reshape tuple": lambda x: x.reshape((*x.shape[:-2], 1, N * N)),
    "view": lambda x: x.contiguous().view(*x.shape[:-2], N * N, 1),
    "flatten": lambda x: x.flatten(-2),
    "mT": lambda x: x.mT,
    "adjoint": lambda x: x.adjoint(),
    "index": lambda x: x[..., 0],
    "slice": lambda x: x[..., 1:, ::2],
    "new axis": lambda x: x[..., None, :],
    "list": lambda x: x[..., [0, 2]],
    "tensor": lambda x: x[..., torch.tensor([[0, 2], [1, 1]])],
    "mask": lambda x: x[..., torch.tensor([True, False, True])],
    "expand": lambda x: x.unsqueeze(-1).expand(*x.shape, 4),
    "expand -1": lambda x: x[..., :1].expand(*(-1,) * (x.dim() - 1), 5),
    "repeat": lambda x: x.repeat(*(1,) * (x.dim() - 1), 2),
    "tile": lambda x: x.tile(2),
    "einsum": lambda x: torch.einsum("...ij,...jk->...ik", x, x),
    "tril": torch.tril,
    "inverse": torch.linalg.inv,
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(N, dtype=torch.float64)),
    "qr": lambda x: torch.linalg.qr(x)[1],
    "pad": lambda x: F.pad(x, (1, 2)),
    "one_hot": lambda x: F.one_hot(x.argmax(-1), 4),
    "where": lambda x: torch.where(x > 0.5, x, 0.0),
    "dtype": lambda x: x.float().double(),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
    "detach": lambda x: x.detach().clone().contiguous(),
    "layer_norm": lambda x: F.layer_norm(x, (N, N)),
    "real": lambda x: torch.complex(x, 2 * x).imag,
    "chain": lambda x: (x.exp() + 1).log().sum(-1).softmax(-1),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[..., :1])[1],
    "expand_as": lambda x: x[..., :1].expand_as(x),
    "bucketize": lambda x: torch.bucketize(x.contiguous(), torch.tensor([0.3, 0.6], dtype=torch.float64)),
    "isin": lambda x: torch.isin((3 * x).long(), torch.tensor([0, 2])),
    "embedding": lambda x: F.embedding((3 * x).long(), torch.arange(12.0).reshape(4, 3)),
    "max of two": lambda x: torch.max(x, 1 - x),
    "keepdim": lambda x: x - x.mean(-1, keepdim=True),
    "two dims": lambda x: x.sum((-1, -2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    assert_per_item(SHAPES[name], draw("a", "b", event=(N, N)))


PAIRS: dict[str, Callable] = {
    "@": lambda x, y: x @ y,
    "matmul": torch.matmul,
    "cat": lambda x, y: torch.cat([x, y], -1),
    "stack": lambda x, y: torch.stack([x, y], -1),
    "stack before": lambda x, y: torch.stack([x, y], -3),
    "linear": F.linear,
    "linear with bias": lambda x, y: F.linear(x, y, y[..., 0]),
    "mse_loss": lambda x, y: F.mse_loss(x, y, reduction="none"),
    "kl_div": lambda x, y: F.kl_div(x.log(), y, reduction="none"),
    "bce": lambda x, y: nn.BCELoss(reduction="none")(x, y),
    "bce logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none").sum(-1),
    "huber": lambda x, y: F.huber_loss(x, y, reduction="none"),
    "smooth_l1": lambda x, y: nn.SmoothL1Loss(reduction="none")(x, y),
    "poisson": lambda x, y: F.poisson_nll_loss(x, y, reduction="none"),
    "gather": lambda x, y: x.gather(-1, y.argsort(-1)),
    "einsum": lambda x, y: torch.einsum("...ij,...kj->...ik", x, y),
    "broadcast": lambda x, y: torch.broadcast_tensors(x, y)[0] + 0,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("plates", [("ab", "b"), ("a", "b"), ("ab", "bc"), ("a", "a")])
def test_pairs(name: str, plates: tuple[str, str]) -> None:
    first, second = (draw(*each, event=(N, N), seed=i) for i, each in enumerate(plates))
    assert_per_item(PAIRS[name], first, second)
    if name != "einsum":
        assert_per_item(PAIRS[name], first, plain_draw(N, N))
        assert_per_item(PAIRS[name], plain_draw(N, N), second)


@pytest.mark.parametrize("plates", [("a", "b"), ("ab", "b"), ("a", "a"), ("b", "ab"), ("ab", "bc")])
@pytest.mark.parametrize("reduces", [True, False])
@pytest.mark.parametrize("piece", [5, 2**16])
def test_derivatives_of_binary_cross_entropy(
    plates: tuple[str, str], reduces: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It and its derivatives of both orders in both arguments are those of its formula, on any plates."""
    monkeypatch.setattr("models.pieces.PIECE", piece)
    raw = [draw(*each, event=(4,), seed=i)._tensor.clone().requires_grad_() for i, each in enumerate(plates)]
    r, x = (on_plates(value, *each) for value, each in zip(raw, plates, strict=True))

    def derivatives(loss: torch.Tensor) -> list[torch.Tensor]:
        loss = loss.sum(-1) if reduces else loss * torch.arange(1.0, 5.0, dtype=torch.float64)
        total = (loss._tensor * torch.arange(1.0, loss.numel() + 1).reshape(loss.shape)).sum()  # type: ignore[attr-defined]
        first = torch.autograd.grad(total, raw, create_graph=True)
        second = torch.autograd.grad(torch.stack([(each**2).sum() for each in first]).sum(), raw)
        return [plain(loss), *first, *second]

    own = derivatives(nn.BCELoss(reduction="none")(r, x))
    for given, wanted in zip(own, derivatives(-(x * r.log() + (1 - x) * (1 - r).log())), strict=True):
        torch.testing.assert_close(given, wanted)


def test_binary_cross_entropy_at_its_ends() -> None:
    """Zeros and ones, as torch has them; no probabilities at all are refused."""
    r, x = torch.tensor([[0.0, 1.0, 0.5], [1e-40, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    given, wanted = r.clone().requires_grad_(), r.clone().requires_grad_()
    plain(F.binary_cross_entropy(on_plates(given, "a"), on_plates(x, "a"), reduction="none")).sum().backward()
    F.binary_cross_entropy(wanted, x, reduction="sum").backward()
    torch.testing.assert_close(given.grad, wanted.grad)
    with pytest.raises(ValueError, match="from -1 to 1, expected probabilities"):
        F.binary_cross_entropy(on_plates(2 * r - 1, "a"), on_plates(x, "a"), reduction="none")


@pytest.mark.parametrize("events", [((N,), (N,)), ((N, N), (N,)), ((N,), (N, N)), ((2, N, N), (N, N))])
def test_products_of_vectors_and_matrices(events: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    first, second = draw("a", event=events[0]), draw("b", event=events[1], seed=1)
    assert_per_item(operator.matmul, first, second)
    assert_per_item(operator.matmul, first, draw("a", event=events[1], seed=1))
    assert_per_item(operator.matmul, plain_draw(*events[0][-2:]), second)


def of_items(loss: Callable) -> Callable:
    """Return a loss of [classes, ...] that gives torch a batch of one where it is plain."""

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(x, y) if isinstance(x, storch.Tensor) else loss(x[None], y[None])[0]

    return run


@pytest.mark.parametrize("event", [(), (2,)])
def test_cross_entropy_takes_the_first_dimension_beside_plates_for_classes(event: tuple[int, ...]) -> None:
    logits = draw("a", "b", event=(N, *event))
    target = (3 * draw("b", event=event, seed=1)).long()
    assert_per_item(of_items(lambda x, y: F.cross_entropy(x, y, reduction="none")), logits, target)
    assert_per_item(of_items(nn.CrossEntropyLoss(reduction="none")), logits, target)
    assert_per_item(of_items(lambda x, y: F.nll_loss(x, y, reduction="none")), logits, target)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(N, 4), (N,)),
    "Linear without bias": (lambda: nn.Linear(N, 4, bias=False), (2, N)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.LayerNorm(N), nn.Dropout(0.0)), (N,)),
    "LayerNorm": (lambda: nn.LayerNorm(N), (N, N)),
    "RMSNorm": (lambda: nn.RMSNorm(N), (N, N)),
    "Conv1d": (lambda: nn.Conv1d(N, 2, 2), (N, 5)),
    "Conv2d": (lambda: nn.Conv2d(N, 2, 2), (N, 4, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(N, 2, 2), (N, 4, 4)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (N, 4, 4)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), (N, 4)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (N, 4, 4)),
    "Softmax": (lambda: nn.Softmax(-1), (N,)),
    "GELU": (nn.GELU, (N,)),
    "Flatten": (lambda: nn.Flatten(-2), (N, N)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, N, N)),
    "Bilinear mapping": (lambda: nn.Sequential(nn.Linear(N, N), nn.Softplus(), nn.Linear(N, 1), nn.Sigmoid()), (N,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    build, event = LAYERS[name]
    torch.manual_seed(0)
    module = build().double()
    assert_per_item(module, draw("a", "b", event=event))
    assert_per_item(module, draw("a", event=event))


def test_layers_of_batches_of_images() -> None:
    """Norms of channels, as those of a batch in evaluation, see each item as one of a batch."""
    torch.manual_seed(0)
    x = draw("a", event=(4, 2, 2))
    batch_norm = nn.BatchNorm2d(4).double().eval()
    assert_per_item(lambda x: batch_norm(x if x.dim() == 4 else x[None]).reshape(x.shape), x)
    group_norm = nn.GroupNorm(2, 4).double()
    assert_per_item(lambda x: group_norm(x if x.dim() == 4 else x[None]).reshape(x.shape), x)


def test_weights_may_have_plates() -> None:
    weight, bias = draw("w", event=(4, N)), draw("w", event=(4,), seed=1)
    assert_per_item(F.linear, draw("a"), weight, bias)
    assert_per_item(F.linear, plain_draw(2, N), weight, bias)
    assert_per_item(F.linear, plain_draw(2, N), plain_draw(4, N), bias)
    with pytest.raises(ValueError, match=r"'w' of size 3.*per_item\(conv1d\)"):
        F.conv1d(plain_draw(1, N, 5), draw("w", event=(2, N, 2)))


def test_assignment() -> None:
    def assign(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., 0] = y[..., 0]
        x[..., 1:] = 7.0
        x[x > 6] = -1.0
        x[..., torch.tensor([False, True, False])] = 2.0
        return x

    assert_per_item(assign, draw("a", "b", event=(2, N)), draw("b", event=(2, N), seed=1))
    with pytest.raises(ValueError, match="'c' of size 3"):
        assign(draw("a"), draw("c"))


def test_per_item_runs_any_function() -> None:
    x, y = draw("a", "b", event=(2, N)), draw("b", event=(4, N), seed=1)
    result = storch.per_item(torch.cdist)(x, y)
    expected = torch.stack(
        [torch.stack([torch.cdist(x._tensor[i, j], _at(y, x, i, j)) for j in range(N)]) for i in range(N)]
    )
    torch.testing.assert_close(result._tensor, expected)
    assert result.plates == x.plates


def _at(y: storch.Tensor, x: storch.Tensor, i: int, j: int) -> torch.Tensor:
    return y._tensor[(i, j)[[plate.name for plate in x.plates].index("b")]]
