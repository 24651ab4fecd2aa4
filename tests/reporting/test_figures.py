import io
import math
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from reporting import aggregate, style
from reporting.figures import curves_figure, pivot_figure
from reporting.layout import Layout, arrange
from reporting.load import Job, flatten
from reporting.options import Metric, PivotMetric
from tests.reporting.synthetic import config

SNR = Metric("train", "grads/snr")
LOSS = Metric("test", "loss/L_k")
KEYS = {"estimator": "estimator", "iw": "estimator.iw"}
NO_PUBLISHED = pd.DataFrame(columns=["metric", "estimator", "iw", "value", "source"])


@pytest.fixture(autouse=True)
def report_style() -> Iterator[None]:
    with mpl.rc_context(style.RC):
        yield


def layout(estimators=("reinforce", "ovis-gamma1"), particles=(5, 20), keys=KEYS, **varied) -> Layout:
    more = [{name: value} for name, values in varied.items() for value in values] or [{}]
    jobs = [
        Job(f"{estimator}-{iw}-{i}", "done", flatten(config(estimator, iw, **settings)), started=True)
        for estimator in estimators
        for iw in particles
        for i, settings in enumerate(more)
    ]
    return arrange(aggregate.tabulate(jobs, keys)[0], keys)


def curve_table(
    metric: Metric, estimators=("reinforce", "ovis-gamma1"), particles=(5, 20), n=3, **column
) -> pd.DataFrame:
    """Means 1, 2, 3 at steps 0, 10, 20, times ten to the place of the estimator, with intervals of 20% about them."""
    rows = [
        {
            "estimator": estimator,
            "iw": iw,
            "metric": str(metric),
            "step": 10 * i,
            "n": n,
            "mean": scale * (i + 1),
            **column,
        }
        for scale, estimator in zip((1, 10, 100), estimators, strict=False)
        for iw in particles
        for i in range(3)
    ]
    table = pd.DataFrame(rows)
    spread = 0.2 * table["mean"] if n > 1 else math.nan
    table = table.assign(low=table["mean"] - spread, high=table["mean"] + spread)
    return table.astype({"estimator": "category", "iw": "category"})


def lines(ax: Axes) -> dict[str, list[list[float]]]:
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in ax.get_lines()}


