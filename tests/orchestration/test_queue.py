import pytest

from errors import CorruptFileError
from orchestration.locks import ProcessLock, is_free
from orchestration.queue import Manager, Queue, Result, Row
from orchestration.run_directory import ExperimentFolder
from orchestration.storage import AtomicStorage


@pytest.fixture
def folder(tmp_path):
    folder = ExperimentFolder(tmp_path, "study")
    folder.jobs.mkdir(parents=True)
    return folder


@pytest.fixture
def queue(folder):
    queue = Queue(folder)
    queue.rebuild([])
    queue.add(Row(name, [f"seed={number}"], snapshot="s1") for number, name in enumerate("abc"))
    return queue


def states(queue):
    return {row.id: row.state for row in queue.rows()}


def leave_status(folder, name, **status):
    run = folder.job(name)
    run.path.mkdir(exist_ok=True)
    run.write_status(status)


def test_jobs_are_claimed_in_order_and_once(folder, queue):
    first, second = Manager(folder), Manager(folder)
    assert [row.id for row in queue.claim(first, 2)[0]] == ["a", "b"]
    assert [(row.id, row.attempt) for row in queue.claim(second, 2)[0]] == [("c", 1)]
    assert queue.claim(first, 2) == ([], {"running": 3})
    assert queue.counts() == {"running": 3}


def test_a_job_is_added_once(queue):
    assert queue.add([Row("a", []), Row("d", [])]) == 1
    assert [row.id for row in queue.rows()] == ["a", "b", "c", "d"]


def test_only_the_current_claim_can_finish(folder, queue):
    mine, other = Manager(folder), Manager(folder)
    queue.claim(mine, 1)
    queue.claim(other, 0, [Result("a", 1, "done")])
    queue.claim(mine, 0, [Result("a", 2, "done")])
    assert states(queue)["a"] == "running"
    queue.claim(mine, 0, [Result("a", 1, "done")])
    assert states(queue)["a"] == "done"
    queue.claim(mine, 0, [Result("a", 1, "failed")])
    assert states(queue)["a"] == "done"


def test_what_a_dead_manager_claimed_is_lost_only_with_the_job(folder, queue):
    dead, alive = Manager(folder), Manager(folder)
    queue.claim(dead, 2)
    assert queue.claim(alive, 0) == ([], {"running": 2, "queued": 1})
    assert states(queue) == {"a": "running", "b": "running", "c": "queued"}
    with ProcessLock(folder.job("a").lock):
        dead.close()
        queue.claim(alive, 0)
        assert states(queue) == {"a": "running", "b": "queued", "c": "queued"}
    assert [(row.id, row.attempt) for row in queue.claim(alive, 3)[0]] == [("a", 2), ("b", 2), ("c", 1)]


@pytest.mark.parametrize("state", ["done", "failed"])
def test_what_a_job_finished_under_a_dead_manager_is_collected(folder, queue, state):
    dead, alive = Manager(folder), Manager(folder)
    queue.claim(dead, 2)
    dead.close()
    leave_status(folder, "a", state=state, attempt=1)
    leave_status(folder, "b", state=state, attempt=0)  # an older attempt's word does not count
    queue.claim(alive, 0)
    assert states(queue) == {"a": state, "b": "queued", "c": "queued"}


def test_a_worker_that_dies_three_times_in_a_row_without_progress_aborts_the_job(folder, queue):
    manager = Manager(folder)
    folder.job("a").path.mkdir()
    for attempt in (1, 2):
        (row,), _ = queue.claim(manager, 1)
        assert row == Row("a", ["seed=0"], "running", attempt, "s1", manager.name, deaths=attempt - 1)
        queue.claim(manager, 0, [Result("a", attempt, "died")])
    folder.job("a").checkpoint.write_bytes(b"progress")
    for attempt in (3, 4, 5, 6):
        assert states(queue)["a"] == "queued"
        queue.claim(manager, 1)
        queue.claim(manager, 0, [Result("a", attempt, "died")])
    assert states(queue)["a"] == "aborted"
    assert folder.job("a").read_status()["state"] == "aborted"
    assert "died 3 times" in folder.job("a").read_status()["error"]


def test_a_worker_that_dies_after_finishing_has_finished(folder, queue):
    manager = Manager(folder)
    queue.claim(manager, 1)
    leave_status(folder, "a", state="done", attempt=1)
    queue.claim(manager, 0, [Result("a", 1, "died")])
    assert states(queue)["a"] == "done"


def test_requeue_levels(folder, queue):
    manager = Manager(folder)
    queue.claim(manager, 3)
    queue.claim(manager, 0, [Result("a", 1, "aborted"), Result("b", 1, "failed"), Result("c", 1, "done")])
    assert queue.requeue(0) == 0
    assert queue.requeue(1) == 1
    assert states(queue) == {"a": "queued", "b": "failed", "c": "done"}
    assert queue.requeue(2) == 1
    leave_status(folder, "c", state="done", attempt=1)
    folder.job("c").checkpoint.touch()
    assert queue.requeue(10_000) == 1
    assert set(states(queue).values()) == {"queued"}
    assert list(folder.job("c").path.iterdir()) == []


