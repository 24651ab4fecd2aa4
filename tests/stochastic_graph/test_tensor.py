"""Plates, what is computed along them, errors, and that nothing is left behind."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D
from torch.nn import functional as F

import stochastic_graph as storch
from stochastic_graph.method import Expect, ScoreFunction
from stochastic_graph.tensor import plain, plates_of
from tests.stochastic_graph.items import assert_per_item, on_plates, per_item
from tests.stochastic_graph.test_functions import draw

DTYPE = torch.float64

FUNCTIONS = {
    "sum": lambda x, d, s: x.sum(d),
    "mean of two": lambda x, d, s: x.mean((d, -1)),
    "softmax": lambda x, d, s: x.softmax(d),
    "max": lambda x, d, s: x.max(d)[0],
    "argmax": lambda x, d, s: x.argmax(d, keepdim=True),
    "flip": lambda x, d, s: x.flip(d),
    "transpose": lambda x, d, s: x.transpose(d, -1),
    "unsqueeze": lambda x, d, s: x.unsqueeze(d),
    "select": lambda x, d, s: x.select(d, 0),
    "unbind": lambda x, d, s: x.unbind(d)[-1],
    "cumsum": lambda x, d, s: x.cumsum(d),
    "flatten": lambda x, d, s: x.flatten(d),
    "reshape": lambda x, d, s: x.reshape(*s, -1),
    "view": lambda x, d, s: x.contiguous().view(s),
    "expand": lambda x, d, s: x.expand(s),
    "repeat": lambda x, d, s: x.repeat(s),
    "permute": lambda x, d, s: x.permute(*s),
    "index": lambda x, d, s: x[(slice(None),) * (d % 4) + (0,)],
    "mT": lambda x, d, s: x.mT,
    "matmul": lambda x, d, s: x @ x.mT,
    "cat": lambda x, d, s: torch.cat([x, x], d),
    "stack": lambda x, d, s: torch.stack([x, x], d),
    "layer_norm": lambda x, d, s: F.layer_norm(x, x.shape[d:]),
    "norm": lambda x, d, s: F.normalize(x, dim=d),
    "cdist": lambda x, d, s: torch.cdist(x, x),
    "squeeze": lambda x, d, s: x.squeeze(d),
    "index pair": lambda x, d, s: x[..., [0, 1], :][..., 0],
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    num_plates=st.integers(0, 2),
    event=st.integers(0, 2),
    dim=st.integers(-4, 3),
    shape=st.lists(st.sampled_from([0, 1, 2, 2, 3, 4, -1]), min_size=1, max_size=4),
)
def test_right_for_each_item_or_refused(name: str, num_plates: int, event: int, dim: int, shape: list[int]) -> None:
    """What is not refused equals, item by item, the same function with dimensions counted without the plates."""
    values = torch.rand((2,) * (num_plates + event), dtype=DTYPE)
    x = on_plates(values, *"ab"[:num_plates]) if num_plates else storch.tensor.wrap(values, ())
    function = FUNCTIONS[name]
    try:
        result = function(x, dim, shape)
    except ValueError as error:
        if num_plates and "plate" not in str(error):
            with pytest.raises(Exception, match=r".*"):
                function(plain(x), dim, shape)
        return
    except (RuntimeError, IndexError, TypeError):
        with pytest.raises((RuntimeError, IndexError, TypeError)):
            function(plain(x), dim, shape)
        return
    own = dim if dim < 0 else dim - num_plates
    if name in ("view", "expand", "repeat", "reshape"):
        item_shape = shape[num_plates:]
    else:
        item_shape = [each % (num_plates + event) - num_plates for each in shape] if event + num_plates else shape
    if name == "index":
        own = dim % 4 - num_plates
    if not num_plates or (name == "layer_norm" and own >= 0):
        return
    expected, plates = per_item(lambda x: function(x, own, item_shape), x)
    assert plates_of(result) == plates
    torch.testing.assert_close(plain(result), expected)


PAIRS = {
    "Normal": lambda x: D.Normal(x - 0.5, x),
    "Bernoulli": lambda x: D.Bernoulli(x),
    "Bernoulli logits": lambda x: D.Bernoulli(logits=x),
    "Exponential": D.Exponential,
    "Gamma": lambda x: D.Gamma(x + 1, x),
    "Beta": lambda x: D.Beta(x + 1, x + 0.5),
    "Laplace": lambda x: D.Laplace(x, x + 1),
    "Poisson": D.Poisson,
    "LogNormal": lambda x: D.LogNormal(x, x),
    "HalfNormal": D.HalfNormal,
    "Gumbel": lambda x: D.Gumbel(x, x + 1),
    "Geometric": D.Geometric,
    "Categorical": lambda x: D.Categorical(logits=x),
    "Categorical probs": lambda x: D.Categorical(probs=x),
    "OneHotCategorical": lambda x: D.OneHotCategorical(logits=x),
    "Dirichlet": lambda x: D.Dirichlet(x + 1),
    "Independent": lambda x: D.Independent(D.Normal(x, x + 1), 1),
    "Binomial": lambda x: D.Binomial(3, x),
    "Uniform": lambda x: D.Uniform(x - 1, x + 2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_kl_divergence_log_prob_and_entropy(name: str) -> None:
    build = PAIRS[name]
    p, q = draw("a", "b"), draw("b", seed=1)
    if name not in ("Binomial",):
        assert_per_item(lambda x, y: D.kl_divergence(build(x), build(y)), p, q)
    point = build(plain(q)).mean if name == "Uniform" else build(plain(q)).sample()
    on_plate = on_plates(point, "b")
    assert_per_item(lambda x, v: build(x).log_prob(v), p, on_plate)

    def log_prob(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        distribution = build(x)
        return storch.log_prob(distribution, v) if isinstance(x, storch.Tensor) else distribution.log_prob(v)

    assert_per_item(log_prob, p, on_plate)
    assert_per_item(log_prob, draw("a"), on_plate)
    if name not in ("Poisson", "Binomial"):
        assert_per_item(lambda x: build(x).entropy(), p)


def test_log_prob_of_what_torch_refuses() -> None:
    """A mixture's log p(x|z): values of z on their own plate, observations on theirs, of other sizes."""
    means = on_plates(torch.randn(4, dtype=DTYPE), "z")
    x = on_plates(torch.randn(3, dtype=DTYPE), "data")
    expected = D.Normal(plain(means)[:, None], 1.0).log_prob(plain(x))
    result = storch.log_prob(D.Normal(means, 1.0), x)
    sorted_names = [plate.name for plate in result.plates]
    torch.testing.assert_close(plain(result) if sorted_names == ["z", "data"] else plain(result).mT, expected)


