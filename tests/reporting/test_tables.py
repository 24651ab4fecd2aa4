import math

import pandas as pd
import pytest

from reporting import tables
from reporting.layout import Layout
from reporting.style import Look

LOWEST, MEAN = "min:test:gmm/posterior_mse", "mean:train:grads/snr"
LAYOUT = Layout((), "iw", ("estimator",), {"a": Look("#000000", "o"), "b": Look("#111111", "o")}, {})
NO_PUBLISHED = pd.DataFrame(columns=["metric", "estimator", "iw", "value", "source"])


def bests(pivot: tables.Pivot) -> list[list[bool | None]]:
    return [[cell and cell.best for cell in cells] for _, cells in pivot.rows]


@pytest.fixture
def summary() -> pd.DataFrame:
    rows = [
        ("gmm", "a", 5, LOWEST, 3, 0.5, 0.03),
        ("gmm", "a", 20, LOWEST, 2, 0.4, 0.01),
        ("gmm", "b", 5, LOWEST, 3, 0.6, 0.02),
        ("gmm", "a", 5, MEAN, 3, 1.5, 0.1),
        ("gmm", "b", 5, MEAN, 1, 2.5e-8, math.nan),
    ]
    table = pd.DataFrame(rows, columns=["dataset", "estimator", "iw", "metric", "n", "mean", "se"])
    table = table.astype({"dataset": "category", "estimator": "category", "iw": "category"})
    table["metric"] = pd.Categorical(table["metric"], categories=[LOWEST, MEAN])
    return table.assign(sd=1.0, low=0.1, high=0.9)


def test_the_pivot_has_a_row_for_each_cell_and_columns_for_each_metric(summary):
    table = tables.pivot_table(summary, ["dataset", "estimator", "iw"])
    assert table.columns[:3].tolist() == ["dataset", "estimator", "iw"]
    assert table.columns[3:9].tolist() == [LOWEST, *(f"{LOWEST} {name}" for name in ("sd", "se", "low", "high", "n"))]
    by_cell = table.set_index(["estimator", "iw"])
    assert by_cell.index.tolist() == [("a", 5), ("a", 20), ("b", 5)]
    assert by_cell[LOWEST].tolist() == [0.5, 0.4, 0.6]
    assert by_cell.loc[("a", 5), MEAN] == 1.5
    assert by_cell[MEAN].isna().tolist() == [False, True, False]
    assert by_cell[f"{LOWEST} n"].tolist() == [3, 2, 3]


def test_laid_out_for_reading(summary):
    lowest, mean = tables.lay_out(summary, ["dataset", "estimator", "iw"], LAYOUT, NO_PUBLISHED)
    assert (lowest.metric, lowest.keys, lowest.columns) == (LOWEST, ["estimator"], ["K = 5", "K = 20"])
    assert [names for names, _ in lowest.rows] == [["a"], ["b"]]
    assert lowest.rows[1][1][1] is None
    assert lowest.rows[0][1][0] == tables.Cell(0.5, 0.03, 3, True, None)
    assert bests(lowest) == [[True, False], [False, None]], "the lowest error, where it is not alone"
    assert bests(mean) == [[True], [False]], "the highest SNR"


@pytest.mark.parametrize(
    ("mean", "se", "expected"),
    [
        (0.012345, 0.00056, ("0.01235", "0.00056", 0)),
        (-88.123, 0.05, ("-88.123", "0.050", 0)),
        (1234.5, 60.0, ("1234", "60", 0)),
        (0.5, math.nan, ("0.5", "", 0)),
        (0.5, 0.0, ("0.5", "0", 0)),
        (1.234e-8, 5e-10, ("1.234", "0.050", -8)),
        (0.0, 0.1, ("0.00", "0.10", 0)),
    ],
)
def test_digits_follow_the_standard_error(mean, se, expected):
    assert tables.digits(mean, se) == expected


def test_html_has_errors_bests_counts_and_published_values(summary):
    theirs = pd.DataFrame([(LOWEST, "a", 20, 0.0126, "them")], columns=NO_PUBLISHED.columns)
    lowest, mean = tables.lay_out(summary, ["dataset", "estimator", "iw"], LAYOUT, theirs)
    page = tables.pivot_html(lowest)
    assert "<b>0.500</b>" in page
    assert "&plusmn; 0.030" in page
    assert "n=2" in page
    assert "n=3" not in page
    assert page.count("published 0.0126") == 1
    assert "2.5 &times; 10<sup>-8</sup>" in tables.pivot_html(mean)


def test_latex(summary):
    lowest, mean = tables.lay_out(summary, ["dataset", "estimator", "iw"], LAYOUT, NO_PUBLISHED)
    text = tables.pivot_latex(lowest, "50% of a_b")
    assert "\\caption{50\\% of a\\_b}" in text
    assert "a & $\\mathbf{0.500} \\pm 0.030$ & $0.400 \\pm 0.010$ \\\\" in text
    assert "b & $0.600 \\pm 0.020$ & -- \\\\" in text
    assert "$2.5 \\cdot 10^{-8}$" in tables.pivot_latex(mean, "")


def test_runs_have_keys_what_varies_and_their_numbers():
    runs = pd.DataFrame(
        {"state": "done", "error": "", "seed": [1, 2], "steps": 10, "optimizer.lr": [0.1, 0.2], "estimator": "a"},
        index=["x", "y"],
    ).assign(last_step=[10, 5])
    numbers = pd.DataFrame({LOWEST: [0.5]}, index=["y"])
    table = tables.runs_table(runs, numbers, {"estimator": "estimator"})
    assert table.columns.tolist() == ["id", "state", "last_step", "error", "estimator", "seed", "optimizer.lr", LOWEST]
    assert table["id"].tolist() == ["x", "y"]
    assert table[LOWEST].tolist()[1] == 0.5
