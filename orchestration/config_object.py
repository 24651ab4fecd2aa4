"""A job's configuration as the object that its task reads.

omegaconf builds one value by value, in 2 ms, and loads a pickled one in 0.2 ms. The jobs of an experiment have the same
keys and differ in few values: the first job's object is built, the others are copies of it with their own values set.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

Key = tuple[str, ...]


class _Built(NamedTuple):
    """An object that was built: the spelling of each value, and the object pickled."""

    spelt: dict[Key, str]
    pickled: bytes


_built: _Built | None = None


def config_object(config: Mapping[str, Any]) -> DictConfig:
    """Return a plain nested configuration as a read-only object of its own; its root is taken literally."""
    global _built
    plain = {**config, "root": _literal(config["root"])}
    leaves = dict(_leaves(plain))
    spelt = {key: repr(value) for key, value in leaves.items()}
    if _built is None or list(_built.spelt) != list(spelt):
        _built = _Built(spelt, pickle.dumps(OmegaConf.create(plain)))
    found: DictConfig = pickle.loads(_built.pickled)
    for key, text in spelt.items():
        if text != _built.spelt[key]:
            section = found
            for name in key[:-1]:
                section = section[name]
            section[key[-1]] = leaves[key]
    OmegaConf.set_readonly(found, True)
    return found


def _leaves(section: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield the values that are no sections, each with the names of the sections it is in and its own."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _literal(text: str) -> str:
    """Return a text that omegaconf reads as this text also where it holds `${`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