def test_samples_stand_left_of_data_and_newer_ones_left_of_older() -> None:
    with storch.Graph():
        x = on_plates(torch.zeros(2, 3), "data")
        z1 = ScoreFunction("z1", 4)(D.Bernoulli(logits=x.sum(-1)))
        later = on_plates(torch.zeros(5), "later")
        z2 = ScoreFunction("z2", 6)(D.Bernoulli(logits=z1 + later))
        assert [plate.name for plate in z2.plates] == ["z2", "z1", "later", "data"]
        assert z2.shape == (6, 4, 5, 2)
        again = storch.denote_independent(z1[..., None].expand(4, 2, 7), 2, "steps")
        assert [plate.name for plate in again.plates] == ["z1", "steps", "data"]


def test_a_plate_stands_where_its_first_mention_put_it() -> None:
    first, other, again = (on_plates(torch.zeros(3), name) for name in ("data", "other", "data"))
    for total in (again + (first + other), (first + other) + again):
        assert isinstance(total, storch.Tensor)
        assert [plate.name for plate in total.plates] == ["other", "data"]


def test_enumerated_values_live_on_their_own_plate() -> None:
    with storch.Graph():
        x = on_plates(torch.zeros(50, 2), "data")
        z = Expect("z")(D.Bernoulli(logits=x))
        assert z.shape == (4, 2)
        assert (z.sum(-1) + x.sum(-1)).shape == (4, 50)


def test_means_over_plates() -> None:
    weight = torch.tensor([0.1, 0.2, 0.7])
    values = torch.arange(6.0).reshape(2, 3)
    x = storch.denote_independent(storch.denote_independent(values, 0, "a"), 1, "b", weight)
    torch.testing.assert_close(plain(storch.reduce_plates(x, "b")), (values * weight).sum(1))
    torch.testing.assert_close(plain(storch.reduce_plates(x, ["a", "b"])), (values * weight).sum(1).mean())
    torch.testing.assert_close(plain(storch.reduce_plates(x)), (values * weight).sum(1).mean())
    mean = (values * weight).sum(1, keepdim=True)
    torch.testing.assert_close(plain(storch.variance(x, "b")), ((values - mean) ** 2 * weight).sum(1).mean())
    torch.testing.assert_close(plain(storch.variance(x, "b", plates=[])), ((values - mean) ** 2 * weight).sum(1))
    gathered = storch.gather_samples([values[0], values[1]], "new")
    assert gathered.shape == (2, 3)
    torch.testing.assert_close(storch.variance(gathered, "new").item(), 3 * 2.25)
    with pytest.raises(ValueError, match="on no plate 'c'; it is on 'b', 'a'"):
        storch.reduce_plates(x, "c")


