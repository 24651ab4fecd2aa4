"""Files that are either the old or the new one, whatever happens in between, and TinyDB's storage on top of them."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tinydb.storages import Storage

from errors import CorruptFileError


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace the file at `path` by `content` (bytes, or a function that writes them to an open file).

    The content goes to a temporary file beside it and to the disk before the name is moved, and the folder is synced
    after: a reader, also one after a power cut, sees the old file or the new one. Raises OSError where the disk
    refuses, with the old file intact and no temporary file left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicStorage(Storage):
    """TinyDB's tables in one JSON file, written atomically, with a checksum that notices any later damage.

    The first line holds the CRC-32 of all that follows it; the whole file is one JSON object.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict[str, Any]] | None:
        """Return the tables, or None where there is no file yet. Raises CorruptFileError."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        head, _, body = content.partition(b"\n")
        try:
            tables = json.loads(content)
            checksum = tables.pop("integrity")["1"]["crc32"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptFileError(f"{self.path} is cut or damaged") from error
        if checksum != zlib.crc32(body) or head != _head(checksum):
            raise CorruptFileError(f"{self.path} is damaged: its checksum does not fit")
        return tables

    def write(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace the file by these tables."""
        body = json.dumps(data, separators=(",", ":")).encode()[1:]
        if data:
            body = b"," + body
        write_atomically(self.path, _head(zlib.crc32(body)) + b"\n" + body)


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
