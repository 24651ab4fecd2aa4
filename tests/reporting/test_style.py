import numpy as np
import pytest
from matplotlib.figure import Figure

from reporting import style


def test_an_estimator_keeps_its_look_whatever_stands_beside_it():
    alone = style.looks(["ovis-gamma1"])["ovis-gamma1"]
    among = style.looks(["ovis-gamma1", "reinforce", "mine", "tvo-part50-beta10"])["ovis-gamma1"]
    assert alone == among == style.Look(*style.PALETTE["ovis-gamma1"])
    assert style.looks(["mine", "reinforce"])["mine"] == style.looks(["mine"])["mine"]


def test_no_two_of_a_figure_look_the_same():
    assert len(set(style.PALETTE.values())) == len(style.PALETTE)
    names = [*style.PALETTE, *(f"my-estimator{i}" for i in range(80))]
    looks = style.looks(names)
    assert list(looks) == sorted(looks, key=style.natural)
    assert len(set(looks.values())) == len(names)


def test_unknown_names_take_other_colours_while_there_are_any():
    looks = style.looks([f"mine{i}" for i in range(len(style.SPARE_COLOURS))])
    assert len({look.colour for look in looks.values()}) == len(style.SPARE_COLOURS)


@pytest.mark.parametrize(
    ("name", "values", "logarithmic"),
    [
        ("grads/snr", [0.1, 2.0], True),
        ("grads/snr", [1.0, 2.0], False),
        ("grads/snr", [0.0, 2.0], False),
        ("grads/bias", [-1.0, 20.0], False),
        ("loss/nll", [1.0, 100.0], False),
        ("gmm/posterior_mse", [0.01, 1.0], True),
        ("gmm/posterior_mse", [], False),
    ],
)
def test_which_axes_are_logarithmic(name, values, logarithmic):
    assert style.is_logarithmic(name, np.array(values), spread=10) is logarithmic


def test_limits_show_means_whole_and_wide_intervals_in_part():
    means = np.array([1.0, 2.0])
    low, high = style.limits(False, means, np.array([0.9, 2.1]), 0.35)
    assert low < 0.9
    assert high > 2.1
    low, high = style.limits(False, means, np.array([-50.0, 50.0]), 0.35)
    assert -0.5 < low < 1
    assert 2 < high < 3.5
    low, high = style.limits(True, np.array([0.01, 1.0]), np.array([-3.0, 2.0]), 0.35)
    assert 0.001 < low < 0.01
    assert 1 < high < 10


@pytest.mark.parametrize("logarithmic", [True, False])
def test_limits_of_a_single_value_are_a_range(logarithmic):
    low, high = style.limits(logarithmic, np.array([0.5]), np.array([]), 0.35)
    assert low < 0.5 < high


def test_metrics_are_named_with_their_units():
    assert style.axis_label("loss/L_k") == "importance-weighted bound (nats)"
    assert style.axis_label("loss/mine") == "loss/mine (nats)"
    assert style.axis_label("gmm/posterior_mse") == "posterior error (L2 norm)"
    assert style.axis_label("snr/p95") == "gradient SNR, 95th percentile"
    assert style.tall_label("grads/snr", "train") == "gradient SNR\n(train)"


def test_near_colours_of_related_estimators_have_other_markers():
    for gamma in (0, 1):
        looks = style.looks([f"ovis-{mean}gamma{gamma}" for mean in ("", "arithmetic-", "geometric-")])
        assert len({look.marker for look in looks.values()}) == 3


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.14, 0.38, [0.15, 0.2, 0.25, 0.3, 0.35]),
        (0.14, 0.62, [0.2, 0.3, 0.4, 0.5, 0.6]),
        (0.14, 21.0, [0.2, 0.5, 1, 2, 5, 10, 20]),
    ],
)
def test_a_logarithmic_axis_has_ticks_enough(low, high, ticks):
    ax = Figure().subplots()
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    style.set_logarithmic(ax.yaxis, low, high)
    drawn = [float(tick) for tick in ax.yaxis.get_majorticklocs() if low <= tick <= high]
    assert drawn == pytest.approx(ticks)


def test_a_wide_logarithmic_axis_has_room_for_its_numbers_side_by_side():
    ax = Figure().subplots()
    ax.set_xscale("log")
    ax.set_xlim(0.0006, 0.17)
    style.set_logarithmic(ax.xaxis, 0.0006, 0.17)
    drawn = [float(tick) for tick in ax.xaxis.get_majorticklocs() if 0.0006 <= tick <= 0.17]
    assert drawn == pytest.approx([0.001, 0.003, 0.01, 0.03, 0.1])
