"""The ids of estimators: their grammar, their spelling, and what each family declares. Never imports torch.

A family of ids is one file, `conf/estimator/<family>.yaml`, here or in a user's directory:

    id: ovis-gamma<gamma>                    # literal text, <parameters> and [optional parts]
    target: estimators.bounds.ovis_gamma.OvisGamma  # called as Estimator(mc, iw, alpha, beta, freebits, **parameters)
    parameters: {gamma: float}               # int, float, count (10, or 0.3: a share of K) or a list of words
    examples: [ovis-gamma0, ovis-gamma1]     # ids that it holds, offered as near names
    declares: unbiased for gamma = 0         # what its tests hold it to
    source: Liévin et al. 2020, eq. 17
    needs: log q(z|x)                        # of a model
    limits: K >= 2; no alpha                 # may be left out: what it refuses
    defaults: {}                             # of the parameters in optional parts, and of no other
    objective: ELBO                          # of q, L_K if left out; reports compare those of one, those of `own` none

`declares` of the form `A for gamma = 0, otherwise B` says A of that value of the parameter and B of any other.
An optional part is left out of the canonical spelling where its parameters have their defaults.

>>> parse("ovis-gamma1.0").id, parse("ovis-gamma1.0").parameters
('ovis-gamma1', {'gamma': 1.0})
>>> parse("tvo-part5-beta10.0-right").id  # tvo-part<num_intervals>[-beta<exponent>][-<rule>]
'tvo-part5-right'
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import yaml

from errors import UserError, near

Value = int | float | str

_PLACEHOLDER = re.compile(r"<(\w+)>")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_NUMBERS = {
    "int": r"[0-9]{1,9}",
    "float": r"[0-9]{1,9}(?:\.[0-9]{1,15})?",
    "count": r"[0-9]{1,9}|0\.[0-9]{1,15}",
}
_KEYS = {"id": str, "target": str, "parameters": dict, "examples": list, "declares": str, "source": str, "needs": str}
_OPTIONAL_KEYS = {"limits": str, "defaults": dict, "objective": str}
_CASES = re.compile(r"(?P<case>.*) for (?P<name>\w+) = (?P<value>\S+), otherwise (?P<otherwise>.*)")
SOURCE = Path(__file__).resolve().parents[1] / "conf" / "estimator"
_directories = [SOURCE]


class EstimatorId(NamedTuple):
    """An id in its canonical spelling, and the class and keyword arguments that it stands for."""

    id: str
    family: str
    target: str
    parameters: dict[str, Value]


@dataclass(frozen=True)
class Family:
    """One file of conf/estimator: the grammar of its ids and what they declare."""

    file: Path
    id: str
    target: str
    parameters: dict[str, str | Sequence[str]]
    examples: tuple[str, ...]
    declares: str
    source: str
    needs: str
    limits: str = ""
    defaults: dict[str, Value] = field(default_factory=dict)
    objective: str = "L_K"

    @property
    def name(self) -> str:
        """The name of the file: `ovis-gamma` for `ovis-gamma.yaml`."""
        return self.file.stem

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What matches the whole of an id, one named group a parameter."""

        def group(name: str) -> str:
            kind = self.parameters[name]
            values = _NUMBERS[kind] if isinstance(kind, str) else "|".join(map(re.escape, kind))
            return f"(?P<{name}>{values})"

        def literal(text: str) -> str:
            parts = _PLACEHOLDER.split(text)  # literal text and names by turns
            return "".join(group(part) if i % 2 else re.escape(part) for i, part in enumerate(parts))

        parts = _OPTIONAL.split(self.id)
        return re.compile("".join(f"(?:{literal(part)})?" if i % 2 else literal(part) for i, part in enumerate(parts)))

    def parse(self, id: str) -> EstimatorId | None:
        """Return what `id` stands for, or None where it is not of this family."""
        match = self.pattern.fullmatch(id)
        if match is None:
            return None
        given = {name: self._value(name, text) for name, text in match.groupdict().items() if text is not None}
        parameters = {name: given[name] if name in given else self.defaults[name] for name in match.groupdict()}

        def canonical(text: str) -> str:
            return _PLACEHOLDER.sub(lambda placeholder: spell(parameters[placeholder[1]]), text)

        def unless_default(part: re.Match[str]) -> str:
            names = _PLACEHOLDER.findall(part[1])
            return "" if all(parameters[name] == self.defaults[name] for name in names) else canonical(part[1])

        spelt = canonical(_OPTIONAL.sub(unless_default, self.id))
        return EstimatorId(spelt, self.name, self.target, parameters)

    def _value(self, name: str, text: str) -> Value:
        kind = self.parameters[name]
        if not isinstance(kind, str):
            return text
        return float(text) if kind == "float" or "." in text else int(text)


