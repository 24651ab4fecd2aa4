"""The Python interface: ids become estimators, and a user's own joins with a file of each kind."""

import subprocess
import sys
from pathlib import Path

import pytest

from errors import UserError
from estimators import get_config, get_estimator, registry
from tests.estimators.test_registry import FAMILY


def test_a_config_builds_the_estimator():
    Estimator, config = get_config("ovis-gamma1.0")
    estimator = Estimator(mc=2, iw=5, **config)
    assert config == {"gamma": 1.0}
    assert repr(estimator) == "OvisGamma(ovis-gamma1, mc=2, iw=5, alpha=0.0, beta=1.0, freebits=None)"
    assert repr(get_estimator("ovis-gamma1", mc=2, iw=5)) == repr(estimator)


@pytest.mark.parametrize(
    "id",
    [
        "reinforce",
        "vimco-geometric",
        "ovis-gamma0.3",
        "ovis-S3",
        "ovis-S0.2-exclusive",
        "wake-wake",
        "wake-sleep",
        "rloo",
        "vargrad",
        "reinforce-baseline",
        "nvil",
        "ovis-geometric-gamma0.3",
        "tvo-part3-beta1.5",
        "tvo-part3",
        "tvo-part3-right",
        "tvo-part3-beta1.5-trapz",
        "tvo-part3-config1",
        "tvo-part3-linear-trapz",
    ],
)
def test_an_estimator_knows_its_id(id: str):
    assert get_estimator(id).id == id


def test_importing_the_package_does_not_import_torch():
    code = "import sys, estimators, estimators.registry as r; r.parse('ovis-S10'); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


HALF_WAKE = """
from dataclasses import dataclass
from estimators.bounds.base import ScoreFunction


@dataclass(eq=False, repr=False)
class HalfWake(ScoreFunction):
    share: float = 1.0

    @property
    def id(self):
        return f"half-wake{self.share}"

    def control_variate(self, weights, beta):
        return self.share * weights.w_norm
"""


def test_a_users_estimator_is_one_config_and_one_file(user_dir: Path):
    (user_dir / "conf" / "estimator" / "half-wake.yaml").write_text(FAMILY)
    (user_dir / "half_wake.py").write_text(HALF_WAKE)
    registry.add_directory(user_dir)
    assert get_estimator("half-wake0.50", iw=4).id == "half-wake0.5"


def test_a_target_that_cannot_be_imported_is_named(user_dir: Path):
    (user_dir / "conf" / "estimator" / "half-wake.yaml").write_text(FAMILY.replace("half_wake.", "absent."))
    registry.add_directory(user_dir)
    with pytest.raises(UserError, match=r"'half-wake1': target 'absent\.HalfWake' cannot be imported"):
        get_estimator("half-wake1")


def test_misspelt_options_are_refused():
    with pytest.raises(TypeError, match="kv"):
        get_estimator("reinforce", kv=3)  # type: ignore[call-arg]
