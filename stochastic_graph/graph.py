"""The graph of a generative story: its samples, its costs, and the surrogate whose derivatives are estimates."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor as Plain
from torch.distributions import Distribution

from estimators.nodes.base import Method, Sample, current_graph
from stochastic_graph.distributions import all_tensors, map_tensors
from stochastic_graph.parameters import ParameterGradients, Parameters
from stochastic_graph.plates import Plate, are_same, mean_over, position, said, union, with_plates
from stochastic_graph.repeated import Repeated, repeats_of
from stochastic_graph.tensor import Tensor, averaged_of, plain, plates_of, wrap

Plates = tuple[Plate, ...]


class StochasticTensor(Repeated):
    """The samples of a node, [samples, *plates of its distribution, ...].

    name: the node's; distribution: what it was drawn from; method: what drew it; param_grads: after backward(), the
    gradients of the total cost with respect to the distribution's parameters, by name (stochastic_graph/parameters.py).
    """

    name: str = ""  # shadows the attribute of named tensors
    distribution: Distribution
    method: Method
    param_grads: ParameterGradients


@dataclass(frozen=True, eq=False)
class Node:
    """A sampled node: what was drawn, how, and on which plate."""

    method: Method
    sample: Sample
    plate: Plate


class Groups:
    """Costs by the plates that they are on, those on the same plates added up."""

    def __init__(self) -> None:
        self._costs: dict[Plates, Plain] = {}

    def add(self, cost: Plain, plates: Plates) -> None:
        """Add a cost [*plates]."""
        for present in self._costs:
            if are_same(present, plates):
                self._costs[present] = self._costs[present] + cost
                return
        self._costs[plates] = cost

    def with_plate(self, plate: Plate) -> list[tuple[Plain, Plates]]:
        """Take out the costs on a plate."""
        found = [plates for plates in self._costs if position(plates, plate) is not None]
        return [(self._costs.pop(plates), plates) for plates in found]

    def next_plate(self, are_samples: bool) -> Plate | None:
        """Return the leftmost plate that there is, a sample's or not."""
        present = (plate for plates in self._costs for plate in plates if plate.is_sample or not are_samples)
        return min(present, key=lambda plate: plate.order, default=None)

    def total(self) -> Plain | None:
        """Return the weighted means of all costs, added up; None where there are none."""
        while (plate := self.next_plate(are_samples=False)) is not None:
            for cost, plates in self.with_plate(plate):
                self.add(*mean_over(cost, plates, plate))
        return self._costs.get(())


