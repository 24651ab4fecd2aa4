"""Run one job in this process: its status before and after, and its errors."""

import errno
import importlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TextIO

from errors import UserError
from orchestration.config_object import config_object
from orchestration.job import Job
from orchestration.run_directory import RunDirectory
from tasks.context import Context, Interrupted

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
CANCELLED = "cancelled"  # the error of a job that was cancelled
PERMISSION_ERRORS = {errno.EACCES, errno.EPERM}  # a disk's refusal where they concern the run directory's own files


class Outcome(NamedTuple):
    """How an attempt ended, and why.

    The state is done, failed, queued (interrupted, to go on later), refused (by the disk), or crowded: it found too
    little memory on its GPU, and goes on later with no neighbour there.
    """

    state: str
    error: str = ""


def execute(make_job: Callable[[], Job], context: Context, attempt: int, retry: bool = False) -> Outcome:
    """Run the job that `make_job` returns in its run directory as `attempt`; the caller holds the job's lock.

    With `retry` a job that runs out of GPU memory ends as crowded, for the caller to run it again alone.

    What `make_job` or the task raises ends up in the status and, with its traceback, in the log. A KeyboardInterrupt
    after the task was asked to stop is passed on: whoever runs the job wants it to end at once.
    """
    run = context.run
    status: dict[str, Any] = {
        "state": "running",
        "attempt": attempt,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _now(),
        "ended": None,
        "error": None,
    }

    def write_end(outcome: Outcome) -> None:
        crowded = outcome.state == "crowded"
        end = {"state": "queued" if crowded else outcome.state, "ended": _now(), "error": outcome.error or None}
        run.write_status({**status, **end, **({"alone": True} if crowded else {})})

    try:
        run.make()
        run.sweep()
        run.write_status(status)
        run.keep()
        outcome = _attempt(make_job, context, retry)
        if outcome.state != "refused":
            write_end(outcome)
            if run.cancelled_attempt() == attempt:
                # Looked at after the word of the end was left: who cancels leaves word first, then looks at the end.
                outcome = Outcome("aborted", CANCELLED)
                write_end(outcome)
    except OSError as error:
        outcome = unwritable(error)
        if outcome.state == "failed":  # such as a job that removed its own folder: its status may have a place again
            with suppress(OSError):
                run.path.mkdir(parents=True, exist_ok=True)
                write_end(outcome)
    return outcome


def _attempt(make_job: Callable[[], Job], context: Context, retry: bool) -> Outcome:
    pid = os.getpid()
    try:
        job = make_job()
        context.run.write_config(job.config)
        try:
            resolve(job.config["task"]["target"])(config_object(job.config), context)
        finally:
            if os.getpid() != pid:
                # A child that the task forked came back with it: status, log and conversation are the parent's.
                os._exit(1)
    except Interrupted:
        return Outcome("queued")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and context.should_stop():
            raise
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return Outcome("refused", one_line(error))
        _log_traceback(context.run)
        if is_out_of_gpu_memory(error):
            return Outcome("crowded" if retry else "failed", f"out of GPU memory: {one_line(error)}")
        return Outcome("failed", one_line(error))
    return Outcome("done")


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Say whether this is torch's OutOfMemoryError, or what the libraries below it raise in its place."""
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.partition(".")[0] == "torch":
        return True
    try:
        message = str(error)
    except Exception:
        return False
    exhausted = re.search(r"\b(CUDA|HIP)\b.*\bout of memory\b|CU\w+_STATUS_ALLOC_FAILED", message)
    return isinstance(error, RuntimeError) and exhausted is not None


def unwritable(error: OSError) -> Outcome:
    """Return how an attempt ends whose run directory cannot be written: the disk's refusal, or the job's own doing."""
    refused = error.errno in DISK_ERRORS | PERMISSION_ERRORS
    return Outcome("refused" if refused else "failed", one_line(error))


def open_log(run: RunDirectory) -> TextIO:
    """Open the job's log to append lines; what is no Unicode, such as odd file names, is written with backslashes."""
    return open(run.log, "a", buffering=1, encoding="utf-8", errors="backslashreplace")


def flush(*streams: Any) -> None:
    """Flush what can be flushed: a job may have closed its streams, or put anything in their place."""
    for stream in streams:
        with suppress(Exception):
            stream.flush()


def _log_traceback(run: RunDirectory) -> None:
    flush(sys.stdout, sys.stderr)
    run.path.mkdir(parents=True, exist_ok=True)
    with open_log(run) as log:
        traceback.print_exc(file=log)


def check(job: Job) -> None:
    """Have the job's task try what the job needs; raise UserError, in one line, for what the task refuses."""
    module, _, _ = job.config["task"]["target"].rpartition(".")
    try:
        resolve(f"{module}.check")(config_object(job.config))
    except Exception as error:
        raise UserError(f"{job.id}: {one_line(error)}") from error


def resolve(target: str) -> Any:
    """Return the object that a dotted path names, as configurations name their classes and functions."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"target {target!r} cannot be imported: {error}") from error


def one_line(error: BaseException) -> str:
    """Return an error as one line: its message, after its kind where that is no refusal of a value."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "its message cannot be printed"
    line = message if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {message}"
    return line.encode(errors="backslashreplace").decode()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
