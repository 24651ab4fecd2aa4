"""Reports of tasks without a model, whose options stand for the estimators of others."""

import pandas as pd

from reporting.layout import arrange
from reporting.published import published

METHODS = ["imle", "score-function", "exact"]


def runs_of(model):
    settings = {
        "task": "top_k",
        "model": model,
        "task.n": 10,
        "task.k": 5,
        "task.problem_seed": 0,
        "optimizer": "sgd",
        "optimizer.momentum": 0.9,
        "steps": 500,
        "estimator": "ovis-gamma1",
        "estimator.iw": 10,
    }
    runs = pd.DataFrame([{**settings, "task.method": method} for method in METHODS])
    return runs.assign(method=pd.Categorical(runs["task.method"]))


def test_options_of_a_task_without_a_model_have_colours():
    keys = {"method": "task.method"}
    without = arrange(runs_of(None), keys)
    assert without.scenes == ()
    assert without.series == ("method",)
    assert set(without.looks) == set(METHODS)
    assert arrange(runs_of("gmm"), keys).scenes == ("method",)


def test_published_values_by_another_column():
    table = published(runs_of(None), ["last:train:top_k/gap"], ["method"])
    assert dict(zip(table["method"], table["value"], strict=True)) == {"imle": 0.2, "score-function": 0.4}
    assert published(runs_of(None).assign(steps=50), ["last:train:top_k/gap"], ["method"]).empty
