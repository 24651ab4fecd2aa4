"""Studies of training: every K in one panel, published values of longer runs, and keys that others decide."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from orchestration.experiment import EXPERIMENTS, expand
from orchestration.experiment import load as load_experiment
from report import main
from reporting import style
from reporting.analyse import Results, analyse
from reporting.figures import pivot_figure, together_figure, without_start
from reporting.layout import Layout, arrange
from reporting.load import load
from reporting.options import Metric, parse
from reporting.tables import lay_out
from tests.reporting.synthetic import Row, config, write_experiment, write_run

BOUND = Metric("train", "loss/L_k")
# Estimator and tag of each curve, whether alpha warms up, and where the bound ends at K = 5.
CURVES = {
    ("ovis-gamma1", "iwbound"): -90.1,
    ("vimco-arithmetic", "iwbound"): -90.4,
    ("ovis-gamma1", "iwrbound"): -88.2,
    ("tvo-part2-config1", "tvo"): -88.8,
}
STUDY = yaml.safe_load((EXPERIMENTS / "sigmoid-belief-network.yaml").read_text())
REPORT = {key: STUDY["report"][key] for key in ("keys", "figures")}
REPORT |= {"metrics": ["train:loss/L_k"], "pivot_metrics": ["max:train:loss/L_k"]}


def sbn_config(estimator: str, tag: str, iw: int, seed: int, **more: Any) -> dict[str, Any]:
    """Return the configuration of a run of the published study."""
    settings = config(estimator, iw, seed, steps=4000000, tag=tag, batch_size=24, optimizer__lr=3e-4)
    settings["choices"] |= {"model": "sbn", "dataset": "binarized_mnist"}
    warm = {"warmup_alpha": 0.99, "warmup_steps": 1000000} if tag == "iwrbound" else {"warmup_alpha": None}
    settings["task"] = {"target": "tasks.train.run", "epochs": None, "warmup_scale": "log", "warmup_steps": 0} | warm
    settings["model"] = {"latents": [200, 200, 200], "hidden": []}
    settings["evaluation"] = {"iw": 5000, "points": 10000}
    return settings | more


def write_study(root: Path, particles=(5, 10, 50), seeds: int = 3, report=None, **more: Any) -> None:
    """Write bounds that rise from -540 to their ends, half a nat apart by seed and 1 nat higher for each next K."""
    folder = root / "study"
    steps = more.get("steps", 4000000)
    for (estimator, tag), end in CURVES.items():
        for place, iw in enumerate(particles):
            for seed in range(1, seeds + 1):
                rows: list[Row] = [
                    (i * steps // 20, "train", "loss/L_k", end + place - 450 * math.exp(-2 * i) + 0.5 * (seed - 2))
                    for i in range(21)
                ]
                write_run(folder, f"{tag}-{estimator}-{iw}-{seed}", sbn_config(estimator, tag, iw, seed, **more), rows)
    write_experiment(folder, report or REPORT)


def study(root: Path, **options: Any) -> tuple[Results, Layout]:
    results = analyse(load("study", root), parse({**REPORT, **options}))
    return results, arrange(results.runs, results.keys)


def together(root: Path, ylims=None, **options: Any) -> list[Axes]:
    results, layout = study(root, **options)
    with mpl.rc_context(style.RC):
        figure = together_figure(results.means, BOUND, layout, ylims or {})
        figure.draw_without_rendering()
    return [ax for ax in figure.axes if ax.axison]


def test_every_k_is_in_one_panel_and_told_by_the_line_style(tmp_path):
    write_study(tmp_path)
    (ax,) = together(tmp_path, include=["iwbound"])
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    names = ("ovis-gamma1", "vimco-arithmetic")
    assert set(lines) == {f"{name}, K = {k}" for name in names for k in (5, 10, 50)}
    for label, line in lines.items():
        name, k = label.split(", K = ")
        assert (to_hex(line.get_color()), line.get_marker()) == style.PALETTE[name]
        assert line.get_linestyle() == {"50": "-", "10": "--", "5": ":"}[k] or line.is_dashed()
        assert np.asarray(line.get_xdata()).tolist() == list(range(0, 4000001, 200000))
        end = CURVES[name, "iwbound"] + {"5": 0, "10": 1, "50": 2}[k]
        assert np.asarray(line.get_ydata())[-1] == pytest.approx(end), "the mean over seeds"
    patterns = {str(vars(line)["_unscaled_dash_pattern"]) for line in lines.values()}
    assert len(patterns) == 3
    assert ax.get_ylabel() == "importance-weighted bound (nats), train"
    assert ax.get_title() == ""


def test_the_legend_names_estimators_and_ks_below_the_panels(tmp_path):
    write_study(tmp_path)
    results, layout = study(tmp_path)
    figure = together_figure(results.means, BOUND, layout, {})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    entries = [text.get_text() for text in legend.get_texts()]
    assert sorted(entries) == sorted(
        ["ovis-gamma1", "vimco-arithmetic", "tvo-part2-config1", "K = 5", "K = 10", "K = 50"]
    )
    bottoms = [box.y0 for ax in figure.axes if (box := ax.get_tightbbox())]
    assert legend.get_window_extent().y1 <= min(bottoms)


def test_other_keys_have_panels_and_share_the_axis(tmp_path):
    write_study(tmp_path)
    axes = together(tmp_path)
    assert [ax.get_title() for ax in axes] == ["tag = iwbound", "tag = iwrbound", "tag = tvo"]
    assert [len(ax.get_lines()) for ax in axes] == [6, 3, 3]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axes}) == 1


def test_what_the_estimator_decides_is_not_told(tmp_path):
    write_study(tmp_path)
    assert study(tmp_path)[1].series == ("estimator", "tag")
    (ax,) = together(tmp_path, include=["iwrbound", "tvo"])
    labels = {str(line.get_label()) for line in ax.get_lines()}
    assert labels == {f"{name}, K = {k}" for name in ("ovis-gamma1", "tvo-part2-config1") for k in (5, 10, 50)}


def test_bands_span_the_interval_over_seeds(tmp_path):
    write_study(tmp_path, particles=(5,))
    (ax,) = together(tmp_path, include=["vimco-arithmetic"])
    assert ax.get_title() == "K = 5", "told nowhere else"
    (band,) = ax.collections
    last = [y for x, y in np.asarray(band.get_paths()[0].vertices).tolist() if x == 4000000]
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert (min(last), max(last)) == (pytest.approx(-90.4 - half), pytest.approx(-90.4 + half))


def test_the_start_of_training_does_not_flatten_the_rest(tmp_path):
    write_study(tmp_path)
    (ax,) = together(tmp_path, include=["iwbound"])
    low, high = ax.get_ylim()
    assert -110 < low < -90.4
    assert -88.1 < high < -85
    (fixed,) = together(tmp_path, {BOUND: (-94.0, -88.0)}, include=["iwbound"])
    assert fixed.get_ylim() == (-94, -88)


def test_only_a_steep_start_is_left_out():
    def table(means):
        return pd.DataFrame({"step": [100 * i for i in range(len(means))], "mean": means})

    steep, slow = table([-500.0, -100.0, -98.0, -97.0, -96.0]), table([-5.0, -4.0, -3.0, -2.0, -1.0])
    assert without_start(BOUND, steep)["mean"].tolist() == [-100, -98, -97, -96]
    assert without_start(BOUND, slow) is slow
    flat = table([-5.0, -1.0, -1.0, -1.0])
    assert without_start(BOUND, flat) is flat, "nothing would be left to see"
    snr = table([100.0, 1.0, 0.9, 0.8])
    assert without_start(Metric("train", "grads/snr"), snr) is snr, "a logarithmic axis has room for it"


def test_published_values_go_with_the_runs_of_their_settings(tmp_path):
    write_study(tmp_path)
    results, _ = study(tmp_path)
    found = results.published.set_index(["estimator", "tag", "iw"])["value"].to_dict()
    assert found["ovis-gamma1", "iwbound", 5] == -90.13
    assert found["ovis-gamma1", "iwrbound", 5] == -88.17
    assert found["tvo-part2-config1", "tvo", 50] == -87.01
    assert ("vimco-arithmetic", "iwbound", 50) not in found, "it was not published"
    assert set(results.published["unlike"]) == {""}


def test_published_values_of_longer_runs_are_marked(tmp_path):
    write_study(tmp_path, steps=100000, evaluation={"iw": 100, "points": 1000})
    results, layout = study(tmp_path)
    assert set(results.published["unlike"]) == {"4M steps, evaluation.iw 5000"}
    assert results.published["source"].str.contains("there 4M steps").all()
    figure = pivot_figure(results.summary, results.options.pivot_metrics, layout, {}, results.published)
    (legend,) = figure.legends
    assert "published (4M steps, evaluation.iw 5000)" in [text.get_text() for text in legend.get_texts()]
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in figure.axes[0].get_lines()}
    assert sorted(drawn["ovis-gamma1, tag iwbound, published"]) == [[5, -90.13], [10, -88.17], [50, -86.72]]
    assert sorted(drawn["ovis-gamma1, tag iwrbound, published"]) == [[5, -88.17], [10, -87.55], [50, -86.68]]


def test_published_values_of_one_estimator_at_two_alphas(tmp_path):
    settings = {"model": {"latent": "normal", "latents": 200, "hidden": [200, 200]}}
    for alpha in (0.0, 0.7):
        run = sbn_config("ovis-gamma1", "", 5, 1, **settings)
        run["estimator"]["alpha"] = alpha
        run["choices"]["model"] = "vae"
        write_run(tmp_path / "study", f"vae-{alpha}", run, [(i, "train", "loss/L_k", -90.0) for i in range(2)])
    write_experiment(tmp_path / "study", REPORT | {"keys": ["estimator", "alpha", "iw"]})
    results, layout = study(tmp_path, keys=["estimator", "alpha", "iw"])
    assert results.published.set_index("alpha")["value"].to_dict() == {0.0: -87.81, 0.7: -87.11}
    (table,) = lay_out(results.summary, ["estimator", "alpha", "iw"], layout, results.published)
    assert [(names, cells[0].published) for names, cells in table.rows if cells[0]] == [
        (["0.0"], "-87.81"),
        (["0.7"], "-87.11"),
    ]


@pytest.mark.parametrize(
    "other", [{"batch_size": 100}, {"optimizer": {"lr": 1e-3}}, {"model": {"latents": [50, 50], "hidden": []}}]
)
def test_other_settings_have_no_published_values(tmp_path, other):
    write_study(tmp_path, particles=(5,), seeds=1, **other)
    assert study(tmp_path)[0].published.empty


def test_the_report_of_a_bound(tmp_path, capsys):
    write_study(tmp_path, particles=(5, 50), seeds=2)
    flags = ["--exp", "study", "--root", str(tmp_path), "--output", str(tmp_path / "reports"), "--include", "iwbound"]
    assert main([*flags, "--figures", "together,pivot", "--ylims", "train:loss/L_k:-94:-88"]) == 0
    folder = tmp_path / "reports" / "study-inc=iwbound"
    assert (folder / "together-train-loss-L_k.png").exists()
    page = (folder / "index.html").read_text()
    assert "published -90.13" in page
    assert "The start of training lies outside" not in page, "the limits were given"
    assert main([*flags, "--figures", "together"]) == 0
    assert "The start of training lies outside the axes." in (folder / "index.html").read_text()
    assert main([*flags[:-1], "nothing"]) == 2
    assert "names no job" in capsys.readouterr().err


STUDIES = sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))


@pytest.mark.parametrize("name", STUDIES)
def test_the_experiment_expands_and_its_report_can_be_read(name):
    experiment = load_experiment(name)
    jobs = expand(experiment)
    assert jobs
    assert parse(experiment.report, name)
    estimators = {id for job in jobs for id in (job.choices["estimator"], *job.config["task"].get("compare", []))}
    assert estimators <= style.PALETTE.keys(), "a colour for good, whatever stands beside it"
