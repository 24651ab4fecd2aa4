import os
import signal
import subprocess
import sys
import time

from orchestration.locks import ProcessLock, holder, is_free

HOLD = "import sys, time; from pathlib import Path; from orchestration.locks import ProcessLock\n"
HOLD += "lock = ProcessLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"


def start_holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def finish(process):
    process.stdout.close()
    process.wait()


def test_a_lock_is_free_before_during_and_after(tmp_path):
    path = tmp_path / "folder" / "lock"
    assert is_free(path)
    assert not path.exists()  # a reader creates nothing
    with ProcessLock(path):
        assert not is_free(path)
        assert not ProcessLock(path).acquire(blocking=False)
    assert is_free(path)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = start_holder(tmp_path / "lock")
    assert not is_free(tmp_path / "lock")
    assert holder(tmp_path / "lock").startswith(f"pid {process.pid} on ")
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert is_free(tmp_path / "lock")


def test_a_stopped_process_keeps_its_lock(tmp_path):
    process = start_holder(tmp_path / "lock")
    process.send_signal(signal.SIGSTOP)
    assert not is_free(tmp_path / "lock")
    process.send_signal(signal.SIGKILL)
    finish(process)


def test_a_forked_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    script = (
        "import os, sys, time; from pathlib import Path; from orchestration.locks import ProcessLock\n"
        "lock = ProcessLock(Path(sys.argv[1])); lock.acquire()\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os._exit(0)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        finish(process)
        deadline = time.monotonic() + 20
        while not is_free(tmp_path / "lock") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_free(tmp_path / "lock")
        os.kill(child, 0)  # the child is alive all the while
    finally:
        os.kill(child, signal.SIGKILL)
