"""How long ten thousand jobs take to be queued, and how long a worker of a busy manager waits for its next job.

    python -m benchmarks.queue [--jobs N] [--managers N] [--workers N] [--nap SECONDS] [--seconds N]

The jobs are those of tests/tally, which import no torch: what is measured is the queue. A worker's wait is the whole
time between the end of one job's task and the beginning of the next one's: its status and metrics brought to the disk,
the word to the manager, the manager's answer, the lock, the reread attempt, the composed configuration.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
TALLY = SOURCE / "tests" / "tally"


def command(root: Path, user_dir: Path, *more: str) -> list[str]:
    """Return the command of a manager of the experiment."""
    return [sys.executable, "manager.py", "--exp", "tally", "--root", str(root), "--user_dir", str(user_dir), *more]


def enqueue(root: Path, user_dir: Path, jobs: int, nap: float) -> float:
    """Queue the jobs and run one; return the seconds until it was handed out."""
    grid = [f"seed=range(1,{jobs + 1})", "steps=1", f"task.nap={nap}"]
    began = time.perf_counter()
    subprocess.run(
        command(root, user_dir, "--max_jobs", "1", "--processes", "1", *grid),
        cwd=SOURCE,
        check=False,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def resident(pid: int, field: str = "VmHWM") -> float:
    """Return the most memory that a process has had, in MB; not a number where /proc does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


def share(root: Path, user_dir: Path, managers: int, workers: int, seconds: float) -> tuple[list[float], list[int]]:
    """Let managers run the experiment for a while; return the most memory of each, and their lines of output."""
    logs = [open(root / f"manager-{number}.log", "wb") for number in range(managers)]  # noqa: SIM115
    running = [
        subprocess.Popen(
            command(root, user_dir, "--processes", str(workers)), cwd=SOURCE, stdout=log, stderr=subprocess.STDOUT
        )
        for log in logs
    ]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(manager.poll() is None for manager in running):
        time.sleep(0.2)
    memory = [resident(manager.pid) for manager in running]
    for manager in running:
        manager.send_signal(signal.SIGINT)
    for manager, log in zip(running, logs, strict=True):
        manager.wait()
        log.close()
    return memory, [Path(log.name).read_bytes().count(b"\n") for log in logs]


def waits(root: Path) -> list[float]:
    """Return the seconds that the workers have waited, each time, for their next job, once all had begun to work."""
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for file in root.glob("tally/jobs/*/attempts.jsonl"):
        for line in file.read_text().splitlines():
            span = json.loads(line)
            spans[span["pid"]].append((span["began"], span["ended"]))
    found = []
    all_at_work = max(min(own)[0] for own in spans.values())
    for own in spans.values():
        found += [
            (after[0] - before[1]) / 1e9 for before, after in itertools.pairwise(sorted(own)) if before[1] > all_at_work
        ]
    return sorted(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--managers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--nap", type=float, default=1.0, help="seconds that a job sleeps")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the managers run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, user_dir = Path(folder, "runs"), Path(folder, "user")
        shutil.copytree(TALLY, user_dir, ignore=shutil.ignore_patterns("__pycache__"))
        print(f"{os.cpu_count()} cores, {given.jobs} jobs of {given.nap} s", flush=True)
        print(f"queued, and one run: {enqueue(root, user_dir, given.jobs, given.nap):.1f} s", flush=True)
        memory, lines = share(root, user_dir, given.managers, given.workers, given.seconds)
        found = waits(root)
    shown = ", ".join(f"{name} {1000 * found[int(part * (len(found) - 1))]:.0f} ms" for name, part in QUANTILES.items())
    print(f"{given.managers} managers of {given.workers} workers: {len(found)} waits: {shown}")
    print(
        f"most memory of a manager: {max(memory):.0f} MB; lines printed by one: {max(lines)} in {given.seconds:.0f} s"
    )


QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}

if __name__ == "__main__":
    main()
