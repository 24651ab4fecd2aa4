"""Faults at every call that changes a file: refused by the disk, cut short, or the process killed there by itself.

The calls are those that a process makes through Python: each opening for writing, write, truncation, sync, renaming,
removal and making of a folder, counted in the order in which they come. `Faults(at=n, fault=...)` lets the n-th fail.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

from orchestration import storage

WRITING = set("wax+")


class Faults:
    """A context in which the `at`-th call that changes a file below `folder` meets a fault; it counts all of them.

    `fault`: kill (in the middle of a write, before any other call), ENOSPC, EIO, short (half of a write, then ENOSPC),
    partial (half of a write, without an error: the system may do that at any time).
    """

    def __init__(self, folder, at=0, fault="count"):
        self.folder, self.at, self.fault = str(folder), at, fault
        self.calls: list[str] = []
        self._stack = ExitStack()

    def strike(self, name, path, partly=lambda: None):
        """Count a call; where its turn has come, let it fail. Return how much of a write was done instead of all."""
        if not str(path).startswith(self.folder):
            return None
        self.calls.append(f"{name} {os.path.basename(path)}")
        if len(self.calls) != self.at:
            return None
        done = partly() if self.fault in ("kill", "short", "partial") else None
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "partial":
            return done
        number = errno.EIO if self.fault == "EIO" else errno.ENOSPC
        named = [] if name in ("write", "truncate", "fsync") else [str(path)]  # what the system names, and what not
        raise OSError(number, "refused by the test", *named)

    def __enter__(self):
        open_file, open_descriptor = io.open, os.open
        faults = self

        class File(io.FileIO):
            """A file whose writes and truncations may fail."""

            def __init__(self, path, mode):
                faults.strike("open", os.fspath(path))
                super().__init__(path, mode)

            def write(self, content):
                half = memoryview(content).cast("B")
                half = half[: (len(half) + 1) // 2]
                done = faults.strike("write", self.name, lambda: io.FileIO.write(self, half))
                return super().write(content) if done is None else done

            def truncate(self, size=None):
                faults.strike("truncate", self.name)
                return super().truncate(size)

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if isinstance(file, int) or not WRITING & set(mode):
                return open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = File(os.fspath(file), mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

        def descriptor_opened(path, flags, mode=0o777, *, dir_fd=None):
            if flags & (os.O_WRONLY | os.O_RDWR):
                faults.strike("open", os.fspath(path))
            return open_descriptor(path, flags, mode, dir_fd=dir_fd)

        def wrapped(name, function, path_of: Callable = lambda first: first):
            def call(first, *rest, **options):
                faults.strike(name, path_of(first))
                return function(first, *rest, **options)

            return mock.patch.object(os, name, call)

        def path_of(descriptor):
            return os.readlink(f"/proc/self/fd/{descriptor}")

        def below(entry):
            return entry if os.path.isabs(entry) else os.path.join(faults.folder, entry)  # what rmtree calls by dir_fd

        for patch in (
            mock.patch.object(builtins, "open", opened),
            mock.patch.object(io, "open", opened),
            mock.patch.object(storage, "_File", type("_File", (storage._File, File), {})),
            mock.patch.object(os, "open", descriptor_opened),
            wrapped("fsync", os.fsync, path_of),
            wrapped("replace", os.replace),
            wrapped("rename", os.rename),
            wrapped("mkdir", os.mkdir),
            wrapped("unlink", os.unlink, below),
            wrapped("rmdir", os.rmdir, below),
        ):
            self._stack.enter_context(patch)
        return self

    def __exit__(self, *raised):
        self._stack.close()


def run_in_child(function):
    """Run `function` in a forked child; return its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
