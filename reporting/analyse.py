"""From a study and what to show of it to the tables of its report."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from errors import UserError, near
from reporting import aggregate, asymptotics, efficiency, gradients, league
from reporting.load import Job, Study
from reporting.options import FEW, Metric, Options, PivotMetric
from reporting.published import published

# Recorded beside the quantities themselves; shown where they are asked for by name.
UNASKED = ("time/", "memory/", "snr/p")
UNASKED_ENDS = ("_se", "num_constant")
LEAGUE_NEEDS = str(league.METRICS[league.VARIANCE])
GIVEN_UP = ("failed", "aborted")


@dataclass(frozen=True)
class Results:
    """The tables of a report.

    jobs: those that were chosen. runs: one row for each that can be read. keys: each key as written, and its column.
    values: the shown metrics of each run. means, smoothed: `aggregate.curves` of all runs but the failed and the
    aborted. numbers: each run's pivot metrics. summary: `aggregate.pivot` of the runs that are done.
    measured: `summary` with the intervals of the measurement where there is one run, and with the league's metrics.
    published: numbers to draw beside the summary. individual, distribution: `gradients.individual` and
    `gradients.distribution` of the runs that are done, None where they are not drawn. warnings: a line for each thing
    that is not as it should be.
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
    measured: pd.DataFrame
    published: pd.DataFrame
    individual: pd.DataFrame | None
    distribution: pd.DataFrame | None
    warnings: list[str]


def analyse(study: Study, options: Options, given: Collection[str] = ()) -> Results:
    """Compute the tables of a report; `given` names the options that the command line gave.

    Raises:
        UserError: a key, metric or filter fits nothing.
    """
    if "individual" in options.figures and not options.draw_individual:
        options = replace(options, draw_individual=FEW)
    jobs = aggregate.select(study.jobs, options.include, options.exclude)
    readable = [job for job in jobs if job.config and job.started]
    columns = dict.fromkeys(column for job in readable for column in job.config)
    keys = {key: aggregate.resolve_key(key, columns) for key in options.keys} if readable else {}
    _check_particles(options, keys)
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
    measured = _measured(recorded, done, names, options)
    if {"league", "frontier"} & {*options.figures} and not (measured["metric"] == LEAGUE_NEEDS).any():
        complaints.append(f"league, frontier: no finished run has recorded {league.METRICS[league.VARIANCE].metric}")
    if "efficiency" in options.figures:
        complaints += efficiency.warnings(measured)
    finished = [job for job in readable if job.id in done.index]
    single = many = None
    if options.draw_individual and names:
        single, unread = gradients.individual(finished, done, names, options.draw_individual, study.folder)
        complaints += unread
    if "distribution" in options.figures and names:
        many, unread = gradients.distribution(finished, done, names, study.folder)
        complaints += unread
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
        measured,
        published(done, [str(metric) for metric in options.pivot_metrics], names),
        single,
        many,
        [*study.warnings, *dict.fromkeys(complaints), *missing, *_confused(shown, names)],
    )


def _metrics(options: Options) -> list:
    return [*options.metrics, *options.detailed_metrics, *(metric for _, metric in options.pivot_metrics)]


def _measured(recorded: pd.DataFrame, done: pd.DataFrame, keys: list[str], options: Options) -> pd.DataFrame:
    """Reduce and average the pivot's metrics and those of league and efficiency.

    A value at one step has the error recorded there.
    """
    known = aggregate.recorded(recorded)
    wanted = list(league.METRICS.values()) if {"league", "frontier"} & {*options.figures} else []
    wanted += efficiency.METRICS.values() if "efficiency" in options.figures else ()
    asked = [metric for metric in wanted if metric.metric in known]
    metrics = list(dict.fromkeys([*options.pivot_metrics, *asked]))
    at_one_step = [metric for metric in metrics if metric.aggregation in ("first", "last")]
    numbers = aggregate.reduce_runs(aggregate.take(recorded, [metric for _, metric in metrics]), metrics)
    errors = aggregate.reduce_runs(_standard_errors(recorded, [metric for _, metric in at_one_step]), at_one_step)
    return aggregate.measured_pivot(numbers, errors, done, keys)


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
    if "asymptotics" in options.figures:
        known = aggregate.recorded(recorded)
        last = tuple(metric for metric in asymptotics.METRICS if metric.metric in known) or last
    if "efficiency" in options.figures and not last:
        last = tuple(efficiency.METRICS[name] for name in efficiency.SHOWN)
    return replace(options, metrics=metrics, pivot_metrics=options.pivot_metrics or last)


def _check_particles(options: Options, keys: Mapping[str, str]) -> None:
    """Refuse figures against K in a report that does not tell the K apart."""
    wanted = [f"figures: {name}" for name in ("asymptotics", "efficiency") if name in options.figures]
    wanted += ["draw_individual"] if options.draw_individual else []
    if wanted and keys and "estimator.iw" not in keys.values():
        raise UserError(f"{' and '.join(wanted)}: drawn against K, so keys must hold iw, not only {', '.join(keys)}")


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
