"""A job: its resolved configuration, and the id that two spellings of the same job share."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Where a job runs and where its files lie: two jobs that differ in nothing else are one.
NEUTRAL_KEYS = {"root", "data_root", "dataset.url", "device", "checkpoint_every"}
ID_VERSION = 1  # raised when ids must change, as when a default does


@dataclass(frozen=True)
class Job:
    """One job; `overrides` are what makes it again, `config` is plain and nested."""

    id: str
    overrides: list[str]
    choices: dict[str, str | None]
    config: dict[str, Any]


def job_id(choices: Mapping[str, str | None], differing: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return a readable name of the job and a hash of its choices and of what differs from their defaults.

    An option or a group that is added later changes no id while it stays at its default or null.
    """
    identity = {
        "version": ID_VERSION,
        "choices": {group: choice for group, choice in choices.items() if choice is not None},
        "differing": {key: value for key, value in differing.items() if key not in NEUTRAL_KEYS},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    names = [None if choices["task"] == "train" else choices["task"]]
    if choices["model"] is not None:  # a task without a model has no use for an estimator of its bound
        names += [choices["model"], choices["estimator"], f"iw{config['estimator']['iw']}"]
    names.append(f"seed{config['seed']}")
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(filter(None, names)))
    return f"{slug.lstrip('.-')[:80]}-{digest}"
