"""Gradient studies: virtual runs, slopes, the comparison with the published, and what the figures draw."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from errors import UserError
from reporting import asymptotics, gradients
from reporting.analyse import Results, analyse
from reporting.gradient_figures import (
    asymptotics_figure,
    density,
    distribution_figure,
    individual_figure,
    slope_text,
)
from reporting.layout import Layout, arrange
from reporting.load import Study, load, states
from reporting.options import Options, override, parse
from tests.reporting.synthetic import POWERS, gradient_study, study_config, write_queue, write_run

SOURCE = Path(__file__).parents[2]
PARTICLES = [3, 12, 54, 234, 1000]
ASYMPTOTICS = {"figures": ["asymptotics", "distribution"], "draw_individual": 2}


def analysed(root: Path, report: dict | None = None, **more) -> tuple[Study, Results, Layout]:
    gradient_study(root, **more)
    study = load("asymptotic", root)
    results = analyse(study, parse({"keys": ["estimator", "iw"], **(report or ASYMPTOTICS)}))
    return study, results, arrange(results.runs, results.keys)


def lines(ax: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.get_lines()}


def panels(results: Results, layout: Layout) -> dict[str, Axes]:
    metrics = list(results.options.pivot_metrics)
    fitted = asymptotics.slopes(results.measured, metrics, layout)
    figure = asymptotics_figure(results.measured, metrics, layout, results.published, fitted)
    return {ax.get_ylabel(): ax for ax in figure.axes if ax.get_ylabel()}


def test_a_job_that_compares_counts_as_a_run_for_each_estimator(tmp_path):
    study, results, _ = analysed(tmp_path, particles=[3, 12])
    assert [job.id for job in study.jobs[:3]] == [f"toy-iw12-seed1@{estimator}" for estimator in POWERS]
    assert {(job.config["estimator"], job.config["estimator.id"]) for job in study.jobs} == {(e, e) for e in POWERS}
    assert states(study.jobs) == {"done": 2}
    assert results.warnings == []
    snr = results.numbers["last:train:grads/snr"]
    for estimator, (at_one, power, _, _) in POWERS.items():
        assert snr[f"toy-iw12-seed1@{estimator}"] == pytest.approx(at_one * 12**power)


def test_the_own_estimator_and_spellings_are_counted_once(tmp_path):
    rows = [(0, "train", "grads/snr", 1.0), (0, "train", "ovis-gamma1/grads/snr", 2.0)]
    settings = study_config("ovis-gamma0", ["ovis-gamma0", "ovis-gamma1.0", "ovis-gamma1"], 5)
    write_run(tmp_path / "study", "a", settings, rows)
    study = load("study", tmp_path)
    assert [job.id for job in study.jobs] == ["a@ovis-gamma0", "a@ovis-gamma1"]
    assert dict(zip(study.values["id"].astype(str), study.values["value"], strict=True)) == {
        "a@ovis-gamma0": 1.0,
        "a@ovis-gamma1": 2.0,
    }
    assert set(study.values["name"]) == {"grads/snr"}


def test_jobs_are_chosen_by_their_own_id_and_runs_by_their_estimator(tmp_path):
    gradient_study(tmp_path, particles=[3, 12])
    study = load("asymptotic", tmp_path)
    options = parse({"keys": ["estimator", "iw"], "include": "toy-iw3-seed1", "exclude": "pathwise"})
    assert [job.id for job in analyse(study, options).jobs] == [
        "toy-iw3-seed1@ovis-gamma0",
        "toy-iw3-seed1@ovis-gamma1",
    ]
    assert len(analyse(study, parse({"include": "ovis-gamma1"})).runs) == 2


def test_a_job_that_has_not_started_is_one_run(tmp_path):
    gradient_study(tmp_path, particles=[3])
    later = {"later": ["task.compare=[ovis-gamma0]"]}
    write_queue(tmp_path / "asymptotic", {"toy-iw3-seed1": "done", "later": "queued"}, later)
    study = load("asymptotic", tmp_path)
    assert states(study.jobs) == {"done": 1, "queued": 1}
    assert len(study.jobs) == len(POWERS) + 1


@pytest.mark.parametrize("power", [-3.0, -0.5, 0.0, 0.5])
def test_the_slope_of_a_power_law_is_exact(power):
    k = np.array(PARTICLES, float)
    slope, low, high = asymptotics.fit_slope(k, 0.7 * k**power)
    assert (slope, low, high) == pytest.approx((power,) * 3, abs=1e-9)


def test_a_slopes_interval_is_students():
    # y = x^1 times e^(1, -2, 1): slope 1, residuals 1, -2, 1 at log x = -1, 0, 1, so se = sqrt(6 / (1 * 2)).
    slope, low, high = asymptotics.fit_slope(np.exp([-1.0, 0.0, 1.0]), np.exp([0.0, -2.0, 2.0]))
    half = 12.7062047 * math.sqrt(3)
    assert (slope, low, high) == pytest.approx((1.0, 1 - half, 1 + half))


def test_few_points_have_no_interval_and_one_no_slope():
    slope, low, high = asymptotics.fit_slope(np.array([1.0, 10.0]), np.array([1.0, 100.0]))
    assert slope == pytest.approx(2)
    assert np.isnan([low, high]).all()
    assert np.isnan(asymptotics.fit_slope(np.array([3.0]), np.array([1.0]))).all()
    assert slope_text(math.nan, math.nan, math.nan) == "\N{EN DASH}"


def test_the_panels_draw_the_measured_against_k(tmp_path):
    _, results, layout = analysed(tmp_path)
    axes = panels(results, layout)
    assert list(axes) == ["gradient SNR", "gradient directional SNR", "gradient variance", "gradient magnitude"]
    k = np.array(PARTICLES, float)
    for estimator, (snr, rise, variance, fall) in POWERS.items():
        drawn = lines(axes["gradient SNR"])[estimator]
        assert drawn == pytest.approx(np.stack([k, snr * k**rise], 1))
        assert lines(axes["gradient variance"])[estimator] == pytest.approx(np.stack([k, variance * k**fall], 1))
    assert all(ax.get_xscale() == ax.get_yscale() == "log" for ax in axes.values())


def test_intervals_are_the_measurements_of_one_run_and_students_over_seeds(tmp_path):
    _, results, _ = analysed(tmp_path / "one", particles=[3])
    row = results.measured.set_index(["estimator", "metric"]).xs(("ovis-gamma1", "last:train:grads/snr"))
    assert row["high"] - row["mean"] == pytest.approx(1.959964 * 0.02 * row["mean"])
    _, results, _ = analysed(tmp_path / "two", particles=[3], seeds=2)
    row = results.measured.set_index(["estimator", "metric"]).xs(("ovis-gamma1", "last:train:grads/snr"))
    first = POWERS["ovis-gamma1"][0] * 3**0.5
    assert row["mean"] == pytest.approx(1.5 * first)
    assert row["high"] - row["mean"] == pytest.approx(12.7062047 * 0.5 * first)
    assert np.isnan(results.summary["se"]).sum() == 0


def test_guides_are_the_powers_that_theory_has(tmp_path):
    _, results, layout = analysed(tmp_path)
    axes = panels(results, layout)
    for label, powers in (("gradient SNR", (0.5, -0.5)), ("gradient variance", (-1.0, -3.0))):
        for power in powers:
            (x0, y0), (x1, y1) = lines(axes[label])[f"K^{power:g}"]
            assert math.log(y1 / y0) / math.log(x1 / x0) == pytest.approx(power)
    assert not any(label.startswith("K^") for label in lines(axes["gradient magnitude"]))


def test_published_values_stand_hollow_beside_ours_and_are_compared(tmp_path):
    _, results, layout = analysed(tmp_path)
    drawn = lines(panels(results, layout)["gradient SNR"])["ovis-gamma1, published"]
    assert drawn.tolist() == [[3, 3.16], [12, 6.61], [54, 13.6], [234, 28.1], [1000, 57.9]]
    compared = asymptotics.compare(results.measured, results.published, layout)
    assert len(compared) == (3 + 3 + 2) * 5
    row = compared[(compared["metric"] == "last:train:grads/variance") & (compared["K"] == 12)].set_index("estimator")
    ours = POWERS["pathwise-iwae"][2] / 12
    assert row.loc["pathwise-iwae", "ratio"] == pytest.approx(ours / 2.57e-4)
    assert row["scaled"].isna().all()
    for metric in ("last:train:grads/snr", "last:train:grads/dsnr"):
        assert np.log(compared[compared["metric"] == metric]["scaled"]).mean() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("change", [{"task__perturbation": 0.1}, {"model__scale": "variance"}, {"model__dim": 1}])
def test_another_study_has_no_published_values(tmp_path, change):
    rows = [(0, "train", "grads/snr", 1.0)]
    write_run(tmp_path / "study", "a", study_config("ovis-gamma1", [], 3, **change), rows)
    assert analyse(load("study", tmp_path), parse({"figures": "asymptotics"})).published.empty


def test_the_distribution_is_that_of_gradients_over_their_mean(tmp_path):
    study, results, layout = analysed(tmp_path, particles=[3, 1000])
    table = results.distribution
    assert table is not None
    assert len(table) == 2 * len(POWERS)
    row = table[(table["estimator"] == "ovis-gamma1") & (table["iw"] == 3)].iloc[0]
    with np.load(study.folder.job("toy-iw3-seed1").gradients) as file:
        expected = file["ovis-gamma1/replicates"] / file["ovis-gamma1/mean"]
    assert np.sort(row["ratios"]) == pytest.approx(np.sort(expected.ravel()))
    figure = distribution_figure(table, layout)
    assert [ax.get_title() for ax in figure.axes] == ["K = 3", "K = 1000"]
    x, _ = lines(figure.axes[0])["ovis-gamma1"].T
    assert (x.min(), x.max()) == pytest.approx(tuple(np.quantile(row["ratios"], [0.005, 0.995])))
    share = f"{100 * (row['ratios'] > 0).mean():.1f}%"
    assert share in [text.get_text() for text in figure.axes[0].texts]


def test_a_density_is_one_over_the_range_drawn_and_has_a_corner_at_zero():
    ratios = np.linspace(-1, 3, 4001)
    x, heights = density(ratios)
    assert np.trapezoid(heights, x) == pytest.approx(1)
    assert heights[1:-1] == pytest.approx(1 / (x[-1] - x[0]), rel=0.02)
    assert 0.0 in x
    assert density(np.ones(100))[0].tolist() == pytest.approx([0.99, 0.99, 1.01, 1.01])


def test_an_oracle_says_what_sign_is_right_and_parameters_without_one_are_left_out(tmp_path):
    study, results, _ = analysed(tmp_path, particles=[3])
    path = study.folder.job("toy-iw3-seed1").gradients
    with np.load(path) as file:
        arrays = dict(file)
    arrays["ovis-gamma1/oracle"] = np.array([-1.0, 0.0])
    arrays["ovis-gamma0/mean_se"] = np.abs(arrays["ovis-gamma0/mean"])
    np.savez(path, **arrays)
    table, warnings = gradients.distribution(study.jobs, results.runs, ["estimator"], study.folder)
    ratios = dict(zip(table["estimator"], table["ratios"], strict=True))
    assert warnings == []
    assert ratios["ovis-gamma1"] == pytest.approx(-arrays["ovis-gamma1/replicates"][:, 0])
    assert dict(zip(table["estimator"], table["unsigned"], strict=True)) == {
        "ovis-gamma1": 1,
        "ovis-gamma0": 2,
        "pathwise-iwae": 0,
    }
    assert ratios["ovis-gamma0"].size == 0
    assert math.isnan(gradients.right_signs(ratios["ovis-gamma0"]))


def test_single_parameters_are_drawn_against_k(tmp_path):
    _, results, layout = analysed(tmp_path)
    table = results.individual
    assert table is not None
    figure = individual_figure(table, layout)
    assert [ax.get_title() for ax in figure.axes] == ["b[0]", "b[1]", "", ""]
    snr, power, variance, fall = POWERS["ovis-gamma0"]
    k = np.array(PARTICLES, float)
    assert lines(figure.axes[0])["ovis-gamma0"] == pytest.approx(np.stack([k, snr * k**power], 1))
    assert lines(figure.axes[3])["ovis-gamma0"] == pytest.approx(np.stack([k, variance * k**fall], 1))
    row = table[(table["metric"] == "snr") & (table["iw"] == 3)].iloc[0]
    assert row["high"] - row["mean"] == pytest.approx(1.959964 * 0.02 * row["mean"])


def test_which_parameters_may_be_named_or_counted(tmp_path):
    gradient_study(tmp_path, particles=[3, 12])
    study = load("asymptotic", tmp_path)
    for which, names in (("b[1]", ["b[1]"]), (1, ["b[0]"]), (True, ["b[0]", "b[1]"])):
        table = analyse(study, parse({"draw_individual": which})).individual
        assert table is not None
        assert list(table["parameter"].unique()) == names
    with pytest.raises(UserError, match=r"draw_individual: no run has a parameter 'b\[2\]'"):
        analyse(study, parse({"draw_individual": ["b[2]"]}))


def test_options_of_single_parameters():
    assert override(Options(), {"draw_individual": "b[0],A[0,1]"}).draw_individual == ("b[0]", "A[0,1]")
    assert [parse({"draw_individual": value}).draw_individual for value in (False, True, 7, "7")] == [0, 5, 7, 7]
    for wrong in (26, -1, 1.5, [], [3], "26"):
        with pytest.raises(UserError, match="draw_individual: expected true, a number from 0 to 25"):
            parse({"draw_individual": wrong})


def test_what_is_drawn_against_k_needs_k_among_the_keys(tmp_path):
    gradient_study(tmp_path, particles=[3])
    with pytest.raises(UserError, match=r"figures: asymptotics: drawn against K, so keys must hold iw"):
        analyse(load("asymptotic", tmp_path), parse({"keys": ["estimator"], "figures": ["asymptotics"]}))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "no zip", "without"])
def test_a_missing_or_damaged_file_costs_its_figure_only(tmp_path, damage):
    gradient_study(tmp_path, particles=[3, 12])
    study = load("asymptotic", tmp_path)
    path = study.folder.job("toy-iw3-seed1").gradients
    if damage == "missing":
        path.unlink()
    elif damage == "without":
        np.savez(path, names=np.array(["b[0]"]))
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "no zip": b"x" * 100}[damage])
    results = analyse(study, parse(ASYMPTOTICS))
    assert results.distribution is not None
    assert results.individual is not None
    assert set(results.distribution["iw"]) == set(results.individual["iw"]) == {12}
    assert len(results.warnings) >= len(POWERS)
    assert all(warning.startswith("job toy-iw3-seed1: gradients.npz: ") for warning in results.warnings)
    assert len(results.measured) == 4 * 2 * len(POWERS)


def test_no_file_is_read_for_other_figures(tmp_path):
    _, results, _ = analysed(tmp_path, {"figures": ["asymptotics"]}, particles=[3])
    assert results.distribution is None
    assert results.individual is None


def test_a_report_of_a_gradient_study(tmp_path):
    gradient_study(tmp_path / "runs")
    command = [sys.executable, "report.py", "--exp=asymptotic", f"--root={tmp_path}/runs", f"--output={tmp_path}/out"]
    done = subprocess.run([*command, "--draw_individual", "b[1]"], capture_output=True, text=True, cwd=SOURCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "asymptotic: 5 done" in done.stdout
    made = tmp_path / "out" / "asymptotic"
    drawn = {path.name for path in made.iterdir() if path.suffix in (".png", ".pdf")}
    assert drawn == {
        f"{stem}.{kind}" for stem in ("asymptotics", "distribution", "individual") for kind in ("png", "pdf")
    }
    slopes = pd.read_csv(made / "slopes.csv").set_index(["estimator", "metric"])
    assert list(slopes.columns) == ["scene", "slope", "low", "high", "n"]
    for estimator, (_, rise, _, fall) in POWERS.items():
        assert slopes["slope"][estimator, "last:train:grads/snr"] == pytest.approx(rise)
        assert slopes["low"][estimator, "last:train:grads/variance"] == pytest.approx(fall)
        assert slopes["high"][estimator, "last:train:grads/variance"] == pytest.approx(fall)
    page = (made / "index.html").read_text()
    assert "Hollow: published by Liévin et al. 2020, Figure 1" in page
    assert "common factor" in page
    assert "<b>5</b> jobs" in page
    assert "single parameters (b[1])" in page
    assert len(pd.read_csv(made / "comparison.csv")) == 40
    assert set(pd.read_csv(made / "runs.csv")["id"]) >= {"toy-iw3-seed1@ovis-gamma0"}
