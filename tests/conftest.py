"""`pytest --user_dir DIR` holds the estimators of a folder of your own to the proofs that those in place pass."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from estimators import registry

# Tests run beside each other, one a core: the threads of one would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--user_dir", type=Path, help="a folder with modules and conf/estimator of your own")


def pytest_configure(config: pytest.Config) -> None:
    if user_dir := config.getoption("user_dir"):
        if not user_dir.is_dir():
            raise pytest.UsageError(f"--user_dir: expected a folder, and there is none at {user_dir}")
        sys.path.insert(0, str(user_dir.resolve()))
        registry.add_directory(user_dir)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """Return a folder in memory where there is such a thing: for what syncs files thousands of times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder).resolve()
