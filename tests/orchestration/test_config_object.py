"""A configuration's object is what omegaconf builds of it, whatever was built before."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from orchestration.config_object import config_object

LEAVES: st.SearchStrategy[Any] = (
    st.sampled_from([0, 1, False, True, 1.0, "1", "True", None, "None", [1], [True], ["1"]])
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.text("ab'\"é\udcff", max_size=3)
    | st.lists(st.integers(0, 2) | st.booleans() | st.text("ab", max_size=2), max_size=3)
    | st.just({})
)
CONFIGS = st.fixed_dictionaries(
    {"root": st.sampled_from(["/runs", "/a${b}", "\\${"]), "seed": LEAVES},
    optional={"task": st.fixed_dictionaries({"nap": LEAVES}, optional={"inner": st.fixed_dictionaries({"x": LEAVES})})},
)


@given(st.lists(CONFIGS, min_size=1, max_size=4))
def test_one_after_another(configs):
    for config in configs:
        found = config_object(config)
        assert repr(OmegaConf.to_container(found, resolve=True)) == repr(config)
        assert OmegaConf.is_readonly(found)


def test_keys_keep_their_order():
    for config in ({"root": "/", "a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1, "root": "/"}):
        assert list(config_object(config)) == list(config)


def test_each_job_has_its_own():
    config: dict[str, Any] = {"root": "/runs", "task": {"nap": 1, "names": ["x"]}}
    first = config_object(config)
    with pytest.raises(ReadonlyConfigError):
        first.task.nap = 3
    OmegaConf.set_readonly(first, False)
    first.task.nap = 2
    first.task.names.append("y")
    assert config_object(config) == config
    assert config["task"]["names"] == ["x"]
    assert config_object({**config, "task": {"nap": 5, "names": []}}).task == {"nap": 5, "names": []}