class Graph:
    """The samples and costs of one story. Several graphs can live at once; `with graph:` makes one current."""

    def __init__(self) -> None:
        self._nodes: dict[Plate, Node] = {}
        self._costs: list[tuple[str, Plain, Plates]] = []
        self._parameters = Parameters()
        self._tokens: list[Any] = []

    def __enter__(self) -> "Graph":
        self._tokens.append(current_graph.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        current_graph.reset(self._tokens.pop())

    def sample(self, method: Method, distribution: Distribution) -> StochasticTensor:
        """Draw from a distribution with a method; the samples lie on a plate of their own, named as the method says.

        A name that this story already has gets a number: z, z_1, z_2. Raises ValueError, naming the node, for a
        distribution that the method cannot handle, or that depends on a sample of before the last reset or backward.
        """
        name = self._unique(method.plate_name)
        self._check_past(all_tensors(distribution), f"node {name!r}")
        self.prepare(method, distribution)
        plates = union(plates_of(value) for value in all_tensors(distribution))
        if any(plate.name == name for plate in plates):
            raise ValueError(f"node {name!r} has the name of a plate that its distribution is on; give it another")
        raw = map_tensors(distribution, plain)
        sizes = tuple(plate.size for plate in plates)
        if raw.batch_shape[: len(plates)] != sizes:
            raise ValueError(
                f"node {name!r}: the distribution's batch shape {list(raw.batch_shape)} does not begin with the sizes "
                f"of its plates ({said(plates)}); plates may not be inside an event (to_event, Independent)"
            )
        method.check(raw)
        sample = method.propose(raw, len(plates))
        sample.key = name
        plate = Plate(name, sample.size, weight_of(method, sample), plates, is_sample=True)
        self._nodes[plate] = Node(method, sample, plate)
        points, own = self.placed(sample, plate)
        value = points.as_subclass(StochasticTensor)
        value.plates, value.name, value.distribution, value.method = own, name, distribution, method
        value.repeats = repeats_of(raw, points, own)
        value.param_grads = self._parameters.watch(distribution, name)
        return value

    def prepare(self, method: Method, distribution: Distribution) -> None:
        """Change what a node is about to be drawn from: replicates do."""

    def placed(self, sample: Sample, plate: Plate) -> tuple[Plain, Plates]:
        """Return a node's points and the plates that they are on.

        Those that are the same for all items are on the node's plate alone: what follows from them is computed once.
        """
        points, parents = sample.points, plate.parents
        if points.shape[1 : 1 + len(parents)] == tuple(each.size for each in parents):
            return points, (plate, *parents)
        return points.reshape(sample.size, *points.shape[1 + len(parents) :]), (plate,)

    def add_cost(self, cost: torch.Tensor, name: str) -> None:
        """Add a cost, one number for each item of its plates, to what the story minimises: its weighted mean.

        Raises ValueError, naming the cost, where it has other dimensions than plates, is no real number, has lost the
        plate of a node by a mean, or depends on a sample of before the last reset() or backward().
        """
        if not name:
            raise ValueError("add_cost was given no name; name the cost, as in add_cost(loss, 'reconstruction')")
        if not isinstance(cost, torch.Tensor) or not cost.is_floating_point():
            kind = cost.dtype if isinstance(cost, torch.Tensor) else type(cost).__name__
            raise ValueError(f"cost {name!r} is of type {kind}, expected a tensor of floating-point numbers")
        plates, own = plates_of(cost), cost.shape[len(plates_of(cost)) :]
        if own.numel() != 1:
            raise ValueError(
                f"cost {name!r} has dimensions {list(own)} beside its plates ({said(plates)}): sum over them, as in "
                "loss.sum(-1), or say with denote_independent that they are a plate"
            )
        self._check_past([cost], f"cost {name!r}")
        self._costs.append((name, plain(cost).reshape(cost.shape[: len(plates)]), plates))

    def costs(self) -> dict[str, Tensor]:
        """Return the costs so far by name, each with its plates; costs of one name are told apart by a number."""
        found: dict[str, Tensor] = {}
        for name, cost, plates in self._costs:
            found[next(each for each in _numbered(name) if each not in found)] = wrap(cost, plates)
        return found

    def surrogate_loss(self) -> Plain:
        """Return the surrogate, a scalar: its value is the weighted mean of the costs, its gradient the estimate.

        From the newest sample to the oldest each plate is reduced by its node's method, which gives the samples credit
        for the costs that depend on them and for no others; then the other plates by their weighted means. Where every
        method is of any order, so is the surrogate. Raises ValueError where there is no cost.
        """
        total = self.reduced_over_samples().total()
        assert total is not None
        return total

    def reduced_over_samples(self) -> Groups:
        """Return the surrogates of the costs with the plates of samples reduced."""
        if not self._costs:
            raise ValueError("there is no cost to minimise: call add_cost first (backward() and reset() forget them)")
        union(plates for _, _, plates in self._costs)  # refuses names that are used twice
        groups = Groups()
        for _, cost, plates in self._costs:
            groups.add(cost, plates)
        while (plate := groups.next_plate(are_samples=True)) is not None:
            node = self._nodes[plate]
            for cost, plates in groups.with_plate(plate):
                groups.add(*_estimated(node, cost, plates))
        return groups

    def backward(self, retain_graph: bool = False, create_graph: bool = False) -> Plain:
        """Add the estimated gradient to the .grad of every parameter; return the mean total cost, a scalar.

        Forgets the costs and samples afterwards unless `retain_graph`.
        """
        loss = self.surrogate_loss()
        if loss.requires_grad:
            with self._parameters.collected():
                loss.backward(retain_graph=retain_graph or create_graph, create_graph=create_graph)
        if not retain_graph:
            self.reset()
        return loss.detach()

    def grad(
        self, inputs: Sequence[torch.Tensor], create_graph: bool = False, retain_graph: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the estimated gradients of the total cost with respect to `inputs`, with their plates."""
        loss = self.surrogate_loss()
        with self._parameters.collected():
            found = torch.autograd.grad(
                loss,
                inputs,
                create_graph=create_graph,
                retain_graph=retain_graph or create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        return tuple(wrap(plain(each), plates_of(value)) for each, value in zip(found, inputs, strict=True))

    def reset(self) -> None:
        """Forget all costs and samples."""
        self._nodes.clear()
        self._costs.clear()
        self._parameters.forget()

    def _check_past(self, values: Iterable[torch.Tensor], what: str) -> None:
        """Raise ValueError for what depends on a sample that this graph does not know, or on a mean over samples."""
        for value in values:
            for plate in averaged_of(value):
                raise ValueError(
                    f"{what} depends on node {plate.name!r} through a mean over its samples, which lost plate "
                    f"{plate}: its gradient could not be estimated; keep the plate, backward() takes the mean"
                )
            for plate in _with_ancestors(plates_of(value)):
                if plate.is_sample and plate not in self._nodes:
                    raise ValueError(
                        f"{what} depends on node {plate.name!r}, which was sampled before the last reset() or "
                        "backward(), or in another graph; sample it again"
                    )

    def _unique(self, name: str) -> str:
        taken = {plate.name for plate in self._nodes}
        return next(each for each in _numbered(name) if each not in taken)


def weight_of(method: Method, sample: Sample) -> Plain | None:
    """Return what a node's points count for in a mean, [n, *plates], or [n] for all items alike; None: 1 / n each."""
    if type(method).weigh is Method.weigh:
        return None
    with torch.no_grad():
        weight = method.weigh(sample)
    return weight.reshape(-1) if weight.numel() == len(weight) else weight


def _estimated(node: Node, cost: Plain, plates: Plates) -> tuple[Plain, Plates]:
    """Return the surrogate of a cost [*plates] on a node's plate, and the plates that are left: the parents too."""
    parents = node.plate.parents
    others = tuple(each for each in plates if each is not node.plate and position(parents, each) is None)
    lined = with_plates(cost, plates, (node.plate, *parents, *others))
    node.sample.key = "/".join([node.plate.name, *(each.name for each in others)])
    sizes = lined.shape[1 + len(parents) :]
    reduced = node.method.estimate(node.sample, lined.reshape(*lined.shape[: 1 + len(parents)], -1))
    left = union([parents, others])
    return with_plates(reduced.reshape((*reduced.shape[:-1], *sizes)), (*parents, *others), left), left


def _with_ancestors(plates: Sequence[Plate]) -> Iterator[Plate]:
    for plate in plates:
        yield plate
        yield from _with_ancestors(plate.parents)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 1
    while True:
        yield f"{name}_{number}"
        number += 1
