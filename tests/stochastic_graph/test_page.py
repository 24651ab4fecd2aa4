"""The page that teaches stochastic graphs: its snippets run, one after another."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import stochastic_graph as storch

PAGE = (Path(__file__).parents[2] / "docs" / "stochastic-graphs.md").read_text()


def test_its_snippets_run() -> None:
    printed, names = io.StringIO(), {"__name__": "page"}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(snippets) >= 5
    with storch.Graph(), contextlib.redirect_stdout(printed):
        for snippet in snippets:
            exec(compile(snippet, "docs/stochastic-graphs.md", "exec"), names)
        assert not storch.costs()
    lines = printed.getvalue().splitlines()
    assert float(re.findall(r"[-\d.]+", lines[0])[0]) == pytest.approx(6, abs=1.5)
    assert "would work along plate 'z' of size 10, dimension 0" in lines[1]
    for line in lines[2:]:
        variance, bias = map(float, line.split()[-2:])
        assert bias < 10 * variance / 1000


def test_its_methods_exist() -> None:
    """And all methods are there."""
    rows = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`([A-Z]\w+)`", rows)) == set(storch.method.__all__) - {"Method"}
