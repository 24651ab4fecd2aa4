"""From overrides to a job.

Hydra composes once for each choice of groups (0.1 s). The other overrides are then laid, checked, on a flat dictionary
of dotted keys, in microseconds, so that thousands of jobs are made in seconds. It follows that the groups are chosen
first wherever they stand among the overrides: a value applies to the final choice, and is refused where that has no
such key. Of two overrides of one key the later wins.

An estimator is not composed: `estimator=ID` sets `estimator.id`, which `estimators.registry` parses, as it parses the
list of others that `task.compare` adds to it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import UserError, near
from estimators import registry
from orchestration.job import Job, job_id
from orchestration.schema import GROUPS, TARGETS, Rule, rules, rules_of

CONF = Path(__file__).resolve().parents[1] / "conf"
DECLARED = dict(rules())
COMPARED = "task.compare"
MOST_VALUES = 100_000  # of one sweep: what has more is a slip, as range(1,inf), and would fill the memory
_REFERENCE = re.compile(r"\$\{(\w[\w.]*)\}")
_PLAIN_TEXT = re.compile(r"(?!(?:null|true|false|inf|nan)$)[a-z_][a-z0-9_.-]*", re.IGNORECASE | re.ASCII)


class OverrideError(UserError):
    """A mistake in one override; `key` says in which."""

    def __init__(self, key: str, value: Any, problem: str):
        super().__init__(f"{shown(f'{key}={spell(value)}')}: {problem}")
        self.key = key


class Assignment(NamedTuple):
    """A parsed override: a key, and its value or the values of its sweep."""

    key: str
    values: tuple[Any, ...]
    is_sweep: bool


@dataclass(frozen=True)
class Composition:
    """What a choice of groups yields: its flat defaults, with interpolations as they stand, and its keys' rules."""

    choices: dict[str, str | None]
    defaults: dict[str, Any]
    rules: dict[str, Rule]
    references: list[str]  # the keys that take their value from other keys


def compose(overrides: Sequence[str], user_dir: Path | None = None) -> Job:
    """Return the job that Hydra overrides (`model=gmm`, `estimator.iw=20`) ask for.

    Raises UserError for a misspelt key or choice, for a value of a wrong type or out of range, and for a sweep.
    """
    values = {}
    for override in overrides:
        assignment = parse_override(override)
        if assignment.is_sweep:
            raise UserError(f"{shown(override)}: one job takes one value a key, not a sweep (a list is written [a,b])")
        values[assignment.key] = assignment.values[0]
    return compose_values(values, user_dir)


def compose_values(values: Mapping[str, Any], user_dir: Path | None = None) -> Job:
    """Return the job of parsed overrides, a mapping of groups to choices and of dotted keys to values."""
    composition = composition_of(values, user_dir)
    defaults = composition.defaults
    laid = {key: _checked(key, value, composition) for key, value in values.items() if key not in GROUPS}
    config = _resolved({**defaults, **laid}, composition)
    for key in composition.references:
        rest = {name: value for name, value in laid.items() if name != key}
        if _resolved({**defaults, **rest}, composition) == config:
            laid = rest
    differing = {key: laid[key] for key in sorted(laid) if laid[key] != defaults[key]}
    choices = composition.choices
    chosen = [f"{group}={choices[group]}" for group in GROUPS if group in values]
    nested = {"choices": dict(choices), **_nested(config)}
    return Job(
        id=job_id(choices, differing, nested),
        overrides=chosen + [f"{key}={spell(value)}" for key, value in differing.items()],
        choices=dict(choices),
        config=nested,
    )


def composition_of(values: Mapping[str, Any], user_dir: Path | None = None) -> Composition:
    """Return the composition of the groups that `values` chooses; raise UserError for a choice that does not exist."""
    chosen = {group: values[group] for group in GROUPS if group in values}
    names = ((group, name if isinstance(name, str) else spell(name)) for group, name in chosen.items())
    return _composition(CONF, user_dir, tuple(names))


