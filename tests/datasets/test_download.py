import hashlib
import socket

import pytest

from datasets import download
from datasets.download import OFFLINE, UnreachableError, fetch
from errors import UserError
from tests.datasets.server import CONTENT, SHA256, Server, remote_file


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)


def ranges(server):
    return [asked for _, asked in server.asked]


def test_a_file_is_fetched_and_its_progress_is_one_line_in_a_log(tmp_path, capfd):
    with Server() as server:
        path = fetch(remote_file(), server.url + "/", tmp_path)
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]
    assert server.asked == [("/images.raw", None)]
    assert capfd.readouterr() == ("", f"downloading {server.url}/images.raw\n")


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_checksum_of_either_kind_is_compared(tmp_path, algorithm):
    right, wrong = (hashlib.new(algorithm, content).hexdigest() for content in (CONTENT, b"another"))
    with Server() as server:
        assert fetch(remote_file(f"{algorithm}:{right}"), server.url, tmp_path).read_bytes() == CONTENT
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(UserError, match=f"images.raw: its {algorithm} is {right}, expected {wrong}"):
            fetch(remote_file(f"{algorithm}:{wrong}"), server.url, tmp_path)


def test_a_cut_transfer_goes_on_where_it_was_cut(tmp_path):
    with Server(answers=[100, 50, 0, 0, 1000, "whole"]) as server:
        assert fetch(remote_file(), server.url, tmp_path).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100-", "bytes=150-", "bytes=150-", "bytes=150-", "bytes=1150-"]


def test_a_cut_transfer_begins_again_where_the_server_does_not_resume(tmp_path):
    with Server(answers=[100, "whole"], ranges=False) as server:
        assert fetch(remote_file(), server.url, tmp_path).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100-"]


@pytest.mark.parametrize("word", ["elsewhere", "HTTP 503", "HTTP 416", "chunked"])
def test_an_answer_of_no_use_is_asked_for_again(tmp_path, word):
    with Server(answers=[100, word, "whole"]) as server:
        assert fetch(remote_file(), server.url, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 3


@pytest.mark.parametrize("resumes", [True, False])
def test_a_connection_that_is_always_cut_ends(tmp_path, resumes):
    with Server(answers=[100, 0] if resumes else [100], ranges=resumes) as server:
        with pytest.raises(UnreachableError, match="the connection was cut after 100 of 4,704 bytes"):
            fetch(remote_file(), server.url, tmp_path)
        assert len(server.asked) == 1 + download.ATTEMPTS
        server.answers = ["whole"]
        assert fetch(remote_file(), server.url, tmp_path).read_bytes() == CONTENT
        assert ranges(server)[-1] == "bytes=100-"


@pytest.mark.parametrize(
    ("word", "message"), [("stall", "no byte came for 0.05 seconds"), ("silent", "no answer for 0.05 seconds")]
)
def test_a_stall_ends(tmp_path, monkeypatch, word, message):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    with Server(answers=[word, "silent"] if word == "silent" else [word]) as server:
        if word == "stall":
            server.ranges = False
        with pytest.raises(UnreachableError, match=message):
            fetch(remote_file(), server.url, tmp_path)


@pytest.mark.parametrize(("files", "word", "code"), [({}, "whole", 404), (None, "HTTP 403", 403)])
def test_a_file_that_the_server_refuses_is_asked_for_once(tmp_path, files, word, code):
    with Server(files=files, answers=[word]) as server:
        with pytest.raises(UnreachableError, match=f"HTTP {code} "):
            fetch(remote_file(), server.url, tmp_path)
        assert len(server.asked) == 1


def test_no_server_is_said_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UnreachableError, match="Connection refused"):
        fetch(remote_file(), f"http://127.0.0.1:{port}", tmp_path)
    with pytest.raises(UnreachableError):
        fetch(remote_file(), "http://no host", tmp_path)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc", ""])
def test_an_address_that_is_not_of_the_web_is_refused(tmp_path, url):
    with pytest.raises(UserError, match=f"^dataset.url={url}: expected an address that begins with http:// or"):
        fetch(remote_file(), url, tmp_path)


def test_wrong_bytes_are_refused_in_one_line_and_not_kept(tmp_path):
    wrong = bytes([1 - CONTENT[0]]) + CONTENT[1:]
    with Server(files={"images.raw": wrong}) as server:
        with pytest.raises(UserError) as caught:
            fetch(remote_file(), server.url, tmp_path)
        assert len(server.asked) == 1
    message = str(caught.value)
    assert "\n" not in message
    found = hashlib.sha256(wrong).hexdigest()
    assert message.startswith(f"{server.url}/images.raw: its sha256 is {found}, expected {SHA256[7:]}: ")
    assert f"put the right file at {tmp_path / 'images.raw'}; " in message
    assert message.endswith(OFFLINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rest", [b"of another file", b"of another file" * 1000])
def test_what_an_earlier_try_left_of_another_file_does_no_harm(tmp_path, rest):
    (tmp_path / "images.raw.part").write_bytes(rest)
    with Server() as server:
        assert fetch(remote_file(), server.url, tmp_path).read_bytes() == CONTENT
    assert ranges(server) == [f"bytes={len(rest)}-", None]


def test_a_file_placed_by_hand_is_used_where_it_is_right(tmp_path):
    placed = tmp_path / "images.raw"
    placed.write_bytes(CONTENT)
    assert fetch(remote_file(), "http://127.0.0.1:1", tmp_path) == placed
    placed.write_bytes(b"another")
    with pytest.raises(
        UserError, match=f"^{placed}: its sha256 is .*, expected {SHA256[7:]}: put the right file there"
    ):
        fetch(remote_file(), "http://127.0.0.1:1", tmp_path)
    assert placed.read_bytes() == b"another"


def test_a_file_fetched_earlier_is_fetched_again_only_where_it_is_damaged(tmp_path):
    with Server() as server:
        path = fetch(remote_file(), server.url, tmp_path)
        assert fetch(remote_file(), server.url, tmp_path) == path
        assert len(server.asked) == 1
        path.write_bytes(CONTENT[:-1])
        assert fetch(remote_file(), server.url, tmp_path).read_bytes() == CONTENT
        assert len(server.asked) == 2
