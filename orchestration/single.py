"""The jobs of run.py, which have no queue: what their run directories say, in a queue's words."""

from contextlib import suppress
from dataclasses import dataclass

import yaml

from orchestration.queue import STATES, Row
from orchestration.run_directory import ExperimentFolder, RunDirectory


@dataclass
class SingleJobs:
    """The jobs below `<root>/single`, to be read as a queue's rows are."""

    folder: ExperimentFolder

    def rows(self) -> list[Row]:
        """Return each job as its status tells it; one without a status has not started."""
        return [_row(self.folder.job(path.name)) for path in sorted(self.folder.jobs.glob("[!.]*/"))]


def _row(run: RunDirectory) -> Row:
    status = run.read_status() or {}
    state = status.get("state")
    return Row(run.path.name, [], state if state in STATES else "queued", status.get("attempt", 0))


def choices(run: RunDirectory) -> list[str]:
    """Return the groups' choices of a job that has started, as it was configured."""
    with suppress(OSError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        kept = yaml.safe_load(run.config.read_bytes())["choices"]
        return [f"{group}={choice}" for group, choice in kept.items() if choice is not None]
    return []
