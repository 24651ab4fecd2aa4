"""Many independent runs of a story in one evaluation, each with a gradient of its own."""

import copy
from typing import Any

import torch
from torch import Tensor as Plain
from torch.distributions import Distribution

from estimators.nodes.base import Method, Sample
from stochastic_graph.distributions import all_tensors, computed, map_tensors, parameters_of
from stochastic_graph.graph import Graph, Groups, Plates
from stochastic_graph.parameters import ParameterGradients
from stochastic_graph.plates import Plate, position, union
from stochastic_graph.tensor import plain, plates_of, wrap


class Root:
    """A parameter of a node that depends on no other sample: what it is, and its copies, one a replicate."""

    def __init__(self, found: ParameterGradients, name: str, value: torch.Tensor, copies: torch.Tensor):
        self.found, self.name, self.value, self.copies = found, name, value, copies


class replicates(Graph):
    """A graph on which a story is told `num_replicates` times at once, for the variance of its gradient.

    >>> with storch.replicates(100, "gradients"):
    ...     z = generative_story(method, model, data)
    ...     storch.backward()
    >>> storch.variance(z.param_grads["probs"], "gradients")

    `param_grads` of every node are on the plate `name`, what 100 stories and 100 calls of backward() would give; no
    other .grad changes, and what a method remembers, as a moving average, is afterwards what it was before. What is
    computed before the first sample, as an encoder's output, is computed once: each node's distribution is given, as it
    is sampled, a copy of its parameters for each replicate. Raises ValueError, naming the node, where a cost depends on
    samples and beside them on such parameters as they were before: take them from the distribution, after sampling.
    """

    def __init__(self, num_replicates: int, name: str = "replicates"):
        super().__init__()
        if num_replicates < 1:
            raise ValueError(f"replicates({num_replicates}, {name!r}): expected at least one")
        self._plate = Plate(name, num_replicates, is_replicates=True)
        self._roots: list[Root] = []
        self._copied: list[tuple[str, torch.Tensor, torch.Tensor, bool]] = []
        self._states: dict[Method, Any] = {}

    def __exit__(self, *exception: object) -> None:
        for method, state in self._states.items():
            method.load_state_dict(state)
        self._states.clear()
        super().__exit__(*exception)

    def prepare(self, method: Method, distribution: Distribution) -> None:
        """Give a distribution that is not on the replicates' plate a copy of its parameters for each."""
        if method not in self._states:
            self._states[method] = copy.deepcopy(method.state_dict())
        plates = union(plates_of(value) for value in all_tensors(distribution))
        if position(plates, self._plate) is not None:
            return
        originals = dict(parameters_of(distribution))
        single = map_tensors(distribution, lambda value: plain(value).detach().requires_grad_(value.requires_grad))
        many = single.expand(torch.Size([self._plate.size, *distribution.batch_shape]))
        sizes = [plate.size for plate in (self._plate, *plates)]

        def with_plates(value: torch.Tensor) -> torch.Tensor:
            if list(value.shape[: len(sizes)]) == sizes:
                return wrap(value, (self._plate, *plates))
            return wrap(value, plates) if plates else value

        copied = map_tensors(many, with_plates)
        for name in computed(distribution):
            del vars(distribution)[name]
        vars(distribution).update(vars(copied))
        copies = dict(parameters_of(distribution))
        self._copied = [(name, value, copies[name], value.requires_grad) for name, value in originals.items()]

    def sample(self, method: Method, distribution: Distribution) -> Any:
        """Draw from a distribution with a method, in each replicate."""
        self._copied = []
        value = super().sample(method, distribution)
        self._roots += [
            Root(value.param_grads, name, original, copies)
            for name, original, copies, requires_grad in self._copied
            if requires_grad
        ]
        return value

    def placed(self, sample: Sample, plate: Plate) -> tuple[Plain, Plates]:
        """Return a node's points, on the replicates' plate at least, and the plates that they are on."""
        points, own = super().placed(sample, plate)
        if len(own) == 1:
            points = points.unsqueeze(1).expand(len(points), self._plate.size, *points.shape[1:])
            own = (plate, self._plate)
        return points, own

    def surrogate_loss(self) -> Plain:
        """Return the mean total cost of a replicate, whose gradient is the mean of theirs."""
        varying, constant = self._totals()
        return varying / self._plate.size + constant

    def backward(self, retain_graph: bool = False, create_graph: bool = False) -> Plain:
        """Leave the replicates' gradients in param_grads; return the mean total cost over all, a scalar.

        Raises ValueError for create_graph: there is nothing here to differentiate again.
        """
        if create_graph:
            raise ValueError("replicates: their gradients cannot be differentiated again; use grad() in a graph")
        varying, constant = self._totals()
        self._find(varying, constant)
        if not retain_graph:
            self.reset()
        return (varying / self._plate.size + constant).detach()

    def reset(self) -> None:
        """Forget all costs and samples."""
        super().reset()
        self._roots.clear()

    def _totals(self) -> tuple[Plain, Plain]:
        """Return the surrogate of all that varies among replicates, summed over them, and that of all that does not."""
        constant, varying = self.reduced_over_samples(), Groups()
        for cost, plates in constant.with_plate(self._plate):
            at = position(plates, self._plate)
            assert at is not None
            varying.add(cost.sum(at), (*plates[:at], *plates[at + 1 :]))
        first, second = (torch.zeros(()) if total is None else total for total in (varying.total(), constant.total()))
        return first, second

    def _find(self, varying: Plain, constant: Plain) -> None:
        """Put each replicate's gradient together: through the copies, and what is the same for all."""
        watched = self._parameters.watched
        values, originals = [each.value for each in watched], [root.value for root in self._roots]
        own = _gradients(varying, values + originals)
        same = _gradients(constant, values + originals)
        for root, direct in zip(self._roots, own[len(values) :], strict=True):
            if direct is not None:
                raise ValueError(
                    f"replicates: a cost depends on samples and on parameters of node {root.found.node!r} as they were "
                    f"before it was sampled; take {root.name} from its distribution, after sampling"
                )
        gradients = {id(each.value): _sum(*pair) for each, *pair in zip(watched, own, same, strict=False)}
        pulled = self._pulled([gradients[id(root.copies)] for root in self._roots])
        for root, through, direct in zip(self._roots, pulled, same[len(values) :], strict=True):
            gradients[id(root.copies)] = _sum(through, direct)
        for each in watched:
            gradient = gradients[id(each.value)]
            if gradient is not None:
                each.keep(gradient)

    def _pulled(self, gradients: list[Plain | None]) -> list[Plain]:
        """Return the gradients of the roots, where the parameters of one may have been made of another's."""
        values = [root.value for root in self._roots]
        own = [
            torch.zeros(self._plate.size, *root.value.shape) if gradient is None else plain(gradient)
            for root, gradient in zip(self._roots, gradients, strict=True)
        ]
        if len(values) < 2:
            return own
        found = torch.autograd.grad(
            values, values, grad_outputs=own, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        return [each if pulled is None else plain(pulled) for each, pulled in zip(own, found, strict=True)]


def _sum(first: Plain | None, second: Plain | None) -> Plain | None:
    return second if first is None else first if second is None else first + second


def _gradients(total: Plain, values: list[torch.Tensor]) -> list[Plain | None]:
    if not total.requires_grad:
        return [None] * len(values)
    return list(torch.autograd.grad(total, values, retain_graph=True, allow_unused=True))
