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
    contents = _present(destination.parent.parent, user_dir)
    name = _name(contents)
    final = destination / name
    if is_whole(final):
        return name
    temporary = destination / f".{name}.{os.getpid()}.tmp"
    for folder in (temporary, final):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        for path, content in contents.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_bytes(content)
        os.rename(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(temporary)
        raise
    return name


def name_of_source(root: Path, user_dir: Path | None = None) -> str:
    """Return the name that a snapshot of the source as it is would have; nothing below `root` is part of it."""
    return _name(_present(root, user_dir))


def is_whole(snapshot: Path) -> bool:
    """Say whether a snapshot's folder holds what its name promises."""
    return snapshot.is_dir() and _name(_contents(snapshot, excluded=snapshot / "runs")) == snapshot.name


def difference(before: Path, after: Path) -> list[str]:
    """Return the files in which two snapshots differ, in order: `+` only in the later, `-` only in the earlier."""
    old, new = (_contents(folder, excluded=folder / "runs") for folder in (before, after))
    changed = {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}
    return [f"{'+' if path not in old else '-' if path not in new else '~'} {path}" for path in sorted(changed)]


def _present(root: Path, user_dir: Path | None) -> dict[str, bytes]:
    """Return what a snapshot of the source as it is holds."""
    contents = _contents(SOURCE, root)
    if user_dir:
        contents |= {f"user_dir/{path}": content for path, content in _contents(user_dir, root).items()}
    return contents


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
