"""An immutable copy of the source, named by its content: what an experiment's jobs run from."""

import hashlib
import os
import shutil
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".yaml"}
IGNORED = {"tests", "benchmarks", "build", "dist"}


def source_files(folder: Path) -> list[Path]:
    """Return the modules and configurations below `folder`, relative and sorted, nothing generated or hidden."""
    found = []
    for parent, folders, files in os.walk(folder):
        top = Path(parent) == folder
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__"))
            and not (Path(parent, name) / "pyvenv.cfg").exists()
            and not (top and (name in IGNORED or (name in {"runs", "reports", "data"})))
        ]
        found += [Path(parent, name).relative_to(folder) for name in files if Path(name).suffix in SUFFIXES]
    return sorted(found)


def take(destination: Path, user_dir: Path | None = None) -> str:
    """Copy the source, and `user_dir` where one is given, below `destination`; return the snapshot's name.

    The snapshot `<destination>/<name>` holds the source, and the user's folder in `user_dir`. A snapshot that is there
    already is left as it is. Raises OSError where the disk refuses.
    """
    trees = {".": SOURCE} | ({"user_dir": user_dir} if user_dir else {})
    contents = {
        Path(prefix, path): (tree / path).read_bytes() for prefix, tree in trees.items() for path in source_files(tree)
    }
    digest = hashlib.sha256()
    for path, content in contents.items():
        digest.update(f"{path} {len(content)}\n".encode() + content)
    name = digest.hexdigest()[:16]
    final = destination / name
    if final.exists():
        return name
    temporary = destination / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for path, content in contents.items():
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).write_bytes(content)
    try:
        os.rename(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not final.exists():
            raise
    return name
