"""Jobs that a worker holds ahead, so that it need not wait for its manager: none is lost, none runs twice."""

import json
import os
import signal
import time
from typing import Any

import pytest
from filelock import FileLock

from orchestration.devices import Slot
from orchestration.display import Display
from orchestration.executors import local
from orchestration.locks import is_free
from orchestration.queue import Manager, Queue, Row
from orchestration.run_directory import ExperimentFolder
from orchestration.scheduler import Scheduler
from tests.orchestration.study import Study
from tests.orchestration.test_worker import Conversation

MANY = ["seed=range(1,41)", "steps=1", "task.nap=0.05"]


class Silent(Any):
    """A process that notes what it is told."""

    def __init__(self):
        self.told: list[str] = []
        self.stdin, self.pid = self, 0

    def write(self, line):
        message = json.loads(line)
        self.told.append(f"{message['do']} {message.get('id', '')}".strip())

    def flush(self):
        pass

    wait = flush


class Handed(local.Executor):
    """An executor whose workers are noted, not started."""

    def _start(self, slot, snapshot):
        worker = self._workers[slot.name] = local.Worker(slot, snapshot, Silent(), returns=True)
        return worker

    def _forget(self, worker):
        del self._workers[worker.slot.name]

    def hear(self, slot, leaving=False, **message):
        """Return what follows when a worker says something: kinds and jobs."""
        return [(event.kind, event.id) for event in self._heard(self._workers[slot], message, leaving)]

    def end(self, slot, identity, state="done", leaving=False):
        return self.hear(slot, leaving, event="ended", id=identity, attempt=1, state=state, error="")

    def told(self, slot):
        process: Any = self._workers[slot].process
        return process.told


def rows(names, **more):
    return [Row(name, [], attempt=1, **more) for name in names]


@pytest.fixture
def executor(tmp_path):
    folder = ExperimentFolder(tmp_path, "study")
    folder.path.mkdir()
    folder.worker_log.touch()
    return Handed(folder, "manager", [Slot(f"cuda:{device}", f"GPU-{device}") for device in (0, 1)])


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


@pytest.fixture
def worker(tmp_path):
    conversation = Conversation(tmp_path / "runs")
    yield conversation
    conversation.process.kill()
    conversation.process.communicate()
    conversation.manager.close()


def test_jobs_ahead_take_their_turn_in_order(executor):
    a, b, c, d, e, f = rows("abcdef")
    assert not executor.submit_ahead(a, 1)  # nobody is busy: it has a slot of its own
    assert [executor.submit(row) for row in (a, b)] == ["cuda:0", "cuda:1"]
    assert [executor.submit_ahead(row, 2) for row in (c, d, e)] == [True, True, True]
    assert not executor.submit_ahead(f, 1)
    assert executor.told("cuda:0") == ["run a", "run c", "run e"]
    assert executor.told("cuda:1") == ["run b", "run d"]
    assert executor.end("cuda:0", "a") == [("ended", "a"), ("next", "c")]
    assert executor.free() == 0
    assert executor.end("cuda:0", "c") == [("ended", "c"), ("next", "e")]
    assert executor.end("cuda:0", "e") == [("ended", "e")]
    assert executor.free() == 1


def test_only_a_worker_that_can_serve_a_job_is_handed_it_ahead(executor):
    a, b, c = rows("abc")
    executor.submit(a)
    assert not executor.submit_ahead(b._replace(snapshot="other"), 1)
    assert not executor.submit_ahead(b._replace(alone=True), 1)
    executor._workers["cuda:0"].returns = False  # its source is older, or it has not started yet
    assert not executor.submit_ahead(b, 1)
    executor.submit(b)
    alone = c._replace(alone=True)
    assert not executor.takes(alone)  # GPU 0 gets no more jobs until it has none
    executor._workers["cuda:0"].returns = True
    assert executor.submit_ahead(c, 1)
    assert executor.told("cuda:0") == ["run a"]


def test_jobs_ahead_come_back_from_a_worker_that_leaves_or_dies(executor):
    a, b, c, d, e = rows("abcde")
    executor.submit(a), executor.submit(b)
    assert all(executor.submit_ahead(row, 2) for row in (c, d, e))
    assert executor.end("cuda:0", "a", "crowded", leaving=True) == [
        ("ended", "a"),
        ("returned", "c"),
        ("returned", "e"),
    ]
    events = executor._bury(executor._workers["cuda:1"], -signal.SIGKILL)
    assert [(event.kind, event.id) for event in events] == [("died", "b"), ("returned", "d")]


def test_jobs_ahead_come_back_when_asked_for_unless_they_have_begun(executor):
    a, b, c = rows("abc")
    executor.submit(a)
    assert all(executor.submit_ahead(row, 2) for row in (b, c))
    executor.recall()
    executor.recall()
    assert executor.told("cuda:0") == ["run a", "run b", "run c", "return"]
    assert executor.end("cuda:0", "a") == [("ended", "a"), ("next", "b")]  # it was faster
    assert executor.end("cuda:0", "c", "queued") == [("returned", "c")]
    assert executor.hear("cuda:0", event="started", id="b") == [("started", "b")]
    assert executor.end("cuda:0", "b", "queued") == [("ended", "b")]  # with a checkpoint
    executor.submit(a)
    assert executor.end("cuda:0", "a", "queued") == [("returned", "a")]