def error_bars(ax: Axes) -> list[Any]:
    return [bars.lines[2][0].get_segments() for bars in ax.containers if isinstance(bars, ErrorbarContainer)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_curves_draw_the_means_a_panel_for_each_k():
    figure = curves_figure(curve_table(SNR), [SNR], layout(), {})
    assert [ax.get_title() for ax in figure.axes] == ["K = 5", "K = 20"]
    for ax in figure.axes:
        assert lines(ax) == {
            "reinforce": [[0, 1], [10, 2], [20, 3]],
            "ovis-gamma1": [[0, 10], [10, 20], [20, 30]],
        }
        assert ax.get_xlabel() == "training step"
    assert figure.axes[0].get_ylabel() == "gradient SNR\n(train)"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert sorted(legend(figure)) == ["ovis-gamma1", "reinforce"]


def test_a_band_spans_the_interval_and_a_single_seed_has_none():
    ax = curves_figure(curve_table(SNR, ["reinforce"], [5]), [SNR], layout(), {}).axes[0]
    (band,) = ax.collections
    corners = {(x, round(y, 6)) for x, y in np.asarray(band.get_paths()[0].vertices).tolist()}
    assert corners == {(0, 0.8), (0, 1.2), (10, 1.6), (10, 2.4), (20, 2.4), (20, 3.6)}
    single = curves_figure(curve_table(SNR, ["reinforce"], [5], n=1), [SNR], layout(), {}).axes[0]
    assert all(len(band.get_paths()) == 0 for band in single.collections)


def test_estimators_have_their_colour_and_marker_in_every_panel_and_in_the_legend():
    figure = curves_figure(curve_table(SNR), [SNR], layout(), {})
    drawn = [line for ax in figure.axes for line in ax.get_lines()] + figure.legends[0].get_lines()
    for line in drawn:
        assert (to_hex(line.get_color()), line.get_marker()) == style.PALETTE[str(line.get_label())]


def test_positive_metrics_over_decades_are_logarithmic_and_losses_never():
    assert curves_figure(curve_table(SNR), [SNR], layout(), {}).axes[0].get_yscale() == "log"
    assert curves_figure(curve_table(SNR, ["reinforce"]), [SNR], layout(), {}).axes[0].get_yscale() == "linear"
    assert curves_figure(curve_table(LOSS), [LOSS], layout(), {}).axes[0].get_yscale() == "linear"


def test_ylims_are_obeyed():
    figure = curves_figure(curve_table(LOSS), [LOSS], layout(), {LOSS: (-94.0, -88.0)})
    assert all(ax.get_ylim() == (-94, -88) for ax in figure.axes)


def test_limits_of_decades_make_an_axis_logarithmic():
    """Whatever the values span; limits of less, and those of losses, leave an axis as the values make it."""
    close = curve_table(SNR).assign(mean=2.0)
    for limits, scale in (((0.3, 1e4), "log"), ((0.3, 10.0), "linear"), ((0.0, 1e4), "linear")):
        figure = curves_figure(close, [SNR], layout(), {SNR: limits})
        assert {ax.get_yscale() for ax in figure.axes} == {scale}
        assert all(ax.get_ylim() == limits for ax in figure.axes)


def test_a_grid_has_a_row_for_each_metric_and_long_rows_are_folded():
    both = pd.concat([curve_table(SNR), curve_table(LOSS)])
    figure = curves_figure(both, [SNR, LOSS], layout(), {})
    assert [ax.get_ylabel().split("\n")[0] for ax in figure.axes] == [
        "gradient SNR",
        "",
        "importance-weighted",
        "",
    ]
    many = tuple(range(2, 9))
    folded = curves_figure(curve_table(SNR, particles=many), [SNR], layout(particles=many), {})
    assert [ax.get_title() for ax in folded.axes if ax.axison] == [f"K = {k}" for k in many]


def test_what_has_no_data_yet_leaves_its_panel_empty():
    table = curve_table(SNR)
    table = pd.concat(
        [table[(table["estimator"] == "reinforce") | (table["iw"] == 5)], curve_table(LOSS, particles=[5])]
    )
    table = table.astype({"estimator": "category", "iw": "category"})
    figure = curves_figure(table, [SNR, LOSS], layout(), {})
    assert [len(ax.get_lines()) for ax in figure.axes] == [2, 1, 2, 0]


def test_another_key_is_told_by_the_line_style():
    keys = {**KEYS, "lr": "optimizer.lr"}
    arranged = layout(keys=keys, optimizer__lr=[0.1, 0.01])
    table = pd.concat([curve_table(SNR, lr=0.1), curve_table(SNR, lr=0.01)])
    table = table.astype({"estimator": "category", "iw": "category", "lr": "category"})
    ax = curves_figure(table, [SNR], arranged, {}).axes[0]
    assert {
        str(line.get_label()): line.get_linestyle() for line in ax.get_lines() if "ovis" in str(line.get_label())
    } == {
        "ovis-gamma1, lr 0.01": "-",
        "ovis-gamma1, lr 0.1": "--",
    }


def pivot_table(metric: PivotMetric, particles=(5, 20), n=3) -> pd.DataFrame:
    table = curve_table(SNR, particles=particles, n=n)
    table = table[table["step"] == 10].assign(metric=pd.Categorical([str(metric)] * 2 * len(particles)))
    return table.drop(columns="step")


MEAN = PivotMetric("mean", SNR)
THEIRS = pd.DataFrame(
    [(str(MEAN), "reinforce", 5, 0.05, "them"), (str(MEAN), "reinforce", 20, 0.04, "them")],
    columns=NO_PUBLISHED.columns,
)


def test_the_pivot_is_drawn_against_k_with_error_bars():
    figure = pivot_figure(pivot_table(MEAN), [MEAN], layout(), {}, NO_PUBLISHED)
    (ax,) = figure.axes
    drawn = lines(ax)
    assert drawn["reinforce"] == [[5, 2], [20, 2]]
    assert drawn["ovis-gamma1"] == [[5, 20], [20, 20]]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xticks().tolist() == [5, 20]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of particles K", "gradient SNR")
    assert ax.get_title() == "mean over training (train)"
    bars = [segment.tolist() for segments in error_bars(ax) for segment in segments]
    assert sorted(bars)[0] == pytest.approx(np.array([[5, 2 * math.exp(-0.2)], [5, 2 * math.exp(0.2)]]))


def test_error_bars_of_estimators_at_one_k_lie_side_by_side_within_the_axis():
    figure = pivot_figure(pivot_table(MEAN), [MEAN], layout(), {}, THEIRS)
    (ax,) = figure.axes
    figure.savefig(io.BytesIO())
    places = {str(line.get_label()): line.get_transform().transform(line.get_xydata())[:, 0] for line in ax.get_lines()}
    apart = places["reinforce"] - places["ovis-gamma1"]
    assert apart == pytest.approx(np.full(2, apart[0]))
    assert 2 < abs(apart[0]) * 72 / figure.dpi < 4
    bars = [container.lines[2][0] for container in ax.containers if isinstance(container, ErrorbarContainer)]
    at = {round(bar.get_transform().transform(bar.get_segments()[0])[0, 0], 3) for bar in bars}
    assert at == {round(places[name][0], 3) for name in ("reinforce", "ovis-gamma1")}
    assert ax.bbox.x0 < min(map(min, places.values()))
    assert ax.bbox.x1 > max(map(max, places.values()))


def test_published_values_stand_beside_ours_hollow_and_dashed():
    figure = pivot_figure(pivot_table(MEAN), [MEAN], layout(), {}, THEIRS)
    theirs = {str(line.get_label()): line for line in figure.axes[0].get_lines()}["reinforce, published"]
    assert np.asarray(theirs.get_xydata()).tolist() == [[5, 0.05], [20, 0.04]]
    assert theirs.get_markerfacecolor() == "white"
    assert theirs.get_linestyle() == "--"
    assert to_hex(theirs.get_color()) == style.PALETTE["reinforce"][0]
    assert figure.axes[0].get_ylim()[0] < 0.04
    assert "published" in legend(figure)


def test_with_one_k_the_pivot_is_drawn_by_name():
    figure = pivot_figure(pivot_table(MEAN, [5]), [MEAN], layout(particles=[5]), {}, THEIRS[:1])
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ovis-gamma1", "reinforce"]
    drawn = lines(ax)
    assert drawn["reinforce"] == [[2, 1]]
    assert drawn["ovis-gamma1"] == [[20, 0]]
    assert drawn["reinforce, published"] == [[0.05, 1]]
    assert ax.get_xscale() == "log"
    assert legend(figure) == ["published"]


def test_single_seeds_have_no_error_bars():
    ax = pivot_figure(pivot_table(MEAN, n=1), [MEAN], layout(), {}, NO_PUBLISHED).axes[0]
    assert error_bars(ax) == [[], []]


def test_legends_stand_below_the_panels():
    figure = curves_figure(curve_table(SNR), [SNR], layout(), {})
    figure.draw_without_rendering()
    top = figure.legends[0].get_window_extent().y1
    bottoms = [box.y0 for ax in figure.axes if (box := ax.get_tightbbox())]
    assert len(bottoms) == 2
    assert top <= min(bottoms)


def test_without_keys_all_runs_are_one_curve():
    table = curve_table(SNR, ["reinforce"], [5]).drop(columns=["estimator", "iw"])
    runs, _ = aggregate.tabulate([Job("a", "done", flatten(config()), started=True)], {})
    assert list(lines(curves_figure(table, [SNR], arrange(runs, {}), {}).axes[0]).values()) == [
        [[0, 1], [10, 2], [20, 3]]
    ]
