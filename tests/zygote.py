"""A process that has imported everything and forks a child for each job, to be killed there.

    python -m tests.zygote USER_DIR

It reads a JSON object a line, {"path", "overrides", "attempt", "at", "fault", "step", "call"}, and answers with
{"status", "calls", "outcome"}: how the child ended, how many calls changed a file, how the job ended. The child is
killed, or meets another fault, at the `at`-th call that changes a file, after step `step`, or in the call of a function
that `call` names, as "tasks.train.gradient_statistics 2" for the second one. The parent runs nothing: PyTorch cannot be
forked once it has computed gradients.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch._dynamo  # noqa: F401 (optimizers import it, which takes a second)

import tasks.gradient_study
import tasks.train
from orchestration.configuration import compose
from orchestration.execution import execute
from orchestration.run_directory import RunDirectory
from tasks.context import Context
from tests.faults import Faults, run_in_child

for folder in ("datasets", "models", "estimators/bounds"):
    for file in Path(folder).glob("[!_]*.py"):
        importlib.import_module(f"{folder.replace('/', '.')}.{file.stem}")

tasks.gradient_study.CHECKPOINT_SECONDS = 0.0  # after every block


def die():
    """End this process as the kernel does when the memory is full."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, count):
    """Return a function that does what `function` does, but dies when it is called for the `count`-th time."""
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        result = function(*arguments, **options)
        if calls == count:
            die()
        return result

    return call


def attempt(request, job, answer):
    """Run the job as the request says; write what became of it to `answer`."""
    run = RunDirectory(Path(request["path"]))
    name, _, count = request.get("call", "").partition(" ")
    module, _, function = name.rpartition(".")
    if module:
        owner = importlib.import_module(module)
        setattr(owner, function, dying(getattr(owner, function), int(count)))
    context = Context(run, progress=lambda step, steps: die() if step == request.get("step") else None)
    with (
        open(os.devnull, "w") as nowhere,
        mock.patch.multiple(sys, stdout=nowhere, stderr=nowhere),
        Faults(run.path, request.get("at", 0), request.get("fault", "count")) as faults,
    ):
        outcome = execute(lambda: job, context, request["attempt"])
    answer.write_text(json.dumps({"calls": faults.calls, "outcome": outcome}))


def main():
    """Serve until the end of the input."""
    user_dir = Path(sys.argv[1])
    sys.path.insert(0, str(user_dir))
    for line in sys.stdin:
        request = json.loads(line)
        answer = Path(request["path"] + ".answer")
        answer.unlink(missing_ok=True)
        job = compose(request["overrides"], user_dir)
        status = run_in_child(lambda: attempt(request, job, answer))  # noqa: B023 (it is called at once)
        said = json.loads(answer.read_text()) if answer.exists() else {"calls": [], "outcome": None}
        print(json.dumps({"status": status, **said}), flush=True)


if __name__ == "__main__":
    main()
