"""The gradients of the total cost with respect to the parameters of the distributions that were sampled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor as Plain
from torch.distributions import Distribution

from stochastic_graph.distributions import forget_computed, is_categorical, parameters_of
from stochastic_graph.repeated import is_used
from stochastic_graph.tensor import Tensor, plain, plates_of, wrap


class ParameterGradients(dict[str, Tensor]):
    """Gradients by parameter, those that the distribution was built of: probs or logits, loc and scale.

    Probabilities and logits of categories are normalised by their distribution: their gradients are those with respect
    to what was given, where that was normalised, so that a constant added to a cost changes no gradient's mean.
    """

    def __init__(self, node: str, names: tuple[str, ...]):
        super().__init__()
        self.node, self.names = node, names
        self.unknown: set[str] = set()

    def __missing__(self, name: str) -> Tensor:
        if name in self.unknown:
            raise KeyError(
                f"node {self.node!r}: the gradient of {name!r} is not known for each sample that it depends on, as "
                "something was computed of it before the node was sampled; sample first"
            )
        if name in self.names:
            raise KeyError(
                f"node {self.node!r}: no gradient of {name!r} yet; call backward() first, and let {name} require one"
            )
        raise KeyError(
            f"node {self.node!r} was built of {', '.join(self.names) or 'nothing that is kept'}, not of {name!r}"
        )


@dataclass(frozen=True, eq=False)
class Watched:
    """A parameter of a node, and where its gradient goes."""

    found: ParameterGradients
    name: str
    value: torch.Tensor
    normalises: bool

    def keep(self, gradient: Plain) -> None:
        """Keep a gradient."""
        values = plain(self.value.detach()) if self.normalises else None
        self.found[self.name] = wrap(_projected(plain(gradient.detach()), self.name, values), plates_of(self.value))


class Parameters:
    """Watches the parameters of a story's nodes while a gradient is computed."""

    def __init__(self) -> None:
        self.watched: list[Watched] = []
        self._handles: list[Any] = []
        self._is_collecting = False

    def watch(self, distribution: Distribution, node: str) -> ParameterGradients:
        """Return where the gradients of a distribution's parameters will be found."""
        found = ParameterGradients(node, tuple(name for name, _ in parameters_of(distribution)))
        normalises = is_categorical(distribution)
        if any(is_used(value) for _, value in parameters_of(distribution)):
            forget_computed(distribution)
        for name, value in parameters_of(distribution):
            if is_used(value):
                found.unknown.add(name)
            elif value.requires_grad:
                watched = Watched(found, name, value, normalises)
                self.watched.append(watched)
                self._handles.append(value.register_hook(self._keeper(watched)))
        return found

    def _keeper(self, watched: Watched) -> Callable[[Plain], None]:
        def keep(gradient: Plain) -> None:
            if self._is_collecting:
                watched.keep(gradient)

        return keep

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the gradients that are computed inside."""
        self._is_collecting = True
        try:
            yield
        finally:
            self._is_collecting = False

    def forget(self) -> None:
        """Watch no more: a parameter that lives on must not gather watchers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.watched.clear()


def _projected(gradient: Plain, name: str, values: Plain | None) -> Plain:
    """Return the gradient through a normalisation, at a point that is normalised; `values` None: none takes place.

    For probs p: g - sum p g; for logits l: g - softmax(l) sum g.
    """
    if values is None:
        return gradient
    if name == "probs":
        return gradient - (gradient * values).sum(-1, keepdim=True)
    return gradient - values.softmax(-1) * gradient.sum(-1, keepdim=True)