def spell(value: Value) -> str:
    """Return a parameter as ids spell it: no exponent, no zero that says nothing.

    >>> spell(1.0), spell(0.37), spell(10)
    ('1', '0.37', '10')
    """
    text = format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)
    return text.removesuffix(".0")


def add_directory(user_dir: str | Path) -> None:
    """Read the families in `user_dir`/conf/estimator too; one without that folder adds nothing."""
    directory = Path(user_dir).resolve() / "conf" / "estimator"
    if directory not in _directories:
        _directories.append(directory)
        families.cache_clear()


@cache
def families() -> tuple[Family, ...]:
    """Return every family of the search path; raise UserError for a file that is not one."""
    return tuple(_read(file) for directory in _directories for file in sorted(directory.glob("*.yaml")))


def parse(id: str) -> EstimatorId:
    """Return what an id stands for; raise UserError with the near names where no family, or more than one, holds it."""
    found = [parsed for family in families() if (parsed := family.parse(id))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"estimator {id!r} is of two families, {found[0].family!r} and {found[1].family!r}: rename one")
    raise UserError(f"unknown estimator {id!r}{near(id, [name for family in families() for name in family.examples])}")


def declares(id: str) -> str:
    """Return what the family of an id declares of it, the one of two cases that the id is.

    >>> declares("ovis-gamma0"), declares("ovis-gamma0.5")
    ('unbiased', 'grad L + gamma beta E[sum_k v_k h_k]')
    """
    parsed = parse(id)
    text = _family(parsed).declares
    cases = _CASES.fullmatch(text)
    if cases is None or cases["name"] not in parsed.parameters:
        return text
    return cases["case" if spell(parsed.parameters[cases["name"]]) == cases["value"] else "otherwise"]


def objective(id: str) -> str:
    """Return the objective of q that an id estimates a gradient of, in a word or two."""
    return _family(parse(id)).objective


def _family(parsed: EstimatorId) -> Family:
    return next(family for family in families() if family.name == parsed.family)


def _read(file: Path) -> Family:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.keys() - _OPTIONAL_KEYS != _KEYS.keys():
        raise UserError(
            f"{file}: expected exactly the keys {', '.join(_KEYS)}, and perhaps {', '.join(_OPTIONAL_KEYS)}"
        )
    for key, kind in (_KEYS | _OPTIONAL_KEYS).items():
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"{file}: {key} = {content[key]!r}, expected a {kind.__name__}")
    placeholders = _PLACEHOLDER.findall(content["id"])
    if sorted(placeholders) != sorted(content["parameters"]):
        raise UserError(f"{file}: `parameters` must give the type of each of {placeholders} in `id`, and no other")
    for name, kind in content["parameters"].items():
        is_words = isinstance(kind, list) and all(isinstance(word, str) for word in kind)
        if not is_words and kind not in list(_NUMBERS):
            raise UserError(f"{file}: parameter {name!r} has type {kind!r}{near(str(kind), _NUMBERS)}")
    optional = [_PLACEHOLDER.findall(part) for part in _OPTIONAL.findall(content["id"])]
    names = [name for part in optional for name in part]
    if not all(optional) or sorted(names) != sorted(content.get("defaults", {})):
        raise UserError(
            f"{file}: `defaults` must give the value of each of {names} in the [parts] of `id`, and no other"
        )
    for name, value in content.get("defaults", {}).items():
        kind = content["parameters"][name]
        if value not in kind if isinstance(kind, list) else not isinstance(value, int | float):
            raise UserError(f"{file}: the default {value!r} of {name!r} is not of its type, {kind!r}")
    family = Family(file=file, **{**content, "examples": tuple(content["examples"])})
    for example in family.examples:
        if family.parse(example) is None:
            raise UserError(f"{file}: the example {example!r} is not of the form {family.id!r}")
    return family
