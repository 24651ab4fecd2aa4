"""The figures of DiCE's studies: what stands in which panel, and that a report draws them."""

import numpy as np
import pytest

import report
from reporting.analyse import analyse
from reporting.dice_figures import returns_figure, samples_figure
from reporting.layout import arrange
from reporting.load import load
from reporting.options import parse
from tests.reporting import synthetic

ERROR, CORRELATION = "train:gradient/error", "train:gradient/correlation"
RETURN, FINAL = "test:game/return", "last:test:game/final_return"


def without_model(seed, **options):
    settings = synthetic.config(iw=10, seed=seed, steps=200, batch_size=64, optimizer__lr=0.2)
    settings["choices"] |= {"task": "prisoners_dilemma", "model": None, "dataset": None}
    del settings["model"], settings["dataset"]
    return settings | {"task": {"target": "x", "rounds": 150, "inner_lr": 0.3, **options}}


@pytest.fixture
def derivatives(tmp_path):
    report_section = {"keys": ["task.baseline"], "figures": ["samples"], "metrics": [ERROR, CORRELATION]}
    synthetic.write_experiment(tmp_path / "mine", report_section)
    for baseline, level in (("none", 3.0), ("loaded", 1.0)):
        for seed in (1, 2, 3):
            rows = [
                row
                for samples in (100, 1000, 10000)
                for row in (
                    (samples, "train", "gradient/error", level * (1 + 0.1 * seed) / samples**0.5),
                    (samples, "train", "gradient/correlation", 1 - level / samples**0.5),
                )
            ]
            synthetic.write_run(tmp_path / "mine", f"{baseline}{seed}", without_model(seed, baseline=baseline), rows)
    return tmp_path


def analysed(root):
    study = load("mine", root)
    results = analyse(study, parse(study.report))
    return results, arrange(results.runs, results.keys)


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_errors_fall_beside_the_guide_and_correlations_stay_below_one(derivatives):
    results, layout = analysed(derivatives)
    figure = samples_figure(results.means, results.options.metrics, layout)
    errors, correlations = figure.axes
    assert (errors.get_xscale(), errors.get_yscale()) == ("log", "log")
    assert (correlations.get_xscale(), correlations.get_yscale()) == ("log", "linear")
    assert set(lines(errors)) == {"none", "loaded", "N^-1/2"}
    guide, lowest = lines(errors)["N^-1/2"], lines(errors)["loaded"]
    slope = np.polyfit(np.log(guide.get_xdata()), np.log(guide.get_ydata()), 1)[0]
    assert slope == pytest.approx(-0.5)
    assert (guide.get_ydata() < lowest.get_ydata()).all()
    low, high = errors.get_ylim()
    assert low < guide.get_ydata().min()
    assert high > lines(errors)["none"].get_ydata().max()
    assert [text.get_text() for text in figure.legends[0].texts] == ["loaded", "none", "$N^{-1/2}$"]


@pytest.fixture
def game(tmp_path):
    section = {"keys": ["task.learner", "task.gradients"], "figures": ["returns", "pivot"], "metrics": [RETURN]}
    synthetic.write_experiment(tmp_path / "mine", section | {"pivot_metrics": [FINAL]})
    for learner, last in (("naive", -2.0), ("lola-1", -1.1)):
        for gradients in ("values", "exact"):
            for seed in (1, 2):
                rows = [(i, "test", "game/return", -1.5 + (last + 1.5) * i / 200 + seed / 100) for i in range(1, 201)]
                rows.append((200, "test", "game/final_return", last))
                settings = without_model(seed, learner=learner, gradients=gradients)
                synthetic.write_run(tmp_path / "mine", f"{learner}{gradients}{seed}", settings, rows)
    return tmp_path


def test_returns_have_a_panel_for_each_kind_of_gradient_and_the_published_beside_samples(game):
    results, layout = analysed(game)
    metric = results.options.metrics[0]
    figure = returns_figure(results.means, metric, layout, results.published)
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == ["task.gradients = exact", "task.gradients = values"]
    assert set(lines(panels["task.gradients = exact"])) == {"naive", "lola-1"}
    marks = lines(panels["task.gradients = values"])
    assert set(marks) == {"naive", "lola-1", "naive, published", "lola-1, published"}
    assert list(marks["lola-1, published"].get_ydata()) == [-1.18]
    assert marks["lola-1, published"].get_color() == marks["lola-1"].get_color()
    assert "published" in [text.get_text() for text in figure.legends[0].texts]


@pytest.mark.parametrize(("study", "stem"), [("derivatives", "samples"), ("game", "returns")])
def test_a_report_draws_them(request, study, stem, tmp_path):
    root = request.getfixturevalue(study)
    assert report.main(["--exp", "mine", "--root", str(root), "--output", str(tmp_path / "out")]) == 0
    (page,) = (tmp_path / "out").rglob("index.html")
    assert (page.parent / f"{stem}.png").exists()
    assert "95% intervals" in page.read_text()
