"""What the README shows, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SOURCE = Path(__file__).resolve().parents[1]
README = (SOURCE / "README.md").read_text()


def block(language, word):
    """Return the README's code block in this language that has this word in it."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in code)
    return found


def prove(user_dir):
    command = [sys.executable, "-m", "pytest", "-q", "tests/estimators/test_bounds_enumeration.py"]
    command += ["-p", "no:cacheprovider", "--user_dir", str(user_dir), "-k", "mean-of", "-rA"]
    return subprocess.run(command, cwd=SOURCE, capture_output=True, text=True).stdout


@pytest.fixture
def user_dir(tmp_path):
    (tmp_path / "conf" / "estimator").mkdir(parents=True)
    (tmp_path / "mean_of_others.py").write_text(block("python", "class MeanOfOthers"))
    (tmp_path / "conf" / "estimator" / "mean-of-others.yaml").write_text(block("yaml", "mean-of-others"))
    return tmp_path


def test_the_estimator_of_the_readme_passes_the_shared_proof_and_a_biased_one_does_not(user_dir):
    module, declaration = user_dir / "mean_of_others.py", user_dir / "conf" / "estimator" / "mean-of-others.yaml"
    unbiased = "(log_w.sum(-2, keepdim=True) - log_w) / (weights.num_particles - 1)"
    assert unbiased in module.read_text()
    biased = (
        module.read_text().replace(unbiased, "log_w.mean(-2, keepdim=True)").replace("mean-of-others", "mean-of-all")
    )
    (user_dir / "mean_of_all.py").write_text(biased)
    declared = declaration.read_text().replace("mean-of-others", "mean-of-all").replace("mean_of_others", "mean_of_all")
    declaration.with_name("mean-of-all.yaml").write_text(declared)
    lines = prove(user_dir).splitlines()
    passed = [line for line in lines if line.startswith("PASSED")]
    failed = [line for line in lines if line.startswith("FAILED")]
    assert passed
    assert failed
    assert all("mean-of-others" in line for line in passed)
    assert all("mean-of-all" in line for line in failed)


def test_the_estimator_of_the_readme_runs_as_a_job(user_dir, tmp_path):
    command = [sys.executable, "run.py", "--user_dir", str(user_dir), "estimator=mean-of-others", "steps=5"]
    result = subprocess.run(
        [*command, f"root={tmp_path / 'runs'}", "analysis.num_replicates=5"], cwd=SOURCE, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_notebook_of_the_readme(capsys, tmp_path):
    names: dict = {}
    exec(compile(block("python", "get_estimator("), "README.md", "exec"), names)
    ess, snr = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert 1 <= float(ess) <= 16
    assert float(snr) > 0
    loop = block("python", "SummaryWriter").replace("runs/mine", str(tmp_path))
    exec(compile(loop, "README.md", "exec"), names)
    names["writer"].close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss/L_k", "loss/ess", "grads/snr"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/L_k")] == [0, 1, 2]


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (SOURCE / target).exists(), target


def test_every_experiment_is_in_the_readme():
    for file in (SOURCE / "experiments").glob("*.yaml"):
        assert f"`{file.stem}`" in README
