"""Jobs that find too little memory: on their GPU, where they go again alone, and on the machine, whose kernel kills."""

import signal
from typing import Any

import pytest

from orchestration.devices import Slot
from orchestration.execution import is_out_of_gpu_memory
from orchestration.executors import local
from orchestration.locks import ProcessLock
from orchestration.queue import Manager, Queue, Result, Row
from orchestration.run_directory import ExperimentFolder
from tests.orchestration.study import Study


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's."""

    __module__ = "torch"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (OutOfMemoryError("whatever a later version says"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), False),
        (ValueError("CUDA out of memory"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_what_counts_as_too_little_gpu_memory(error, is_memory):
    assert is_out_of_gpu_memory(error) == is_memory


def alive(run):
    """The first and the last sign of life of a job's last attempt."""
    beats = max(run.path.glob("beats/*")).read_text().split()
    return int(beats[0]), int(beats[-1])


def test_a_job_without_room_goes_again_alone_and_its_neighbours_go_on(study):
    # Job 1 fails as soon as another runs beside it.
    file = study.user_dir / "experiments" / "tally.yaml"
    file.write_text(
        "base: [task=tally, steps=8, task.nap=0.1]\nvariants:\n"
        "- [seed=1, task.mode=crowded]\n- [seed=2]\n- [seed=3]\n- [seed=4]\n- [seed=5]\n"
    )
    result = study.run("--processes", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row.id.partition("seed")[2][0]: row for row in study.rows}
    assert {number: row.attempt for number, row in rows.items()} == {"1": 2, "2": 1, "3": 1, "4": 1, "5": 1}
    assert {number: row.alone for number, row in rows.items()} == {number: number == "1" for number in rows}
    assert "out of GPU memory: RuntimeError: CUDA out of memory" in result.stdout
    began, ended = alive(study.folder.job(rows["1"].id))
    for number in "2345":
        others = alive(study.folder.job(rows[number].id))
        assert others[1] < began or ended < others[0], f"job {number} was beside it"


def test_a_job_without_room_even_alone_fails_and_says_so(study):
    result = study.run("task.mode=crowded_always", "seed=1,2")
    assert result.returncode == 1
    assert {(row.state, row.attempt) for row in study.rows} == {("failed", 2)}
    status = study.job("seed1").read_status()
    assert status["error"] == "out of GPU memory: RuntimeError: CUDA error: out of memory"
    assert "Traceback" in study.job("seed1").log.read_text()


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


@pytest.fixture
def folder(tmp_path):
    folder = ExperimentFolder(tmp_path, "study")
    folder.jobs.mkdir(parents=True)
    return folder


class Handed(local.Executor):
    """An executor whose workers are noted, not started."""

    def _start(self, slot, snapshot):
        worker = self._workers[slot.name] = local.Worker(slot, snapshot, Silent())
        return worker

    def _dismiss(self, worker):
        del self._workers[worker.slot.name]

    def end(self, slot):
        self._workers[slot].job = None


class Silent(Any):
    """A process that hears nothing."""

    class stdin:
        write = flush = staticmethod(lambda *args: None)


def test_a_job_alone_has_one_device_to_itself_and_the_other_goes_on(folder):
    slots = [Slot(f"cuda:{device}/{number}", f"GPU-{device}") for device in (0, 1) for number in (0, 1)]
    executor = Handed(folder, "manager", slots)
    plain, alone = Row("plain", []), Row("alone", [], alone=True)
    assert [executor.submit(plain) for _ in range(3)] == ["cuda:0/0", "cuda:0/1", "cuda:1/0"]
    assert not executor.takes(alone)  # GPU 1 has fewer jobs, and gets no more
    assert executor.free() == 0
    assert not executor.takes(plain)
    executor.end("cuda:0/1")
    assert executor.takes(plain)
    assert executor.submit(plain) == "cuda:0/1"
    executor.end("cuda:1/0")
    assert executor.free() == 0
    assert executor.takes(alone)
    assert executor.submit(alone) == "cuda:1/0"
    assert executor.free() == 0
    executor.end("cuda:1/0")
    assert executor.free() == 2
    executor.end("cuda:0/0")
    assert executor.free() == 3


def test_what_is_to_run_alone_is_known_from_the_status_too(folder):
    queue, dead, alive = Queue(folder), Manager(folder), Manager(folder)
    queue.rebuild([Row("a", []), Row("b", [])])
    queue.claim(dead, 2)
    run = folder.job("a")
    with ProcessLock(run.lock):
        run.write_status({"state": "queued", "attempt": 1, "alone": True})
    dead.close()
    queue.claim(alive, 0)
    assert {row.id: (row.state, row.alone) for row in queue.rows()} == {"a": ("queued", True), "b": ("queued", False)}
    folder.queue.unlink()
    queue.rebuild([Row("a", []), Row("b", [])])
    assert {row.id: row.alone for row in queue.rows()} == {"a": True, "b": False}


@pytest.mark.parametrize("killed", [5, 6])
def test_a_worker_killed_for_memory_is_marked_so(folder, tmp_path, monkeypatch, killed):
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 12\noom_kill 5\n")
    monkeypatch.setattr(local, "KERNEL_COUNTERS", counters)
    executor = local.Executor(folder, "manager", [Slot("cpu:0", "")])
    monkeypatch.setattr(executor, "_forget", lambda worker: None)
    counters.write_text(f"nr_free_pages 12\noom_kill {killed}\n")
    worker = local.Worker(Slot("cpu:0", ""), "", Silent(), Row("a", [], attempt=1))
    (event,) = executor._bury(worker, -signal.SIGKILL)
    assert event.error.startswith(
        "its worker was killed for memory" if killed > 5 else "its worker was killed by signal 9"
    )


def test_a_kill_for_memory_explains_one_death_however_long_that_takes(folder, tmp_path, monkeypatch):
    counters = tmp_path / "vmstat"
    counters.write_text("oom_kill 5\n")
    monkeypatch.setattr(local, "KERNEL_COUNTERS", counters)
    executor = local.Executor(folder, "manager", [Slot("cpu:0", "")])
    monkeypatch.setattr(executor, "_forget", lambda worker: None)
    worker = local.Worker(Slot("cpu:0", ""), "", Silent(), Row("a", [], attempt=1))
    counters.write_text("oom_kill 6\n")
    for _ in range(3):
        assert executor.events(0) == []  # the kernel has said it, and the process is not dead yet
    reasons = [executor._bury(worker, -signal.SIGKILL)[0].error for _ in range(2)]
    assert reasons[0].startswith("its worker was killed for memory")
    assert reasons[1] == "its worker was killed by signal 9"
    counters.write_text("oom_kill 7\n")
    executor.events(0)
    monkeypatch.setattr(local, "MEMORY_LAG", 0.0)
    assert executor._bury(worker, -signal.SIGKILL)[0].error == "its worker was killed by signal 9"


def test_the_reason_of_a_death_is_in_the_status(folder):
    queue, manager = Queue(folder), Manager(folder)
    queue.rebuild([Row("a", [])])
    folder.job("a").path.mkdir()
    for attempt in (1, 2, 3):
        queue.claim(manager, 1)
        queue.claim(manager, 0, [Result("a", attempt, "died", "its worker was killed for memory")])
        status = folder.job("a").read_status()
        assert (status["state"], status["attempt"]) == ("aborted" if attempt == 3 else "queued", attempt)
        assert "killed for memory" in status["error"]


def test_without_the_kernels_word_nothing_was_killed_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "KERNEL_COUNTERS", tmp_path / "missing")
    assert local.killed_for_memory() == 0
