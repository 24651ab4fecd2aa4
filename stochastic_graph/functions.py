"""What the current graph is told, and what is computed along plates."""

from collections.abc import Sequence

import torch
from torch.distributions import Distribution

from estimators.nodes.base import current_graph
from stochastic_graph.distributions import all_tensors, map_tensors
from stochastic_graph.graph import Graph
from stochastic_graph.plates import Plate, are_same, check_weight, mean_over, position, union, with_plates
from stochastic_graph.tensor import Tensor, averaged_of, common_averaged, plain, plates_of, wrap

Plates = str | Plate | Sequence[str | Plate]


def current() -> Graph:
    """Return the current graph."""
    graph = current_graph.get(None)
    if not isinstance(graph, Graph):
        raise ValueError("no graph is current in this thread: tell the story inside `with Graph():`")
    return graph


def add_cost(cost: torch.Tensor, name: str) -> None:
    """Add a cost to the current graph: one number for each item of its plates."""
    current().add_cost(cost, name)


def costs() -> dict[str, Tensor]:
    """Return the current graph's costs by name."""
    return current().costs()


def surrogate_loss() -> torch.Tensor:
    """Return the current graph's surrogate, a scalar."""
    return current().surrogate_loss()


def backward(retain_graph: bool = False, create_graph: bool = False) -> torch.Tensor:
    """Add the estimated gradient to every .grad; return the mean total cost, a scalar, and forget the story."""
    return current().backward(retain_graph, create_graph)


def reset() -> None:
    """Forget the current graph's costs and samples."""
    current().reset()


def grad(
    inputs: torch.Tensor | Sequence[torch.Tensor], create_graph: bool = False, retain_graph: bool = True
) -> tuple[Tensor, ...]:
    """Return the estimated gradients of the current graph's total cost with respect to `inputs`, with their plates.

    With `create_graph` they can be differentiated again, where all methods are of any order. The costs are kept.
    """
    return current().grad([inputs] if isinstance(inputs, torch.Tensor) else inputs, create_graph, retain_graph)


def denote_independent(tensor: torch.Tensor, dim: int, name: str, weight: torch.Tensor | None = None) -> Tensor:
    """Say that the items along a dimension are independent: it becomes the plate `name`, on the left.

    Costs are averaged over it, with `weight` [size] where it is given (which is not normalised). The same name and size
    is the same plate. Raises ValueError for a dimension that is a plate already, and where there is no such dimension.
    """
    plates, rank = plates_of(tensor), tensor.dim()
    if not -rank <= dim < rank:
        raise ValueError(
            f"denote_independent(dim={dim}, name={name!r}): the tensor {list(tensor.shape)} has no such one"
        )
    dim %= rank
    if dim < len(plates):
        raise ValueError(f"denote_independent(dim={dim}, name={name!r}): that dimension is plate {plates[dim]} already")
    raw = plain(tensor)
    check_weight(weight, raw.shape[dim], name)
    plate = Plate(name, raw.shape[dim], weight)
    if any(each.name == name for each in plates):
        raise ValueError(f"denote_independent(dim={dim}, name={name!r}): the tensor is on a plate {name!r} already")
    return _put(raw.movedim(dim, 0), plate, tensor)


def log_prob(distribution: Distribution, value: torch.Tensor) -> Tensor:
    """Return the log-probability of a value under a distribution that may be on other plates, on the plates of both.

    `distribution.log_prob(value)` is the same where the value is on all plates of the distribution; otherwise torch's
    check of shapes would compare one's plates with the other's.
    """
    held = list(all_tensors(distribution))
    own = union(plates_of(each) for each in held)
    wanted = union([own, plates_of(value)])
    added = tuple(each for each in wanted if position(own, each) is None)
    # What is new stands to the left, as the sample dimensions of log_prob.
    result = map_tensors(distribution, plain).log_prob(with_plates(plain(value), plates_of(value), added + own))
    averaged = common_averaged([each for each in (*held, value) if isinstance(each, Tensor)])
    return wrap(with_plates(result, added + own, wanted), wanted, averaged)


def gather_samples(samples: Sequence[torch.Tensor], name: str, weight: torch.Tensor | None = None) -> Tensor:
    """Stack tensors along a new plate. Raises ValueError where there are none, or of different shapes or plates."""
    if not samples:
        raise ValueError(f"gather_samples: there is nothing to gather on plate {name!r}")
    plates = plates_of(samples[0])
    for sample in samples:
        others = plates_of(sample)
        if sample.shape != samples[0].shape or not are_same(plates, others):
            raise ValueError(
                f"gather_samples on plate {name!r}: samples of shapes {list(samples[0].shape)} and "
                f"{list(sample.shape)}, expected one shape and the same plates"
            )
    check_weight(weight, len(samples), name)
    return _put(torch.stack([plain(sample) for sample in samples]), Plate(name, len(samples), weight), samples[0])


def reduce_plates(tensor: torch.Tensor, plates: Plates | None = None) -> Tensor:
    """Return the weighted mean over plates, given by name or as they are; over all of them by default.

    Samples count for what their method weighs them with: the mean over the values of Expect is the expectation, on the
    plates that their probabilities are on. Raises ValueError for a plate that the tensor is not on.
    """
    raw, left, averaged = plain(tensor), plates_of(tensor), averaged_of(tensor)
    chosen = None if plates is None else [_find(tensor, each) for each in _listed(plates)]
    while remaining := [each for each in left if chosen is None or position(chosen, each) is not None]:
        plate = remaining[0]
        raw, left = mean_over(raw, left, plate)
        averaged += (plate,) if plate.is_sample else ()
    return wrap(raw, left, averaged)


def variance(tensor: torch.Tensor, plate: str | Plate, plates: Plates | None = None) -> Tensor:
    """Return the variance over one plate, summed over all that is no plate and averaged over `plates` (all by default).

    The mean of the squared distances from the mean, as the weights of the plate have it.
    """
    found = _find(tensor, plate)
    distance = tensor - reduce_plates(tensor, found)
    squares, own = distance * distance, tensor.dim() - len(plates_of(tensor))
    squares = squares.flatten(-own).sum(-1) if own else squares
    kept = None if plates is None else [found, *_listed(plates)]
    return reduce_plates(squares, kept)


def _put(raw: torch.Tensor, plate: Plate, like: torch.Tensor) -> Tensor:
    """Return [plate, *plates of `like`, ...] as a tensor, its plates in their order."""
    own = (plate, *plates_of(like))
    wanted = union([own])
    return wrap(with_plates(raw, own, wanted), wanted, averaged_of(like))


def _listed(plates: Plates) -> Sequence[str | Plate]:
    return [plates] if isinstance(plates, str | Plate) else plates


def _find(tensor: torch.Tensor, wanted: str | Plate) -> Plate:
    plates = plates_of(tensor)
    for plate in plates:
        if plate is wanted or plate.name == wanted or (isinstance(wanted, Plate) and plate.is_same(wanted)):
            return plate
    name = wanted if isinstance(wanted, str) else wanted.name
    raise ValueError(
        f"the tensor is on no plate {name!r}; it is on {', '.join(repr(plate.name) for plate in plates) or 'none'}"
    )
