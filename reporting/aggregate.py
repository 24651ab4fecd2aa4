"""From the runs' values to curves over seeds and to the pivot: pure functions of tables.

A run is one row of the `runs` table (index: job id; columns: the flat configuration). The seeds of a cell, the runs
that agree in all of the report's keys, are averaged: mean m, standard deviation s (n - 1), standard error s / sqrt(n)
and the 95% interval m -+ t s / sqrt(n), t the 97.5% point of Student's distribution with n - 1 degrees of freedom. A
single run has no such interval; its curves have that of the measurement, where its standard error was recorded.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from errors import UserError, near
from reporting.load import GROUPS, Job
from reporting.options import Metric, PivotMetric

NORMAL = 1.959964  # the 97.5% point of the standard normal distribution

# What may differ between the runs of a cell without a word: it changes no number, or it is what is averaged over.
NEUTRAL = frozenset(
    {"state", "error", "seed", "tag", "device", "root", "data_root", "threads", "checkpoint_every", "dataset.url"}
)


def natural(value: Any) -> tuple:
    """Sort key: numbers by value, before texts, whose digits count as numbers (`S10` after `S5`)."""
    if isinstance(value, int | float):
        return (0, value)
    parts = re.split(r"(\d+)", str(value).casefold())
    return (1, tuple(int(part) if part.isdecimal() else part for part in parts), str(value))


def resolve_key(key: str, columns: Iterable[str]) -> str:
    """Return the column that a key names: a group, a whole path, or a path's last part (the estimator's own first).

    Raises:
        UserError: no column, or several, are called so.
    """
    columns = list(columns)
    if key in columns:
        return key
    matches = [column for column in columns if column.rpartition(".")[2] == key]
    if f"estimator.{key}" in matches:
        return f"estimator.{key}"
    if len(matches) > 1:
        raise UserError(f"keys: {key!r} may be {' or '.join(sorted(matches))}; give one of these")
    if not matches:
        last_parts = [column.rpartition(".")[2] for column in columns]
        raise UserError(f"keys: no run has a {key!r}{near(key, [*columns, *last_parts])}")
    return matches[0]


def select(jobs: Sequence[Job], include: Sequence[str], exclude: Sequence[str]) -> list[Job]:
    """Keep the jobs that some item of `include` names (all, where there is none) and no item of `exclude` does.

    Raises:
        UserError: an item names no job.
    """
    chosen = {item: matches(item, jobs) for item in (*include, *exclude)}
    for item, ids in chosen.items():
        if jobs and not ids:
            # There may be thousands of ids: of these only the near ones.
            all_ids = [id for job in jobs for id in dict.fromkeys((job.id, job.origin))]
            names = {word for job in jobs for word in _words(job)[2:]} | {*get_close_matches(item, all_ids)}
            option = "include" if item in include else "exclude"
            raise UserError(f"{option}: {item!r} names no job{near(item, names)}")
    kept = set[str]().union(*(chosen[item] for item in include)) if include else {job.id for job in jobs}
    dropped = set[str]().union(*(chosen[item] for item in exclude))
    return [job for job in jobs if job.id in kept - dropped]


def matches(item: str, jobs: Sequence[Job]) -> set[str]:
    """Return the ids of the jobs that `item` names.

    `iw=5` names the jobs with that value. Otherwise an item is compared with each job's id, tag and choices: where it
    equals one of them (`*` and `?` stand for any text), those jobs are meant; where it equals none, those that begin
    with it as a whole word: `tvo` names `tvo-part5-beta2`, while `reinforce` leaves `reinforce-baseline` alone.
    """
    key, equals, value = item.partition("=")
    if equals:
        return {job.id for job in jobs if _has_value(job, key, value)}
    exact = {job.id for job in jobs if any(fnmatchcase(word, item) for word in _words(job))}
    return exact or {job.id for job in jobs if any(word.startswith(f"{item}-") for word in _words(job))}


def _words(job: Job) -> list[str]:
    tags = str(job.config.get("tag") or "").replace(",", " ").split()
    return [job.id, job.origin, *tags, *(str(job.config[group]) for group in GROUPS if group in job.config)]


def _has_value(job: Job, key: str, value: str) -> bool:
    return any(
        str(found) == value and (column == key or column.endswith(f".{key}")) for column, found in job.config.items()
    )


def tabulate(jobs: Iterable[Job], keys: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """Lay the jobs' configurations in a table with a column for each key, ordered as people count.

    Returns the table (index: job id) of the jobs that have every key, and a line for each job that lacks one.
    """
    complaints = []
    rows = {}
    for job in jobs:
        lacking = [column for column in keys.values() if job.config.get(column) is None]
        if lacking:
            complaints.append(f"job {job.id}: config.yaml: has no {', '.join(lacking)}; left out")
        else:
            rows[job.id] = {"state": job.state, "error": job.error, **job.config}
    empty = pd.DataFrame(columns=["state", "error", "seed"], dtype=object)
    runs = pd.DataFrame.from_dict(rows, orient="index", dtype=object) if rows else empty
    for key, column in keys.items():
        values = runs.get(column, pd.Series(dtype=object))
        runs[key] = pd.Categorical(values, categories=sorted(set(values), key=natural), ordered=True)
    return runs, complaints


def mixed(runs: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """Return the configuration columns that differ between runs of one cell, beside the seed."""
    columns = [column for column in varied(runs) if column not in NEUTRAL and column not in keys]
    if runs.empty or not columns:
        return []
    counts = runs[columns].astype(str).groupby([runs[key] for key in keys], observed=True).nunique()
    return [column for column in columns if (counts[column] > 1).any()]


def varied(runs: pd.DataFrame) -> list[str]:
    """Return the configuration columns that are not the same in all runs."""
    return [column for column in runs.columns if runs[column].astype(str).nunique() > 1]


def recorded(values: pd.DataFrame) -> list[Metric]:
    """Return the recorded metrics in order of name, then split."""
    pairs = values[["split", "name"]].drop_duplicates().itertuples(index=False)
    return sorted((Metric(split, name) for split, name in pairs), key=lambda metric: (metric.name, metric.split))


def take(values: pd.DataFrame, metrics: Iterable[Metric]) -> pd.DataFrame:
    """Keep the rows of some metrics, under one column `metric` in place of split and name."""
    metrics = list(dict.fromkeys(metrics))
    parts = [values[(values["split"] == split) & (values["name"] == name)] for split, name in metrics]
    kept = pd.concat(parts) if parts else values.iloc[:0]
    names = pd.Index([str(metric) for metric in metrics])
    codes = np.repeat(np.arange(len(parts)), np.array([len(part) for part in parts], dtype=int))
    column = pd.Categorical.from_codes(codes, categories=names)
    return kept.drop(columns=["split", "name"]).assign(metric=column)


def smooth(values: pd.DataFrame, ema: float) -> pd.DataFrame:
    """Replace each run's values by their exponential moving average, in order of step.

    y_t = (1 - ema) sum_s ema^s x_{t-s}, divided by the weights' sum: unbiased at the start. `values` as `take` gives.
    """
    if not ema or values.empty:
        return values
    values = values.sort_values(["id", "metric", "step"])
    averages = values.groupby(["id", "metric"], observed=True, sort=False)["value"].ewm(alpha=1 - ema).mean()
    return values.assign(value=averages.to_numpy())


def curves(values: pd.DataFrame, runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Average over seeds at each step: one row for each cell, metric and step, with n, mean, sd, se, low, high."""
    return summarise(with_keys(values, runs, keys), [*keys, "metric", "step"])


