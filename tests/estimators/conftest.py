from pathlib import Path

import pytest

from estimators import registry


@pytest.fixture
def user_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's directory on the import path, which the registry forgets after the test."""
    (tmp_path / "conf" / "estimator").mkdir(parents=True)
    monkeypatch.setattr(registry, "_directories", list(registry._directories))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    registry.families.cache_clear()