@lru_cache(maxsize=100_000)
def parse_override(override: str) -> Assignment:
    """Parse `key=value`, the value being in Hydra's grammar, sweeps (`1,2`, `choice(a,b)`, `range(1,11)`) included."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        if parsed.type is not OverrideType.CHANGE or parsed.package is not None:
            raise UserError(
                f"{shown(override)}: adding (+), deleting (~) and packages (@) are not supported: give key=value"
            )
        key, is_sweep = parsed.key_or_group, parsed.is_sweep_override()
        if not is_sweep:
            values = [parsed.value()]
        elif parsed.is_interval_sweep() or getattr(parsed.value(), "shuffle", True):
            raise UserError(
                f"{shown(override)}: of sweeps only a,b,c and choice(a,b) and range(1,11) can be enumerated"
            )
        else:
            values = [_unquoted(value) for value in islice(parsed.sweep_iterator(), MOST_VALUES + 1)]
    except (HydraException, ValueError, ArithmeticError, RecursionError):
        raise UserError(
            f"{shown(override)}: expected key=value in Hydra's grammar (a text with special characters is quoted: "
            "key=\"'a=b'\")"
        ) from None
    if not values:
        raise UserError(f"{shown(override)}: the sweep is empty")
    if len(values) > MOST_VALUES:
        raise UserError(f"{shown(override)}: the sweep has more than {MOST_VALUES:,} values")
    return Assignment(key, tuple(values), is_sweep)


@cache
def _composition(conf: Path, user_dir: Path | None, chosen: tuple[tuple[str, str], ...]) -> Composition:
    """Return the composition with its estimator, whose id is in its canonical spelling."""
    for group, choice in chosen:
        if group != "estimator":
            names = _options(conf, user_dir, group)
            if choice not in names:
                raise OverrideError(group, choice, f"unknown {group}{near(choice, names)}")
    composed = _hydra_composition(conf, user_dir, tuple(item for item in chosen if item[0] != "estimator"))
    if user_dir is not None:
        registry.add_directory(user_dir)
    given = dict(chosen).get("estimator", composed.defaults["estimator.id"])
    try:
        estimator = registry.parse(given).id
    except UserError as error:
        raise OverrideError("estimator", given, str(error)) from None
    return replace(
        composed,
        choices={group: estimator if group == "estimator" else composed.choices[group] for group in GROUPS},
        defaults={**composed.defaults, "estimator.id": estimator},
    )


@cache
def _hydra_composition(conf: Path, user_dir: Path | None, chosen: tuple[tuple[str, str], ...]) -> Composition:
    """Let Hydra compose a choice of groups, and check what the files say."""
    overrides = [f"{group}={spell(choice)}" for group, choice in chosen]
    if user_dir is not None and (user_dir / "conf").is_dir():
        folder = QuotedString(f"file://{(user_dir / 'conf').resolve()}", Quote.single).with_quotes()
        overrides.append(f"hydra.searchpath=[{folder}]")
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            composed = hydra_compose("config", overrides, return_hydra_config=True)
        choices = composed.hydra.runtime.choices
        OmegaConf.set_readonly(composed, False)
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        defaults = _flat(OmegaConf.to_container(composed, throw_on_missing=True))
        values = _flat(OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"the configuration cannot be composed: {' '.join(str(error).split())}") from None
    choices = {group: choices.get(group) for group in GROUPS}
    if choices["model"] is not None and choices["dataset"] is None:
        raise UserError(
            f"model={choices['model']} names no data set: give dataset=NAME, or let the file's defaults list say "
            "`override /dataset@_global_.dataset: NAME`"
        )
    declared = {key: rule for key, rule in DECLARED.items() if key.partition(".")[0] in composed}
    for section in TARGETS:
        declared |= rules_of(section, str(values.get(f"{section}.target")))
    for key, rule in declared.items():
        value = _declared_value(key, rule, values, choices)
        if not _is_interpolated(defaults[key]):
            defaults[key] = value
    return Composition(
        choices,
        defaults,
        rules={key: declared.get(key) or Rule.of_default(value) for key, value in values.items()},
        references=sorted(key for key, value in defaults.items() if _is_interpolated(value)),
    )


def _declared_value(key: str, rule: Rule, values: Mapping[str, Any], choices: Mapping[str, str | None]) -> Any:
    """Return what the files give to a declared key, in its type."""
    section = key.partition(".")[0]
    file = f"{section}/{choices[section]}.yaml" if choices.get(section) else "config.yaml"
    if key not in values:
        raise UserError(f"conf/{file}: the key {key} is missing")
    try:
        return rule.check(values[key])
    except ValueError:
        raise UserError(f"conf/{file}: {key}={spell(values[key])}: expected {rule}") from None


def _options(conf: Path, user_dir: Path | None, group: str) -> list[str]:
    """Return the names that a group's files offer."""
    folders = [conf / group] + ([user_dir / "conf" / group] if user_dir is not None else [])
    names = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{folders[1] / min(twice)}.yaml: {group} {min(twice)!r} exists already: rename yours")
    return names


