import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from datasets import download, store
from datasets.images import shuffled
from datasets.store import stored_images
from errors import UserError
from tests.datasets.server import CONTENT, IMAGES, SHA256, Server, remote_file

NOWHERE = "http://127.0.0.1:1"  # where nothing listens
PARTS = {"train": IMAGES[:4], "valid": IMAGES[4:5], "test": IMAGES[5:]}
SPLITS = {split: shuffled(images, f"small {split}") for split, images in PARTS.items()}
ROOT = Path(__file__).resolve().parents[2]
ANOTHER_PROCESS = """
import sys
from datasets.store import stored_images
from tests.datasets.server import remote_file
images = stored_images("small", [remote_file()], *sys.argv[1:])
print(sum(int(pixels.sum()) for pixels in images.values()))
"""


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)


def stored(url, root, checksum: str | None = SHA256):
    return stored_images("small", [remote_file(checksum)], url, str(root))


def assert_right(images):
    assert list(images) == list(SPLITS)
    for split, pixels in SPLITS.items():
        assert images[split].dtype == np.uint8
        np.testing.assert_array_equal(images[split], pixels)


def place(root, content=CONTENT):
    """Put the published file where the message says, by hand."""
    (root / "small").mkdir(exist_ok=True)
    (root / "small/images.raw").write_bytes(content)


def test_only_the_compact_form_is_kept_and_read_from_then_on(tmp_path):
    with Server() as server:
        assert_right(stored(server.url, tmp_path))
    assert {path.name for path in (tmp_path / "small").iterdir()} <= {"images.npz", ".lock"}
    assert_right(stored(NOWHERE, tmp_path))
    with np.load(tmp_path / "small/images.npz") as archive:
        assert archive["train"].shape == (4, 98)


def test_grey_images_are_kept_as_bytes(tmp_path):
    grey = {split: pixels * np.uint8(200) for split, pixels in SPLITS.items()}
    path = tmp_path / "images.npz"
    store._save(path, grey)
    loaded = store._load(path)
    assert loaded is not None
    for split in SPLITS:
        np.testing.assert_array_equal(loaded[split], grey[split])


def test_a_file_placed_by_hand_is_used_and_left(tmp_path):
    place(tmp_path)
    assert_right(stored(NOWHERE, tmp_path))
    assert (tmp_path / "small/images.raw").read_bytes() == CONTENT


def test_damage_is_noticed_and_mended_wherever_it_is(memory_path, capsys):
    place(memory_path)
    stored(NOWHERE, memory_path)
    path = memory_path / "small/images.npz"
    whole = path.read_bytes()
    damages = [whole[:length] for length in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    damages += [b"garbage" * 100, np.random.default_rng(0).bytes(2000)]
    begin = whole.index(bytes(np.packbits(SPLITS["train"], axis=1)))
    for position in (begin, begin + 100, begin + 4 * 98 - 1):
        damages.append(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    for damage in damages:
        path.write_bytes(damage)
        assert_right(stored(NOWHERE, memory_path))
        assert capsys.readouterr().err == f"{path} is damaged: making it again\n"
        assert path.read_bytes() == whole
    for position in range(0, len(whole), 13):  # also where the damage is of no consequence
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        assert_right(stored(NOWHERE, memory_path))


def test_no_network_is_one_line_with_all_that_helps(tmp_path):
    with pytest.raises(UserError) as caught:
        stored(NOWHERE, tmp_path)
    assert str(caught.value) == (
        f"dataset small: {NOWHERE}/images.raw cannot be fetched (Connection refused): put images.raw into "
        f"{tmp_path}/small, or give another dataset.url; dataset=mnist5k and dataset=shapes need no network"
    )


def test_only_the_files_that_are_not_there_are_asked_for_by_hand(tmp_path):
    place(tmp_path)
    others = [download.RemoteFile(name, remote_file().read) for name in ("second.raw", "third.raw")]
    with pytest.raises(UserError, match=r"/second.raw cannot be fetched .*: put second.raw and third.raw into "):
        stored_images("small", [remote_file(), *others], NOWHERE, str(tmp_path))


def test_what_is_not_the_file_and_has_no_checksum_is_refused_by_its_content(tmp_path):
    with Server(files={"images.raw": b"<html>please log in</html>"}) as server:
        with pytest.raises(UserError) as caught:
            stored(server.url, tmp_path, checksum=None)
        assert str(caught.value) == (
            f"dataset small: {server.url}/images.raw: expected 4,704 bytes: put the right file at "
            f"{tmp_path}/small/images.raw, or give another dataset.url"
        )
        server.files["images.raw"] = CONTENT
        assert_right(stored(server.url, tmp_path, checksum=None))


def test_a_wrong_file_by_hand_is_refused_and_left(tmp_path):
    place(tmp_path, b"another")
    with pytest.raises(UserError, match=f"^dataset small: {tmp_path}/small/images.raw: expected 4,704 bytes: put the"):
        stored(NOWHERE, tmp_path, checksum=None)
    assert (tmp_path / "small/images.raw").read_bytes() == b"another"


def test_a_disk_that_refuses_leaves_what_was_fetched(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    with Server() as server:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_atomically", refuse)
            with pytest.raises(OSError, match="No space left"):
                stored(server.url, tmp_path)
        assert_right(stored(server.url, tmp_path))
        assert len(server.asked) == 1


def test_one_process_fetches_while_the_others_wait_and_go_on_where_it_was_killed(tmp_path):
    def start():
        return subprocess.Popen(
            [sys.executable, "-c", ANOTHER_PROCESS, server.url, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with Server(answers=["stall", "whole"]) as server, ExitStack() as processes:
        first = processes.enter_context(start())
        processes.callback(first.kill)
        assert first.stderr is not None
        assert first.stderr.readline().startswith("downloading")
        part = tmp_path / "small/images.raw.part"
        while not (part.exists() and part.stat().st_size == 100):
            assert first.poll() is None
        other = processes.enter_context(start())
        processes.callback(other.kill)
        assert other.stderr is not None
        assert other.stderr.readline() == "waiting for another process, which fetches small\n"
        found: list[dict[str, np.ndarray]] = []
        own = threading.Thread(target=lambda: found.append(stored(server.url, tmp_path)))
        own.start()
        first.kill()
        output, _ = other.communicate(timeout=60)
        own.join(timeout=60)
        assert int(output) == IMAGES.sum()
        assert_right(found[0])
        assert server.asked == [("/images.raw", None), ("/images.raw", "bytes=100-")]
