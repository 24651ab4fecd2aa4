"""`python -m estimators`, and that what it says of a family's limits is what the class does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from estimators import get_config, registry
from estimators.__main__ import main
from tests.estimators.test_registry import FAMILY

ROOT = Path(__file__).resolve().parents[2]


def listed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "estimators", *arguments]
    environment = {**os.environ, "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_all_families_are_listed_with_what_they_need_and_declare():
    result = listed()
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 120
    said = re.sub(r"\s+", "", result.stdout)
    for family in registry.families():
        assert re.sub(r"\s+", "", family.id.partition("[")[0])[:20] in said
    for column in ("id", "needs", "declares", "source"):
        assert column in result.stdout.partition("dreg")[0]
    assert "K > S" in result.stdout
    assert "arithmetic, geometric" in result.stdout


def test_an_id_is_shown_in_full():
    result = listed("tvo-part5-beta10.0-right", "reinforce")
    assert result.returncode == 0
    for words in (
        "id          tvo-part5-right",
        "form        tvo-part<num_intervals>[-beta<exponent>][-<rule>]",
        "parameters  num_intervals = 5, exponent = 10, rule = right",
        "limits      K >= 2; no alpha; N >= 2",
        "source      Masrani et al. 2019",
        "class       estimators.bounds.reinforce.Reinforce",
    ):
        assert " ".join(words.split()) in " ".join(result.stdout.split())


def test_an_unknown_id_is_one_line_with_the_near_names():
    result = listed("reinforse")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown estimator 'reinforse'; did you mean 'reinforce' or 'reinforce-baseline'?\n"


def test_a_users_family_is_listed(user_dir: Path):
    (user_dir / "conf" / "estimator" / "half-wake.yaml").write_text(FAMILY)
    assert "half-wake<share>" in listed("--user_dir", str(user_dir)).stdout
    assert listed("--user_dir", str(user_dir / "absent")).returncode == 2


def test_an_output_that_knows_no_accents_is_no_error():
    result = listed("ovis-gamma1", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert "Li\\xe9vin" in result.stdout


def test_listing_does_not_import_torch():
    code = "import sys; from estimators.__main__ import main; sys.exit(main([]) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == 0


def test_it_explains_itself(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m estimators" in capsys.readouterr().out


@pytest.mark.parametrize("family", registry.families(), ids=lambda family: family.name)
def test_a_familys_limits_are_those_of_its_class(family: registry.Family):
    if family.file.parent != registry.SOURCE:
        pytest.skip("a family of a folder of one's own need not say its limits")
    Estimator, _ = get_config(family.examples[0])
    least = "K > S" if family.name == "ovis-S" else f"K >= {Estimator.min_particles}"
    refused = [least]
    refused += [] if Estimator.takes_alpha else ["no alpha"]
    refused += [] if Estimator.takes_beta else ["beta = 1"]
    refused += [] if Estimator.takes_freebits else ["no freebits"]
    refused += ["N >= 2"] if family.name.startswith("tvo") else []
    assert family.limits == "; ".join(refused)
