"""A disk that is full, read-only or not ours: one line, nothing lost, and the same command goes on when it can.

The disk is a small one in memory, in a mount namespace of its own that ends with the test.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.queue import Queue
from orchestration.run_directory import ExperimentFolder

SOURCE = Path(__file__).resolve().parents[2]
TALLY = SOURCE / "tests" / "tally"


class Disk:
    """A file system of our own at `path`, seen by the commands that `run` starts; `seen` is where it is from here."""

    def __init__(self, path):
        path.mkdir()
        self.path = path
        script = f"mount -t tmpfs -o size=16m tmpfs {path} && echo ready && exec sleep 600"
        self.holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.holder.stdout is not None
        self.refusal = self.holder.stdout.readline().strip()
        self.seen = Path(f"/proc/{self.holder.pid}/root{path}")

    def run(self, *command):
        inside = [
            "nsenter",
            "--target",
            str(self.holder.pid),
            "--user",
            "--mount",
            "--preserve-credentials",
            f"--wd={SOURCE}",
        ]
        return subprocess.run([*inside, *command], capture_output=True, text=True, timeout=120)

    def mount(self, options):
        done = self.run("mount", "-o", f"remount,{options}", str(self.path))
        assert done.returncode == 0, done.stderr

    def fill(self, leaving):
        """Write a file that leaves so many bytes free."""
        (self.seen / "ballast").unlink(missing_ok=True)
        usage = shutil.disk_usage(self.seen)
        (self.seen / "ballast").write_bytes(bytes(max(0, usage.free - leaving)))

    def empty(self):
        (self.seen / "ballast").unlink()

    def manager(self, *arguments):
        options = ["--exp", "tally", "--root", str(self.path / "runs"), "--user_dir", str(TALLY), "--processes", "2"]
        return self.run(sys.executable, "manager.py", *options, *arguments)

    @property
    def folder(self):
        return ExperimentFolder(self.seen / "runs", "tally")

    def states(self):
        return sorted(row.state for row in Queue(self.folder).rows())

    def close(self):
        self.holder.kill()
        self.holder.communicate()


@pytest.fixture
def disk(tmp_path):
    if not all(map(shutil.which, ("unshare", "nsenter", "mount"))):
        pytest.skip("this system has no unshare, nsenter or mount")
    made = Disk(tmp_path / "disk")
    if made.refusal != "ready":
        made.close()
        pytest.skip(f"this user may not mount a file system of their own: {made.refusal}")
    yield made
    made.close()


def assert_one_line(result, words):
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert words in result.stderr


def assert_all_done_once(disk, steps):
    assert disk.states() == ["done"] * 6
    for row in Queue(disk.folder).rows():
        run = disk.folder.job(row.id)
        assert len(run.metrics.read_text().splitlines()) == steps
        assert (run.read_status() or {})["state"] == "done"
    assert [path for path in disk.seen.rglob("*.tmp") if "snapshots" not in path.parts] == []


@pytest.mark.parametrize("leaving", [0, 100_000, 800_000])
def test_an_experiment_that_finds_no_room_is_refused_and_leaves_nothing(disk, leaving):
    disk.fill(leaving)
    assert_one_line(disk.manager(), "No space left on device: ")
    assert not disk.folder.path.exists()
    disk.empty()
    assert disk.manager().returncode == 0
    assert_all_done_once(disk, steps=5)


@pytest.mark.parametrize(
    "leaving", [0, 40_000, *(pytest.param(4096 * n, marks=pytest.mark.slow) for n in (1, 2, 4, 8, 16, 24, 32, 48))]
)
def test_a_disk_that_fills_while_jobs_run_loses_nothing(disk, leaving):
    assert disk.manager("--max_jobs", "2").returncode == 3
    kept = {row.id: disk.folder.job(row.id).metrics.read_bytes() for row in Queue(disk.folder).rows()[:2]}
    disk.fill(leaving)
    result = disk.manager()
    if result.returncode:
        assert_one_line(result, "No space left on device")
        for row in Queue(disk.folder).rows():
            done = row.state == "done" or (disk.folder.job(row.id).read_status() or {}).get("state") == "done"
            assert not done or len(disk.folder.job(row.id).metrics.read_text().splitlines()) == 5
        assert "failed" not in disk.states()
        status = disk.manager("--status")
        assert status.returncode == 3, status.stderr
        assert "done" in status.stdout
    disk.empty()
    assert disk.manager().returncode == 0
    assert_all_done_once(disk, steps=5)
    assert {row.id: disk.folder.job(row.id).metrics.read_bytes() for row in Queue(disk.folder).rows()[:2]} == kept


def test_a_read_only_disk_is_said_in_one_line_and_can_be_read(disk):
    assert disk.manager("--max_jobs", "2").returncode == 3
    before = disk.folder.queue.read_bytes()
    disk.mount("ro")
    assert_one_line(disk.manager(), "Read-only file system: ")
    assert_one_line(disk.manager("--rf"), "Read-only file system: ")
    status = disk.manager("--status")
    assert (status.returncode, status.stdout) == (3, "tally: 2 done, 4 queued\n")
    single = disk.run(sys.executable, "run.py", "--user_dir", str(TALLY), "task=tally", f"root={disk.path}/runs")
    assert_one_line(single, "Read-only file system: ")
    assert disk.folder.queue.read_bytes() == before
    disk.mount("rw")
    assert disk.manager().returncode == 0
    assert_all_done_once(disk, steps=5)


def test_run_py_on_a_full_disk_goes_on_from_there(disk):
    disk.fill(leaving=0)
    command = [sys.executable, "run.py", "--user_dir", str(TALLY), "task=tally", "steps=5", f"root={disk.path}/runs"]
    refused = disk.run(*command)
    assert refused.returncode == 1
    assert "No space left on device" in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    disk.empty()
    result = disk.run(*command)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_root_that_cannot_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for root, words in ((tmp_path / "file" / "runs", "Not a directory: "), (Path("/proc/runs"), "No such file")):
        result = subprocess.run(
            [sys.executable, "manager.py", "--exp", "tally", "--user_dir", str(TALLY), "--root", str(root)],
            cwd=SOURCE,
            capture_output=True,
            text=True,
        )
        assert_one_line(result, words)
