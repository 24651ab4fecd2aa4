"""The types of the configuration's keys.

A key that no class here declares, such as an option of a model, has the type of its default in the YAML.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
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
Natural = Annotated[int, Range(at_least=0)]
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
    """A torch optimiser; keys that are not here are its keyword arguments, as lr is.

    estimator_lr: the rate of the estimator's own parameters, as a baseline's; null: lr.
    """

    lr: Positive
    estimator_lr: Positive | None


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
class Train(Component):
    """The options of the task `train`, which conf/task/train.yaml explains."""

    epochs: Count | None
    lr_steps: list[Count]
    lr_factor: Annotated[float, Range(above=0, below=1)]
    lr_patience: Count | None
    warmup_alpha: Annotated[float, Range(at_least=0, below=1)] | None
    warmup_beta: NonNegative | None
    warmup_steps: Natural
    warmup_offset: Natural
    warmup_scale: str
    temperature_rate: NonNegative
    temperature_minimum: NonNegative


@dataclass
class DiceDerivatives(Component):
    """The options of the task `dice_derivatives`, which its file in conf/task explains."""

    baseline: str
    orders: Annotated[int, Range(at_least=1, below=4)]
    rounds: Count
    discount: Annotated[float, Range(above=0, below=1)]
    policy_seed: Seed


@dataclass
class PrisonersDilemma(Component):
    """The options of the task `prisoners_dilemma`, which its file in conf/task explains."""

    learner: str
    gradients: str
    rounds: Count
    discount: Annotated[float, Range(above=0, below=1)]
    inner_lr: Positive


@dataclass
class DiceLanguageModel(Component):
    """The options of the task `dice_language_model`, which its file in conf/task explains."""

    penalty: str
    baseline: str
    kl: NonNegative
    length: Count
    width: Count
    layers: Count
    heads: Count
    pretrain_steps: Natural
    pretrain_batch: Count
    pretrain_lr: Positive
    replicates: Annotated[int, Range(at_least=2)]


@dataclass
class SolverLearning(Component):
    """The options that the tasks share which learn through a solver."""

    method: str
    noise: str
    nb_samples: Count
    lambda_: NonNegative
    lambda_update: Positive


@dataclass
class TopK(SolverLearning):
    """The options of the task `top_k`, which its file in conf/task explains."""

    n: Count
    k: Count
    problem_seed: Seed
    replicates: Annotated[int, Range(at_least=2)]


@dataclass
class ShortestPath(SolverLearning):
    """The options of the task `shortest_path`, which its file in conf/task explains."""

    temperature: NonNegative
    hidden: Count


# What a section has beside its target.
TARGETS: dict[str, dict[str, type]] = {
    "task": {
        "tasks.train.run": Train,
        "tasks.dice_derivatives.run": DiceDerivatives,
        "tasks.prisoners_dilemma.run": PrisonersDilemma,
        "tasks.dice_language_model.run": DiceLanguageModel,
        "tasks.top_k.run": TopK,
        "tasks.shortest_path.run": ShortestPath,
    }
}


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
            inner = cls.of_annotation(get_args(annotation)[0])
            return cls(inner.kind, is_list=True, range=inner.range)
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


@cache
def rules_of(section: str, target: str) -> dict[str, Rule]:
    """Return the rules of a section whose target is declared in TARGETS by dotted key; none for another target."""
    schema = TARGETS.get(section, {}).get(target)
    return {} if schema is None else dict(rules(schema, f"{section}."))
