"""A task without torch for testing the queue: it counts to `steps`, slowly, and tells who counted when."""

import json
import os
import signal
import time
from pathlib import Path

from orchestration.run_directory import MetricsFile
from orchestration.storage import write_atomically
from tasks.context import Interrupted

GREETING = "one"


def run(config, context):
    """Count, with a checkpoint a step."""
    print(f"counting, greeting {GREETING}")
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
