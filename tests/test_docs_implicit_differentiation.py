"""What docs/implicit-differentiation.md shows, run as it stands there."""

import re
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parents[1]
PAGE = (SOURCE / "docs" / "implicit-differentiation.md").read_text()


def test_the_code_of_the_page_runs():
    torch.manual_seed(0)
    names: dict = {}
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(first, "implicit-differentiation.md", "exec"), names)
    assert names["y"].shape == (30, 5)
    assert torch.equal(names["theta"].grad.mean(0) < 0, torch.tensor([True, True, False, False, False]))
    exec(compile(second, "implicit-differentiation.md", "exec"), names)
    assert (names["theta"].grad != 0).any()


def test_what_the_page_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (SOURCE / "docs" / target).exists(), target
    for name in re.findall(r"--exp (\S+)", PAGE):
        assert (SOURCE / "experiments" / f"{name}.yaml").exists()
