import re

from hypothesis import given
from hypothesis import strategies as st

from orchestration.job import NEUTRAL_KEYS, job_id

CHOICES = {
    "task": "train",
    "model": "gmm",
    "dataset": "gaussian_mixture",
    "estimator": "ovis-gamma1",
    "optimizer": "adam",
}
CONFIG = {"seed": 3, "estimator": {"iw": 20}}


def test_id_is_readable():
    assert re.fullmatch(r"gmm-ovis-gamma1-iw20-seed3-[0-9a-f]{12}", job_id(CHOICES, {}, CONFIG))
    assert job_id({**CHOICES, "task": "efficiency"}, {}, CONFIG).startswith("efficiency-gmm-ovis-gamma1-iw20-seed3-")


def test_id_is_what_it_always_was():
    """Run directories on people's disks are found by it: a change needs a new ID_VERSION, and a reason."""
    assert job_id(CHOICES, {"estimator.iw": 20, "seed": 3}, CONFIG) == "gmm-ovis-gamma1-iw20-seed3-10df8df9f5d3"


def test_id_follows_choices_and_what_differs():
    ids = {
        job_id(CHOICES, {}, CONFIG),
        job_id({**CHOICES, "optimizer": "sgd"}, {}, CONFIG),
        job_id(CHOICES, {"optimizer.lr": 0.1}, CONFIG),
        job_id(CHOICES, {"optimizer.lr": 0.2}, CONFIG),
        job_id(CHOICES, {"tag": "0.1"}, CONFIG),
    }
    assert len(ids) == 5


def test_id_ignores_where_a_job_runs():
    assert job_id(CHOICES, dict.fromkeys(NEUTRAL_KEYS, "elsewhere"), CONFIG) == job_id(CHOICES, {}, CONFIG)


def test_a_new_group_that_is_not_chosen_renames_nothing():
    assert job_id({**CHOICES, "scheduler": None}, {}, CONFIG) == job_id(CHOICES, {}, CONFIG)


@given(st.text(min_size=1), st.text(min_size=1, max_size=500))
def test_id_is_a_file_name_everywhere(model, estimator):
    name = job_id({**CHOICES, "model": model, "estimator": estimator}, {}, CONFIG)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
    assert len(name) <= 100
