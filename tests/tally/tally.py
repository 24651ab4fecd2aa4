"""A task without torch for testing the queue: it counts to `steps`, slowly, and tells who counted when."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from orchestration.run_directory import MetricsFile
from orchestration.storage import write_atomically
from tasks.context import Interrupted

GREETING = "one"


class Unprintable(Exception):
    """An error that has no message."""

    def __str__(self):
        raise RuntimeError("no message")


def throw(error):
    """Raise the error."""
    raise error


def fork(context):
    """Leave two processes to go on."""
    os.fork()


def fork_and_raise(context):
    """Let a child raise out of the task."""
    if os.fork() == 0:
        raise RuntimeError("the child")


# How a job may misbehave before it counts.
MODES = {
    "plain": lambda context: None,
    "fork": fork,
    "fork_and_raise": fork_and_raise,
    "input": lambda context: input("name? "),
    "cat": lambda context: os.system("cat"),
    "interrupt": lambda context: throw(KeyboardInterrupt("by itself")),
    "generator_exit": lambda context: throw(GeneratorExit("by itself")),
    "group": lambda context: throw(BaseExceptionGroup("several", [KeyboardInterrupt()])),
    "exit": lambda context: sys.exit("left"),
    "surrogate": lambda context: throw(RuntimeError("file \udcff.txt")),
    "print_surrogate": lambda context: print("file \udcff.txt"),
    "unprintable": lambda context: throw(Unprintable()),
    "remove_folder": lambda context: shutil.rmtree(context.run.path),
    "missing_file": lambda context: os.stat("/nonexistent"),
    "no_permission": lambda context: throw(PermissionError(13, "Permission denied", "/data")),
    "disk_full": lambda context: throw(OSError(28, "No space left on device")),
    "close_output": lambda context: [stream.close() for stream in (sys.stdout, sys.stderr)],
    "close_descriptors": lambda context: os.closerange(1, 3),
    "no_output": lambda context: setattr(sys, "stdout", None),
}


def run(config, context):
    """Count, with a checkpoint a step."""
    print(f"counting, greeting {GREETING}")
    MODES[config.task.mode](context)
    checkpoint = context.run.checkpoint
    start = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "length": 0}
    metrics = MetricsFile(context.run.metrics)
    metrics.keep(start["length"])
    began = time.monotonic_ns()
    try:
        for step in range(start["step"], config.steps):
            if context.should_stop():
                raise Interrupted
            if config.task.fail_at == step:
                raise RuntimeError(f"told to fail at step {step}")
            if config.task.die_at == step:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(config.task.nap)
            metrics.append(step, "train", {"tally/square": step * step + config.seed})
            state = {"step": step + 1, "length": metrics.sync()}
            write_atomically(checkpoint, json.dumps(state).encode())
            context.progress(step + 1, config.steps)
    finally:
        metrics.close()
        with open(Path(context.run.path, "attempts.jsonl"), "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "began": began, "ended": time.monotonic_ns()}) + "\n")


def check(config):
    """Refuse a nap that is no number of seconds."""
    if config.task.nap < 0:
        raise ValueError(f"task.nap={config.task.nap}: expected at least 0 seconds")
