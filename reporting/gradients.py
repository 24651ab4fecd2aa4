"""What only gradients.npz has: the replicates of single gradients, and the statistics of single parameters.

A run directory of the task gradient_study holds one such file for all estimators of its job. Its arrays: `names` [P],
and for each estimator id E `E/mean`, `E/mean_se`, `E/variance`, `E/variance_se`, `E/snr`, `E/snr_se` [P], `E/oracle`
[P] where the true gradient is known, `E/replicates` [R, P'], gradients of the first P' <= P parameters.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from errors import UserError, near
from orchestration.run_directory import ExperimentFolder
from reporting import aggregate
from reporting.load import DAMAGE, Job, canonical

# What a cut or damaged archive raises beside what any damaged file does.
BROKEN = (*DAMAGE, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
T = TypeVar("T")
INDIVIDUAL = ("snr", "variance")
SIGN_Z = 2.0  # standard errors from zero at which a mean is held to have a sign


class GradientsFile:
    """One gradients.npz, of which only the arrays that are asked for are read."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__; np.load leaves a broken archive open)
        try:
            self._archive = np.load(self._file, allow_pickle=False)
            if not isinstance(self._archive, np.lib.npyio.NpzFile):
                raise ValueError("no archive of arrays")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "GradientsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()
        self._file.close()

    def names(self) -> list[str]:
        """Return the labels of the parameters."""
        return [str(name) for name in self._archive["names"]]

    def get(self, estimator: str, quantity: str, dimensions: int = 1) -> np.ndarray:
        """Return an array of an estimator. Raises KeyError where there is none, ValueError for one of another shape."""
        array = np.asarray(self._archive[f"{estimator}/{quantity}"], np.float64)
        if array.ndim != dimensions:
            raise ValueError(f"{estimator}/{quantity} has {array.ndim} dimensions, expected {dimensions}")
        return array

    def has(self, estimator: str, quantity: str) -> bool:
        """Return whether there is such an array."""
        return f"{estimator}/{quantity}" in self._archive.files


def _each(
    jobs: Iterable[Job], folder: ExperimentFolder, read: Callable[[GradientsFile, str], T], warnings: list[str]
) -> dict[str, T]:
    """Return what `read` makes of each run's file and estimator; what is missing or broken is named and left out."""
    found = {}
    for job in jobs:
        path = folder.job(job.origin).gradients
        estimator = canonical(str(job.config.get("estimator.id") or job.config.get("estimator")))
        try:
            with GradientsFile(path) as file:
                found[job.id] = read(file, estimator)
        except BROKEN as error:
            text = "missing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:160]
            warnings.append(f"job {job.origin}: {path.name}: {text or type(error).__name__}; {estimator} not drawn")
    return found


def individual(
    jobs: Sequence[Job], runs: pd.DataFrame, keys: Sequence[str], which: int | Sequence[str], folder: ExperimentFolder
) -> tuple[pd.DataFrame, list[str]]:
    """Return SNR and variance of single parameters in each cell, and warnings.

    The table has the columns of `aggregate.summarise` for each combination of the keys, metric (snr, variance) and
    parameter; a single run's interval is that of the measurement, mean -+ 1.96 se. `which`: parameters' names, or how
    many, spread evenly over all.

    Raises:
        UserError: a name that no file has.
    """
    warnings: list[str] = []

    def read(file: GradientsFile, estimator: str) -> list[tuple[str, str, float, float]]:
        names = file.names()
        return [
            (metric, *row)
            for metric in INDIVIDUAL
            for row in zip(names, file.get(estimator, metric), file.get(estimator, f"{metric}_se"), strict=True)
        ]

    found = _each(jobs, folder, read, warnings)
    rows = [(id, *row) for id, part in found.items() for row in part]
    known = dict.fromkeys(name for _, _, name, _, _ in rows)
    wanted = _spread(list(known), which) if isinstance(which, int) else list(which)
    for name in wanted:
        if known and name not in known:
            raise UserError(f"draw_individual: no run has a parameter {name!r}{near(name, known)}")
    table = pd.DataFrame(rows, columns=["id", "metric", "parameter", "value", "own"])
    table = table[table["parameter"].isin(wanted) & np.isfinite(table["value"])]
    table["parameter"] = pd.Categorical(table["parameter"], categories=wanted)
    table["metric"] = pd.Categorical(table["metric"], categories=INDIVIDUAL)
    table = aggregate.with_keys(table, runs, keys)
    by = [*keys, "metric", "parameter"]
    means = aggregate.summarise(table, by)
    return aggregate.with_own_errors(means, table.drop(columns="value").rename(columns={"own": "value"}), by), warnings


def _spread(names: Sequence[str], count: int) -> list[str]:
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, min(count, len(names)))]


def distribution(
    jobs: Sequence[Job], runs: pd.DataFrame, keys: Sequence[str], folder: ExperimentFolder
) -> tuple[pd.DataFrame, list[str]]:
    """Return the single gradients of each run in units of the true one, with its keys, and warnings.

    Columns: the keys, and `ratios`: an array of g_i / G_i over replicates and parameters i, where G is the oracle, or
    without one the mean over all replicates. Above zero the sign is right. Left out are parameters whose G_i is zero,
    or a mean within two standard errors of zero: these have no sign to be right about; their number is `unsigned`, of
    `parameters`. `oracle` says whether G is one.
    """
    warnings: list[str] = []

    def read(file: GradientsFile, estimator: str) -> dict[str, Any]:
        replicates = file.get(estimator, "replicates", dimensions=2)
        exact = file.has(estimator, "oracle")
        truth = file.get(estimator, "oracle" if exact else "mean")
        least = 0 if exact else SIGN_Z * file.get(estimator, "mean_se")
        signed = (np.abs(truth) > least)[: replicates.shape[1]]
        ratios = (replicates[:, signed] / truth[: replicates.shape[1]][signed]).ravel()
        kept = ratios[np.isfinite(ratios)]
        return {"ratios": kept, "unsigned": int((~signed).sum()), "parameters": len(signed), "oracle": exact}

    found = _each(jobs, folder, read, warnings)
    columns = ["id", "ratios", "unsigned", "parameters", "oracle"]
    table = pd.DataFrame([{"id": id, **row} for id, row in found.items()], columns=columns)
    return aggregate.with_keys(table, runs, keys), warnings


def divided_by(table: pd.DataFrame) -> str:
    """Say which gradients the `ratios` of `distribution` are divided by: exact ones, or means over all replicates."""
    kinds = {"exact": table["oracle"], "mean": ~table["oracle"].astype(bool)}
    return f"{' or '.join(kind for kind, rows in kinds.items() if rows.any())} gradient"


def right_signs(ratios: np.ndarray) -> float:
    """Return the fraction of gradients with the right sign, NaN where there is none."""
    return float((ratios > 0).mean()) if ratios.size else float("nan")
