"""The manager as its users see it: a command line, real worker processes, real kills. The jobs count, without torch."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manager import main
from tests.orchestration.study import IDS, SOURCE, Study


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_all_jobs_run_once_and_a_second_call_has_nothing_to_do(study):
    first = study.run()
    assert first.returncode == 0, first.stderr
    assert re.match(r"no CUDA device found: jobs run on the CPU, 2 jobs at a time\n|\d+ of \d+ CUDA", first.stdout)
    study.assert_all_done_once()
    for name in ("config.yaml", "status.json", "metrics.jsonl", "run.log"):
        assert (study.job("seed1").path / name).exists()
    assert study.job("seed1").log.read_text() == "counting, greeting one\n"
    before = {path: path.stat().st_mtime_ns for path in study.folder.jobs.rglob("*")}
    assert study.run("--resume").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in study.folder.jobs.rglob("*")} == before
    assert not list(study.folder.managers.iterdir())


def test_a_job_that_raises_fails_alone_and_can_be_queued_again(study):
    result = study.run("task.fail_at=3", "seed=1,2")
    assert result.returncode == 1
    assert study.states == {"seed1": "failed", "seed2": "failed"}
    assert "Traceback" in study.job("seed1").log.read_text()
    assert study.job("seed1").read_status()["error"] == "RuntimeError: told to fail at step 3"
    assert "told to fail" in study.run("--status").stdout
    assert study.run().returncode == 1
    assert study.run("--requeue_level", "2").returncode == 1
    assert all(row.attempt == 2 for row in study.rows)


def test_max_jobs_leaves_the_rest_for_later(study):
    assert study.run("--max_jobs", "2").returncode == 3
    assert sorted(study.states.values()) == ["done"] * 2 + ["queued"] * 4
    status = study.run("--status")
    assert status.returncode == 3
    assert status.stdout == "tally: 2 done, 4 queued\n"
    assert study.run().returncode == 0
    study.assert_all_done_once()


def test_an_interrupt_sends_jobs_back_with_their_checkpoint(study):
    manager = study.start("task.nap=0.2", "steps=15")
    study.wait_for(lambda: len(study.running()) == 2)
    pids = study.running().values()
    manager.send_signal(signal.SIGINT)
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 130
    assert "go back to the queue" in output
    assert set(study.states.values()) == {"queued"}
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()
    study.hurry()
    assert study.run().returncode == 0
    study.assert_all_done_once(steps=15)


def test_a_second_interrupt_stops_at_once_without_orphans(study):
    manager = study.start("task.nap=30")
    study.wait_for(lambda: len(study.running()) == 2)
    pids = study.running().values()
    manager.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    manager.send_signal(signal.SIGINT)
    manager.communicate(timeout=20)
    assert manager.returncode == 130
    assert set(study.states.values()) == {"queued"}
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_a_killed_worker_is_replaced_and_its_job_goes_on(study):
    manager = study.start("task.nap=0.2", "steps=6")
    study.wait_for(lambda: len(study.running()) == 2)
    victim, pid = next(iter(study.running().items()))
    os.kill(pid, signal.SIGKILL)
    study.hurry()
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 0, output
    assert f"lost     {victim}" in output
    study.assert_all_done_once(steps=6)
    assert {row.attempt for row in study.rows if row.id == victim} == {2}


def test_a_job_that_kills_its_worker_three_times_is_aborted(study):
    result = study.run("task.die_at=2", "seed=3")
    assert result.returncode == 1
    assert study.states == {"seed3": "aborted"}
    # The first attempt still brought a new checkpoint: its death does not count.
    assert study.rows[0].attempt == 4
    assert "died 3 times" in study.job("seed3").read_status()["error"]


def test_a_killed_manager_leaves_its_jobs_to_finish_and_the_next_one_collects_them(study):
    manager = study.start("task.nap=0.3", "steps=8")
    study.wait_for(lambda: len(study.running()) == 2)
    alive = study.running()
    manager.kill()
    manager.communicate()
    before = set(study.folder.managers.iterdir())
    second = study.start()
    study.wait_for(lambda: set(study.folder.managers.iterdir()) - before)
    study.hurry()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    study.assert_all_done_once(steps=8)
    assert {row.attempt for row in study.rows if row.id in alive} == {1}


def test_two_managers_share_an_experiment(study):
    managers = [study.start("task.nap=0.05") for _ in range(2)]
    for manager in managers:
        output, _ = manager.communicate(timeout=60)
        assert manager.returncode == 0, output
    study.assert_all_done_once()
    assert {row.attempt for row in study.rows} == {1}


def test_other_overrides_on_a_resume_need_to_be_taken_in(study):
    assert study.run("steps=2").returncode == 0
    assert study.run("steps=2").returncode == 0
    refused = study.run("steps=3")
    assert refused.returncode == 2
    assert "steps=2" in refused.stderr
    assert "steps=3" in refused.stderr
    assert "--update_exp" in refused.stderr
    assert study.run("--update_exp", "steps=3").returncode == 0
    assert sorted(study.states) == IDS
    assert len(study.rows) == 12


def test_a_changed_file_is_named_and_taken_in_when_asked(study):
    assert study.run("--max_jobs", "2").returncode == 3
    file = study.user_dir / "experiments" / "tally.yaml"
    file.write_text(file.read_text().replace("range(1,7)", "range(2,8)"))
    result = study.run("--max_jobs", "1")
    assert "tally.yaml has changed" in result.stdout
    assert sorted(study.states) == IDS
    result = study.run("--update_exp")
    assert result.returncode == 0
    assert "1 new jobs queued, 0 queued ones withdrawn" in result.stdout
    assert re.search(
        r"\n  \+ \S+seed7-\w+\n1 jobs that are no longer in the grid have started, and stay\n", result.stdout
    )
    assert study.states == dict.fromkeys([*IDS, "seed7"], "done")


def test_points_that_left_the_grid_are_withdrawn_while_queued(study):
    assert study.run("--max_jobs", "1").returncode == 3
    assert study.run("--update_exp", "seed=1,6").returncode == 0
    assert study.states == {"seed1": "done", "seed6": "done"}


def test_jobs_run_from_the_source_as_it_was_unless_it_is_renewed(study):
    assert study.run("--max_jobs", "1").returncode == 3
    module = study.user_dir / "tally.py"
    module.write_text(module.read_text().replace('"one"', '"two"'))
    assert study.run("--max_jobs", "1").returncode == 3
    renewed = study.run("--update_lib")
    assert renewed.returncode == 0
    assert "the source has changed in 1 files:\n  ~ user_dir/tally.py\n" in renewed.stdout
    assert len(list(study.folder.commits.glob("*.json"))) == 2
    logs = sorted(study.folder.job(row.id).log.read_text() for row in study.rows)
    assert logs == ["counting, greeting one\n"] * 2 + ["counting, greeting two\n"] * 4


def test_starting_afresh_is_refused_while_a_job_runs(study):
    manager = study.start("task.nap=30")
    study.wait_for(lambda: len(study.running()) == 2)
    refused = study.run("--rf")
    assert refused.returncode == 2
    assert "is running" in refused.stderr
    assert f"pid {manager.pid}" in refused.stderr
    for _ in range(2):
        manager.send_signal(signal.SIGINT)
        time.sleep(0.6)
    manager.communicate(timeout=20)
    assert study.run("--rf").returncode == 0
    assert {row.attempt for row in study.rows} == {1}


@pytest.mark.parametrize("mistake", ["foo=1", "task.nap=-1"])
def test_a_mistake_beside_rf_removes_nothing(study, mistake):
    assert study.run().returncode == 0
    assert study.run("--rf", mistake).returncode == 2
    study.assert_all_done_once()
    assert [path.name for path in study.folder.root.iterdir() if "removed" in path.name] == []


@pytest.mark.parametrize("arguments", [["task.nap=-1"], ["--rf"]])
def test_a_folder_that_is_no_experiment_is_left_alone(study, arguments):
    study.folder.path.mkdir(parents=True)
    (study.folder.path / "thesis.tex").touch()
    assert study.run(*arguments).returncode == 2
    assert (study.folder.path / "thesis.tex").exists()


def test_a_lost_record_loses_no_run(study):
    assert study.run("seed=1,2,3").returncode == 0
    study.folder.record.unlink()
    result = study.run()
    assert result.returncode == 0
    assert "tally: 3 of 6 jobs queued" in result.stdout
    study.assert_all_done_once()
    assert {row.attempt for row in study.rows} == {1}


def test_a_queue_deleted_under_a_manager_ends_it_with_an_error_and_is_rebuilt(study):
    manager = study.start("task.nap=0.2", "steps=10")
    study.wait_for(lambda: len(study.running()) == 2)
    study.folder.queue.unlink()
    output, _ = manager.communicate(timeout=60)
    assert manager.returncode == 1
    assert "queue.json is missing" in output
    assert "Traceback" not in output
    status = study.run("--status")
    assert status.returncode == 2
    assert "rebuilds it" in status.stderr
    study.hurry()
    assert study.run().returncode == 0
    study.assert_all_done_once(steps=10)


def test_a_missing_snapshot_is_taken_again_or_asked_for(study):
    assert study.run("--max_jobs", "2").returncode == 3
    for snapshot in study.folder.snapshots.iterdir():
        shutil.rmtree(snapshot)
    assert study.run("--max_jobs", "2").returncode == 3
    for snapshot in study.folder.snapshots.iterdir():
        (snapshot / "orchestration" / "worker.py").unlink()
    (study.user_dir / "tally.py").write_text((study.user_dir / "tally.py").read_text() + "\n")
    refused = study.run()
    assert refused.returncode == 2
    assert "--update_lib" in refused.stderr
    assert study.run("--update_lib").returncode == 0
    study.assert_all_done_once()


def test_an_experiment_goes_on_without_its_file(study):
    assert study.run("--max_jobs", "2").returncode == 3
    (study.user_dir / "experiments" / "tally.yaml").unlink()
    result = study.run()
    assert result.returncode == 0
    assert "going on with the copy" in result.stdout
    study.assert_all_done_once()


def test_a_wrong_report_section_is_refused_before_any_job_runs(study):
    file = study.user_dir / "experiments" / "tally.yaml"
    file.write_text(file.read_text().replace("metrics:", "metricz:"))
    result = study.run()
    assert result.returncode == 2
    assert "'metrics'" in result.stderr
    assert not study.folder.root.exists()


def test_a_damaged_queue_is_said_and_rebuilt(study):
    assert study.run("--max_jobs", "4").returncode == 3
    study.folder.queue.write_bytes(study.folder.queue.read_bytes()[:100])
    assert study.run("--status").returncode == 2
    result = study.run()
    assert result.returncode == 0
    assert "rebuilt" in result.stdout
    study.assert_all_done_once()
    assert {row.attempt for row in study.rows} == {1}
    assert (study.folder.path / "queue.json.damaged-1").exists()


def test_a_refusal_of_the_check_leaves_nothing_behind(study):
    result = study.run("task.nap=-1")
    assert result.returncode == 2
    assert "task.nap=-1" in result.stderr
    assert "no job was queued" in result.stderr
    assert not study.folder.path.exists()


def test_a_dry_run_lists_the_jobs_and_writes_nothing(study):
    result = study.run("--dry_run", "seed=4,5")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "2 jobs"
    assert "seed=5" in result.stdout
    assert not study.folder.root.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--exp", "quickstrat"], "quickstart"),
        (["--exp", "tally", "seed=x"], "seed=x"),
        (["--exp", "tally", "stepz=3"], "steps"),
        (["--exp", "tally", "--processes", "0"], "from 1 to"),
        (["--exp", "tally", "--max_load", "2"], "between 0 and 1"),
        (["--exp", "tally", "--executor", "locl"], "local"),
        (["--exp", "tally", "--proceses", "2"], "--proceses"),
        (["--exp", "tally", "--processes", "9" * 30], "999999"),
        (["--exp", "tally", "--requeue_level", "-3"], "--requeue_level"),
        (["--exp", "tally", "--status", "--rf"], "--rf"),
        (["--exp", "tally", "--user_dir", "nowhere"], "nowhere"),
        (["--exp", "tally", "root=elsewhere"], "--root elsewhere"),
        (["--exp", "tally", "--steps", "3"], "give steps=3"),
        (["--exp", "single"], "dbutils.py --exp single"),
        ([], "--exp"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(study, capsys, arguments, words):
    try:
        code: object = main(["--root", str(study.folder.root), "--user_dir", str(study.user_dir), *arguments])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1
    assert not study.folder.path.exists()


def test_help_answers_without_torch_or_hydra():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "manager.py", "--help"], cwd=SOURCE, capture_output=True, text=True
    )
    modules = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert "--requeue_level" in result.stdout
    assert not modules & {"torch", "hydra", "pandas", "tinydb"}


def test_the_same_overrides_in_another_order_go_on(study):
    assert study.run("task.nap=0", "seed=1,2", "--max_jobs", "1").returncode == 3
    assert study.run("seed=1,2", "task.nap=0").returncode == 0
    assert study.run("seed=2,1", "task.nap=0").returncode == 2
