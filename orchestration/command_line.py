"""What the command-line programs share: exit statuses, one-line errors, kinds of arguments."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from errors import CorruptFileError, UserError, near

if TYPE_CHECKING:
    from filelock import FileLock

DONE, FAILED, USAGE, REMAIN, INTERRUPTED = 0, 1, 2, 3, 130


class Parser(argparse.ArgumentParser):
    """A parser whose description is a module's docstring, and whose errors are one line and status 2."""

    def __init__(self, docstring: str | None):
        summary, _, rest = (docstring or "").partition("\n\n")
        super().__init__(
            description=summary,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the arguments, flags and others in any order; an unknown flag is refused with the near ones."""
        known, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            flag, _, value = unknown[0].partition("=")
            if "overrides" in known and _is_key(key := flag.lstrip("-")):
                given = list(sys.argv[1:] if arguments is None else arguments)
                after = given[given.index(unknown[0]) + 1 :][:1]
                value = value or ("VALUE" if not after or after[0].startswith("-") or "=" in after[0] else after[0])
                self.error(f"{flag} is a key of the configuration and no flag: give {key}={value}")
            self.error(f"unknown argument {flag!r}{near(flag, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(USAGE, f"error: {message}\n")


def _is_key(name: str) -> bool:
    """Say whether a name is one of the configuration's."""
    from orchestration.schema import GROUPS, rules

    return name in GROUPS or name in dict(rules())


def guarded(command: Callable[[], int]) -> int:
    """Return the command's exit status; a user's mistake, an interrupt or a disk that refuses is one line."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's background command inherits that SIGINT is ignored
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, which is inherited too, it would hide how children ended
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except CorruptFileError as error:
        print(f"error: {error}; the same command again repairs what can be repaired", file=sys.stderr)
        return FAILED
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return FAILED


@contextmanager
def waiting(lock: "FileLock") -> Iterator[None]:
    """Hold the lock of an experiment's setup; say who has it where it takes more than a moment to get it."""
    from filelock import Timeout

    from orchestration.locks import holder

    try:
        lock.acquire(timeout=1)
    except Timeout:
        who = holder(Path(lock.lock_file))
        print(f"{who} is setting this experiment up (it holds {lock.lock_file}): waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def count(text: str, least: int = 0) -> int:
    """Parse a whole number of at least `least`, and below a million."""
    if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to 999999, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number of at least one."""
    return count(text, least=1)


def existing_folder(text: str) -> Path:
    """Parse the path of a folder that exists."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, and there is none at {path}")
    return path


def fraction(text: str) -> float:
    """Parse a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, not {text!r}")
    return value
