import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from errors import UserError
from reporting import aggregate
from reporting.load import Job, flatten, join
from reporting.options import Metric, PivotMetric
from tests.reporting.synthetic import config

ERROR = Metric("test", "gmm/posterior_mse")
SNR = Metric("train", "grads/snr")
KEYS = {"estimator": "estimator", "iw": "estimator.iw"}
# The 97.5% points of Student's distribution with 1 and 2 degrees of freedom, from printed tables.
T1, T2 = 12.7062047, 4.30265273


def job(id: str, estimator: str = "reinforce", iw: int = 5, seed: int = 1, **more) -> Job:
    return Job(id, "done", flatten(config(estimator, iw, seed, **more)), started=True)


def values(runs: dict[str, list[float]], metric: Metric = ERROR) -> pd.DataFrame:
    """A value each 10 steps for each run."""
    tables = {
        id: ([10 * i for i in range(len(ys))], [metric.split] * len(ys), [metric.name] * len(ys), ys)
        for id, ys in runs.items()
    }
    return join(tables)


def test_curves_are_means_over_seeds_with_students_interval():
    runs, _ = aggregate.tabulate([job("a", seed=1), job("b", seed=2), job("c", seed=3), job("d", iw=10)], KEYS)
    recorded = values({"a": [1.0, 4.0], "b": [2.0, 6.0], "c": [3.0], "d": [7.0]})
    table = aggregate.curves(aggregate.take(recorded, [ERROR]), runs, list(KEYS))
    rows: dict[Any, Any] = {(row.iw, row.step): row for row in table.itertuples()}
    assert set(rows) == {(5, 0), (5, 10), (10, 0)}
    three, two, one = rows[5, 0], rows[5, 10], rows[10, 0]
    assert (three.n, three.mean, three.sd) == (3, 2.0, 1.0)
    assert three.se == pytest.approx(1 / math.sqrt(3))
    assert (three.low, three.high) == pytest.approx((2 - T2 / math.sqrt(3), 2 + T2 / math.sqrt(3)), rel=1e-6)
    assert (two.n, two.mean) == (2, 5.0)
    assert (two.low, two.high) == pytest.approx((5 - T1, 5 + T1), rel=1e-6)
    assert (one.n, one.mean) == (1, 7.0)
    assert all(math.isnan(value) for value in (one.sd, one.se, one.low, one.high))


def test_a_single_run_has_the_interval_of_its_measurement():
    runs, _ = aggregate.tabulate([job("a", seed=1), job("b", seed=2), job("d", iw=10)], KEYS)
    keys = list(KEYS)
    means = aggregate.curves(aggregate.take(values({"a": [1.0], "b": [2.0], "d": [7.0, 8.0]}), [ERROR]), runs, keys)
    errors = aggregate.take(values({"a": [0.5], "b": [0.5], "d": [0.1]}), [ERROR])
    table = aggregate.with_measurement_errors(means, errors, runs, keys)
    rows: dict[Any, Any] = {(row.iw, row.step): row for row in table.itertuples()}
    assert (rows[10, 0].low, rows[10, 0].high) == pytest.approx((7 - 0.196, 7 + 0.196), rel=1e-3)
    assert math.isnan(rows[10, 10].low)
    pd.testing.assert_frame_equal(table[table["n"] > 1], means[means["n"] > 1])


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("min", 1), ("max", 9), ("mean", 4), ("median", 2), ("first", 9), ("last", 2)]
)
def test_a_run_is_reduced_over_its_steps(aggregation, expected):
    recorded = aggregate.take(values({"a": [9.0, 1.0, 2.0]}), [ERROR])
    numbers = aggregate.reduce_runs(recorded, [PivotMetric(aggregation, ERROR)])
    assert list(numbers.loc["a"]) == [expected]


def test_steps_out_of_order_are_put_in_order():
    table = join({"a": ([20, 0, 10], ["test"] * 3, [ERROR.name] * 3, [3.0, 1.0, 2.0])})
    numbers = aggregate.reduce_runs(
        aggregate.take(table, [ERROR]), [PivotMetric("first", ERROR), PivotMetric("last", ERROR)]
    )
    assert list(numbers.loc["a"]) == [1.0, 3.0]


def test_the_pivot_averages_the_runs_numbers():
    runs, _ = aggregate.tabulate([job("a"), job("b", seed=2), job("c", "ovis-gamma1")], KEYS)
    recorded = aggregate.take(values({"a": [5.0, 1.0], "b": [3.0, 4.0], "c": [0.5, 0.7]}), [ERROR])
    lowest = PivotMetric("min", ERROR)
    table = aggregate.pivot(aggregate.reduce_runs(recorded, [lowest]), runs, list(KEYS))
    assert table["estimator"].tolist() == ["ovis-gamma1", "reinforce"]
    assert table["mean"].tolist() == [0.5, 2.0]
    assert table["n"].tolist() == [1, 2]
    assert table["sd"].tolist()[1] == pytest.approx(math.sqrt(2))
    assert table["metric"].tolist() == [str(lowest)] * 2


def test_smoothing_is_the_weighted_mean_of_the_past():
    recorded = aggregate.take(values({"a": [1.0, 3.0, 5.0], "b": [2.0, 2.0, 2.0]}), [ERROR])
    smoothed = aggregate.smooth(recorded, 0.5)
    of_a = smoothed[smoothed["id"] == "a"].sort_values("step")["value"].tolist()
    assert of_a == pytest.approx([1.0, (3 + 0.5 * 1) / 1.5, (5 + 0.5 * 3 + 0.25 * 1) / 1.75])
    assert smoothed[smoothed["id"] == "b"]["value"].tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert aggregate.smooth(recorded, 0.0) is recorded


