"""What the experiments' captions say holds whatever the command line overrides."""

from pathlib import Path

import pytest
import yaml

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
STUDIES = [file for file in FILES if "task=gradient_study" in yaml.safe_load(file.read_text())["base"]]


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_caption_has_no_number_that_the_configuration_sets(file):
    content = yaml.safe_load(file.read_text())
    caption = content["report"]["caption"].replace(",", "")
    values = [str(value) for item in content["base"] for value in item.partition("=")[2].split(",")]
    assert not [value for value in values if value.isdecimal() and int(value) > 1 and value in caption.split()]
    assert not [word for word in caption.replace(".", " ").split() if word.isdecimal() and int(word) > 1]
