"""The nodes and costs of the proofs by enumeration, and what a method is held to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, OneHotCategorical

from estimators.nodes.base import Method, base_of
from tests.estimators.nodes.draws import Rule

NUM_COSTS = 2


@dataclass(frozen=True)
class Node:
    """A tiny node: its parameter, [*plates, ...], and what makes the distribution of one, or of R copies of it."""

    parameter: list
    num_plates: int
    build: Callable[[Tensor], Distribution]

    def leaf(self) -> Tensor:
        return torch.tensor(self.parameter, dtype=torch.float64, requires_grad=True)


def normal(parameter: Tensor) -> Distribution:
    """Location and logarithm of the scale lie in the last dimension."""
    return Normal(parameter[..., 0], parameter[..., 1].exp())


NODES = {
    "bernoulli": Node(0.4, 0, lambda x: Bernoulli(logits=x)),  # type: ignore[arg-type]
    "bernoulli probs": Node([[0.7, 0.2], [0.45, 0.9]], 1, lambda p: Bernoulli(probs=p)),
    "bernoulli plates": Node([[[0.4, -0.9]], [[1.2, 0.1]]], 2, lambda x: Bernoulli(logits=x)),
    "bernoulli three": Node([0.4, -0.9, 1.3], 0, lambda x: Independent(Bernoulli(logits=x), 1)),
    "one-hot": Node([0.5, -0.3, 0.1], 0, lambda x: OneHotCategorical(logits=x)),
    "one-hot probs": Node([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], 1, lambda p: OneHotCategorical(probs=p)),
    "one-hot two": Node(
        [[[0.5, -0.3, 0.1], [1.0, 0.2, -0.4]], [[0.1, 0.0, -0.2], [-0.3, 0.8, 0.6]]],
        1,
        lambda x: OneHotCategorical(logits=x),
    ),
    "categorical": Node([0.5, -0.3, 0.1, 0.9], 0, lambda x: Categorical(logits=x)),
    "categorical plates": Node([[[0.5, -0.3, 0.1]], [[1.0, 0.2, -0.4]]], 2, lambda x: Categorical(logits=x)),
    "normal": Node([[0.3, -0.5], [-0.7, 0.1]], 1, normal),
}
BERNOULLI = ("bernoulli", "bernoulli probs", "bernoulli plates", "bernoulli three")
ONE_HOT = ("one-hot", "one-hot probs", "one-hot two")
CATEGORICAL = ("categorical", "categorical plates")
DISCRETE = BERNOULLI + ONE_HOT + CATEGORICAL
SMALL = ("bernoulli", "bernoulli probs", "one-hot", "one-hot probs")  # for a quadrature over relaxed samples
RELAXED_NODES = 24  # of such a quadrature on each smooth piece
FEW = ("bernoulli", "bernoulli probs", "one-hot", "one-hot probs", *CATEGORICAL)  # where n draws are few together


@dataclass(frozen=True)
class Costs:
    """m asymmetric, nonlinear costs scale f + shift of points [n, ..., *plates, *rest, *event], others each item."""

    plates: torch.Size
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, points: Tensor, leading: int) -> Tensor:
        """[n, ..., *plates, m], where `leading` dimensions are before the node's variables."""
        x = points.double()
        x = x.flatten(leading) if x.dim() > leading else x.unsqueeze(-1)
        k = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64)
        a, b = torch.stack([0.9 / k - 0.4, 0.3 * k.sqrt() - 0.5]), torch.stack([0.8 - 0.5 * k, 0.6 * k.sin()])
        items = 0.4 * torch.arange(self.plates.numel(), dtype=torch.float64).reshape(*self.plates, 1)
        f = (x @ a.T).exp() + (x @ b.T - 0.3 - items) ** 2
        return self.scale * f + self.shift


@dataclass(frozen=True)
class Row:
    """A method and what it is held to.

    make: the method. rule: all that its `draw` returns, for copies of a node. nodes: their names. stated: for a biased
    one, a function of a node's parameter, the node and the costs, which returns the surrogate [*plates, m] of what it
    estimates. leave_one_out: whether f + c leaves each draw of the gradient what it is under f. scales: whether c f
    scales each draw by c. draws_gradient: whether an outcome's gradient is at hand.
    """

    make: Callable[[], Method]
    rule: Rule
    nodes: tuple[str, ...]
    stated: Callable[[Tensor, "Node", "Costs"], Tensor] | None = None
    leave_one_out: bool = False
    scales: bool = True
    draws_gradient: bool = True


def plates_of(node: Node) -> torch.Size:
    return node.build(node.leaf()).batch_shape[: node.num_plates]


def squashed(q: Distribution, noise: Tensor, temperature: float) -> Tensor:
    """The relaxed sample of noise, by its definition."""
    base = base_of(q)
    if isinstance(base, Bernoulli):
        odds = (base.probs * noise / ((1 - base.probs) * (1 - noise))) ** (1 / temperature)
        return odds / (1 + odds)
    powers = (base.probs * noise.exp()) ** (1 / temperature)  # type: ignore[attr-defined]
    return powers / powers.sum(-1, keepdim=True)


def first_order(hard: Tensor, soft: Tensor, weight: Tensor, node: Node, costs: Costs) -> Tensor:
    """E f(hard), with the gradient of E[grad f(hard) soft]."""
    leading = 1 + node.num_plates
    value, slope = [], []
    for i in range(NUM_COSTS):
        at = hard.detach().requires_grad_()
        f = costs(at, leading)[..., i]
        value.append((weight.detach() * f.detach()).sum(0))
        product = torch.autograd.grad(f.sum(), at)[0] * soft
        product = product.flatten(leading).sum(-1) if product.dim() > leading else product
        slope.append((weight.detach() * product).sum(0))
    slopes = torch.stack(slope, -1)
    return torch.stack(value, -1) + slopes - slopes.detach()
