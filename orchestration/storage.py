"""Files that are either the old or the new one, whatever happens in between, and TinyDB's storage on top of them."""

import io
import json
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
from tinydb.storages import Storage

from errors import CorruptFileError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

TEMPORARY = ".tmp"  # the end of the name of a file that is not yet whole


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object], sync_name: bool = True) -> None:
    """Replace the file at `path` by `content` (bytes, or a function that writes them to an open file).

    The content goes to a temporary file beside it and to the disk before the name is moved, and the folder is synced
    after: a reader, also one after a power cut, sees the old file or the new one. Raises OSError, which names a file,
    where the disk refuses, with the old file intact and no temporary file left behind; a process that is killed leaves
    one, which `sweep` removes. Without `sync_name` the folder is not synced, as where the next file in it does that: a
    power cut may bring the old file back.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    raw = None
    try:
        raw = _File(temporary, "wb")
        with io.BufferedWriter(raw) as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync_name:
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # What wrote to the file may have an error of its own for it, as torch.save has.
        refusal = error if raw is None or raw.refusal is None else raw.refusal
        if isinstance(refusal, OSError) and refusal.filename is None:
            refusal.filename = str(path)
        if refusal is error:
            raise
        raise refusal from error


class _File(io.FileIO):
    """A file that remembers why a write to it was refused."""

    refusal: OSError | None = None

    def write(self, content: "Buffer") -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.refusal = error
            raise


def sweep(folder: Path, names: Iterable[str] = ("*",)) -> None:
    """Remove what killed writers of these files (names or patterns) left in `folder`.

    For who holds the lock under which the files are written: what a living writer has begun must not be taken from it.
    """
    for name in names:
        for temporary in folder.glob(f".{name}.*{TEMPORARY}"):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicStorage(Storage):
    """TinyDB's tables in one JSON file, written atomically, with a checksum that notices any later damage.

    Values are texts, booleans, null, integers of 64 bits, finite floats, and lists and objects of these.

    The first line holds the CRC-32 of all that follows it; the whole file is one JSON object.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict[str, Any]] | None:
        """Return the tables, or None where there is no file yet. Raises CorruptFileError."""
        content = self.read_bytes()
        if content is None:
            return None
        try:
            tables = _parsed(content)
            del tables["integrity"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptFileError(f"{self.path} is damaged: it is not what a manager writes") from error
        return tables

    def read_bytes(self) -> bytes | None:
        """Return the file as it is, its checksum compared, or None where there is no file yet.

        Raises CorruptFileError.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        length = content.find(b"\n")
        if content[: max(0, length)] != _head(zlib.crc32(memoryview(content)[length + 1 :])):
            raise CorruptFileError(f"{self.path} is cut or damaged: its checksum does not fit")
        return content

    def write(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace the file by these tables."""
        body = _spelt(data)[1:]
        if data:
            body = b"," + body
        write_atomically(self.path, _head(zlib.crc32(body)) + b"\n" + body)


def _parsed(content: bytes) -> Any:
    """Return what JSON text says; the fast parser refuses half surrogate pairs, as of names that are no Unicode."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return json.loads(content)


def _spelt(data: Any) -> bytes:
    """Return the JSON text that `_parsed` reads."""
    try:
        return orjson.dumps(data)
    except orjson.JSONEncodeError:
        return json.dumps(data, separators=(",", ":")).encode()


def _head(checksum: int) -> bytes:
    return b'{"integrity":{"1":{"crc32":%d}}' % checksum


class BufferedStorage(Storage):
    """Another storage, read once and written once: what happens in between is in memory and all or nothing."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._tables = storage.read()
        self._changed = False

    def read(self) -> dict[str, dict[str, Any]] | None:
        """Return the tables as they are in memory."""
        return self._tables

    def write(self, data: dict[str, dict[str, Any]]) -> None:
        """Keep these tables in memory until `flush`."""
        self._tables, self._changed = data, True

    def forget(self) -> None:
        """Leave the storage below as it is: what was written so far changed nothing."""
        self._changed = False

    def flush(self) -> None:
        """Write the tables to the storage below where they have changed."""
        if self._changed:
            assert self._tables is not None
            self._storage.write(self._tables)
            self._changed = False