def _checked(key: str, value: Any, composition: Composition) -> Any:
    """Return the value in the key's type."""
    rule = composition.rules.get(key)
    if key == "estimator.id":
        raise OverrideError(key, value, "an estimator is chosen by estimator=ID")
    if rule is None:
        raise OverrideError(key, value, _unknown_key(key, [*composition.rules, *GROUPS]))
    try:
        checked = rule.check(value)
    except ValueError:
        raise OverrideError(key, value, f"expected {rule}") from None
    if _is_interpolated(checked):
        raise OverrideError(key, value, "a value refers to no other key: interpolations belong in conf/")
    return _others(key, checked, composition.defaults["estimator.id"]) if key == COMPARED else checked


def _others(key: str, ids: Sequence[Any], own: str) -> list[str]:
    """Return estimators' ids in their canonical spelling, each once and without the job's own."""
    try:
        canonical = [registry.parse(str(id)).id for id in ids]
    except UserError as error:
        raise OverrideError(key, list(ids), str(error)) from None
    return [id for id in dict.fromkeys(canonical) if id != own]


def _unknown_key(key: str, known: Iterable[str]) -> str:
    """Say what may have been meant: the same last part elsewhere, a key of that section, or a section."""
    known = list(known)
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"this is a section; choose from {', '.join(inside)}"
    section, _, last = key.rpartition(".")
    namesakes = [name for name in known if name.rpartition(".")[2] == last]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    sections = [name.partition(".")[0] for name in known]
    return f"no such key{near(key, namesakes or siblings or sections)}"


def _resolved(values: dict[str, Any], composition: Composition) -> dict[str, Any]:
    """Return the flat values with every interpolation resolved."""
    pending = [key for key in composition.references if _is_interpolated(values[key])]
    if not pending:
        return values
    values = dict(values)
    for key in pending:
        # `${other.key}` is followed here, since OmegaConf takes milliseconds; it does whatever is less plain.
        while isinstance(values[key], str) and (match := _REFERENCE.fullmatch(values[key])) and match[1] in values:
            values[key] = values[match[1]]
        if _is_interpolated(values[key]):
            return _flat(OmegaConf.to_container(OmegaConf.create(_nested(values)), resolve=True))
    return values


def _is_interpolated(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_interpolated, value))
    return isinstance(value, str) and "${" in value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries under dotted keys; an empty dictionary is a leaf."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    items = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items())
    return {name: leaf for key, value in items for name, leaf in _flat(value, key).items()}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `_flat`; what can change is copied, so that no two jobs share one."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = deepcopy(value) if isinstance(value, list | dict) else value
    return tree


def _unquoted(value: Any) -> Any:
    """Return a value that Hydra parsed as plain Python."""
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    return value.text if isinstance(value, QuotedString) else value


def shown(text: str) -> str:
    """Return a text as a message of one line shows it: as it stands, or quoted where it has control characters."""
    return text if text.isprintable() else repr(text)


def spell(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    if isinstance(value, str) and not _PLAIN_TEXT.fullmatch(value):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
