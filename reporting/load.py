"""Read an experiment's folder, `<root>/<experiment>`, as it lies on the disk; nothing is ever written to it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from errors import UserError, near
from estimators import registry
from orchestration.run_directory import ExperimentFolder, RunDirectory

GROUPS = ("task", "model", "dataset", "estimator", "optimizer", "analysis")
SOURCE = Path(__file__).resolve().parents[1]
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What reading a damaged file raises: JSON that is nested too deeply a RecursionError, an integer that is too large an
# OverflowError (which is an ArithmeticError).
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError)


class Job(NamedTuple):
    """One run of the experiment: a job's queue entry, its run directory, or both.

    `config` is flat: the group names hold the choices (`estimator`: "reinforce"), dotted paths the values
    (`estimator.iw`: 5). A job that has not started has only its overrides there, as text. A job that compares
    estimators counts as one run for each of them; `job` is then its id, and `id` is `<job>@<estimator>`.
    """

    id: str
    state: str
    config: dict[str, Any]
    error: str = ""
    started: bool = False
    job: str = ""

    @property
    def origin(self) -> str:
        """The id of the job that this run is of."""
        return self.job or self.id


@dataclass
class Study:
    """What is known of an experiment.

    source: the file that `report`, its section, comes from. values: a row for each recorded value, with the columns id,
    step, split, name, value. warnings: a line for each thing that could not be read. folder: where the jobs are.
    """

    name: str
    folder: ExperimentFolder
    source: str = ""
    description: str = ""
    report: dict[str, Any] | None = None
    jobs: list[Job] = field(default_factory=list)
    values: pd.DataFrame = field(default_factory=lambda: join({}))
    warnings: list[str] = field(default_factory=list)


def load(name: str, root: Path, user_dir: Path | None = None) -> Study:
    """Read the experiment `name`: its file, its queue and the run directory of each job.

    A file that is missing or cut costs its job, or the rows that it lost, and is named in the study's warnings.

    Raises:
        UserError: there is no such experiment, neither under `root` nor among the experiment files.
    """
    if user_dir:
        registry.add_directory(user_dir)
    files = {path.stem: path for folder in experiment_folders(user_dir) for path in sorted(folder.glob("*.yaml"))}
    folder = ExperimentFolder(root, name)
    if name not in files and not (_is_plain(name) and folder.path.is_dir()):
        ran = [path.name for path in root.glob("*/") if ExperimentFolder(root, path.name).jobs.is_dir()]
        raise UserError(f"unknown experiment {name!r} in {root} and experiments{near(name, [*files, *ran])}")
    study = Study(name, folder)
    _read_experiment(study, folder.record, files.get(name))
    _read_jobs(study, folder)
    return study


def experiment_folders(user_dir: Path | None) -> list[Path]:
    """Where experiment files are looked for; a later folder wins."""
    return [SOURCE / "experiments", *([user_dir / "experiments"] if user_dir else [])]


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def _read_experiment(study: Study, record: Path, file: Path | None) -> None:
    """Take description and report from the experiment's file as it is now; where it is gone, from the stored copy."""
    if file is not None:
        try:
            _read_experiment_text(study, file, file.read_text(encoding="utf-8"))
        except DAMAGE as error:
            raise UserError(f"{file}: cannot be read: {_first_line(error)}") from None
    elif record.exists():
        try:
            _read_experiment_text(study, record, json.loads(record.read_bytes())["file"])
        except DAMAGE as error:
            study.warnings.append(f"{record}: cannot be read ({_first_line(error)}); using the defaults")


def _read_experiment_text(study: Study, source: Path, text: str) -> None:
    content = yaml.load(text, Loader)
    if not isinstance(content, dict):
        raise ValueError("not a mapping")
    study.source, study.report = str(source), content.get("report")
    study.description = str(content.get("description") or "")


