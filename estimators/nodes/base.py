"""What a method for one stochastic node is: four small functions (van Krieken et al. 2021, "Storchastic").

A method draws points x_1..x_n for a node with distribution q, and estimates from the costs f(x_i) at them

    E_q[f(x)]  and its derivatives, as those of the surrogate  sum_i w_i l_i f(x_i) + a,

with weights w_i, a gradient function l_i whose value is 1, and a control variate a whose value is 0. A score function
has l_i = magic_box(log q(x_i)) (estimators/dice.py); a reparameterised or enumerated node needs neither l nor a.

Shapes. The distribution is a plain one of torch.distributions with batch shape [*plates, *rest], whose `num_plates`
leading dimensions are independent items; `rest` are independent variables of one node. Points are [n, *plates, *rest,
*event], or [n, *ones, *rest, *event] where they are the same for all items. Log-probabilities and weights are
[n, *plates], costs [n, *plates, m]: m costs at once, of sizes 1 where a cost does not vary along a plate.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, OneHotCategorical


class Graph(Protocol):
    """Where the samples of a called method go."""

    def sample(self, method: "Method", distribution: Distribution) -> Tensor:
        """Draw with a method; keep what the gradient needs."""


current_graph: ContextVar[Graph] = ContextVar("current_graph")


@dataclass(eq=False)
class Sample:
    """The points of a node, and what its method needs to weigh them.

    distribution: [*plates, *rest]; num_plates: how many leading dimensions are plates; points: [n, *plates, *rest,
    *event] (or ones in place of plates); noise: what the method itself keeps, as the uniform noise of its points;
    key: names the node and the costs at hand, for what a method remembers from one sample to the next.
    """

    distribution: Distribution
    num_plates: int
    points: Tensor
    noise: Any = None
    key: str = ""

    @property
    def size(self) -> int:
        """N."""
        return len(self.points)

    @property
    def log_prob(self) -> Tensor:
        """log q(x_i), summed over the node's variables, [n, *plates]."""
        return self.sum_rest(self.distribution.log_prob(self.points))

    def sum_rest(self, values: Tensor, leading: int = 1) -> Tensor:
        """Return values [*leading, *plates, ...] summed over all that comes after the plates."""
        kept = leading + self.num_plates
        return values.flatten(kept).sum(-1) if values.dim() > kept else values


class Method(nn.Module):
    """A method, which a subclass makes of some of `propose`, `weigh`, `gradient` and `control_variate`.

    plate_name: the name of the plate of its points, and of the node.
    n_samples: how many independent draws; a method may need several points for each.
    """

    declares: ClassVar[str] = "unbiased"  # or exact, consistent, biased
    source: ClassVar[str] = ""
    any_order: ClassVar[bool] = False  # whether higher derivatives of the surrogate are estimates too
    takes: ClassVar[tuple[type[Distribution], ...]] = (Distribution,)  # the distributions that it can handle

    def __init__(self, plate_name: str, n_samples: int = 1):
        super().__init__()
        if not isinstance(plate_name, str) or not plate_name:
            raise ValueError(f"{type(self).__name__}({plate_name!r}): expected a name of the node first, such as 'z'")
        if not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"{type(self).__name__}({plate_name!r}): n_samples = {n_samples!r}, expected at least 1")
        self.plate_name, self.n_samples = plate_name, n_samples

    def forward(self, distribution: Distribution) -> Tensor:
        """Draw from a distribution, as a node of the current graph of stochastic_graph.

        Raises ValueError, naming the node, for a distribution that the method cannot handle.
        """
        if not isinstance(distribution, Distribution):
            raise ValueError(
                f"node {self.plate_name!r}: {type(self).__name__} takes a distribution of torch.distributions, not "
                f"{type(distribution).__name__}"
            )
        try:
            graph = current_graph.get()
        except LookupError:
            raise ValueError(
                f"node {self.plate_name!r}: to sample by calling a method import stochastic_graph; in a thread of its "
                "own tell the story inside `with stochastic_graph.Graph():`"
            ) from None
        return graph.sample(self, distribution)

    def check(self, distribution: Distribution) -> None:
        """Raise ValueError for a distribution that this method cannot handle."""
        if not isinstance(base_of(distribution), self.takes):
            names = ", ".join(kind.__name__ for kind in self.takes)
            raise ValueError(
                f"node {self.plate_name!r}: {type(self).__name__} takes {names}, not {type(distribution).__name__}"
            )

    def propose(self, distribution: Distribution, num_plates: int) -> Sample:
        """Draw the points: `place` of `draw`."""
        return self.place(distribution, num_plates, self.draw(distribution, num_plates))

    def draw(self, distribution: Distribution, num_plates: int) -> Any:  # noqa: ARG002
        """Return all that is random, the points themselves or the noise that they are made of; [n, *plates, ...]."""
        return distribution.sample(torch.Size([self.n_samples]))

    def place(self, distribution: Distribution, num_plates: int, noise: Any) -> Sample:
        """Return the sample that `draw` leads to, without further chance: a proof may give every draw in turn."""
        return Sample(distribution, num_plates, noise)

    def weigh(self, sample: Sample) -> Tensor:
        """Return w, [n, *plates] (or what broadcasts to it), without a gradient unless it is exact; 1/n each."""
        return torch.full((sample.size, *(1,) * sample.num_plates), 1 / sample.size, **like(sample))

    def gradient(self, sample: Sample) -> Tensor | None:  # noqa: ARG002
        """Return l, [n, *plates], whose value is 1; None for the constant."""
        return None

    def control_variate(self, sample: Sample, cost: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return a, [*plates, m], whose value is 0, for costs [n, *plates, m]; None for none."""
        return None

    def estimate(self, sample: Sample, cost: Tensor) -> Tensor:
        """Return the surrogate of E[cost], [*plates, m], for costs [n, *plates, m]."""
        weight, gradient = self.weigh(sample).unsqueeze(-1), self.gradient(sample)
        # A cost at a point of weight zero, as where a relaxation is evaluated, may be anything.
        terms = weight * (cost if gradient is None else gradient.unsqueeze(-1) * cost)
        control_variate = self.control_variate(sample, cost)
        total = terms.sum(0)
        return total if control_variate is None else total + control_variate

    def parameters_of_estimator(self) -> Iterable[nn.Parameter]:
        """Return what the method itself trains, as a control variate's network."""
        return self.parameters()

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.plate_name!r}, n_samples={self.n_samples}"


