"""The league of estimators and its frontier."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation, Text

from estimators import registry
from reporting import league
from reporting.analyse import analyse
from reporting.gradient_figures import frontier_figure, pareto
from reporting.layout import arrange
from reporting.league import BIAS_Z, TIME, VARIANCE, WORK, League
from reporting.load import load
from reporting.options import parse
from tests.reporting.synthetic import SHAPES, zoo

SOURCE = Path(__file__).parents[2]
MANY = [*SHAPES, *(f"ovis-S{i}-exclusive" for i in range(1, 9)), *(f"ovis-gamma0.{i}" for i in range(1, 8))]


def leagues(root: Path, **more) -> list[League]:
    zoo(root, **more)
    results = analyse(
        load("zoo", root), parse({"keys": ["model", "estimator", "iw"], "figures": ["league", "frontier"]})
    )
    assert results.warnings == []
    return league.leagues(results.measured, arrange(results.runs, results.keys))


def test_a_league_for_each_model_in_order_of_work_normalised_variance(tmp_path):
    found = leagues(tmp_path)
    assert [each.scene for each in found] == ["model = gaussian_toy", "model = gmm"]
    for each in found:
        for entries in league.by_objective(each).values():
            work = [entry.values[WORK] for entry in entries]
            assert work == sorted(work)
        assert {entry.label for entry in each.entries} == set(SHAPES)
        assert each.columns == list(league.COLUMNS)


def test_the_best_of_each_column_is_marked_and_a_bias_of_many_errors_too(tmp_path):
    entries = leagues(tmp_path, models=["gmm"])[0].entries
    assert [entry.label for entry in entries if WORK in entry.best] == [entries[0].label]
    assert [entry.label for entry in entries if "grads/snr" in entry.best] == [list(SHAPES)[-1]]
    assert not any(BIAS_Z in entry.best for entry in entries)
    assert {entry.label for entry in entries if league.is_biased(entry)} == {"tvo-part5-beta2"}
    html = league.league_html(League("", list(league.COLUMNS), entries))
    assert '<span class="biased">12.0</span>' in html
    assert html.count("<b>") == sum(len(entry.best) for entry in entries)


def test_what_an_estimator_declares_is_its_familys():
    assert league._declared("vimco-geometric") == ("L_K", registry.declares("vimco-geometric"))
    assert league._declared("of-nobody") == ("", "")


def test_a_declared_unbiasedness_that_the_bias_speaks_against_is_a_warning(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"])
    assert league.contradictions([found]) == []
    entries = [entry._replace(values={**entry.values, BIAS_Z: 9.0}) for entry in found.entries]
    warnings = league.contradictions([found._replace(entries=entries)])
    assert any(warning.startswith("ovis-gamma0: declares 'unbiased'") for warning in warnings)
    assert not any(warning.startswith(("ovis-gamma1", "tvo", "wake-wake")) for warning in warnings)


def test_nothing_is_the_best_across_objectives_nor_among_the_biased(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"])
    groups = league.by_objective(found)
    assert set(groups) == {"L_K", "own Riemann sum", "wake phase"}
    assert not any(entry.best for name in ("own Riemann sum", "wake phase") for entry in groups[name])
    first = groups["L_K"][0]
    biased = first._replace(values={**first.values, BIAS_Z: 9.0, WORK: 0.0})
    marked = league._marked([biased, *groups["L_K"][1:]], found.columns)
    assert not marked[0].best
    assert WORK in marked[1].best


def test_what_declares_a_bias_is_never_the_best_even_where_none_was_found(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"], estimators=["ovis-gamma1", "ovis-gamma0", "nvil", "reinforce", "stl"])
    group = league.by_objective(found)["L_K"]
    assert not any(league.is_biased(entry) for entry in group)
    assert {entry.label for entry in league.competing(group, found.columns)} == {"ovis-gamma0", "reinforce"}
    assert {entry.label for entry in group if entry.best} <= {"ovis-gamma0", "reinforce"}


def test_an_estimator_has_one_number_in_all_leagues(tmp_path):
    numbers = [{entry.label: entry.number for entry in each.entries} for each in leagues(tmp_path)]
    assert numbers[0] == numbers[1]
    assert sorted(numbers[0].values()) == list(range(1, len(SHAPES) + 1))


def test_points_lie_at_time_and_variance_and_the_frontier_joins_the_best(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"])
    left, right = frontier_figure([found]).axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()) for line in left.get_lines()}
    for entry in found.entries:
        assert drawn[entry.label].tolist() == [[entry.values[TIME], entry.values[VARIANCE]]]
    rivals = league.competing(league.by_objective(found)["L_K"], found.columns)
    points = [(entry.values[TIME], entry.values[VARIANCE]) for entry in rivals]
    assert drawn["frontier of L_K"].tolist() == [list(point) for point in pareto(points)]
    bias = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in right.get_lines()}
    rows = [tick.get_text() for tick in right.get_yticklabels()]
    for entry in found.entries:
        assert bias[entry.label] == [[entry.values[BIAS_Z], rows.index(f"{entry.label}  {entry.number}")]]
    hollow = [line.get_label() for line in left.get_lines() if line.get_markerfacecolor() == "white"]
    assert hollow == ["tvo-part5-beta2"]


def test_equal_work_lies_on_the_dotted_lines(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"])
    dotted = [line for line in frontier_figure([found]).axes[0].get_lines() if line.get_linestyle() == ":"]
    assert dotted
    for line in dotted:
        work = np.prod(np.asarray(line.get_xydata()), axis=1) / 1e3
        assert work[0] == pytest.approx(work[1])
        assert np.log10(work[0]) == pytest.approx(round(np.log10(work[0])))


def test_no_two_numbers_of_many_estimators_overlap_nor_cover_a_point(tmp_path):
    (found,) = leagues(tmp_path, estimators=MANY, models=["gmm"])
    assert len(found.entries) == 25
    crowd = [  # all in one corner
        entry._replace(values={**entry.values, TIME: 2 + 0.02 * (i % 5), VARIANCE: 1 + 0.03 * (i // 5)})
        for i, entry in enumerate(found.entries)
    ]
    crowd[-1] = crowd[-1]._replace(values={**crowd[-1].values, TIME: 50.0, VARIANCE: 30.0})
    for entries in (found.entries, crowd):
        figure = frontier_figure([found._replace(entries=entries)])
        figure.draw_without_rendering()
        ax = figure.axes[0]
        numbers = [text for text in ax.texts if isinstance(text, Annotation) and text.get_text().isdecimal()]
        assert sorted(int(text.get_text()) for text in numbers) == list(range(1, 26))
        texts = [Text.get_window_extent(text) for text in numbers]  # without the line to the point
        overlaps = [(i, j) for i in range(25) for j in range(i) if texts[i].overlaps(texts[j])]
        assert overlaps == []
        centres = [ax.transData.transform((entry.values[TIME], entry.values[VARIANCE])) for entry in entries]
        assert not any(box.contains(*centre) for box in texts for centre in centres)


def test_the_colours_of_a_league_are_all_different(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"])
    assert len({entry.look.colour for entry in found.entries}) == len(found.entries)


def test_a_league_without_times_or_bias_is_ranked_by_variance(tmp_path):
    (found,) = leagues(tmp_path, models=["gmm"])
    entries = [entry._replace(values={VARIANCE: entry.values[VARIANCE]}) for entry in found.entries]
    assert frontier_figure([League("", [VARIANCE], entries)]).axes[1].get_xlabel() == "gradient variance"


def test_a_report_of_the_zoo(tmp_path):
    zoo(tmp_path / "runs")
    command = [sys.executable, "report.py", "--exp=zoo", f"--root={tmp_path}/runs", f"--output={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "zoo: 2 done" in done.stdout
    made = tmp_path / "out" / "zoo"
    assert (made / "frontier.png").is_file()
    table = pd.read_csv(made / "league.csv")
    assert len(table) == 2 * len(SHAPES)
    assert set(table["scene"]) == {"model = gmm", "model = gaussian_toy"}
    tex = (made / "league.tex").read_text()
    assert tex.count("\\begin{tabular}") == 2
    assert "\\mathbf{" in tex
    page = (made / "index.html").read_text()
    assert "<h2>League</h2>" in page
