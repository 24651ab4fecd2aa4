"""Images on disk in a compact form: made once from the published files, checked, and read in a moment."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from datasets.base import SPLITS
from datasets.download import FETCHED, OFFLINE, PART, RemoteFile, UnreachableError, address_of, fetch, is_here
from datasets.images import PIXELS, Images, shuffled
from errors import UserError
from orchestration.storage import sweep, write_atomically

STORED = "images.npz"


def stored_images(name: str, files: Sequence[RemoteFile], url: str, data_root: str) -> dict[str, Images]:
    """Return the images [N, 784] of each split of the data set `name`, in an order that is the same everywhere.

    They are read from `<data_root>/<name>/images.npz`: bits where all pixels are 0 or 1, else bytes, under the CRC-32
    of the archive. Where that is absent or damaged it is made from the published files: those that lie in the folder
    under their own names, the others fetched from `url` and removed when they are no longer needed. Of several
    processes one makes it and the others wait. Raises UserError, in one line, for what the user has to mend.
    """
    folder = Path(data_root, name)
    path = folder / STORED
    if (images := _load(path)) is not None:
        return images
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (images := _load(path)) is not None:
            return images
        if path.exists():
            print(f"{path} is damaged: making it again", file=sys.stderr, flush=True)
        sweep(folder)
        images = _read(name, files, url, folder)
        _save(path, images)
        for end in (PART, FETCHED):
            for rest in folder.glob(f"*{end}"):
                rest.unlink()
    return images


def _read(name: str, files: Sequence[RemoteFile], url: str, folder: Path) -> dict[str, Images]:
    splits: dict[str, Images] = {}
    for file in files:
        try:
            path = fetch(file, url, folder)
        except UnreachableError as error:
            absent = " and ".join(each.name for each in files if not is_here(each, folder))
            raise UserError(
                f"dataset {name}: {address_of(file, url)} cannot be fetched ({error}): put {absent} into "
                f"{folder.resolve()}, or give another dataset.url; {OFFLINE}"
            ) from error
        try:
            splits |= file.read(path)
        except ValueError as error:
            by_hand = path.name == file.name
            if not by_hand:
                path.unlink()
            raise UserError(
                f"dataset {name}: {path if by_hand else address_of(file, url)}: expected {error}: put the right file "
                f"at {(folder / file.name).resolve()}{'' if by_hand else ', or give another dataset.url'}"
            ) from error
    # Published files are often in the order of the classes: the first thousand of a split are to stand for all of it.
    return {split: shuffled(images, f"{name} {split}") for split, images in splits.items()}


def _save(path: Path, images: Mapping[str, Images]) -> None:
    is_binary = all(pixels.max() <= 1 for pixels in images.values())
    arrays = {split: np.packbits(images[split], axis=1) if is_binary else images[split] for split in SPLITS}
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, Images] | None:
    """Return the stored images, or None where they are absent or damaged."""
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            arrays = {split: archive[split] for split in SPLITS}
        return {
            split: pixels if pixels.shape[1] == PIXELS else np.unpackbits(pixels, axis=1, count=PIXELS)
            for split, pixels in arrays.items()
        }
    except FileNotFoundError:
        return None
    except PermissionError:
        raise
    except Exception:  # each kind of damage has an error of its own, in zipfile, zlib or NumPy
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which fetches {folder.name}", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()