class _FirstOrder(torch.autograd.Function):
    """Adds a constant to the gradient of a tensor; what is so added refuses to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, coefficient: Tensor, name: str) -> Tensor:  # noqa: ARG004
        shape = torch.broadcast_shapes(value.shape, coefficient.shape)
        return torch.zeros(shape, dtype=value.dtype, device=value.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:  # noqa: ARG004
        value, coefficient, ctx.name = inputs
        ctx.save_for_backward(coefficient, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (coefficient, value) = gradients, ctx.saved_tensors
        return _Constant.apply((gradient * coefficient).sum_to_size(value.shape), value, ctx.name), None, None


class _Constant(torch.autograd.Function):
    """The gradient that `_FirstOrder` adds, which depends on the value in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(added: Tensor, value: Tensor, name: str) -> Tensor:  # noqa: ARG004
        return added.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:  # noqa: ARG004
        ctx.name = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:  # noqa: ARG004
        raise ValueError(
            f"{ctx.name} estimates first derivatives alone; for higher ones use ScoreFunction, Expect or "
            "Reparameterization"
        )


def with_gradient(value: Tensor, coefficient: Tensor, name: str) -> Tensor:
    """Return zeros, in the shape that both broadcast to, whose gradient with respect to `value` is `coefficient`.

    Its second derivative is unknown, and asking for it raises ValueError, naming the method.
    """
    return _FirstOrder.apply(value, coefficient.detach(), name)


def like(sample: Sample) -> dict[str, Any]:
    """Return dtype and device for a tensor of weights."""
    points = sample.points
    dtype = points.dtype if points.is_floating_point() else torch.get_default_dtype()
    return {"dtype": dtype, "device": points.device}


def base_of(distribution: Distribution) -> Distribution:
    """Return the distribution inside Independent."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def uniforms(distribution: Distribution, n: int) -> Tensor:
    """Return uniform noise in the open interval (0, 1), [n, *the shape of the distribution's logits]."""
    logits = logits_of(distribution)
    limits = torch.finfo(logits.dtype)
    return torch.rand(n, *logits.shape, dtype=logits.dtype, device=logits.device).clamp(limits.tiny, 1 - limits.eps / 2)


def gumbels(logits: Tensor) -> Tensor:
    """Return standard Gumbel noise in the shape of `logits`; made of what torch.vmap can draw."""
    uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).eps / 4)
    return -(-torch.log1p(-uniform)).log()


def gradient_of_logits(sample: Sample, coefficient: Tensor, name: str) -> Tensor:
    """Return zeros [*plates, m] whose gradient with respect to the logits is `coefficient` [*plates, *rest, (C,) m].

    For the logits of categories, its sum over them has to be zero: only then are normalised logits as good as others.
    """
    zeros = with_gradient(logits_of(sample.distribution).unsqueeze(-1), coefficient, name)
    return zeros.flatten(sample.num_plates, -2).sum(-2) if zeros.dim() > sample.num_plates + 1 else zeros


def logits_of(distribution: Distribution) -> Tensor:
    """Return the logits of a Bernoulli, [*batch], or the log-probabilities of categories, [*batch, C]."""
    distribution = base_of(distribution)
    assert isinstance(distribution, Bernoulli | Categorical | OneHotCategorical)
    return distribution.logits
