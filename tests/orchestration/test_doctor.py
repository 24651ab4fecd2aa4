import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration import commits, doctor

SOURCE = Path(__file__).resolve().parents[2]


def test_the_doctor_leaves_nothing_behind_and_says_so_where_all_is_well(tmp_path):
    command = [sys.executable, "manager.py", "--doctor", "--root", str(tmp_path / "runs")]
    result = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "verdict: jobs can run here"
    others = [line for line in result.stdout.splitlines()[:-1] if not line.startswith("warn  processors: ")]
    assert {line[:4] for line in others} == {"ok  "}
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_notices_locks_that_do_not_exclude(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "is_free", lambda path: True)
    monkeypatch.setattr(doctor, "LEAST_SPACE", 1 << 60)
    lines: list[str] = []
    assert not doctor.examine(tmp_path, lines.append)
    assert [line.partition(":")[0] for line in lines if line.startswith("FAIL")] == ["FAIL  space", "FAIL  lock"]
    assert lines[-1] == "verdict: 2 of the above must be mended first"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("load", "start"), [(99.0, "warn  processors: "), (0.5, "ok    processors: ")])
def test_the_doctor_warns_of_a_machine_that_others_use(tmp_path, monkeypatch, load, start):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    lines: list[str] = []
    assert doctor.examine(tmp_path, lines.append)
    (line,) = [line for line in lines if "processors" in line]
    assert line.startswith(start)
    assert ("jobs will be slow" in line) == (load > 1)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.py").write_text("a = 1\n")
    identity = ["-c", "user.name=N", "-c", "user.email=n@example.org"]
    for arguments in (["init", "-q"], ["add", "a.py"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    return folder


def test_the_commit_and_what_was_changed_since_are_kept(tmp_path, repository):
    assert commits.shown(repository).endswith("(clean)")
    (repository / "a.py").write_text("a = 2\n")
    (repository / "b.py").write_text("")
    (tmp_path / "plain").mkdir()
    store = tmp_path / "store"
    commits.record(store, "name", {"source": repository, "user_dir": tmp_path / "plain"})
    kept = json.loads((store / "name.json").read_text())
    assert len(kept["source"]["commit"]) == 40
    assert kept["source"]["untracked"] == ["b.py"]
    assert "-a = 1\n+a = 2\n" in (store / kept["source"]["patch"]).read_text()
    assert kept["user_dir"]["commit"] is None
    assert "git" in kept["user_dir"]["reason"]
