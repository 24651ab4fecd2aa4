import pandas as pd
import pytest
import yaml

from reporting import aggregate
from reporting.load import Job, flatten
from reporting.options import parse
from reporting.published import FILE, published
from tests.reporting.synthetic import config

LOWEST = "min:test:gmm/posterior_mse"


def runs(**more) -> pd.DataFrame:
    jobs = [
        Job(f"{estimator}{iw}", "done", flatten(config(estimator, iw, **more)), started=True)
        for estimator in ("reinforce", "mine")
        for iw in (5, 7, 20)
    ]
    return aggregate.tabulate(jobs, {})[0]


def test_published_values_of_our_cells_only():
    table = published(runs(), [LOWEST, "last:test:loss/L_k"])
    assert table[["estimator", "iw", "value"]].to_numpy().tolist() == [["reinforce", 5, 0.54], ["reinforce", 20, 0.66]]
    assert set(table["metric"]) == {LOWEST}
    assert "2020" in table["source"][0]


@pytest.mark.parametrize("other", [{"steps": 10000}, {"batch_size": 10}, {"optimizer__lr": 0.01}])
def test_a_study_with_other_settings_has_none(other):
    assert published(runs(**other), [LOWEST]).empty


def test_no_runs_have_none():
    assert published(pd.DataFrame(), [LOWEST]).empty


def test_the_file_is_well_formed():
    for study in yaml.safe_load(FILE.read_text()):
        assert set(study) - {"of", "though", "by"} == {"source", "note", "where", "iw", "values"}
        assert parse({"pivot_metrics": list(study["values"])}).pivot_metrics
        for estimators in study["values"].values():
            assert all(len(values) == len(study["iw"]) for values in estimators.values())
