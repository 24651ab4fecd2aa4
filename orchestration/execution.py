"""Run one job in this process: its status before and after, and its errors."""

import errno
import importlib
import os
import socket
import sys
import time
import traceback
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from errors import UserError
from orchestration.job import Job
from tasks.context import Context, Interrupted

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


class Outcome(NamedTuple):
    """How an attempt ended: done, failed, queued (interrupted, to go on later) or refused (by the disk); and why."""

    state: str
    error: str = ""


def execute(job: Job, context: Context, attempt: int) -> Outcome:
    """Run `job` in its run directory as `attempt`; the caller holds the job's lock.

    What the task raises ends up in the status and, with its traceback, in the log.
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
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(job.config)
        run.write_status(status)
        outcome = _attempt(job, context)
        run.write_status({**status, "state": outcome.state, "ended": _now(), "error": outcome.error or None})
    except OSError as error:
        return Outcome("refused", one_line(error))
    return outcome


def _attempt(job: Job, context: Context) -> Outcome:
    config = OmegaConf.create(job.config)
    OmegaConf.set_readonly(config, True)
    try:
        resolve(job.config["task"]["target"])(config, context)
    except Interrupted:
        return Outcome("queued")
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        sys.stdout.flush()
        with open(context.run.log, "a") as log:
            traceback.print_exc(file=log)
        return Outcome("failed", one_line(error))
    return Outcome("done")


def check(job: Job) -> None:
    """Have the job's task try what the job needs; raise UserError, in one line, for what the task refuses."""
    module, _, _ = job.config["task"]["target"].rpartition(".")
    try:
        resolve(f"{module}.check")(OmegaConf.create(job.config))
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
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {message}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
