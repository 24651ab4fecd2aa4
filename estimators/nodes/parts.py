"""Parts of which the control variates of several methods are made."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution

from estimators.nodes.base import Method, Sample, base_of, like, logits_of, with_gradient


def probs_of(distribution: Distribution) -> Tensor:
    """Return the probabilities of a Bernoulli, [*batch], or of categories, [*batch, C], without a gradient."""
    logits = logits_of(distribution).detach()
    return logits.sigmoid() if isinstance(base_of(distribution), Bernoulli) else logits.softmax(-1)


def score_of(distribution: Distribution, points: Tensor) -> Tensor:
    """Return the gradient of log q(x_i) by the logits, b - p, in the shape [n, *logits], without a gradient itself."""
    probs = probs_of(distribution)
    if isinstance(base_of(distribution), Categorical):
        points = nn.functional.one_hot(points, probs.shape[-1])
    return points.detach().to(probs.dtype) - probs


def beside(sample: Sample, cost: Tensor) -> Tensor:
    """Return costs [n, *plates, m] as [n, *plates, *ones, m], in line with what has the shape [n, *logits, m]."""
    rest = logits_of(sample.distribution).dim() - sample.num_plates
    return cost.reshape(*cost.shape[:-1], *(1,) * rest, cost.shape[-1])


def weights_of(sample: Sample, n: int) -> Tensor:
    """Return 1 / n for the first n points and 0 for the others, which serve the estimate alone, [N, *ones]."""
    weight = torch.zeros(sample.size, **like(sample))
    weight[:n] = 1 / n
    return weight.reshape(-1, *(1,) * sample.num_plates)


def differentiable(points: Tensor) -> Tensor:
    """Return points by which costs can be differentiated, cut off from what they were made of."""
    return points.detach().requires_grad_()


def slopes(method: Method, sample: Sample, cost: Tensor, create_graph: bool = False) -> Tensor:
    """Return the gradients of costs [n, *plates, m] by their own points, [n, *plates, *rest, *event, m].

    One pass backwards for each of the m. The points have to be `differentiable`. Raises ValueError, naming the node,
    where the cost is not a differentiable function of them.
    """
    plates = sample.points.shape[: 1 + sample.num_plates]
    found = []
    for each in cost.expand(*plates, cost.shape[-1]).unbind(-1):
        slope = None
        if each.requires_grad:
            (slope,) = torch.autograd.grad(
                each.sum(), sample.points, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        if slope is None:
            raise ValueError(
                f"node {method.plate_name!r}: {type(method).__name__} needs costs that are differentiable functions of "
                "the samples, and one is not; use DisARM, RELAX or ScoreFunction, which ask for values alone"
            )
        found.append(slope)
    return torch.stack(found, -1)


def training_term(parameters: Iterable[nn.Parameter], objective: Tensor) -> Tensor:
    """Return a zero whose gradient by `parameters`, and by nothing else, is that of the objective, a scalar."""
    chosen = [each for each in parameters if each.requires_grad]
    found = torch.autograd.grad(objective, chosen, allow_unused=True, retain_graph=True) if chosen else ()
    pairs = zip(chosen, found, strict=True)
    zeros = [
        with_gradient(each, slope, "a control variate's training").sum() for each, slope in pairs if slope is not None
    ]
    return sum(zeros, objective.new_zeros(()))


def variance_objective(coefficient: Tensor, num_plates: int) -> Tensor:
    """Return the squared norm of gradients by the logits [*plates, ..., m], summed over the m, the mean over plates.

    Its expectation is the variance and the square of the mean, which no control variate changes.
    """
    num_items = coefficient.shape[:num_plates].numel()
    return coefficient.square().sum() / max(1, num_items)
