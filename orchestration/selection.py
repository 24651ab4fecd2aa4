"""Which jobs of a queue are meant: `estimator=ovis-*,estimator.iw>=10,seed=1|2`, read by a grammar of its own.

Terms are separated by commas and must all hold. A key is a configuration key, by its whole name or its last part
(`iw`), a group (`model`), or one of id, state, attempt. `=` and `!=` take `*` and `?` as wildcards and alternatives
after `|`; `<`, `<=`, `>`, `>=` compare numbers. A text in quotes is taken as it stands.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from errors import UserError, near
from estimators import registry
from orchestration.composer import Composer
from orchestration.configuration import shown, spell
from orchestration.job import Job
from orchestration.queue import STATES, Row
from orchestration.run_directory import ExperimentFolder

_TERM = re.compile(r"\s*([\w.]+)\s*(!=|<=|>=|=|<|>)(?!=)\s*(.*?)\s*", re.DOTALL)
_ORDERS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
JOBS_OWN = {"id", "state", "attempt"}  # what can be asked of a job beside its configuration
Values = Mapping[str, Any]  # of one job, under dotted keys


@dataclass(frozen=True)
class Term:
    """One comparison: a key, an operator and the values that it is compared with."""

    key: str
    sign: str
    values: tuple[str, ...]

    def holds(self, values: Values) -> bool:
        """Say whether it holds for a job; one without the key has no value that anything is equal to."""
        if self.sign in _ORDERS:
            number = as_number(values.get(self.key))
            return number is not None and _ORDERS[self.sign](number, float(self.values[0]))
        is_equal = self.key in values and any(equals(values[self.key], wanted) for wanted in self.values)
        return is_equal == (self.sign == "=")


def parse(expression: str, keys: Iterable[str]) -> list[Term]:
    """Parse an expression over these keys; raise UserError, in one line, for what is wrong in it."""
    known = sorted(set(keys))
    return [_term(text, known) for text in _split(expression, ",")]


def _term(text: str, known: Sequence[str]) -> Term:
    found = _TERM.fullmatch(text)
    if not found:
        raise UserError(
            f"--find: {shown(text)!r}: expected KEY=VALUE, or with != < <= > >=; alternatives are written seed=1|2"
        )
    key, sign, value = found.groups()
    key = full_key(key, known, "--find")
    values = tuple(_split(value, "|"))
    if sign in _ORDERS and as_number(value) is None:
        raise UserError(f"--find: {shown(text.strip())!r}: {sign} compares numbers, and {shown(value)!r} is none")
    if key == "state":
        for value in values:
            if not any(equals(state, value) for state in STATES):
                raise UserError(f"--find: the queue knows no state {value!r}{near(value, STATES)}")
    if key in ("estimator", "estimator.id"):
        values = tuple(map(canonical, values))
    return Term(key, sign, values)


def full_key(key: str, known: Sequence[str], where: str) -> str:
    """Return the whole name of a key that may be given by its last part."""
    if key in known:
        return key
    whole = [name for name in known if name.rpartition(".")[2] == key]
    whole = [name for name in whole if name.startswith("estimator.")] or whole
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UserError(f"{where}: {key!r} is the last part of {' and '.join(whole)}: give one of them")
    raise UserError(f"{where}: no job has a key {key!r}{near(key, known)}")


def canonical(estimator: str) -> str:
    """Return an estimator's id in its canonical spelling; what is none, such as a wildcard, as it stands."""
    try:
        return registry.parse(estimator).id
    except UserError:
        return estimator


def equals(value: Any, wanted: str) -> bool:
    """Say whether a value is what was written: the same text or number, or of the form that wildcards describe."""
    quoted = len(wanted) > 1 and wanted[0] == wanted[-1] and wanted[0] in "'\""
    if quoted:
        return value == wanted[1:-1]
    text = value if isinstance(value, str) else spell(value)
    if "*" in wanted or "?" in wanted:
        return fnmatchcase(text, wanted.replace("[", "[[]"))
    number = as_number(value)
    return text == wanted.replace(" ", "") or text == wanted or (number is not None and number == as_number(wanted))


def as_number(value: Any) -> float | None:
    """Return a value, or a text, as the number that it is; None where it is none."""
    if value is None or isinstance(value, bool | list):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _split(text: str, separator: str) -> list[str]:
    """Split a text at a separator that is in no quotes and no brackets; raise UserError where these are not closed."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{(") - (character in ")}]")
        if character == separator and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    if quote or depth:
        raise UserError(f"--find: {shown(text)!r}: a quote or a bracket is not closed, or never opened")
    return parts


def values_of(rows: Sequence[Row], folder: ExperimentFolder, composer: Composer) -> dict[str, Values]:
    """Return each job's configuration under dotted keys, its groups' choices, and its id, state and attempt.

    It is composed from the overrides, as the job's snapshot does it. A job without any, or one that cannot be composed,
    has what its run directory has kept.
    """
    found: dict[str, Values] = {}
    for snapshot in dict.fromkeys(row.snapshot for row in rows):
        own = [row for row in rows if row.snapshot == snapshot]
        try:
            jobs = composer.compose([row.overrides for row in own], snapshot)
        except UserError as error:  # none can be
            jobs = [error] * len(own)
        for row, job in zip(own, jobs, strict=True):
            config = flatten(job) if isinstance(job, Job) and row.overrides else _kept(row, folder)
            found[row.id] = {**config, "id": row.id, "state": row.state, "attempt": row.attempt}
    return found


def _kept(row: Row, folder: ExperimentFolder) -> Values:
    """Return what is known of a job that cannot be composed: its overrides, and what it wrote when it started."""
    given = dict(override.partition("=")[::2] for override in row.overrides)
    try:
        kept = yaml.safe_load(folder.job(row.id).config.read_bytes())
        return {**given, **flatten(Job(row.id, row.overrides, kept["choices"], kept))}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return given  # it has not started


def flatten(job: Job) -> dict[str, Any]:
    """Return a job's configuration under dotted keys, each group's name holding its choice."""
    flat: dict[str, Any] = {}

    def visit(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                visit(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    visit({key: value for key, value in job.config.items() if key != "choices"}, "")
    return {**flat, **{group: choice for group, choice in job.choices.items() if choice is not None}}