def with_measurement_errors(
    means: pd.DataFrame, errors: pd.DataFrame, runs: pd.DataFrame, keys: Sequence[str]
) -> pd.DataFrame:
    """Give the points of a single run the interval of the measurement itself, mean -+ 1.96 se.

    `means` as `curves` gives; `errors` as `take` gives: the recorded standard errors, under their quantity's metric.
    """
    return with_own_errors(means, with_keys(errors, runs, keys), [*keys, "metric", "step"])


def with_own_errors(means: pd.DataFrame, errors: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Give the means of a single run the interval mean -+ 1.96 se; `errors` has the columns of `by`, and value."""
    own = errors[[*by, "value"]].dropna(subset="value").drop_duplicates(list(by)).rename(columns={"value": "own"})
    single = means["n"] == 1
    own_se = means[single].reset_index().merge(own, on=list(by), how="left").set_index("index")["own"]
    means = means.copy()
    means.loc[single, "se"] = own_se
    means.loc[single, "low"] = means["mean"] - NORMAL * own_se
    means.loc[single, "high"] = means["mean"] + NORMAL * own_se
    return means


def reduce_runs(values: pd.DataFrame, pivot_metrics: Sequence[PivotMetric]) -> pd.DataFrame:
    """Reduce each run's metric over its steps to a number: index id, one column for each. `values` as `take` gives."""
    columns = {}
    for pivot_metric in pivot_metrics:
        of_metric = values[values["metric"] == str(pivot_metric.metric)]
        columns[str(pivot_metric)] = of_metric.groupby("id", observed=True)["value"].agg(pivot_metric.aggregation)
    table = pd.DataFrame(columns)
    table.index = table.index.astype(str)
    return table


def measured_pivot(
    numbers: pd.DataFrame, errors: pd.DataFrame, runs: pd.DataFrame, keys: Sequence[str]
) -> pd.DataFrame:
    """Return `pivot`, where a single run has the interval of the measurement; `errors` is of the shape of `numbers`."""
    long = errors.rename_axis(index="id").melt(var_name="metric", value_name="value", ignore_index=False).reset_index()
    return with_own_errors(pivot(numbers, runs, keys), with_keys(long, runs, keys), [*keys, "metric"])


def pivot(numbers: pd.DataFrame, runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Average the runs' numbers over seeds: one row for each cell and metric, with n, mean, sd, se, low, high."""
    long = numbers.rename_axis(index="id").melt(var_name="metric", value_name="value", ignore_index=False).reset_index()
    long["metric"] = pd.Categorical(long["metric"], categories=list(numbers.columns))
    return summarise(with_keys(long, runs, keys), [*keys, "metric"])


def with_keys(values: pd.DataFrame, runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Keep the values of the runs in `runs` and add their keys as columns."""
    ids = values["id"].astype("category").cat
    rows = runs.index.get_indexer(ids.categories)[ids.codes]
    kept, rows = values[rows >= 0], rows[rows >= 0]
    return kept.assign(**{key: runs[key].array[rows] for key in keys})


def summarise(values: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return n, mean, sd, se, low and high of `value` in each group; all NaN but n and mean where n = 1."""
    grouped = values.groupby(list(by), observed=True)["value"]
    table = grouped.agg(n="count", mean="mean", sd="std").reset_index()
    table = table[table["n"] > 0].reset_index(drop=True)
    table["se"] = table["sd"] / np.sqrt(table["n"])
    half = stdtrit(np.maximum(table["n"] - 1, 1), 0.975) * table["se"]
    return table.assign(low=table["mean"] - half, high=table["mean"] + half)
