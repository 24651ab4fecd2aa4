"""docs/queue.md: its commands run as they stand there, on six jobs that count, and its table is that of the flags."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dbutils

SOURCE = Path(__file__).resolve().parents[2]
PAGE = (SOURCE / "docs" / "queue.md").read_text()
COMMANDS = re.findall(r"^    (python .*?)(?: +#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_of_the_page_runs(study, capsys, command):
    study.fail("seed3", "ValueError: told to")
    shutil.copytree(study.folder.path, study.folder.root / "single", ignore=shutil.ignore_patterns("*.json"))
    _, program, *arguments = shlex.split(command.replace("quickstart", "tally").replace("gmm-ovis", "tally-"))
    arguments += ["--root", str(study.folder.root)]
    if "--logs" in arguments:
        arguments[arguments.index("--logs") + 1] = study.rows["seed1"].id[:-2]
    if program == "dbutils.py":
        code, error = dbutils.main([*arguments, "--yes"]), capsys.readouterr().err
    else:
        options = [] if "--doctor" in arguments else ["--user_dir", str(study.user_dir), "--processes", "2"]
        process = [sys.executable, program, *arguments, *options]
        done = subprocess.run(process, cwd=SOURCE, capture_output=True, text=True)
        code, error = done.returncode, done.stderr
    assert code in (0, 1, 3), error
    assert error == ""


def test_the_table_has_every_flag_and_no_other():
    said = set(re.findall(r"^\| `(--\w+)", PAGE, re.MULTILINE))
    there = {flag for action in dbutils.parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert said == there


def test_every_state_and_level_is_on_the_page():
    from orchestration.queue import REQUEUE_LEVELS, STATES

    for word in (*STATES, *map(str, REQUEUE_LEVELS.values())):
        assert word in PAGE
