"""Locks that the operating system drops when their holder dies: the only evidence of life that the queue believes."""

import fcntl
import os
import socket
import time
import weakref
from contextlib import suppress
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
        with suppress(OSError):  # a full disk: the name is for people, the lock is what counts
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
    """Return who holds the lock and since when, as `pid 123 on host since 2026-01-31 12:00:00`, for a message.

    Where the kernel tells who that is it need not be one of ours; else it is who took the lock last and left its name.
    """
    try:
        host, pid = path.read_text().split()
        since = path.stat().st_mtime
    except (OSError, ValueError):
        host, pid, since = "", "", 0.0
    seen = _seen_holder(path)
    if seen and (host, pid) != (socket.gethostname(), seen):
        return f"pid {seen} on {socket.gethostname()}{_described(seen)}"
    return f"pid {pid} on {host} since {_time(since)}" if pid else "an unknown process"


def _seen_holder(path: Path) -> str:
    """Return the pid of the process of this host that holds the lock, empty where none is seen."""
    with suppress(OSError):
        found = path.stat()
        file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()[1:]
            if words[0] == "FLOCK" and words[4] == file and int(words[3]) > 0:
                return words[3]
    return ""


def _described(pid: str) -> str:
    """Return what a process of this host runs, and since when."""
    try:
        words = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
        (booted,) = (line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line[:5] == "btime")
        since = _time(int(booted) + int(words[19]) / os.sysconf("SC_CLK_TCK"))
        return f" ({Path('/proc', pid, 'comm').read_text().strip()}, which runs since {since})"
    except (OSError, ValueError, IndexError):
        return ""


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def is_seen_held(path: Path) -> bool | None:
    """Say whether the last holder of the lock is seen to hold it, without touching the lock: for who only reads.

    A process holds its lock for as long as it has the file open. None where that cannot be seen from here: the holder
    is on another host, of another user, or has not yet left its name.
    """
    try:
        host, pid = path.read_text().split()
        if host != socket.gethostname() or not Path("/proc/self/fd").is_dir():
            return None
        opened = list(Path("/proc", pid, "fd").iterdir())
        identity = path.stat()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, ValueError):
        return None
    for file in opened:
        with suppress(OSError):
            if os.path.samestat(file.stat(), identity):
                return True
    return False


def _close_in_child() -> None:
    # A forked child shares the open file, and with it the lock: without this a child that outlives its parent would
    # keep a dead job "running".
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