WEIGHTED = {
    "Expect": lambda: storch.method.Expect("z"),
    "RaoBlackwellSF": lambda: storch.method.RaoBlackwellSF("z", 3),
    "ScoreFunctionWOR": lambda: storch.method.ScoreFunctionWOR("z", 2),
    "UnorderedSetEstimator": lambda: storch.method.UnorderedSetEstimator("z", 3),
    "ImportanceSampling": lambda: storch.method.ImportanceSampling("z", D.OneHotCategorical(logits=torch.zeros(3)), 4),
    "MuProp": lambda: storch.method.MuProp("z", 2),
    "REBAR": lambda: storch.method.REBAR("z", 2),
    "LocalExpectation": lambda: storch.method.LocalExpectation("z"),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_means_over_samples_weigh_them_as_their_method_does(name: str) -> None:
    """The mean of a cost is the value that backward() returns; of all values, weighed, it is the expectation."""
    with storch.Graph():
        x = on_plates(torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 0.3]], requires_grad=True), "data")
        z = WEIGHTED[name]()(D.OneHotCategorical(logits=x))
        cost = ((z * torch.tensor([1.0, 2.0, 5.0])).sum(-1) - 0.3) ** 2
        storch.add_cost(cost, "loss")
        mean, by_hand = storch.reduce_plates(cost), storch.reduce_plates(storch.reduce_plates(cost, "z"), "data")
        torch.testing.assert_close(plain(mean), plain(by_hand))
        torch.testing.assert_close(plain(mean.detach()), storch.backward())
        if name == "Expect":
            torch.testing.assert_close(plain(storch.reduce_plates(z, "z")), plain(x).softmax(-1))


def test_equal_weights_make_one_plate() -> None:
    x, y = (storch.denote_independent(torch.ones(2), 0, "p", torch.tensor([0.3, 0.7])) for _ in range(2))
    assert storch.tensor.plates_of(x + y) == x.plates
    with pytest.raises(ValueError, match="two different plates are named 'p'"):
        x + storch.denote_independent(torch.ones(2), 0, "p", torch.tensor([0.4, 0.6]))


