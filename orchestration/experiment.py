"""Experiment files, and the jobs that they stand for.

    description: Which estimator, at which K?
    base: [model=gmm, steps=5000]             # overrides of every job
    variants:                                 # lists of overrides, one alternative each
      - [estimator=ovis-gamma1]
      - [estimator=ovis-gamma1, estimator.alpha=0.5]
    grid:                                     # every combination: Hydra's sweep grammar, or a list
      seed: range(1,11)
      estimator.iw: [2, 5, 10]
    exclude:                                  # combinations to drop
      - [estimator.alpha=0.5, estimator.iw=2]
    report: {keys: [estimator, iw]}           # report.py's options

A later layer wins: base, variant, grid, command line, where a value or a sweep replaces that key's axis.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import UserError, near
from orchestration.configuration import OverrideError, compose_values, composition_of, parse_override, shown
from orchestration.job import Job
from orchestration.schema import GROUPS

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
MOST_COMBINATIONS = 1_000_000
SINGLE = "single"  # the folder below the root where run.py keeps its jobs

Values = dict[str, Any]
Axes = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Experiment:
    """A parsed experiment file: the values of each layer, in the order of the file."""

    name: str
    text: str
    where: str
    user_dir: Path | None
    description: str = ""
    base: Values = field(default_factory=dict)
    variants: list[Values] = field(default_factory=lambda: [{}])
    grid: Axes = field(default_factory=dict)
    exclude: list[Axes] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


class Difference(NamedTuple):
    """What a changed experiment adds to the jobs that are known, and the ids that it no longer holds."""

    added: list[Job]
    removed: list[str]


def load(name: str, user_dir: Path | None = None) -> Experiment:
    """Read `experiments/<name>.yaml`, of the source or of `user_dir`; raise UserError where there is none, or two."""
    folders = [EXPERIMENTS] + ([user_dir / "experiments"] if user_dir is not None else [])
    files = [file for folder in folders for file in sorted(folder.glob("*.yaml"))]
    found = [file for file in files if file.stem == name]
    if not found:
        raise UserError(f"no experiment {name!r}{near(name, [file.stem for file in files])}")
    if name == SINGLE:
        raise UserError(f"{found[0]}: the name {name!r} is taken by run.py's jobs: rename yours")
    if len(found) > 1:
        raise UserError(f"{found[1]}: an experiment {name!r} exists already: rename yours")
    try:
        text = found[0].read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{found[0]}: not YAML: expected UTF-8 text") from None
    return parse(name, text, str(found[0]), user_dir)


def parse(name: str, text: str, where: str, user_dir: Path | None = None) -> Experiment:
    """Parse an experiment's text; raise UserError, beginning with `where`, for what is wrong in it."""
    try:
        # OmegaConf asserts where the whole is a scalar.
        is_mapping = isinstance(yaml.compose(text, yaml.SafeLoader), yaml.MappingNode)
        content = OmegaConf.to_container(OmegaConf.create(text)) if is_mapping else None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{where}: not an experiment: it contains itself, or is nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{where}: not an experiment: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where}: expected a mapping with the keys {', '.join(_SECTIONS)}")
    sections = {}
    for key, value in ((str(key), value) for key, value in content.items()):
        if key not in _SECTIONS:
            raise UserError(f"{where}: unknown key {key!r}{near(key, _SECTIONS)}")
        try:
            sections[key] = _SECTIONS[key](value)
        except UserError as error:
            raise UserError(f"{where}: {key}: {error}") from None
    return Experiment(name, text, where, user_dir, **sections)


def expand(experiment: Experiment, overrides: Sequence[str] = ()) -> list[Job]:
    """Return the jobs of an experiment under the command line's overrides, in order, each once.

    The last key of the grid turns fastest. Raises UserError for a wrong override, and where no job is left.
    """
    command = _axes(overrides)
    axes = {**experiment.grid, **command}
    _refuse_excess([axes] * len(experiment.variants), f"{experiment.where}: the grid")
    _refuse_excess(experiment.exclude, f"{experiment.where}: exclude")
    jobs: dict[str, Job] = {}
    try:
        for variant in experiment.variants:
            for values in _combinations({**experiment.base, **variant}, axes):
                job = compose_values(values, experiment.user_dir)
                if job.id not in jobs and not _is_excluded(job, values, experiment):
                    jobs[job.id] = job
    except OverrideError as error:
        if error.key in command:
            raise
        raise UserError(f"{experiment.where}: {error}") from None
    if not jobs:
        raise UserError(f"{experiment.where}: exclude drops every job")
    return list(jobs.values())