@pytest.mark.parametrize(("jobs", "kept"), [(50, 4), (40, 2)])
def test_what_was_claimed_ahead_as_short_goes_back_when_jobs_turn_out_long(executor, jobs, kept):
    queue = Queue(executor.folder)
    queue.rebuild(Row(f"job{number}", []) for number in range(jobs))
    scheduler = Scheduler(queue, Manager(executor.folder), executor, Display("study", 2), slots=2, max_jobs=30)
    scheduler._exchange()
    assert queue.counts() == {"running": 2, "queued": jobs - 2}
    scheduler._durations.extend([0.1] * 5)
    scheduler._last_end = time.monotonic()
    scheduler._next_exchange = 0.0
    scheduler._exchange()
    assert queue.counts() == {"running": 30, "queued": jobs - 30}
    assert scheduler.allowance == 0
    scheduler._last_end -= 100
    scheduler._exchange()
    # One a slot is held beyond the free slots, where there are plenty for others.
    assert queue.counts() == {"running": kept, "queued": jobs - kept}
    assert scheduler.allowance == 30 - kept
    assert [row.id for row in scheduler._hand] == [f"job{number}" for number in range(kept)]


def begun(folder):
    """How often each job has begun."""
    return {
        path.name: len(list((path / "beats").glob("*"))) for path in folder.jobs.iterdir() if (path / "beats").exists()
    }


def hand(worker, **naps):
    """Claim these jobs and hand them all to the worker."""
    for name, nap in naps.items():
        worker.queue.add([Row(name, ["task=tally", "steps=1", f"task.nap={nap}"], snapshot="none")])
    claimed, _ = worker.queue.claim(worker.manager, len(naps))
    for row in claimed:
        worker.say(do="run", id=row.id, attempt=row.attempt, overrides=row.overrides)


def hear(worker, count):
    """Return the next ends that the worker speaks of."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        message = json.loads(worker.process.stdout.readline())
        if message["event"] == "ended":
            found.append((message["id"], message["state"]))
    return found


def wait_for_start(worker, name):
    while json.loads(worker.process.stdout.readline()) != {"event": "started", "id": name}:
        pass


def test_a_worker_returns_what_it_has_not_begun(worker):
    hand(worker, a=0.5, b=0, c=0)
    wait_for_start(worker, "a")
    worker.say(do="return")
    assert hear(worker, 3) == [("b", "queued"), ("c", "queued"), ("a", "done")]
    hand(worker, d=0)
    assert hear(worker, 1) == [("d", "done")]
    assert begun(worker.folder) == {"a": 1, "d": 1}


def test_a_stop_sends_the_jobs_ahead_back_unbegun(worker):
    hand(worker, a=0.5, b=0)
    wait_for_start(worker, "a")
    worker.say(do="stop")
    assert hear(worker, 2)[1] == ("b", "queued")
    assert begun(worker.folder) == {"a": 1}


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
def test_a_worker_without_a_manager_or_told_to_end_begins_no_further_job(worker, number):
    hand(worker, a=0.5, b=0)
    wait_for_start(worker, "a")
    if number:
        worker.process.send_signal(number)
        assert hear(worker, 1)[0][0] == "a"
    _, status = worker.end()
    assert status == 0
    assert begun(worker.folder) == {"a": 1}
    assert is_free(worker.folder.job("b").lock)


def test_a_job_that_is_cancelled_while_it_is_ahead_does_not_run(worker):
    hand(worker, a=0.5, b=0)
    wait_for_start(worker, "a")
    worker.queue.edit(lambda rows: [row._replace(state="aborted") if row.id == "b" else row for row in rows])
    assert hear(worker, 2) == [("a", "done"), ("b", "withdrawn")]
    assert begun(worker.folder) == {"a": 1}


def test_no_more_than_max_jobs_begin(study):
    result = study.run(*MANY, "--max_jobs", "23")
    assert result.returncode == 3
    assert set(begun(study.folder).values()) == {1}
    assert len(begun(study.folder)) == 23
    assert sorted((row.state, row.attempt) for row in study.rows) == [("done", 1)] * 23 + [("queued", 0)] * 17


def test_an_interrupt_sends_back_what_is_ahead(study):
    manager = study.start(*MANY)
    study.wait_for(lambda: study.folder.jobs.exists() and len(begun(study.folder)) > 8)
    manager.send_signal(signal.SIGINT)
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 130
    assert set(study.states.values()) <= {"done", "queued"}
    assert output.count("stopped") <= 2  # the jobs that ran
    assert study.run().returncode == 0
    assert set(study.states.values()) == {"done"}
    assert study.worker_pids() == []


def test_a_long_job_keeps_no_short_one_waiting(study):
    # The last jobs are ahead in both workers when one of them begins a job that naps for long.
    file = study.user_dir / "experiments" / "tally.yaml"
    short = "".join(f"- [seed={seed}]\n" for seed in range(1, 11))
    file.write_text(
        "base: [task=tally, steps=1]\nvariants:\n"
        + short
        + "- [seed=50, task.nap=4]\n"
        + "".join(f"- [seed={seed}, task.nap=0.3]\n" for seed in range(11, 19))
    )
    result = study.run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(begun(study.folder).values()) == {1}
    ends = {row.id: (study.folder.job(row.id).path / "attempts.jsonl").read_text() for row in study.rows}
    ended = {name: json.loads(line)["ended"] for name, line in ends.items()}
    (long,) = [name for name in ended if "seed50" in name]
    assert max(ended, key=lambda name: ended[name]) == long


def test_an_interrupt_is_answered_while_another_holds_the_queue(study):
    manager = study.start("task.nap=0.1", "steps=20")
    study.wait_for(lambda: len(study.running()) == 2)
    with FileLock(study.folder.queue_lock):
        manager.send_signal(signal.SIGINT)
        study.wait_for(lambda: not study.running())
        manager.send_signal(signal.SIGINT)
        output, _ = manager.communicate(timeout=20)
    assert manager.returncode == 130, output
    assert f"pid {os.getpid()} on" in output
    assert "left without it" in output
    assert study.run().returncode == 0
    study.assert_all_done_once(steps=20)
