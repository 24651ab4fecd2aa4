"""An immutable copy of the source, named by its content: what an experiment's jobs run from."""

import hashlib
import os
import shutil
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".yaml"}
IGNORED = {"tests", "benchmarks", "build", "dist", "runs", "reports", "data"}


def take(destination: Path, user_dir: Path | None = None) -> str:
    """Copy the source, and `user_dir` where one is given, below `destination`; return the snapshot's name.

    The snapshot `<destination>/<name>` holds the source, and the user's folder in `user_dir`. A whole one that is there
    already is left as it is. `destination` is an experiment's, `<root>/<experiment>/snapshots`: nothing below the root
    is copied. Raises OSError where the disk refuses.
    """
    root = destination.parent.parent
    contents = _contents(SOURCE, root)
    if user_dir:
        contents |= {f"user_dir/{path}": content for path, content in _contents(user_dir, root).items()}
    name = _name(contents)
    final = destination / name
    if is_whole(final):
        return name
    temporary = destination / f".{name}.{os.getpid()}.tmp"
    for folder in (temporary, final):
        shutil.rmtree(folder, ignore_errors=True)
    for path, content in contents.items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).write_bytes(content)
    os.rename(temporary, final)
    return name


def is_whole(snapshot: Path) -> bool:
    """Say whether a snapshot's folder holds what its name promises."""
    return snapshot.is_dir() and _name(_contents(snapshot, excluded=snapshot / "runs")) == snapshot.name


def _contents(folder: Path, excluded: Path) -> dict[str, bytes]:
    """Return the modules and configurations below `folder` by their paths, nothing generated, hidden or excluded."""
    found = {}
    for parent, folders, files in os.walk(folder):
        top = Path(parent) == folder
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__"))
            and not (top and name in IGNORED)
            and Path(parent, name) != excluded
            and not Path(parent, name, "pyvenv.cfg").exists()
        ]
        for name in files:
            path = Path(parent, name)
            if path.suffix in SUFFIXES and not name.startswith(".") and path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _name(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for path, content in sorted(contents.items()):
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
