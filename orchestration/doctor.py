"""Whether a queue can rely on this machine: locks, renames and flushes of the file system, devices, versions.

What is claimed is tried, with processes of their own, in a folder that is removed again. Ran as a program, this module
is one of those processes: `python -m orchestration.doctor hold|count|read FOLDER`.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from orchestration.commits import shown
from orchestration.devices import cuda_devices
from orchestration.locks import ProcessLock, is_free
from orchestration.snapshot import SOURCE
from orchestration.storage import write_atomically

PACKAGES = ("torch", "tinydb", "filelock", "hydra-core", "omegaconf", "nvidia-ml-py")
CHANGES = 25  # that each of two processes makes to one file
REPLACEMENTS = 100  # of a file that another process reads meanwhile
TIMEOUT = 20.0  # seconds for a process to answer
MOST_LOAD = 1.0  # processes a processor that run or wait to, over a minute
LEAST_SPACE = 1 << 30  # bytes


class Problem(Exception):
    """What does not hold here, in one line."""


def examine(root: Path, say: Callable[[str], None]) -> bool:
    """Try everything, a line each; return whether all that the queue relies on holds below `root`."""
    failures = 0

    def check(name: str, test: Callable[[], str]) -> None:
        nonlocal failures
        try:
            say(f"ok    {name}: {test()}")
        except (Problem, OSError, subprocess.SubprocessError) as error:
            failures += 1
            say(f"FAIL  {name}: {' '.join(str(error).split())}")

    above = next(path for path in (root, *root.parents) if path.is_dir())
    check("space", lambda: _space(above))
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=above))
        tried = folder
        say(f"ok    files: {above} can be written{_kind(above)}")
        check("lock", lambda: _lock(tried))
        check("queue", lambda: _queue(tried))
        check("rename", lambda: _rename(tried))
        check("flush", lambda: _flush(tried))
    except OSError as error:
        failures += 1
        say(f"FAIL  files: {above} cannot be written: {error.strerror}")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    say(_processors())
    check("devices", _devices)
    check("python", _python)
    for package in PACKAGES:
        check(package, lambda package=package: _version(package))  # type: ignore[misc]
    say(f"ok    source: {SOURCE}, commit {shown(SOURCE)}")
    say("verdict: jobs can run here" if not failures else f"verdict: {failures} of the above must be mended first")
    return not failures


def _lock(folder: Path) -> str:
    """A lock excludes another process, and is dropped when its holder is killed."""
    lock = folder / "lock"
    with _process("hold", folder) as holder:
        _expect(holder, "held")
        if is_free(lock) or ProcessLock(lock).acquire(blocking=False):
            raise Problem("flock does not exclude another process: two jobs could run as one")
        holder.send_signal(signal.SIGKILL)
        holder.wait(TIMEOUT)
        deadline = time.monotonic() + TIMEOUT
        while not is_free(lock):
            if time.monotonic() > deadline:
                raise Problem(f"flock is not released {TIMEOUT:.0f} s after its holder was killed")
            time.sleep(0.01)
    return "flock excludes another process and is released when that is killed"


def _queue(folder: Path) -> str:
    """Two processes that change one file under one lock lose no change."""
    write_atomically(folder / "count", b"0")
    with _process("count", folder) as first, _process("count", folder) as second:
        for process in (first, second):
            _expect(process, "counted")
    found = int((folder / "count").read_bytes())
    if found != 2 * CHANGES:
        raise Problem(f"of {2 * CHANGES} changes by two processes under one lock {2 * CHANGES - found} were lost")
    return f"{found} changes by two processes under one lock, none lost"


def _rename(folder: Path) -> str:
    """Who reads a file that is replaced sees the old or the new one."""
    file = folder / "replaced"
    write_atomically(file, b"a" * 1000)
    with _process("read", folder) as reader:
        _expect(reader, "reading")
        for number in range(REPLACEMENTS):
            write_atomically(file, (b"a" * 1000, b"b" * 200_000)[number % 2])
        write_atomically(file, b"end")
        said = _expect(reader, "saw")
    return f"{REPLACEMENTS} replacements of a file, whole in each of{said} looks of another process"


def _flush(folder: Path) -> str:
    """Files and folders can be flushed to the disk; say how long one atomic write takes."""
    seconds = []
    for number in range(10):
        began = time.monotonic()
        write_atomically(folder / "flushed", b"%d" % number)
        seconds.append(time.monotonic() - began)
    return f"a file and its folder reach the disk in {1000 * sorted(seconds)[5]:.1f} ms"


def _space(folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    if free < LEAST_SPACE:
        raise Problem(f"{free / 2**30:.2f} GiB free in {folder}: expected at least {LEAST_SPACE >> 30}")
    return f"{free / 2**30:.1f} GiB free in {folder}"


def _kind(folder: Path) -> str:
    """Return the kind of file system that a folder is on, where the system tells."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    found = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return f" ({max(found)[1]})" if found else ""


def _processors() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    found = f"processors: {usable} usable of {os.cpu_count()}, load {load:.1f}"
    return (
        f"warn  {found}: others use them, jobs will be slow" if load > MOST_LOAD * (usable or 1) else f"ok    {found}"
    )


def _devices() -> str:
    found = cuda_devices()
    texts = (f"{device.name} ({device.load:.0%} busy, {device.memory:.0%} full)" for device in found)
    return "; ".join(texts) or "no CUDA device: jobs run on the CPU"


def _python() -> str:
    return f"{sys.version.split()[0]}, {sys.executable}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Problem("it is not installed: `make` sets up .venv, or pip install -r requirements.txt") from None


@contextmanager
def _process(role: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start this module as another process; it is gone at the end."""
    command = [sys.executable, "-m", "orchestration.doctor", role, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(command, cwd=SOURCE, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _expect(process: subprocess.Popen[str], word: str) -> str:
    """Return what a process says after this word, the first of a line."""
    assert process.stdout is not None
    line = process.stdout.readline().rstrip("\n")
    if not line.startswith(word):
        raise Problem(line or f"the process that was to say {word!r} ended with status {process.wait(TIMEOUT)}")
    return line[len(word) :]


def _hold(folder: Path) -> None:
    with ProcessLock(folder / "lock"):
        print("held", flush=True)
        time.sleep(10 * TIMEOUT)


def _count(folder: Path) -> None:
    for _ in range(CHANGES):
        with FileLock(folder / "count.lock", poll_interval=0.001):
            write_atomically(folder / "count", b"%d" % (int((folder / "count").read_bytes()) + 1))
    print("counted", flush=True)


def _read(folder: Path) -> None:
    print("reading", flush=True)
    looks = 0
    while True:
        content = (folder / "replaced").read_bytes()
        looks += 1
        if content == b"end":
            break
        if content not in (b"a" * 1000, b"b" * 200_000):
            print(f"a file that was being replaced was seen with {len(content)} bytes, neither old nor new", flush=True)
            return
    print(f"saw {looks}", flush=True)


if __name__ == "__main__":
    {"hold": _hold, "count": _count, "read": _read}[sys.argv[1]](Path(sys.argv[2]))
