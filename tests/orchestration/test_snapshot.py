import subprocess
import sys

from orchestration import snapshot


def test_the_snapshot_is_named_by_its_content(tmp_path):
    user = tmp_path / "user"
    (user / "conf" / "task").mkdir(parents=True)
    (user / "mine.py").write_text("WORD = 1\n")
    (user / "conf" / "task" / "mine.yaml").write_text("target: mine.run\n")
    (user / ".venv").mkdir()
    (user / ".venv" / "hidden.py").write_text("")
    store = tmp_path / "snapshots"
    store.mkdir()
    first = snapshot.take(store, user)
    assert snapshot.take(store, user) == first
    copied = sorted(str(path.relative_to(store / first)) for path in (store / first / "user_dir").rglob("*.*"))
    assert copied == ["user_dir/conf/task/mine.yaml", "user_dir/mine.py"]
    (user / "mine.py").write_text("WORD = 2\n")
    second = snapshot.take(store, user)
    assert second != first
    assert (store / first / "user_dir" / "mine.py").read_text() == "WORD = 1\n"
    assert sorted(path.name for path in store.iterdir()) == sorted([first, second])


def test_a_snapshot_holds_all_that_a_worker_needs_and_no_tests(tmp_path):
    name = snapshot.take(tmp_path)
    folders = {path.name for path in (tmp_path / name).iterdir() if path.is_dir()}
    assert {"analysis", "conf", "datasets", "estimators", "models", "orchestration", "tasks"} <= folders
    assert not folders & {"tests", "benchmarks", "runs", "reports", "data"}
    script = "import orchestration.worker, tasks.train; print(orchestration.worker.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / name, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(str(tmp_path / name))
