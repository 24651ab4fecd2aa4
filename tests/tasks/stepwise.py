"""Run a task of steps in this process, and compare one that was interrupted with one that was not."""

import json
import math

import pytest
from omegaconf import OmegaConf

from orchestration.configuration import compose
from orchestration.execution import resolve
from orchestration.run_directory import RunDirectory
from tasks.context import Context, Interrupted


def configured(*overrides):
    return OmegaConf.create(compose(["checkpoint_every=2", *overrides]).config)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def interruptible(path, stop_at=math.inf):
    """Return the context of a job in `path` that is asked to stop at a step, and the steps that it has told of."""
    path.mkdir(exist_ok=True)
    steps = [0]
    context = Context(
        RunDirectory(path),
        should_stop=lambda: steps[-1] >= stop_at,
        progress=lambda step, total: steps.append(step),
    )
    return context, steps


def work(path, *overrides, stop_at=math.inf):
    config, (context, _) = configured(*overrides), interruptible(path, stop_at)
    resolve(config.task.target)(config, context)


def interrupted_rows(path, *overrides, stops):
    """Return the metrics of a job that is interrupted at these steps: those of one that is not, each step once."""
    work(path / "whole", *overrides)
    for stop in stops:
        with pytest.raises(Interrupted):
            work(path / "cut", *overrides, stop_at=stop)
    work(path / "cut", *overrides)
    expected = rows(path / "whole")
    assert rows(path / "cut") == expected
    assert len({(row["step"], row["split"], row["name"]) for row in expected}) == len(expected)
    return expected
