import json
import os

import pytest
from tinydb import TinyDB

from errors import CorruptFileError
from orchestration.storage import AtomicStorage, BufferedStorage, write_atomically

TABLES = {"jobs": {"1": {"id": "a", "state": "queued"}, "2": {"id": "b", "state": "done"}}}


def test_what_is_written_is_read_and_is_plain_json(tmp_path):
    storage = AtomicStorage(tmp_path / "queue.json")
    assert storage.read() is None
    storage.write(TABLES)
    assert storage.read() == TABLES
    assert json.loads((tmp_path / "queue.json").read_bytes())["jobs"] == TABLES["jobs"]
    storage.write({})
    assert storage.read() == {}


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "queue.json"
    storage = AtomicStorage(path)
    storage.write(TABLES)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [
        whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :]
        for index in range(len(whole))
        for bit in range(8)
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"queue\.json"):
            storage.read()


@pytest.mark.parametrize("refused", ["fsync", "replace"])
def test_a_refused_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, refused):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, refused, refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_buffered_storage_writes_once_and_only_what_changed(tmp_path):
    inner = AtomicStorage(tmp_path / "queue.json")
    inner.write(TABLES)
    before = os.stat(inner.path).st_ino
    storage = BufferedStorage(inner)
    with TinyDB(storage=lambda: storage) as database:
        assert len(database.table("jobs")) == 2
        storage.flush()
        assert os.stat(inner.path).st_ino == before
        database.table("jobs").insert({"id": "c"})
        assert inner.read() == TABLES
    storage.flush()
    tables = inner.read() or {}
    assert [row["id"] for row in tables["jobs"].values()] == ["a", "b", "c"]


def test_names_that_are_no_unicode(tmp_path):
    tables = {"jobs": {"1": {"id": "a", "overrides": ["data_root='/\udcff'", "tag=é"]}}}
    AtomicStorage(tmp_path / "queue.json").write(tables)
    assert AtomicStorage(tmp_path / "queue.json").read() == tables
