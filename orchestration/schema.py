"""The types of the configuration's keys.

A key that no class here declares, such as an option of a model, has the type of its default in the YAML.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

GROUPS = ("task", "model", "dataset", "estimator", "optimizer", "analysis")


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes."""

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value < self.below and value > self.above

    def __str__(self) -> str:
        limits = {"of at least": self.at_least, "above": self.above, "below": self.below}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))


Count = Annotated[int, Range(at_least=1)]
Seed = Annotated[int, Range(at_least=0, below=2**32)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]


@dataclass
class Component:
    """What is built from a Python path and keyword arguments."""

    target: str


@dataclass
class Estimator:
    """An estimator of the gradient of a bound, by its id, and the bound's options."""

    id: str
    mc: Count
    iw: Count
    alpha: Annotated[float, Range(at_least=0, below=1)]
    beta: NonNegative
    freebits: NonNegative | None


@dataclass
class Optimizer(Component):
    """A torch optimiser; other keys are its keyword arguments."""

    lr: Positive


@dataclass
class Evaluation:
    """The fixed evaluator: particles and data points."""

    iw: Count
    points: Count


@dataclass
class Analysis:
    """The gradient statistics."""

    num_replicates: Annotated[int, Range(at_least=2)]
    parameters: list[str]
    block_size: Count | None


@dataclass
class Config:
    """A whole configuration."""

    tag: str
    seed: Seed
    steps: Count
    batch_size: Count
    eval_every: Count
    checkpoint_every: Count
    device: str
    threads: Count
    root: str
    data_root: str
    task: Component
    model: Component
    dataset: Component
    estimator: Estimator
    optimizer: Optimizer
    evaluation: Evaluation
    analysis: Analysis


_LARGEST = sys.float_info.max
_NAMES: dict[type | None, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    None: "a value",
}


@dataclass(frozen=True)
class Rule:
    """The values that one key takes: of `kind` (None: any scalar or list), a list of them, or null."""

    kind: type | None = None
    is_list: bool = False
    optional: bool = False
    range: Range = Range()

    @classmethod
    def of_annotation(cls, annotation: Any) -> "Rule":
        """Read a rule off a field's annotation."""
        if NoneType in get_args(annotation):
            kind, _ = get_args(annotation)
            inner = cls.of_annotation(kind)
            return cls(inner.kind, inner.is_list, True, inner.range)
        if get_origin(annotation) is list:
            return cls(get_args(annotation)[0], is_list=True)
        if get_origin(annotation) is Annotated:
            kind, limits = get_args(annotation)
            return cls(kind, range=limits)
        return cls(annotation)

    @classmethod
    def of_default(cls, value: Any) -> "Rule":
        """Read a rule off a default value; null says nothing."""
        if isinstance(value, list):
            kinds = {type(item) for item in value}
            if kinds == {int, float}:
                return cls(float, is_list=True)
            return cls(kinds.pop() if len(kinds) == 1 and kinds <= _NAMES.keys() else None, is_list=True)
        return cls(type(value)) if type(value) in _NAMES else cls(optional=True)

    def __str__(self) -> str:
        text = " ".join(filter(None, [_NAMES[self.kind], str(self.range)]))
        return f"{'a list, each ' if self.is_list else ''}{text}{' or null' if self.optional else ''}"

    def check(self, value: Any) -> Any:
        """Return the value in the key's type; raise ValueError where it does not fit."""
        if value is None and self.optional:
            return None
        if self.is_list:
            return [self._check_item(item) for item in (value if isinstance(value, list) else [value])]
        return self._check_item(value)

    def _check_item(self, value: Any) -> Any:
        if isinstance(value, bool | str) and self.kind in (type(value), None):
            return value
        if isinstance(value, list) and self.kind is None:
            return [self._check_item(item) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
            is_integer = value == int(value)
            if self.kind is str and isinstance(value, int):
                return str(value)
            if self.kind is None:  # no type tells 1 from 1.0: one spelling of each number
                return int(value) if is_integer else value
            if (self.kind is float or (self.kind is int and is_integer)) and value in self.range:
                return self.kind(value) + 0  # -0.0 is 0.0
        raise ValueError


def rules(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Yield the dotted name and the rule of every key that the classes declare."""
    for name, annotation in get_type_hints(schema, include_extras=True).items():
        if isinstance(annotation, type) and is_dataclass(annotation):
            yield from rules(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, Rule.of_annotation(annotation)