def _read_jobs(study: Study, folder: ExperimentFolder) -> None:
    queue = _read_queue(study, folder.queue)
    tables: dict[str, Columns] = {}
    started = {}
    for id in sorted(path.name for path in folder.jobs.glob("[!.]*/")):
        started[id] = job = _read_run(study, folder.job(id), queue.get(id, {}).get("state"))
        if job.config:
            tables |= _by_run(job, _read_metrics(study, folder.job(id), job.state))
    waiting = {
        id: Job(id, _text(entry.get("state")) or "unknown", _overrides(entry))
        for id, entry in queue.items()
        if id not in started
    }
    lost = (job.id for job in waiting.values() if job.state in ("done", "failed"))
    study.warnings += [f"job {id}: its folder is missing" for id in lost]
    everything = {**started, **waiting}
    ids = [*queue, *(id for id in started if id not in queue)]
    study.jobs = [run for id in ids for run in runs_of(everything[id])]
    study.values = _without_infinities(study, join(tables))


def _read_queue(study: Study, path: Path) -> dict[str, dict[str, Any]]:
    """Return the queue's entries by job id; the file is a TinyDB, read as the JSON that it is."""
    try:
        entries = json.loads(path.read_bytes())["jobs"].values()
        return {str(entry["id"]): entry for entry in entries}
    except FileNotFoundError:
        return {}
    except DAMAGE as error:
        study.warnings.append(f"{path}: cannot be read ({_first_line(error)}); jobs not yet started are unknown")
        return {}


def _overrides(entry: dict[str, Any]) -> dict[str, Any]:
    overrides = entry.get("overrides")
    texts = filter(None, map(_text, overrides)) if isinstance(overrides, list) else ()
    pairs = (text.partition("=") for text in texts)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _read_run(study: Study, run: RunDirectory, queued: str | None) -> Job:
    """Read a run directory's configuration and status; without a configuration none of its values can be shown."""
    status: dict[str, Any] = {}
    try:
        status = dict(json.loads(run.status.read_bytes()))
    except DAMAGE as error:
        _warn(study, run.status, error)
    recorded = status.get("state")
    # The worker's own word that it is done comes before the manager's entry, which lags when a manager dies.
    state = "done" if "done" in (recorded, queued) else _text(queued) or _text(recorded) or "unknown"
    try:
        config = flatten(yaml.load(run.config.read_bytes(), Loader))
    except DAMAGE as error:
        _warn(study, run.config, error, "; left out")
        config = {}
    return Job(run.path.name, state, config, _text(status.get("error")), started=True)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def flatten(config: Any) -> dict[str, Any]:
    """Lay a resolved configuration flat: its choices under the groups' names, every other value under its path.

    Raises:
        ValueError: it is no configuration of a job, or only the beginning of one.
    """
    if not isinstance(config, dict) or not isinstance(config.get("choices"), dict) or "seed" not in config:
        raise ValueError("cut or empty: no choices, or no seed")
    flat = dict(config["choices"])

    def visit(prefix: str, mapping: dict[str, Any]) -> None:
        for key, value in mapping.items():
            if isinstance(value, dict):
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value if not isinstance(value, list) else ",".join(map(str, value))

    visit("", {key: value for key, value in config.items() if key != "choices"})
    return flat


Columns = tuple[Sequence[int] | np.ndarray, list[str], list[str], Sequence[float] | np.ndarray]


def runs_of(job: Job) -> list[Job]:
    """Return the runs that a job counts as: itself, or one for each estimator that it compares, its own first."""
    compared = _compared(job)
    if not compared:
        return [job]
    alone = {**job.config, "task.compare": ""}
    configs = {_own(job): alone} | {id: {**alone, "estimator": id, "estimator.id": id} for id in compared}
    return [
        job._replace(id=f"{job.id}@{estimator}", config=config, job=job.id) for estimator, config in configs.items()
    ]


def _own(job: Job) -> str:
    return canonical(str(job.config.get("estimator.id") or job.config.get("estimator")))


def _compared(job: Job) -> list[str]:
    """Return the estimators that a job measures beside its own."""
    texts = str(job.config.get("task.compare") or "").split(",") if job.started and job.config else []
    ids = dict.fromkeys(canonical(text.strip()) for text in texts if text.strip())
    return [id for id in ids if id != _own(job)]


def canonical(estimator: str) -> str:
    """Return an estimator's id in its canonical spelling; one that no family here holds stays as it is."""
    try:
        return registry.parse(estimator).id
    except UserError:
        return estimator


