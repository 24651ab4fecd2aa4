"""Which git commit a snapshot of the source was taken from, and what had been changed since: for people, and papers."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from orchestration.storage import write_atomically

TIMEOUT = 30.0  # seconds for one call of git


def record(folder: Path, name: str, sources: dict[str, Path]) -> None:
    """Write `<name>.json` in `folder`, and `<name>-<source>.patch` for each source that differs from its commit.

    The record holds, for each source, `commit` (null with a `reason` outside git), `patch` (a file's name, or null) and
    `untracked` (files that git does not know: the snapshot holds them). What is there already stays: a snapshot is
    named by its content, and that was first seen then.
    """
    file = folder / f"{name}.json"
    if file.exists():
        return
    folder.mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for source, path in sources.items():
        state, patch = describe(path)
        state["patch"] = f"{name}-{source}.patch" if patch else None
        if patch:
            write_atomically(folder / state["patch"], patch)
        found[source] = state
    write_atomically(file, json.dumps(found, indent=1).encode() + b"\n")


def describe(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the commit that a folder is at, its untracked files, and its difference from the commit as a patch."""
    try:
        if not _git(path, "ls-files", "--", "."):
            return {"commit": None, "reason": "git tracks none of its files"}, b""
        commit = _git(path, "rev-parse", "HEAD").decode().strip()
        patch = _git(path, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", ".")
        untracked = _git(path, "ls-files", "--others", "--exclude-standard", "-z", "--", ".").split(b"\0")
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="backslashreplace").split("\n")
        return {"commit": None, "reason": words[0]}, b""
    names = sorted(os.fsdecode(item).encode(errors="backslashreplace").decode() for item in untracked if item)
    return {"commit": commit, "untracked": names}, patch


def shown(path: Path) -> str:
    """Return the commit of a folder in a few words."""
    state, patch = describe(path)
    if state["commit"] is None:
        return f"not under git ({state['reason']})"
    changed = "with changes" if patch or state["untracked"] else "clean"
    return f"{state['commit'][:12]} ({changed})"


def _git(path: Path, *arguments: str) -> bytes:
    """Run git in a folder; it takes no lock there, and no hook's variables lead it elsewhere."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=TIMEOUT).stdout