def difference(known: Iterable[str], jobs: Sequence[Job]) -> Difference:
    """Compare the ids of the jobs that an experiment had with the jobs that it has now."""
    before, now = dict.fromkeys(known), {job.id for job in jobs}
    return Difference([job for job in jobs if job.id not in before], [id for id in before if id not in now])


def _refuse_excess(grids: Iterable[Axes], what: str) -> None:
    """Refuse grids of so many combinations that they would never end, before the first is made."""
    total = sum(math.prod(map(len, axes.values())) for axes in grids)
    if total > MOST_COMBINATIONS:
        raise UserError(f"{what} has {total:,} combinations: expected at most {MOST_COMBINATIONS:,}")


def _combinations(fixed: Values, axes: Axes) -> Iterator[Values]:
    """Yield every point of the grid, over the fixed values."""
    for point in itertools.product(*axes.values()):
        yield {**fixed, **dict(zip(axes, point, strict=True))}


def _is_excluded(job: Job, values: Values, experiment: Experiment) -> bool:
    """Say whether one of the excluded combinations, laid over the job, would change nothing."""
    for axes in experiment.exclude:
        for combination in _combinations({}, axes):
            groups = {group: choice for group, choice in combination.items() if group in GROUPS}
            if composition_of({**values, **groups}, experiment.user_dir).choices != job.choices:
                continue
            if compose_values({**values, **combination}, experiment.user_dir).config == job.config:
                return True
    return False


def _axes(overrides: Iterable[str]) -> Axes:
    """Return the values of each override; of two of one key the later counts."""
    return {assignment.key: assignment.values for assignment in map(parse_override, overrides)}


def _read_description(content: Any) -> str:
    if not isinstance(content, str):
        raise UserError(f"expected a text, not {content!r}")
    return content


def _read_axes(content: Any) -> Axes:
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise UserError(f"expected a list of overrides such as [model=gmm, seed=1], not {content!r}")
    return _axes(content)


def _read_values(content: Any) -> Values:
    axes = _read_axes(content)
    for key, values in axes.items():
        if len(values) > 1:
            raise UserError(f"{shown(key)}: expected one value, not {len(values)}: a sweep belongs in the grid")
    return {key: values[0] for key, values in axes.items()}


def _read_each(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def read_list(content: Any) -> list[Any]:
        if not isinstance(content, list) or not content:
            raise UserError(f"expected lists of overrides, such as [[seed=1], [seed=2]], not {content!r}")
        return [read(item) for item in content]

    return read_list


def _read_grid(content: Any) -> Axes:
    if not isinstance(content, dict) or not content:
        raise UserError(f"expected a mapping of keys to values, not {content!r}")
    return {str(key): _read_axis(str(key), values) for key, values in content.items()}


def _read_axis(key: str, content: Any) -> tuple[Any, ...]:
    items = content if isinstance(content, list) else [content]
    if not items or any(isinstance(item, dict) for item in items):
        raise UserError(f"{shown(key)}: expected values, as [1, 2, 3] or 1,2,3 or range(1,4), not {content!r}")
    # A text is in Hydra's grammar inside a list too.
    parsed = [parse_override(f"{key}={item}").values if isinstance(item, str) else (item,) for item in items]
    return tuple(itertools.chain(*parsed))


def _read_report(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"expected a mapping of report.py's options, not {content!r}")
    return content


_SECTIONS: Mapping[str, Callable[[Any], Any]] = {
    "description": _read_description,
    "base": _read_values,
    "variants": _read_each(_read_values),
    "grid": _read_grid,
    "exclude": _read_each(_read_axes),
    "report": _read_report,
}