def test_results_stay_where_queueing_them_again_is_refused(folder, queue, monkeypatch):
    manager = Manager(folder)
    queue.claim(manager, 1)
    queue.claim(manager, 0, [Result("a", 1, "done")])
    leave_status(folder, "a", state="done", attempt=1)
    folder.job("a").metrics.touch()

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        queue.requeue(10_000)
    assert folder.job("a").metrics.exists()
    assert folder.job("a").read_status()["state"] == "done"
    assert states(queue)["a"] == "done"


def test_a_missing_queue_is_no_empty_queue(folder, queue):
    manager = Manager(folder)
    folder.queue.unlink()
    for use in (queue.rows, queue.counts, lambda: queue.claim(manager, 1), lambda: queue.add([Row("z", [])])):
        with pytest.raises(CorruptFileError, match=r"queue\.json is missing"):
            use()
    assert not folder.queue.exists()


def test_the_locks_of_killed_managers_are_cleared_away(folder):
    (folder.managers).mkdir()
    (folder.managers / "killed.lock").touch()
    alive = Manager(folder)
    assert [lock.stem for lock in folder.managers.iterdir()] == [alive.name]


def test_withdraw_and_renew_touch_only_queued_jobs(folder, queue):
    queue.claim(Manager(folder), 1)
    assert queue.renew_snapshot("s2") == 2
    assert queue.withdraw(["a", "b"]) == ["b"]
    assert [(row.id, row.snapshot) for row in queue.rows()] == [("a", "s1"), ("c", "s2")]


def test_a_damaged_queue_is_rebuilt_from_the_run_directories(folder, queue):
    rows = [row._replace(state="queued") for row in queue.rows()]
    leave_status(folder, "a", state="done", attempt=2)
    leave_status(folder, "b", state="running", attempt=3)
    folder.queue.write_bytes(folder.queue.read_bytes()[:-5])
    with pytest.raises(CorruptFileError):
        queue.rows()
    with ProcessLock(folder.job("b").lock):
        aside = queue.rebuild(rows)
        assert aside.exists()
        assert {row.id: (row.state, row.attempt) for row in queue.rows()} == {
            "a": ("done", 2),
            "b": ("running", 3),
            "c": ("queued", 0),
        }
        queue.claim(Manager(folder), 0)
        assert states(queue)["b"] == "running"
    leave_status(folder, "b", state="done", attempt=3)
    queue.claim(Manager(folder), 0)
    assert states(queue) == {"a": "done", "b": "done", "c": "queued"}


def test_rebuilding_a_queue_that_can_be_read_changes_nothing(folder, queue):
    queue.claim(Manager(folder), 1)
    before = folder.queue.read_bytes()
    assert queue.rebuild([Row("z", [])]) is None
    assert folder.queue.read_bytes() == before


def test_reading_takes_no_lock_and_writes_nothing(folder, queue):
    before = sorted(folder.root.rglob("*"))
    queue.rows(), queue.counts()
    assert sorted(folder.root.rglob("*")) == before


def test_a_look_that_changes_nothing_writes_nothing(folder, queue):
    before = folder.queue.stat().st_ino
    manager = Manager(folder)
    queue.claim(manager, 0)
    queue.requeue(2)
    assert folder.queue.stat().st_ino == before
    queue.claim(manager, 1)
    assert folder.queue.stat().st_ino != before


@pytest.mark.parametrize("identity", ["a", 'odd "{[}]\\ é\udcff', '{"id":"b",'])
def test_one_row_is_found_without_the_others(folder, queue, identity):
    queue.add([Row('x{"id":"zz",', ['k={"id":"q",'], snapshot="}"), Row(identity, ['v={"id":"b",}'], snapshot="s")])
    assert {row.id: queue.row(row.id) for row in queue.rows()} == {row.id: row for row in queue.rows()}
    assert queue.row("q") is queue.row("zz") is None
    folder.queue.write_bytes(folder.queue.read_bytes()[:-1])
    with pytest.raises(CorruptFileError):
        queue.row("a")


def test_a_lost_job_is_held_until_its_collection_is_written(folder, queue, monkeypatch):
    dead, alive = Manager(folder), Manager(folder)
    queue.claim(dead, 2)
    dead.close()
    write, free = AtomicStorage.write, []

    def watched(self, data):
        free.append(is_free(folder.job("a").lock))
        write(self, data)

    monkeypatch.setattr(AtomicStorage, "write", watched)
    queue.claim(alive, 0)
    assert free == [False]
    assert is_free(folder.job("a").lock)
    assert set(states(queue).values()) == {"queued"}


def test_many_lost_jobs_are_collected_in_portions(folder, queue, monkeypatch):
    monkeypatch.setattr("orchestration.queue.MOST_COLLECTED", 2)
    dead, alive = Manager(folder), Manager(folder)
    queue.claim(dead, 3)
    dead.close()
    assert queue.claim(alive, 0)[1] == {"queued": 2, "running": 1}
    assert queue.claim(alive, 0)[1] == {"queued": 3}