def test_keys_are_found_by_group_path_and_last_part():
    columns = flatten(config())
    assert aggregate.resolve_key("estimator", columns) == "estimator"
    assert aggregate.resolve_key("iw", columns) == "estimator.iw"
    assert aggregate.resolve_key("lr", columns) == "optimizer.lr"
    assert aggregate.resolve_key("evaluation.iw", columns) == "evaluation.iw"
    assert aggregate.resolve_key("seed", columns) == "seed"


def test_keys_that_fit_nothing_or_too_much_are_refused():
    columns = flatten(config())
    with pytest.raises(UserError, match=r"keys: no run has a 'estimatr'; did you mean 'estimator'"):
        aggregate.resolve_key("estimatr", columns)
    with pytest.raises(UserError, match=r"keys: 'target' may be dataset.target or model.target or optimizer.target"):
        aggregate.resolve_key("target", columns)


def test_particles_and_ids_are_ordered_as_people_count():
    jobs = [job(f"{name}{iw}", name, iw) for name in ("ovis-S10", "ovis-S5") for iw in (20, 5, 100)]
    runs, _ = aggregate.tabulate(jobs, KEYS)
    assert runs["iw"].cat.categories.tolist() == [5, 20, 100]
    assert runs["estimator"].cat.categories.tolist() == ["ovis-S5", "ovis-S10"]


def test_a_job_without_a_key_is_left_out_and_named():
    cut = job("cut")
    del cut.config["estimator.iw"]
    runs, complaints = aggregate.tabulate([job("a"), cut], KEYS)
    assert runs.index.tolist() == ["a"]
    assert complaints == ["job cut: config.yaml: has no estimator.iw; left out"]


JOBS = [
    job("1", "tvo-part5-beta2", tag="iwbound"),
    job("2", "reinforce", tag="iwrbound, long"),
    job("3", "reinforce-baseline", 10),
    job("4", "ovis-S10"),
    job("5", "ovis-S10-exclusive"),
]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], "12345"),
        (["iwbound"], [], "1"),
        (["iwrbound", "tvo"], [], "12"),
        (["reinforce"], [], "2"),
        (["reinforce*"], [], "23"),
        (["ovis"], [], "45"),
        (["ovis-S10"], [], "4"),
        (["iw=10"], [], "3"),
        (["estimator.iw=5"], ["ovis"], "12"),
        (["5"], [], "5"),
        (["long"], ["tvo"], "2"),
        ([], ["gmm"], ""),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    assert "".join(job.id for job in aggregate.select(JOBS, include, exclude)) == expected


def test_a_filter_that_names_nothing_offers_what_is_near():
    with pytest.raises(UserError, match=r"include: 'iwbond' names no job; did you mean 'iwbound'"):
        aggregate.select(JOBS, ["iwbond"], [])
    with pytest.raises(UserError, match=r"exclude: 'iw=3' names no job"):
        aggregate.select(JOBS, [], ["iw=3"])
    assert aggregate.select([], ["anything"], []) == []


def test_a_cell_whose_runs_differ_in_more_than_the_seed_is_noticed():
    alike = [job("a", seed=1), job("b", seed=2, device="cpu"), job("c", "ovis-gamma1", optimizer__lr=0.1)]
    runs, _ = aggregate.tabulate(alike, KEYS)
    assert aggregate.mixed(runs, list(KEYS)) == []
    runs, _ = aggregate.tabulate([*alike, job("d", seed=3, optimizer__lr=0.01)], KEYS)
    assert aggregate.mixed(runs, list(KEYS)) == ["optimizer.lr"]


def test_nothing_recorded_gives_empty_tables():
    runs, complaints = aggregate.tabulate([], {})
    chosen = aggregate.take(join({}), [ERROR])
    assert complaints == []
    assert aggregate.curves(chosen, runs, []).empty
    assert aggregate.pivot(aggregate.reduce_runs(chosen, [PivotMetric("min", ERROR)]), runs, []).empty


def test_two_metrics_stay_apart():
    table = pd.concat([values({"a": [1.0]}), values({"a": [8.0]}, SNR)]).reset_index(drop=True)
    runs, _ = aggregate.tabulate([job("a")], KEYS)
    curves = aggregate.curves(aggregate.take(table, [SNR, ERROR]), runs, list(KEYS))
    assert curves.set_index("metric")["mean"].to_dict() == {str(SNR): 8.0, str(ERROR): 1.0}
    assert not np.isnan(curves["mean"]).any()


def test_a_metric_that_one_run_of_a_cell_has_takes_that_runs_error():
    runs, _ = aggregate.tabulate([job("a", seed=1), job("b", seed=2)], KEYS)
    numbers = pd.DataFrame({"last:train:grads/snr": {"a": 2.0, "b": math.nan}})
    errors = pd.DataFrame({"last:train:grads/snr": {"a": 0.1, "b": math.nan}})
    for each in (errors, errors.iloc[::-1]):
        (row,) = aggregate.measured_pivot(numbers, each, runs, list(KEYS)).itertuples()
        assert (row.n, row.mean, row.se) == (1, 2.0, 0.1)
