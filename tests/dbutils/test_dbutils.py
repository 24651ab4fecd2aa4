"""dbutils.py on the experiment `tally`, whose jobs count without torch: real managers, real workers, real signals."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.locks import ProcessLock
from orchestration.queue import Manager, Queue, Result
from orchestration.run_directory import RunDirectory

SOURCE = Path(__file__).resolve().parents[2]


def test_check_counts_and_says_how_it_ends(study, capsys):
    assert study.run() == 3
    assert capsys.readouterr().out == "tally: 2 done, 4 queued\n"
    study.fail("seed3")
    assert study.run("--check") == 1
    assert capsys.readouterr().out == "tally: 2 done, 3 queued, 1 failed\n"
    assert study.run("--check", "--state", "done") == 0


def test_a_fault_says_what_mends_it_and_that_does(study, capsys):
    for name, content in [("seed1", "null"), ("seed2", '{"state": "finished", "attempt": 1}')]:
        study.job(name).status.write_text(content)
    assert study.run() == 1
    out = capsys.readouterr().out
    assert "tally: 1 done, 4 queued, 1 missing\n" in out
    assert out.count("--rebuild queues it again") == 2
    assert study.run("--rebuild", "--yes") == 0
    assert study.run() == 3
    assert capsys.readouterr().out.endswith("tally: 6 queued\n")


def test_check_names_what_does_not_fit(study, capsys):
    manager = Manager(study.folder)
    study.queue.claim(manager, 2)
    assert study.run() == 3
    assert "2 running" in capsys.readouterr().out
    manager.close()
    study.job("seed4").path.mkdir()
    study.job("seed4").write_status({"state": "done", "attempt": 1})
    shutil.rmtree(study.job("seed1").path)
    (study.folder.jobs / "stray").mkdir()
    assert study.run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["tally: 2 done, 2 queued, 1 lost, 1 missing", "the queue says: 2 done, 2 running, 2 queued"]
    remarks = "\n".join(lines[2:])
    assert re.search(r"fault .*seed1-\w+: the queue says done, and it has no status", remarks)
    assert re.search(r"note .*seed3-\w+: no living process", remarks)
    assert re.search(r"note .*seed4-\w+: the queue says running; it has ended, done", remarks)
    assert remarks.endswith("does not hold: stray")


@pytest.mark.parametrize(
    ("expression", "seeds"),
    [
        ("seed=3", "3"),
        ("seed=2|4", "24"),
        ("seed!=3", "12456"),
        ("seed>=5", "56"),
        ("seed<3,state=done", "12"),
        ("seed>1 , seed<=3.0", "23"),
        ("task=tal*,seed=4", "4"),
        ("task.nap=0.010,seed=1", "1"),
        ("estimator=ovis-gamma1.0,estimator.iw=10,iw=10,seed=6", "6"),
        ("analysis.parameters=[*],seed=2", "2"),
        ("tag='',seed=1", "1"),
        ("id=*seed5-*", "5"),
        ("state=failed", ""),
    ],
)
def test_find(study, capsys, expression, seeds):
    assert study.run("--find", expression) == 0
    assert "".join(re.findall(r"seed(\d+)-", capsys.readouterr().out)) == seeds


def test_a_find_expression_is_data_and_no_code(study, tmp_path):
    assert study.run("--find", f"seed=__import__('os').mkdir('{tmp_path}/x')") == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--find", "sed=3"], "did you mean 'seed'"),
        (["--find", "seed"], "expected KEY=VALUE"),
        (["--find", "seed=1,2"], "seed=1|2"),
        (["--find", "seed<x"], "compares numbers"),
        (["--state", "dnoe"], "done"),
        (["--state", ""], "unknown state ''"),
        (["--find", ""], "expected KEY=VALUE"),
        (["--find", "", "--requeue", "--requeue_level", "10000", "--yes"], "expected KEY=VALUE"),
        (["--find", "seed==1"], "expected KEY=VALUE"),
        (["--find", "seed!=(1,state=done", "--delete", "--yes"], "not closed"),
        (["--find", "tag!='a,state=done", "--delete", "--yes"], "not closed"),
        (["--find", "state=lost"], "no state 'lost'"),
        (["--find", "state=done|qeued"], "did you mean 'queued'"),
        (["--update", "state:queued:done", "--yes"], "no key of the configuration"),
        (["--delete", "--yes"], "--all"),
        (["--cancel", "--yes"], "--all"),
        (["--delete", "--all"], "--yes"),
        (["--rebuild"], "--yes"),
        (["--check", "--rebuild"], "give one of them"),
        (["--follow"], "--logs"),
        (["--requeue_level", "2"], "--requeue"),
        (["--logs", "tally"], "6 jobs begin with"),
        (["--logs", "zzz"], "no job begins with"),
        (["--update", "seed:3"], "KEY:OLD:NEW"),
        (["--update", "sed:3:4", "--yes"], "did you mean 'seed'"),
        (["--update", "seed:33:4", "--yes"], "no job has seed=33"),
        (["--update", "seed:3:x", "--yes"], "expected an integer"),
        (["--update", "seed:3:7,8", "--yes"], "not a sweep"),
        (["--update", "task.nap:0.01:${seed}", "--yes"], "seed"),
        (["--update", "seed:1:9", "--yes"], "only queued jobs change"),
        (["--update", "seed:3:4", "--yes"], "exists already"),
        (["--update", "seed:3:1", "--yes"], "exists already"),
        (["--exp", "taly"], "did you mean 'tally'"),
        (["--dlete"], "--delete"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_changes_nothing(study, capsys, arguments, words):
    before = study.contents()
    try:
        code = study.run(*arguments)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1
    assert {path: kept for path, kept in study.contents().items() if path.suffix != ".lock"} == {
        path: kept for path, kept in before.items() if path.suffix != ".lock"
    }


def test_update_makes_another_job_that_runs_and_outlives_a_rebuild(study, capsys):
    assert study.run("--update", "seed:3:30", "--yes") == 0
    assert study.run("--find", "seed=30", "--update", "steps:5:2", "--yes") == 0
    study.folder.queue.unlink()
    assert study.run("--rebuild", "--yes") == 0
    assert sorted(study.states) == ["seed1", "seed2", "seed30", "seed4", "seed5", "seed6"]
    manager = study.manager()
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 0, output
    assert len(study.job("seed30").metrics.read_text().splitlines()) == 2
    assert study.job("seed1").read_status()["attempt"] == 1


def test_update_of_a_key_that_names_no_job_keeps_the_job(study):
    before = study.rows["seed3"]
    assert study.run("--update", "device:auto:cpu", "--find", "seed=3|4", "--yes") == 0
    after = study.rows["seed3"]
    assert after.id == before.id
    assert "device=cpu" in after.overrides
    assert [row.id for row in study.queue.rows()][2] == before.id


def test_delete_removes_jobs_and_folders_for_good_but_none_that_runs(study, capsys):
    manager = Manager(study.folder)
    study.queue.claim(manager, 1)
    ids = {name: row.id for name, row in study.rows.items()}
    assert study.run("--delete", "--find", "seed<=4", "--yes") == 0
    assert "left alone, since they run" in capsys.readouterr().out
    assert sorted(study.states) == ["seed3", "seed5", "seed6"]
    assert not study.folder.job(ids["seed1"]).path.exists()
    assert list(study.folder.jobs.iterdir()) == []
    assert study.run("--rebuild", "--yes") == 0
    assert study.states == {"seed3": "running", "seed5": "queued", "seed6": "queued"}


def test_error_messages_are_grouped(study, capsys):
    study.fail("seed4")
    study.fail("seed5")
    study.fail("seed6", "ValueError: other")
    assert study.run("--error_messages") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 failed: RuntimeError: told to"
    assert [line.split("seed")[1][0] for line in out if line.startswith("    ")] == ["4", "5", "6"]
    assert out[3] == "1 failed: ValueError: other"


def test_requeue_levels(study, capsys):
    study.fail("seed3")
    assert study.run("--cancel", "--find", "seed=4", "--yes") == 0
    dead, alive = Manager(study.folder), Manager(study.folder)
    study.queue.claim(dead, 1)
    study.queue.claim(alive, 1)
    lock = ProcessLock(study.job("seed6").lock)
    lock.acquire()
    (study.folder.managers / f"{dead.name}.lock").unlink()
    assert study.states == {
        "seed1": "done", "seed2": "done", "seed3": "failed", "seed4": "aborted", "seed5": "running", "seed6": "running",
    }  # fmt: skip
    for level, queued in [("1", {"seed4", "seed5"}), ("2", {"seed3", "seed4", "seed5"})]:
        assert study.run("--requeue", "--requeue_level", level, "--yes") == 0
        assert {name for name, state in study.states.items() if state == "queued"} == queued
    capsys.readouterr()
    study.run("--requeue", "--requeue_level", "100", "--yes")
    assert "no job to queue again" in capsys.readouterr().out
    assert study.states["seed6"] == "running"
    lock.release()
    study.run("--requeue", "--requeue_level", "2", "--yes")
    assert study.states["seed6"] == "running"
    study.run("--requeue", "--requeue_level", "100", "--yes")
    assert study.states["seed6"] == "queued"
    study.run("--requeue", "--requeue_level", "10000", "--find", "seed=1", "--yes")
    assert study.states["seed1"] == "queued"
    assert study.states["seed2"] == "done"
    assert not study.job("seed1").metrics.exists()


def test_a_job_that_has_just_ended_is_not_queued_again(study):
    manager = Manager(study.folder)
    study.queue.claim(manager, 1)
    study.job("seed3").path.mkdir()
    study.job("seed3").write_status({"state": "done", "attempt": 1})
    study.run("--requeue", "--requeue_level", "100", "--yes")
    assert study.states["seed3"] == "running"


@pytest.mark.parametrize("damage", ["cut", "missing", "states"])
def test_rebuild_restores_the_queue(study, damage):
    before = study.queue.rows()
    if damage == "states":
        study.queue.edit(lambda rows: [row._replace(state="queued", attempt=0) for row in rows])
    elif damage == "missing":
        study.folder.queue.unlink()
    else:
        study.folder.queue.write_bytes(study.folder.queue.read_bytes()[:100])
        assert study.run() == 2
    assert study.run("--rebuild", "--yes") == 0
    assert study.queue.rows() == before


def test_a_cancelled_running_job_stops_and_a_later_finish_is_refused(study, capsys):
    manager = study.manager("--update_exp", "task.nap=0.2", "steps=200", "seed=3,4,5")
    study.wait_for(lambda: len(study.running()) == 2)
    frozen, other = study.running()
    pid = study.folder.job(frozen.id).read_status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert study.run("--cancel", "--find", f"id={frozen.id}|{other.id}", "--yes") == 0
        assert {row.state for row in study.queue.rows() if row.id in (frozen.id, other.id)} == {"aborted"}
        study.wait_for(lambda: study.folder.job(other.id).read_status()["state"] == "aborted")
        assert study.folder.job(frozen.id).read_status()["state"] == "running"
        study.run("--delete", "--find", f"id={frozen.id}", "--yes")
        assert "still runs" in capsys.readouterr().out
        assert study.folder.job(frozen.id).path.exists()
        study.run()
        assert f"{frozen.id}: pid {pid}" in capsys.readouterr().out
        study.run("--error_messages")
        assert "1 aborted: cancelled; its process has not ended yet" in capsys.readouterr().out
    finally:
        os.kill(pid, signal.SIGCONT)
    study.wait_for(lambda: study.folder.job(frozen.id).read_status()["state"] == "aborted")
    assert study.folder.job(frozen.id).read_status()["error"] == "cancelled"
    manager.send_signal(signal.SIGINT)
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 130, output
    assert study.run("--rebuild", "--yes") == 0
    assert {row.state for row in study.queue.rows() if row.id in (frozen.id, other.id)} == {"aborted"}


def test_a_result_of_a_cancelled_attempt_does_not_count(study):
    manager = Manager(study.folder)
    (row,), _ = study.queue.claim(manager, 1)
    with ProcessLock(study.job("seed3").lock):
        assert study.run("--cancel", "--find", "seed=3", "--yes") == 0
    study.queue.claim(manager, 0, [Result(row.id, 1, "done")])
    assert study.states["seed3"] == "aborted"
    assert study.run("--requeue", "--yes") == 0
    (row,), _ = study.queue.claim(manager, 1)
    study.queue.claim(manager, 0, [Result(row.id, 1, "done")])
    assert (study.states["seed3"], row.attempt) == ("running", 2)


def test_reading_writes_nothing_while_a_manager_works(study, capfdbinary):
    manager = study.manager("task.nap=30", "--update_exp")
    study.wait_for(lambda: len(study.running()) == 2)
    time.sleep(0.5)
    try:
        name = next(name for name, state in study.states.items() if state == "running")
        before = study.contents()
        for verb in (["--show_all"], ["--find", "seed>2"], ["--error_messages"], ["--check", "--state", "done"]):
            assert study.run(*verb) == 0
            assert study.contents() == before
        capfdbinary.readouterr()
        assert study.run() == 3
        check = capfdbinary.readouterr().out
        assert b"2 running" in check
        assert b"note" not in check
        assert study.run("--logs", study.rows[name].id) == 0
        assert capfdbinary.readouterr().out == b"counting, greeting one\n"
        assert study.contents() == before
    finally:
        for _ in range(2):
            manager.send_signal(signal.SIGINT)
            time.sleep(0.4)
        manager.communicate(timeout=30)


def test_following_a_log_ends_with_the_job(study):
    manager = Manager(study.folder)
    study.queue.claim(manager, 1)
    job = study.job("seed3")
    job.path.mkdir()
    job.log.write_text("first\n")
    command = study.command("dbutils.py", "--logs", study.rows["seed3"].id[:-3], "--follow")
    with subprocess.Popen(command, cwd=SOURCE, stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"first\n"
        with open(job.log, "ab") as log:
            log.write(b"\xff second\n")
        assert follower.stdout.readline() == b"\xff second\n"
        assert follower.poll() is None
        job.write_status({"state": "failed", "attempt": 1})
        assert follower.wait(timeout=20) == 1


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self):
        return True


def test_it_asks_on_a_terminal(study, monkeypatch, capsys):
    for answer, left in [("n\n", "queued"), ("", "queued"), ("y\n", "aborted")]:
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert study.run("--cancel", "--find", "seed=3") == 0
        shown = capsys.readouterr().out
        assert "cancel 1 jobs:" in shown
        assert "[y/N]" in shown
        assert study.states["seed3"] == left


def test_a_reader_that_leaves_early_is_no_error(study):
    shell = " ".join(map(str, study.command("dbutils.py", "--show_all"))) + " | head -n 0"
    result = subprocess.run(shell, shell=True, cwd=SOURCE, capture_output=True, text=True)
    assert result.stderr == ""


def test_help_is_quick_and_imports_little():
    command = [sys.executable, "-X", "importtime", "dbutils.py", "--help"]
    result = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert result.returncode == 0
    modules = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not modules & {"torch", "hydra", "pandas", "tinydb", "filelock"}


def test_no_verb_imports_torch(study):
    script = (
        "import sys, dbutils; root = sys.argv[1]\n"
        "for verb in (['--check'], ['--find', 'seed=1'], ['--cancel', '--find', 'seed=3', '--yes']):\n"
        "    dbutils.main(['--exp', 'tally', '--root', root, *verb])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(study.folder.root)], cwd=SOURCE, check=True, capture_output=True)


def test_many_jobs_are_cancelled_without_keeping_managers_waiting(study, monkeypatch):
    locked = []
    cancel, edit = RunDirectory.cancel, Queue.edit

    def editing(queue, change):
        locked.append(True)
        edit(queue, change)
        locked.pop()

    def cancelling(run, attempt):
        assert not locked
        cancel(run, attempt)

    monkeypatch.setattr(Queue, "edit", editing)
    monkeypatch.setattr(RunDirectory, "cancel", cancelling)
    assert study.run("--cancel", "--all", "--yes") == 0
    assert sorted(study.states.values()) == ["aborted"] * 4 + ["done"] * 2
    study.folder.queue.unlink()
    assert study.run("--rebuild", "--yes") == 0
    assert sorted(study.states.values()) == ["aborted"] * 4 + ["done"] * 2


@pytest.mark.parametrize(("closing", "arguments", "status"), [("<&-", "--cancel --find seed=3", 2), (">&-", "", 3)])
def test_closed_streams_are_no_traceback(study, closing, arguments, status):
    shell = " ".join([*map(str, study.command("dbutils.py")), arguments, closing])
    result = subprocess.run(shell, shell=True, cwd=SOURCE, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert study.states["seed3"] == "queued"
