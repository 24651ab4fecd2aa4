"""Files from the web: with a progress bar, resumed where they were cut, checked, and never waited for without end."""

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from datasets.images import Images
from errors import UserError

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 3  # in a row that bring a file no further
PAUSE = 1.0  # seconds between two attempts
CHUNK = 2**18  # bytes
PART, FETCHED = ".part", ".fetched"  # the ends of the names of what is still coming, and of what has come whole
OFFLINE = "dataset=mnist5k and dataset=shapes need no network"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set: its name at the data set's URL, how splits are read from it, and its checksum if known.

    `read` raises ValueError, in words that follow "expected", for what is not that file. `checksum` is `sha256:...` or
    `md5:...`.
    """

    name: str
    read: Callable[[Path], Mapping[str, Images]]
    checksum: str | None = None


class UnreachableError(Exception):
    """The web does not give a file, and why."""


class _CutError(Exception):
    """A transfer ended before the file did: to be tried again."""


def fetch(file: RemoteFile, url: str, folder: Path) -> Path:
    """Return where the file lies in `folder`: put there by hand under its name, fetched earlier, or fetched now.

    What is fetched gets a name of its own, with FETCHED at its end. The caller holds the folder's lock. Raises
    UserError where the file by hand or at the URL has another checksum, UnreachableError where there is neither.
    """
    by_hand, fetched, part = (folder / f"{file.name}{end}" for end in ("", FETCHED, PART))
    if by_hand.exists():
        if difference := _difference(by_hand, file.checksum):
            raise UserError(f"{by_hand}: {difference}: put the right file there, or remove it to have it downloaded")
        return by_hand
    if fetched.exists() and not _difference(fetched, file.checksum):
        return fetched
    address = address_of(file, url)
    began_earlier = part.exists()
    _download(address, part)
    difference = _difference(part, file.checksum)
    if difference and began_earlier:  # with what may be of another file
        part.unlink()
        _download(address, part)
        difference = _difference(part, file.checksum)
    if difference:
        part.unlink()
        raise UserError(
            f"{address}: {difference}: the server has another file, or it was damaged on its way; try again, give "
            f"another dataset.url, or put the right file at {by_hand.resolve()}; {OFFLINE}"
        )
    return part.replace(fetched)


def is_here(file: RemoteFile, folder: Path) -> bool:
    """Say whether a file lies in `folder`, by hand or fetched."""
    return any((folder / f"{file.name}{end}").exists() for end in ("", FETCHED))


def address_of(file: RemoteFile, url: str) -> str:
    """Return the address of a file; raise UserError for a URL that is none of http."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"dataset.url={url}: expected an address that begins with http:// or https://")
    return f"{url.rstrip('/')}/{file.name}"


def _difference(path: Path, checksum: str | None) -> str:
    """Say how a file's checksum differs from the one expected; empty where it does not."""
    if checksum is None:
        return ""
    algorithm, _, expected = checksum.partition(":")
    with open(path, "rb") as opened:
        found = hashlib.file_digest(opened, algorithm).hexdigest()
    return "" if found == expected else f"its {algorithm} is {found}, expected {expected}"


def _download(address: str, path: Path) -> None:
    """Bring the file at `path` to the whole of what is at the address, going on from what is there."""
    print(f"downloading {address}", file=sys.stderr, flush=True)
    farthest, failures, reason = _size(path), 0, ""
    while failures < ATTEMPTS:
        if reason:
            time.sleep(PAUSE)
        try:
            return _receive(address, path)
        except _CutError as error:
            reason = str(error)
        failures = 0 if _size(path) > farthest else failures + 1
        farthest = max(farthest, _size(path))
    raise UnreachableError(reason)


def _receive(address: str, path: Path) -> None:
    """Append what a file lacks, or the whole of it where the server does not resume."""
    begin = _size(path)
    with _open(address, path, begin) as response:
        length = response.length
        if response.status != 206:
            begin = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            path.unlink()
            raise _CutError("the server resumes where it was not asked to")
        with open(path, "ab" if begin else "wb") as file, _progress() as progress:
            task = progress.add_task(path.stem, total=None if length is None else begin + length, completed=begin)
            received = 0
            while chunk := _read(response):
                file.write(chunk)
                file.flush()  # what has come is there to go on from, also for another process after a kill
                received += len(chunk)
                progress.advance(task, len(chunk))
    if length is not None and received < length:
        raise _CutError(f"the connection was cut after {begin + received:,} of {begin + length:,} bytes")


def _open(address: str, path: Path, begin: int) -> HTTPResponse:
    headers = {"User-Agent": "estlab", **({"Range": f"bytes={begin}-"} if begin else {})}
    try:
        response: HTTPResponse = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        problem = f"HTTP {error.code} {error.reason}"
        if error.code == 416:  # there is no such range: what is at `path` is not the beginning of this file
            path.unlink()
        if error.code == 416 or error.code >= 500:
            raise _CutError(problem) from error
        raise UnreachableError(problem) from error
    except URLError as error:
        raise UnreachableError(getattr(error.reason, "strerror", None) or str(error.reason)) from error
    except (InvalidURL, ValueError) as error:
        raise UnreachableError(str(error)) from error
    except TimeoutError as error:
        raise _CutError(f"no answer for {TIMEOUT:g} seconds") from error
    except (OSError, HTTPException) as error:
        raise _CutError(f"the connection was cut ({type(error).__name__})") from error
    return response


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except TimeoutError as error:
        raise _CutError(f"no byte came for {TIMEOUT:g} seconds") from error
    except (OSError, HTTPException) as error:
        raise _CutError(f"the connection was cut ({type(error).__name__})") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _progress() -> Progress:
    """Return a bar on a terminal, and nothing in a log."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