ERRORS = {
    "no such dimension": lambda x: storch.denote_independent(torch.zeros(3), 1, "p"),
    "plate already": lambda x: storch.denote_independent(x, 0, "p"),
    "name taken": lambda x: storch.denote_independent(x, 1, "data"),
    "weights": lambda x: storch.denote_independent(torch.zeros(3), 0, "p", torch.ones(2)),
    "two sizes": lambda x: x + storch.denote_independent(torch.zeros(5), 0, "data"),
    "nothing": lambda x: storch.gather_samples([], "g"),
    "shapes": lambda x: storch.gather_samples([torch.zeros(2), torch.zeros(3)], "g"),
    "cost with dimensions": lambda x: storch.add_cost(x, "loss"),
    "cost without name": lambda x: storch.add_cost(x.sum(-1), ""),
    "cost of integers": lambda x: storch.add_cost((x.sum(-1) > 0), "loss"),
    "cost that is a number": lambda x: storch.add_cost(1.0, "loss"),  # type: ignore[arg-type]
    "no cost": lambda x: storch.backward(),
    "name of a plate": lambda x: ScoreFunction("data")(D.Bernoulli(logits=x)),
    "not reparameterisable": lambda x: storch.method.Reparameterization("z")(D.Bernoulli(logits=x)),
    "too many values": lambda x: Expect("z")(D.Bernoulli(logits=torch.zeros(70))),
    "one sample": lambda x: ScoreFunction("z", 1, "batch_average"),
    "infinite support": lambda x: Expect("z")(D.Normal(x, 1.0)),
    "no name of a node": lambda x: ScoreFunction(10),  # type: ignore[arg-type]
    "a share of a sample": lambda x: ScoreFunction("z", 2.5),  # type: ignore[arg-type]
    "no distribution": lambda x: ScoreFunction("z")(x),
    "plates in an event": lambda x: ScoreFunction("z")(D.Independent(D.Normal(x.sum(-1), 1.0), 1)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_clear_error(name: str) -> None:
    with storch.Graph(), pytest.raises(ValueError, match=r"'(p|data|g|loss|z)'|no name|a name|no cost") as caught:
        ERRORS[name](on_plates(torch.zeros(3, 2), "data"))
    assert "\n" not in str(caught.value)


def test_a_cost_that_lost_a_plate() -> None:
    """A mean over samples, taken by hand or on the way, names its node; one over data is an ordinary number."""
    with storch.Graph():
        x = on_plates(torch.zeros(3), "data")
        z = ScoreFunction("z", 2)(D.Bernoulli(logits=x))
        mean = storch.reduce_plates(z, "z")
        for cost in (mean, (mean * 2 + x).exp(), storch.reduce_plates(z)):
            with pytest.raises(ValueError, match="cost 'loss' depends on node 'z' through a mean"):
                storch.add_cost(cost, "loss")
        with pytest.raises(ValueError, match="node 'y' depends on node 'z' through a mean"):
            ScoreFunction("y")(D.Bernoulli(logits=mean))
        storch.add_cost(storch.reduce_plates(z + x, "data"), "over data")


def test_a_sample_used_after_reset() -> None:
    with storch.Graph():
        z = ScoreFunction("z")(D.Bernoulli(logits=torch.zeros(())))
        storch.add_cost(z * 1.0, "cost")
        storch.backward()
        for use in (lambda: storch.add_cost(z * 1.0, "late"), lambda: ScoreFunction("y")(D.Bernoulli(logits=z))):
            with pytest.raises(ValueError, match="node 'z', which was sampled before the last reset"):
                use()
        new = ScoreFunction("z")(D.Bernoulli(logits=torch.zeros(())))
        with pytest.raises(ValueError, match="two different plates are named 'z'"):
            z + new


def test_what_python_does_with_tensors() -> None:
    x = on_plates(torch.arange(6.0).reshape(2, 3), "data")
    assert repr(x).endswith("with plates ['data']")
    assert f"{x.sum(-1)[..., None].sum(-1)}"
    assert f"{storch.reduce_plates(x).sum():.2f}" == "7.50"
    assert np.asarray(x).sum() == x.numpy().sum() == 15
    copied = copy.deepcopy(x)
    assert copied.plates == x.plates
    assert copied.data_ptr() != x.data_ptr()
    assert plates_of(copy.copy(x)) == x.plates
    assert type(pickle.loads(pickle.dumps(x))) is torch.Tensor
    assert len(x) == 2
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert bool((x >= 0).all())
    assert torch.equal(x, x)
    assert x.dtype is torch.float32
    assert x.new_zeros(2).shape == (2,)
    assert type(x._tensor) is torch.Tensor
    assert x.requires_grad is False
    assert x.detach().requires_grad_().requires_grad


def test_gradients_flow_through() -> None:
    raw = torch.randn(3, 2, requires_grad=True)
    x = on_plates(raw, "data")
    storch.add_cost((x * x).sum(-1), "cost")
    (gradient,) = storch.grad(x)
    torch.testing.assert_close(plain(gradient), 2 * raw / 3)
    assert gradient.plates == x.plates
    storch.backward()
    torch.testing.assert_close(raw.grad, 2 * raw / 3)


def test_every_thread_has_stories_of_its_own() -> None:
    found: list[object] = []

    def tell() -> None:
        try:
            storch.costs()
        except ValueError as error:
            found.append(str(error))
        with storch.Graph():
            storch.add_cost(torch.ones(()), "cost")
            found.append(list(storch.costs()))

    thread = threading.Thread(target=tell)
    thread.start()
    thread.join()
    assert found == ["no graph is current in this thread: tell the story inside `with Graph():`", ["cost"]]
    assert not storch.costs()


def test_nothing_is_left_behind() -> None:
    """A thousand stories leave no tensor, no hook on a parameter that lives on, and no sample."""
    theta = torch.ones(3, dtype=DTYPE, requires_grad=True)
    how = ScoreFunction("z", 2, "moving_average")

    def tell() -> weakref.ref:
        z = how(D.Dirichlet(theta))
        storch.add_cost((z * z).sum(-1), "cost")
        storch.backward()
        return weakref.ref(z)

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    for _ in range(5):
        last = tell()
    before = count()
    gc.disable()
    try:
        for _ in range(1000):
            last = tell()
            assert last() is None
    finally:
        gc.enable()
    assert count() <= before
    assert not theta._backward_hooks
