"""Locks that the operating system drops when their holder dies: the only evidence of life that the queue believes."""

import fcntl
import os
import socket
import weakref
from pathlib import Path
from types import TracebackType

_held: "weakref.WeakSet[ProcessLock]" = weakref.WeakSet()


class ProcessLock:
    """An exclusive lock on a file, held by this process until it is released or the process is dead.

    The file stays when the lock is released: removing it would let two processes lock two files of one name. It holds
    one line for people, `<host> <pid>` of the last holder; nothing reads it to decide anything.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; with `blocking` false, return False at once where another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        _held.add(self)
        return True

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def __enter__(self) -> "ProcessLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_free(path: Path) -> bool:
    """Say whether nobody alive holds the lock on `path`; a file that is not there is free."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def holder(path: Path) -> str:
    """Return who took the lock last, as `pid 123 on host`, for a message."""
    try:
        host, pid = path.read_text().split()
    except (OSError, ValueError):
        return "an unknown process"
    return f"pid {pid} on {host}"


def _close_in_child() -> None:
    # A forked child shares the open file, and with it the lock: without this a child that outlives its parent would
    # keep a dead job "running".
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
