"""Jobs as a snapshot of the source composes them: the checkout's conf/ and schema may have changed since.

A snapshot that is what the checkout holds is composed here; any other by a process of its own, started in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from orchestration.configuration import compose
from orchestration.experiment import expand, parse
from orchestration.job import Job
from orchestration.run_directory import ExperimentFolder
from orchestration.snapshot import name_of_source

# Ran with a snapshot's modules, which may be older than this file: it uses nothing but what every snapshot has.
SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from errors import UserError
from orchestration.configuration import compose
from orchestration.experiment import expand, parse

def answer(make):
    try:
        return {"jobs": [asdict(job) for job in make()]}
    except UserError as error:
        return {"error": str(error)}

user_dir = Path(sys.argv[1]) if sys.argv[1] else None
for line in sys.stdin:
    asked = json.loads(line)
    if "overrides" in asked:
        found = answer(lambda: [compose(asked["overrides"], user_dir)])
    else:
        name, text, where, overrides = asked["experiment"]
        found = answer(lambda: expand(parse(name, text, where, user_dir), overrides))
    print(json.dumps(found), flush=True)
"""


@dataclass
class Composer:
    """Composes jobs for one experiment; `user_dir` is the user's folder as it is, a snapshot has its own copy."""

    folder: ExperimentFolder
    user_dir: Path | None = None

    def __post_init__(self) -> None:
        self._present = ""

    def compose(self, jobs: Sequence[Sequence[str]], snapshot: str) -> list[Job | UserError]:
        """Return the job of each of these lists of overrides, or why that snapshot refuses it."""
        if not self.is_present(snapshot):
            asked = [{"overrides": list(overrides)} for overrides in jobs]
            return [found if isinstance(found, UserError) else found[0] for found in self._ask(asked, snapshot)]
        found: list[Job | UserError] = []
        for overrides in jobs:
            try:
                found.append(compose(overrides, self.user_dir))
            except UserError as error:
                found.append(error)
        return found

    def expand(self, name: str, text: str, overrides: Sequence[str], snapshot: str) -> list[Job]:
        """Return the jobs of an experiment's text under these overrides; raise UserError where that is refused."""
        where = str(self.folder.record)
        if self.is_present(snapshot):
            return expand(parse(name, text, where, self.user_dir), overrides)
        (found,) = self._ask([{"experiment": [name, text, where, list(overrides)]}], snapshot)
        if isinstance(found, UserError):
            raise found
        return found

    def is_present(self, snapshot: str) -> bool:
        """Say whether a snapshot is what the checkout holds, or is not there, so that nothing else can be asked."""
        self._present = self._present or name_of_source(self.folder.root, self.user_dir)
        return snapshot == self._present or not self.folder.snapshot(snapshot).is_dir()

    def _ask(self, asked: Sequence[Any], snapshot: str) -> list[list[Job] | UserError]:
        source = self.folder.snapshot(snapshot)
        user_dir = source / "user_dir"
        command = [sys.executable, "-c", SCRIPT, str(user_dir) if user_dir.is_dir() else ""]
        lines = "".join(json.dumps(item) + "\n" for item in asked)
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=source, env=environment, input=lines, capture_output=True, text=True)
        answers = done.stdout.splitlines()
        if done.returncode or len(answers) != len(asked):
            why = (done.stderr.strip().splitlines() or ["it left no word"])[-1]
            raise UserError(f"the source that the jobs run from, {source}, cannot compose them: {why}")
        return [_read(json.loads(line)) for line in answers]


def _read(answer: dict[str, Any]) -> list[Job] | UserError:
    if "error" in answer:
        return UserError(answer["error"])
    return [Job(job["id"], job["overrides"], job["choices"], job["config"]) for job in answer["jobs"]]
