"""The errors that have a meaning of their own, and how near names are offered."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where and what would be right (exit status 2)."""


class CorruptFileError(Exception):
    """A file whose content is not what was written to it."""


def near(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that offers what `name` may have meant among `names`.

    >>> near("vimco-arithmetik", ["vimco-arithmetic", "reinforce"])
    "; did you mean 'vimco-arithmetic'?"
    """
    names = sorted(set(names))
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    if not close and len(name) > 1:
        close = [candidate for candidate in names if name.lower() in re.split(r"[^a-z]", candidate.lower())][:6]
    if close:
        return f"; did you mean {' or '.join(repr(match) for match in close)}?"
    return f"; choose from {', '.join(names)}" if names else ""
