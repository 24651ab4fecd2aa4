"""From a study and what to show of it to the tables of its report."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from errors import UserError, near
from reporting import aggregate
from reporting.load import Job, Study
from reporting.options import Metric, Options, PivotMetric
from reporting.published import published

# Recorded beside the quantities themselves; shown where they are asked for by name.
UNASKED = ("time/", "memory/", "snr/p")
UNASKED_ENDS = ("_se", "num_constant")
GIVEN_UP = ("failed", "aborted")


@dataclass(frozen=True)
class Results:
    """The tables of a report.

    jobs: those that were chosen. runs: one row for each that can be read. keys: each key as written, and its column.
    values: the shown metrics of each run. means, smoothed: `aggregate.curves` of all runs but the failed and the
    aborted. numbers: each run's pivot metrics. summary: `aggregate.pivot` of the runs that are done.
    published: numbers to draw beside the summary. warnings: a line for each thing that is not as it should be.
    """

    options: Options
    jobs: list[Job]
    runs: pd.DataFrame
    keys: Mapping[str, str]
    values: pd.DataFrame
    means: pd.DataFrame
    smoothed: pd.DataFrame
    numbers: pd.DataFrame
    summary: pd.DataFrame
    published: pd.DataFrame
    warnings: list[str]


def analyse(study: Study, options: Options, given: Collection[str] = ()) -> Results:
    """Compute the tables of a report; `given` names the options that the command line gave.

    Raises:
        UserError: a key, metric or filter fits nothing.
    """
    jobs = aggregate.select(study.jobs, options.include, options.exclude)
    readable = [job for job in jobs if job.config and job.started]
    columns = dict.fromkeys(column for job in readable for column in job.config)
    keys = {key: aggregate.resolve_key(key, columns) for key in options.keys} if readable else {}
    runs, complaints = aggregate.tabulate(readable, keys)
    names = list(keys)

    recorded = study.values[study.values["id"].isin(runs.index)]
    options = _with_defaults(options, recorded)
    any_done = any(job.state == "done" for job in readable)
    missing = _check_metrics(options, given, recorded, any_done)
    values = aggregate.take(recorded, _metrics(options))

    shown, done = runs[~runs["state"].isin(GIVEN_UP)], runs[runs["state"] == "done"]
    means = aggregate.curves(values, shown, names)
    means = aggregate.with_measurement_errors(means, _standard_errors(recorded, _metrics(options)), shown, names)
    smoothed = aggregate.curves(aggregate.smooth(values, options.ema), shown, names) if options.ema else means
    numbers = aggregate.reduce_runs(values, options.pivot_metrics)
    summary = aggregate.pivot(numbers, done, names)
    return Results(
        options,
        jobs,
        runs.assign(last_step=recorded.groupby("id", observed=True)["step"].max().rename(str)),
        keys,
        values,
        means,
        smoothed,
        numbers,
        summary,
        published(done, [str(metric) for metric in options.pivot_metrics]),
        [*study.warnings, *complaints, *missing, *_confused(shown, names)],
    )


def _metrics(options: Options) -> list:
    return [*options.metrics, *options.detailed_metrics, *(metric for _, metric in options.pivot_metrics)]


def _standard_errors(recorded: pd.DataFrame, metrics: Collection[Metric]) -> pd.DataFrame:
    """Return the standard errors recorded beside these metrics, under the names of the metrics."""
    errors = recorded[recorded["name"].str.endswith("_se")]
    return aggregate.take(errors.assign(name=errors["name"].str.removesuffix("_se")), metrics)


def _with_defaults(options: Options, recorded: pd.DataFrame) -> Options:
    """Where no metrics are named, take every recorded one, and the last value of each."""
    metrics = options.metrics or tuple(
        metric
        for metric in aggregate.recorded(recorded)
        if not metric.name.startswith(UNASKED) and not metric.name.endswith(UNASKED_ENDS)
    )
    last = tuple(PivotMetric("last", metric) for metric in metrics)
    return replace(options, metrics=metrics, pivot_metrics=options.pivot_metrics or last)


def _check_metrics(options: Options, given: Collection[str], recorded: pd.DataFrame, any_done: bool) -> list[str]:
    """Refuse metrics that no run has recorded; while no run is done, one that the file names may yet come."""
    known = aggregate.recorded(recorded)
    wanted = {
        "metrics": options.metrics,
        "detailed_metrics": options.detailed_metrics,
        "pivot_metrics": [metric for _, metric in options.pivot_metrics],
        "ylims": [metric for metric, _ in options.ylims],
    }
    waiting = []
    for option, metrics in wanted.items():
        for metric in metrics:
            if known and metric not in known and (any_done or option in given):
                raise UserError(f"{option}: no run has recorded {str(metric)!r}{near(str(metric), map(str, known))}")
            if known and metric not in known:
                waiting.append(f"{metric}: not recorded yet")
    return list(dict.fromkeys(waiting))


def _confused(runs: pd.DataFrame, keys: list[str]) -> list[str]:
    """Warn of runs that are averaged though they differ in more than their seed."""
    columns = ", ".join(aggregate.mixed(runs, keys))
    return [f"runs that differ in {columns} are averaged as if these were seeds; add it to keys"] if columns else []
