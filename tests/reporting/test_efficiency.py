"""Costs of a training step: exponents, factors beside the published, what the figure draws, the report."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from errors import UserError
from reporting import efficiency, style
from reporting.analyse import Results, analyse
from reporting.efficiency import MEMORY, TIME
from reporting.gradient_figures import NONE
from reporting.layout import Layout, arrange
from reporting.load import load
from reporting.options import parse
from reporting.output import write
from tests.reporting.synthetic import config, write_experiment, write_run

SOURCE = Path(__file__).parents[2]
PARTICLES = (10, 50, 251, 501, 1253, 2506, 5000)
REPORT = {"keys": ["model", "estimator", "iw"], "figures": ["efficiency"]}
# Of each estimator: ms at K = 1 beside a fixed cost of 20 ms below K = 500, its power of K, and the same of MiB.
COSTS = {
    "ovis-gamma1": (0.1, 1.0, 0.2, 1.0),
    "vimco-arithmetic": (0.01, 1.5, 0.002, 1.9),
    "reinforce": (0.09, 0.9, 0.19, 0.95),
}


def settings(estimator: str, iw: int, seed: int = 1, latents: tuple[int, ...] = (200,), **more: Any) -> dict[str, Any]:
    resolved = config(estimator, iw, seed)
    resolved["choices"] |= {"task": "efficiency", "model": "sbn", "dataset": "mnist5k"}
    return resolved | {"batch_size": 24, "model": {"latents": list(latents)}} | more


def costs(estimator: str, iw: int) -> dict[str, float]:
    ms, rise, mib, growth = COSTS[estimator]
    least = ms * iw**rise + (20 if iw < 500 else 0)
    return {
        "time/step_ms": least,
        "time/step_ms_se": 0.01 * least,
        "time/step_ms_median": 1.3 * least,
        "time/step_cpu_ms": 0.9 * least,
        "memory/step_mb": mib * iw**growth,
        "time/on_gpu": 0.0,
    }


def study(root: Path, particles=PARTICLES, **more: Any) -> Path:
    for estimator in COSTS:
        for iw in particles:
            rows = [(0, "train", name, value) for name, value in costs(estimator, iw).items()]
            write_run(root / "efficiency", f"{estimator}-iw{iw}", settings(estimator, iw, **more), rows)
    write_experiment(root / "efficiency", REPORT)
    return root / "efficiency"


def analysed(root: Path) -> tuple[Results, Layout, pd.DataFrame]:
    results = analyse(load("efficiency", root), parse(REPORT))
    layout = arrange(results.runs, results.keys)
    done = results.runs[results.runs["state"] == "done"]
    return results, layout, efficiency.growths(results.measured, efficiency.published_factors(done), layout)


def cell(grown: pd.DataFrame, estimator: str, metric: str) -> dict[str, Any]:
    (row,) = grown[(grown["estimator"] == estimator) & (grown["metric"] == metric)].to_dict("records")
    return {str(name): value for name, value in row.items()}


def drawn(results: Results, layout: Layout, grown: pd.DataFrame) -> Figure:
    short = efficiency.short_of_memory(results.runs)
    return efficiency.efficiency_figure(results.measured, grown, layout, short)


def lines(ax: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.get_lines()}


def test_exponents_are_those_of_large_k_and_factors_those_of_the_last(tmp_path):
    study(tmp_path)
    _, _, grown = analysed(tmp_path)
    assert len(grown) == 2 * len(COSTS)
    for estimator, (ms, rise, _, growth) in COSTS.items():
        time, memory = cell(grown, estimator, TIME), cell(grown, estimator, MEMORY)
        # The fixed cost of the smaller K would lower these.
        assert (time["exponent"], time["low"], time["high"]) == pytest.approx((rise, rise, rise))
        assert memory["exponent"] == pytest.approx(growth)
        assert (time["n"], time["K"], time["from"]) == (4, 5000, 2506)
        assert time["value"] == pytest.approx(ms * 5000**rise)
        assert memory["factor"] == pytest.approx((5000 / 2506) ** growth)


def test_an_exponent_of_few_k_takes_three_and_of_fewer_has_no_interval(tmp_path):
    study(tmp_path / "three", particles=[10, 100, 1000, 10000])
    _, _, grown = analysed(tmp_path / "three")
    assert set(grown["n"]) == {3}
    study(tmp_path / "two", particles=[500, 1000])
    _, _, grown = analysed(tmp_path / "two")
    assert set(grown["n"]) == {2}
    assert grown["low"].isna().all()
    assert cell(grown, "reinforce", MEMORY)["exponent"] == pytest.approx(0.95)
    study(tmp_path / "one", particles=[500])
    _, _, grown = analysed(tmp_path / "one")
    assert grown[["exponent", "from", "factor", "published"]].isna().all(axis=None)
    heads, rows = efficiency.table_of(grown)
    assert rows[0][1:] == ["500", "50", "100", NONE, NONE, NONE]
    assert len(heads) == len(rows[0])


def test_published_factors_stand_beside_ours_of_the_same_settings_only(tmp_path):
    study(tmp_path / "same")
    results, layout, grown = analysed(tmp_path / "same")
    theirs = grown.dropna(subset="published").set_index(["estimator", "metric"])["published"]
    assert theirs.to_dict() == {("ovis-gamma1", MEMORY): 2.0, ("vimco-arithmetic", MEMORY): 3.5}
    left, right = drawn(results, layout, grown).axes
    assert not any("published" in label for label in lines(left))
    mib = 0.002 * 2506**1.9
    assert lines(right)["vimco-arithmetic, published growth"] == pytest.approx(
        np.array([[2506, mib], [5000, 3.5 * mib]])
    )
    others: list[dict[str, Any]] = [{"batch_size": 25}, {"latents": (200, 200)}, {"particles": (10, 2000, 5000)}]
    for i, more in enumerate(others):
        study(tmp_path / str(i), **more)
        assert analysed(tmp_path / str(i))[2]["published"].isna().all()


def test_the_figure_draws_the_least_times_bars_to_the_medians_and_memory(tmp_path):
    study(tmp_path)
    results, layout, grown = analysed(tmp_path)
    left, right = drawn(results, layout, grown).axes
    assert (left.get_xscale(), left.get_yscale(), right.get_xscale(), right.get_yscale()) == ("log",) * 4
    assert (left.get_ylabel(), right.get_ylabel()) == ("time a training step (ms)", "memory a training step (MiB)")
    for estimator in COSTS:
        for ax, metric in ((left, TIME), (right, MEMORY)):
            expected = [[iw, costs(estimator, iw)[metric]] for iw in PARTICLES]
            assert lines(ax)[estimator] == pytest.approx(np.array(expected))
            assert min(lines(ax)["K^1"][:, 1]) < min(y for x, y in expected if x >= 501)
    (bars,) = (part for part in left.collections if part.get_label() == "reinforce, median")
    assert isinstance(bars, LineCollection)
    first = bars.get_segments()[0]
    assert first == pytest.approx(np.array([[10, 1.0], [10, 1.3]]) * [1, costs("reinforce", 10)[TIME]])
    assert list(right.collections) == []
    for power in (1, 2):
        (x0, y0), (x1, y1) = lines(right)[f"K^{power}"]
        assert math.log(y1 / y0) / math.log(x1 / x0) == pytest.approx(power)
        assert y1 <= right.get_ylim()[1] * (1 + 1e-9)


def test_the_legend_is_a_table_of_the_exponents(tmp_path):
    study(tmp_path)
    figure = drawn(*analysed(tmp_path))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    columns = [texts[start : start + 4] for start in range(0, 20, 4)]
    assert columns[0] == ["exponents [95%]", "ovis-gamma1", "reinforce", "vimco-arithmetic"]
    assert columns[1] == ["time as K^", "1.00 [1.00, 1.00]", "0.90 [0.90, 0.90]", "1.50 [1.50, 1.50]"]
    assert [text[:4] for text in columns[2]] == ["memo", "1.00", "0.95", "1.90"]
    assert columns[3][1] == f"{style.TIMES}2.00 from K = 2,506"
    assert columns[4] == ["published", f"{style.TIMES}2.0", NONE, f"{style.TIMES}3.5"]
    figure.draw_without_rendering()
    (first, second) = (figure.legends[0].get_texts()[i].get_window_extent() for i in (0, 4))
    assert first.y0 == pytest.approx(second.y0)
    assert first.x1 < second.x0


def test_jobs_without_room_are_marked_and_estimators_without_memory_have_gaps(tmp_path):
    folder = study(tmp_path)
    run = folder / "jobs" / "vimco-arithmetic-iw5000"
    (run / "status.json").write_text('{"state": "failed", "attempt": 2, "error": "out of GPU memory: no room"}')
    results, layout, grown = analysed(tmp_path)
    row = cell(grown, "vimco-arithmetic", MEMORY)
    assert (row["K"], row["from"]) == (2506, 1253)
    assert math.isnan(row["published"])
    _, right = drawn(results, layout, grown).axes
    assert lines(right)["vimco-arithmetic, out of memory"].tolist() == [[5000, 1]]
    assert 5000 not in lines(right)["vimco-arithmetic"][:, 0]
    caption = efficiency.caption(results.measured, grown, efficiency.short_of_memory(results.runs))
    assert "Crosses: out of memory." in caption
    assert "on a CPU" in caption


@pytest.mark.parametrize(
    ("error", "short"),
    [
        ("out of GPU memory: RuntimeError: CUDA error: out of memory", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you", True),
        ("FloatingPointError: the loss is not finite", False),
        (None, False),
    ],
)
def test_what_counts_as_out_of_memory(error, short):
    runs = pd.DataFrame({"state": ["failed", "done"], "error": [error, error]})
    assert len(efficiency.short_of_memory(runs)) == short


def test_models_have_rows_of_their_own(tmp_path):
    study(tmp_path)
    for iw in PARTICLES:
        resolved = settings("ovis-gamma1", iw)
        resolved["choices"]["model"] = "gmm"
        rows = [(0, "train", name, 2 * value) for name, value in costs("ovis-gamma1", iw).items()]
        write_run(tmp_path / "efficiency", f"gmm-{iw}", resolved, rows)
    results, layout, grown = analysed(tmp_path)
    axes = drawn(results, layout, grown).axes
    assert [ax.get_title() for ax in axes] == ["model = gmm", "model = gmm", "model = sbn", "model = sbn"]
    assert set(lines(axes[0])) == {"ovis-gamma1", "K^1", "K^2"}
    _, table = efficiency.table_of(grown)
    assert sorted(row[0] for row in table)[0] == "model = gmm, ovis-gamma1"
    assert grown["published"].isna().all()


def test_times_of_a_gpu_and_a_cpu_are_not_compared_without_a_word(tmp_path):
    folder = study(tmp_path)
    assert analysed(tmp_path)[0].warnings == []
    metrics = folder / "jobs" / "reinforce-iw10" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"time/on_gpu", "value": 0.0', '"time/on_gpu", "value": 1.0'))
    (warning,) = analysed(tmp_path)[0].warnings
    assert warning.startswith("efficiency: some steps ran on a GPU, others on a CPU")


def test_times_of_a_busy_processor_are_told(tmp_path):
    folder = study(tmp_path)
    for iw in (10, 50):
        metrics = folder / "jobs" / f"reinforce-iw{iw}" / "metrics.jsonl"
        row = '{"step": 0, "split": "train", "name": "time/step_cpu_ms", "value": 1e-3}\n'
        metrics.write_text(metrics.read_text() + row)  # the last row counts
    (warning,) = analysed(tmp_path)[0].warnings
    assert warning.startswith("efficiency: in 2 of 21 cells even the fastest step waited for the processor")


def test_it_needs_k_among_the_keys(tmp_path):
    study(tmp_path, particles=[10])
    with pytest.raises(UserError, match="figures: efficiency: drawn against K, so keys must hold iw"):
        analyse(load("efficiency", tmp_path), parse({**REPORT, "keys": ["estimator"]}))


def test_a_report_of_costs(tmp_path):
    study(tmp_path / "runs")
    command = [sys.executable, "report.py", "--exp=efficiency", f"--root={tmp_path}/runs", f"--output={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE)
    assert (done.returncode, done.stderr) == (0, "")
    made = tmp_path / "out" / "efficiency"
    assert {path.stem for path in made.glob("*.png")} == {"efficiency"}
    table = pd.read_csv(made / "efficiency.csv")
    assert list(table.columns) == efficiency.COLUMNS
    page = (made / "index.html").read_text()
    assert f"{style.TIMES}3.72 from K = 2,506" in page
    assert "where memory would be had it grown as in the code of Liévin et al. 2020" in page
    pivot = pd.read_csv(made / "pivot.csv")
    assert {"last:train:time/step_ms", "last:train:memory/step_mb"} <= set(pivot.columns)


def test_a_report_before_any_job_is_done(tmp_path):
    folder = tmp_path / "runs" / "efficiency"
    write_run(folder, "a", settings("reinforce", 10), [], state="running")
    write_experiment(folder, REPORT)
    results = analyse(load("efficiency", tmp_path / "runs"), parse(REPORT))
    assert write(results, tmp_path / "out", "efficiency", "") == []
    assert not list((tmp_path / "out").glob("*.png"))
