"""A task without torch for testing the queue: it counts to `steps`, slowly, and tells who counted when."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
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


def daemon(context):
    """Leave a process of a session of its own that outlives the job."""
    if (child := os.fork()) == 0:
        os.setsid()
        time.sleep(120)
        os._exit(0)
    note(context, child)


def daemon_by_exec(context):
    """Leave another program that outlives the job."""
    note(context, subprocess.Popen(["sleep", "120"], start_new_session=True, close_fds=False).pid)


def child(context):
    """Have another program that works for the job."""
    note(context, subprocess.Popen(["sleep", "120"]).pid)


def thread(context):
    """Leave a thread that the interpreter waits for at its end."""
    threading.Thread(target=time.sleep, args=(120,)).start()


def note(context, child):
    """Leave word of a child."""
    write_atomically(Path(context.run.path, "daemon.pid"), str(child).encode())


def crowded(context):
    """Run out of GPU memory at first, as soon as another job is under way, and later where one still is."""

    def has_neighbours():
        others = (path for path in context.run.path.parent.glob("*/status.json") if path.parent != context.run.path)
        return any(json.loads(path.read_text())["state"] == "running" for path in others)

    while context.run.read_status()["attempt"] == 1 and not has_neighbours():
        time.sleep(0.01)
    if has_neighbours():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# How a job may misbehave before it counts.
MODES = {
    "plain": lambda context: None,
    "fork": fork,
    "fork_and_raise": fork_and_raise,
    "crowded": crowded,
    "crowded_always": lambda context: throw(RuntimeError("CUDA error: out of memory")),
    "daemon": daemon,
    "daemon_by_exec": daemon_by_exec,
    "child": child,
    "thread": thread,
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


def beat(path):
    """Leave a sign of life of this attempt: one that is killed leaves no other end."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(f"{time.monotonic_ns()}\n")


def run(config, context):
    """Count, with a checkpoint a step; without a nap as soon as there is a file `hurry` in the root."""
    print(f"counting, greeting {GREETING}")
    MODES[config.task.mode](context)
    checkpoint, hurry = context.run.checkpoint, Path(config.root, "hurry")
    start = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "length": 0}
    metrics = MetricsFile(context.run.metrics)
    metrics.keep(start["length"])
    began = time.monotonic_ns()
    beats = Path(context.run.path, "beats", f"{began}-{os.getpid()}")
    beat(beats)
    try:
        for step in range(start["step"], config.steps):
            if context.should_stop():
                raise Interrupted
            if config.task.fail_at == step:
                raise RuntimeError(f"told to fail at step {step}")
            if config.task.die_at == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if not hurry.exists():
                time.sleep(config.task.nap)
            metrics.append(step, "train", {"tally/square": step * step + config.seed})
            state = {"step": step + 1, "length": metrics.sync()}
            write_atomically(checkpoint, json.dumps(state).encode())
            beat(beats)
            context.progress(step + 1, config.steps)
    finally:
        metrics.close()
        with open(Path(context.run.path, "attempts.jsonl"), "a") as file:
            span = {"pid": os.getpid(), "began": began, "ended": time.monotonic_ns()}
            file.write(json.dumps(span) + "\n")


def check(config):
    """Refuse a nap that is no number of seconds."""
    if config.task.nap < 0:
        raise ValueError(f"task.nap={config.task.nap}: expected at least 0 seconds")