def _by_run(job: Job, columns: Columns) -> dict[str, Columns]:
    """Part a job's rows by its runs: the name of a compared estimator's metric begins with its id."""
    compared = _compared(job)
    if not compared:
        return {job.id: columns}
    parts = [name.partition("/") for name in columns[2]]
    found: dict[str, Columns] = {}
    for run in runs_of(job):
        estimator = str(run.config["estimator.id"]) if run.config.get("estimator.id") in compared else ""
        mine: list[int] = [i for i, part in enumerate(parts) if (part[0] if part[0] in compared else "") == estimator]
        names = [columns[2][i].removeprefix(f"{estimator}/") for i in mine]
        found[run.id] = (
            np.asarray(columns[0])[mine],
            [columns[1][i] for i in mine],
            names,
            np.asarray(columns[3])[mine],
        )
    return found


def _read_metrics(study: Study, run: RunDirectory, state: str) -> Columns:
    """Return the columns step, split, name, value; lines that are no row are left out and counted."""
    try:
        lines = [line for line in run.metrics.read_bytes().split(b"\n") if line.strip()]
    except OSError as error:
        if state == "done" or not isinstance(error, FileNotFoundError):
            _warn(study, run.metrics, error)
        return [], [], [], []
    try:
        # One call for the whole file: four times as fast as one for each line.
        columns = _columns(json.loads(b"[" + b",".join(lines) + b"]"))
    except DAMAGE:
        rows = [row for line in lines if (row := _row(line))]
        columns = _columns(rows)
        cut = len(lines) - len(rows)
        _warn(study, run.metrics, f"{cut} of {len(lines)} lines cut or no metric", "; left out")
    if not lines and state == "done":
        _warn(study, run.metrics, "empty")
    return columns


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        _columns([row])
    except DAMAGE:
        return None
    return row


def _columns(rows: list[dict[str, Any]]) -> Columns:
    steps, splits, names, values = columns = [[row[key] for row in rows] for key in ("step", "split", "name", "value")]
    if not all(map(_has_type, columns, (int, str, str, int | float))):
        raise TypeError("a step, split, name or value of another type")
    return np.array(steps, np.int64), splits, names, np.array(values, np.float64)


def _has_type(values: list[Any], kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def join(tables: Mapping[str, Columns]) -> pd.DataFrame:
    """Stack the runs' columns into one table: id, step, split, name, value; the last row of a step counts."""
    ids = list(tables)
    runs = np.repeat(np.arange(len(ids)), [len(columns[0]) for columns in tables.values()])
    steps, splits, names, values = ([columns[i] for columns in tables.values()] for i in range(4))
    frame = pd.DataFrame(
        {
            "id": pd.Categorical.from_codes(runs, categories=pd.Index(ids, dtype=str)),
            "step": np.concatenate([np.array([], np.int64), *steps]),
            "split": pd.Categorical(list(chain(*splits))),
            "name": pd.Categorical(list(chain(*names))),
            "value": np.concatenate([np.array([], np.float64), *values]),
        }
    )
    frame = frame.drop_duplicates(["id", "step", "split", "name"], keep="last")
    return frame.sort_values("step", kind="stable", ignore_index=True)


def _without_infinities(study: Study, values: pd.DataFrame) -> pd.DataFrame:
    finite = np.isfinite(values["value"])
    for (job, name), count in values[~finite].groupby(["id", "name"], observed=True).size().items():
        study.warnings.append(f"job {job}: {name}: {count} values are not finite; left out")
    return values[finite].reset_index(drop=True)


def _warn(study: Study, file: Path, problem: Exception | str, consequence: str = "") -> None:
    text = "missing" if isinstance(problem, FileNotFoundError) else _first_line(problem)
    study.warnings.append(f"job {file.parent.name}: {file.name}: {text}{consequence}")


def _first_line(problem: Exception | str) -> str:
    return " ".join(str(problem).split())[:160] or type(problem).__name__


def distinct(runs: Iterable[Job]) -> list[Job]:
    """Return the jobs that some runs are of, each once and under its own id."""
    return list({run.origin: run._replace(id=run.origin) for run in runs}.values())


def states(jobs: Iterable[Job]) -> dict[str, int]:
    """Count the jobs in each state, the finished ones first; the runs of one job count once."""
    counts: dict[str, int] = {}
    for job in distinct(jobs):
        counts[job.state] = counts.get(job.state, 0) + 1
    order = ["done", "running", "queued", "failed", "aborted"]
    return dict(sorted(counts.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
