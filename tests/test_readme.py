"""What the README shows, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1]
README = (SOURCE / "README.md").read_text()


def block(language, word):
    """Return the README's code block in this language that has this word in it."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in code)
    return found


def prove(user_dir):
    command = [sys.executable, "-m", "pytest", "-q", "tests/estimators/test_bounds_enumeration.py"]
    command += ["-p", "no:cacheprovider", "--user_dir", str(user_dir), "-k", "mean-of-others"]
    return subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)


@pytest.fixture
def user_dir(tmp_path):
    (tmp_path / "conf" / "estimator").mkdir(parents=True)
    (tmp_path / "mean_of_others.py").write_text(block("python", "class MeanOfOthers"))
    (tmp_path / "conf" / "estimator" / "mean-of-others.yaml").write_text(block("yaml", "mean-of-others"))
    return tmp_path


def test_the_estimator_of_the_readme_passes_the_shared_proof_and_a_biased_one_does_not(user_dir):
    assert prove(user_dir).returncode == 0
    file = user_dir / "mean_of_others.py"
    unbiased = "(log_w.sum(-2, keepdim=True) - log_w) / (weights.num_particles - 1)"
    assert unbiased in file.read_text()
    file.write_text(file.read_text().replace(unbiased, "log_w.mean(-2, keepdim=True)"))
    biased = prove(user_dir)
    assert biased.returncode == 1
    assert "passed" not in biased.stdout


def test_the_estimator_of_the_readme_runs_as_a_job(user_dir, tmp_path):
    command = [sys.executable, "run.py", "--user_dir", str(user_dir), "estimator=mean-of-others", "steps=5"]
    result = subprocess.run(
        [*command, f"root={tmp_path / 'runs'}", "analysis.num_replicates=5"], cwd=SOURCE, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_notebook_of_the_readme(capsys):
    exec(compile(block("python", "gradient_statistics"), "README.md", "exec"), {})
    ess, snr = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert 1 <= float(ess) <= 16
    assert float(snr) > 0


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (SOURCE / target).exists(), target


def test_every_experiment_is_in_the_readme():
    for file in (SOURCE / "experiments").glob("*.yaml"):
        assert f"`{file.stem}`" in README
