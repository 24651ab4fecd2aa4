import pytest

from errors import UserError
from reporting.options import Metric, Options, PivotMetric, override, parse

POSTERIOR = Metric("test", "gmm/posterior_mse")
SNR = Metric("train", "grads/snr")


def test_nothing_given_is_the_defaults():
    assert parse(None) == parse({}) == Options()


def test_a_section_as_yaml_and_as_flags_say_the_same():
    as_yaml = {
        "keys": ["dataset", "estimator", "iw"],
        "metrics": ["test:gmm/posterior_mse", "train:grads/snr"],
        "pivot_metrics": ["min:test:gmm/posterior_mse", "avg:train:grads/snr"],
        "ylims": {"test:loss/L_k": [-94, -88]},
        "include": ["iwrbound", "tvo"],
    }
    as_flags = {
        "keys": "dataset, estimator,iw",
        "metrics": "test:gmm/posterior_mse,train:grads/snr",
        "pivot_metrics": "min:test:gmm/posterior_mse,mean:train:grads/snr",
        "ylims": "test:loss/L_k:-94:-88",
        "include": "iwrbound,tvo",
    }
    options = parse(as_yaml)
    assert options == parse(as_flags) == override(Options(), as_flags)
    assert options.keys == ("dataset", "estimator", "iw")
    assert options.metrics == (POSTERIOR, SNR)
    assert options.pivot_metrics == (PivotMetric("min", POSTERIOR), PivotMetric("mean", SNR))
    assert options.ylims == ((Metric("test", "loss/L_k"), (-94.0, -88.0)),)


def test_a_flag_replaces_its_entry_only():
    options = override(parse({"metrics": ["train:grads/snr"], "ema": 0.5}), {"ema": 0.9, "include": ""})
    assert options == Options(metrics=(SNR,), ema=0.9)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"metric": ["train:grads/snr"]}, r"file: report: unknown entry 'metric'; did you mean 'metrics'"),
        ({"metrics": ["grads/snr"]}, r"file: report: metrics: 'grads/snr' is not split:group/name"),
        ({"metrics": ["tests:grads/snr"]}, r"unknown split 'tests'; did you mean 'test'"),
        ({"metrics": [3]}, r"metrics: expected a list, or a comma-separated string"),
        ({"keys": ""}, r"keys: name one at least"),
        ({"pivot_metrics": ["train:grads/snr"]}, r"is not aggregation:split:group/name"),
        ({"pivot_metrics": ["maxi:train:grads/snr"]}, r"unknown aggregation 'maxi'; did you mean 'max'"),
        ({"ylims": ["train:grads/snr:1"]}, r"ylims: 'train:grads/snr:1' is not split:group/name:low:high"),
        ({"ylims": {"train:grads/snr": [2, 1]}}, r"the low limit must lie below the high one"),
        ({"ylims": {"train:grads/snr": 2}}, r"expected \[low, high\], not 2"),
        ({"ema": 1}, r"ema: expected a number from 0"),
        ({"ema": "strong"}, r"ema: expected a number from 0"),
        ({"latex": "yes"}, r"latex: expected true or false"),
        ({"caption": 3}, r"caption: expected a text"),
        ({"figures": ["curve"]}, r"unknown kind 'curve'; did you mean 'curves'"),
        (["train:grads/snr"], r"file: report: expected a mapping"),
    ],
)
def test_mistakes_name_the_file_the_entry_and_what_is_right(report, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(report, "file: report")
    assert "\n" not in str(caught.value)


def test_a_flags_mistake_names_the_flag():
    with pytest.raises(UserError, match="--ema: expected a number"):
        override(Options(), {"ema": 2.0})
