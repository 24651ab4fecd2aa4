"""What dbutils.py changes outlives changed files, and jobs are composed as the source does that they run from."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture
def mine(study, tmp_path):
    """A copy of the user's folder, to be changed."""
    shutil.copytree(study.user_dir, tmp_path / "mine")
    return tmp_path / "mine"


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def update_experiment(study, user_dir, *arguments):
    """Take in a changed file; no job is run."""
    command = study.command("manager.py", "--user_dir", str(user_dir), "--update_exp", "--max_jobs", "1", *arguments)
    return subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)


def test_jobs_are_composed_as_their_snapshot_does_it(study, mine, capsys):
    assert study.run("--update", "task.nap:0.01:0.02", "--find", "seed=3", "--yes") == 0
    expected = study.rows["seed3"]
    assert study.run("--restore", "--yes") == 0
    rows = study.queue.rows()
    task = mine / "conf" / "task" / "tally.yaml"
    change(task, "nap: 0.01", "nap: 0.02\nmore: 1")  # the default is what the job is to have
    given = ["--user_dir", str(mine)]
    capsys.readouterr()
    assert study.run("--find", "task.nap=0.01", *given) == 0
    assert "6 jobs" in capsys.readouterr().out
    assert study.run("--update", "task.more:1:2", "--yes", *given) == 2
    assert "no job has a key 'task.more'" in capsys.readouterr().err
    assert study.run("--update", "task.nap:0.01:0.02", "--find", "seed=3", "--yes", *given) == 0
    assert study.rows["seed3"] == expected
    study.run("--restore", "--yes", *given)
    study.folder.queue.unlink()
    assert study.run("--rebuild", "--yes", *given) == 0
    assert study.queue.rows() == rows
    task.write_text("nap: [")
    assert study.run("--find", "seed=3,task.nap=0.01", *given) == 0


def test_what_a_snapshot_refuses_is_one_line(study, mine, capsys):
    change(mine / "conf" / "task" / "tally.yaml", "nap: 0.01", "nap: text")
    assert study.run("--update", "task.nap:0.01:text", "--yes", "--user_dir", str(mine)) == 2
    assert re.fullmatch(r"error: task\.nap=text: expected .*number\n", capsys.readouterr().err)


def test_a_relative_data_root_is_that_of_the_first_command(study, tmp_path):
    before = [row.overrides for row in study.queue.rows()]
    study.folder.queue.unlink()
    command = [sys.executable, SOURCE / "dbutils.py", *study.command("")[2:], "--rebuild", "--yes"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert [row.overrides for row in study.queue.rows()] == before


def test_edits_outlive_a_changed_file_and_are_named_and_taken_back(study, mine, capsys):
    ids = {name: row.id for name, row in study.rows.items()}
    assert study.run("--update", "seed:3:30", "--yes") == 0
    assert study.run("--delete", "--find", "seed=4", "--yes") == 0
    change(mine / "experiments" / "tally.yaml", "range(1,7)", "range(2,8)")
    done = update_experiment(study, mine)
    assert done.returncode == 3, done.stderr
    assert "1 new jobs queued, 0 queued ones withdrawn" in done.stdout
    assert "edits by dbutils.py stay: 2 jobs removed from the grid, 1 put in the place of such" in done.stdout
    assert f"without {ids['seed4']}" in done.stdout
    assert f"with    {study.rows['seed30'].id}" in done.stdout
    states = study.states
    assert set(states) == {"seed1", "seed2", "seed30", "seed5", "seed6", "seed7"}
    assert study.run("--rebuild", "--yes") == 0
    assert study.states == states
    assert study.run("--update", "seed:6:60", "--yes") == 0
    capsys.readouterr()
    assert study.run("--restore", "--yes") == 0
    assert "3 jobs are back, 1 queued ones withdrawn" in capsys.readouterr().out
    seeds = dict.fromkeys(["seed1", "seed2", "seed30"], "done")  # seed30 was run before its place was taken back
    assert study.states == seeds | dict.fromkeys(["seed3", "seed4", "seed5", "seed6", "seed7"], "queued")
    assert study.rows["seed4"].id == ids["seed4"]
    assert "edits" not in json.loads(study.folder.record.read_text())
    assert study.run("--restore", "--yes") == 0
    assert "0 jobs are back, 0 queued ones withdrawn" in capsys.readouterr().out


def test_restoring_gives_a_neutral_key_its_value_again(study):
    before = study.queue.rows()
    assert study.run("--update", "device:auto:cpu", "--yes") == 0
    assert study.queue.rows() != before
    assert study.run("--restore", "--yes") == 0
    assert study.queue.rows() == before


@pytest.mark.parametrize("arguments", [["--delete", "iw>=100"], ["iw>=100", "--delete"], ["iw>=100"]])
def test_an_expression_without_its_flag_is_told_where_it_belongs(study, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        study.run(*arguments)
    assert "--find 'iw>=100'" in capsys.readouterr().err


def test_a_source_that_cannot_build_the_jobs_is_not_taken(study, mine):
    before = study.queue.rows()
    command = study.command("manager.py", "--user_dir", str(mine), "--update_lib", "--max_jobs", "1")
    for file, old, new, words in [
        ("conf/task/tally.yaml", "nap: 0.01", "nap: [", "tally.yaml"),
        ("tally.py", "def check", "def check(config):\n    raise ValueError('broken')\n\n\ndef _check", "broken"),
    ]:
        text = (mine / file).read_text()
        change(mine / file, old, new)
        refused = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
        assert refused.returncode == 2
        assert re.fullmatch(rf"error: --update_lib: .*{words}.*; nothing was changed\n", refused.stderr)
        assert study.queue.rows() == before
        (mine / file).write_text(text)
