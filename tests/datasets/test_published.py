"""The data sets that are downloaded, on small files in their formats, and on the real ones where they are at hand."""

import gzip
import hashlib
import inspect
import lzma
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from omegaconf import OmegaConf

from datasets import binarized_mnist, caltech_silhouettes, fashion_mnist, mnist, omniglot
from datasets.base import SPLITS
from datasets.images import shuffled
from errors import UserError
from orchestration.configuration import compose
from orchestration.execution import resolve
from tasks.build import build_dataset
from tests.datasets.server import Server

MIRROR = Path(__file__).resolve().parents[3] / "shared/mirror"
NOWHERE = "http://127.0.0.1:1"  # where nothing listens
DRAWS = np.random.default_rng(0)
MODULES = {
    "binarized_mnist": binarized_mnist,
    "caltech_silhouettes": caltech_silhouettes,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "omniglot": omniglot,
}

needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="the real files are not beside this checkout")


def build(name, root, url=NOWHERE, **options):
    values = [f"dataset.{key}={value}" for key, value in {"url": url, **options}.items()]
    config = compose([f"dataset={name}", f"data_root={root}", *values]).config
    return build_dataset(OmegaConf.create(config))


def points(dataset):
    return {split: dataset.points(split).flatten(1).numpy() for split in SPLITS}


def stored(name, split, images):
    """Return images in the order in which they are stored, which is not that of the published files."""
    return shuffled(np.asarray(images), f"{name} {split}")


def place(root, name, files):
    """Put files where they are looked for first, by hand."""
    folder = root / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


# binarized_mnist


@pytest.fixture
def amat(monkeypatch):
    """Return the pixels of a small set in the format of binarized MNIST, and its files, which pass for the real."""
    pixels = {split: DRAWS.integers(0, 2, (size, 784)) for split, size in zip(SPLITS, (6, 3, 2), strict=True)}
    files = {split: "".join(" ".join(map(str, row)) + "\n" for row in rows).encode() for split, rows in pixels.items()}
    monkeypatch.setattr(binarized_mnist, "SIZES", {split: len(rows) for split, rows in pixels.items()})
    monkeypatch.setattr(binarized_mnist, "SHA256", {s: hashlib.sha256(text).hexdigest() for s, text in files.items()})
    return pixels, {f"binarized_mnist_{split}.amat": text for split, text in files.items()}


def test_binarized_mnist_is_downloaded_once_and_has_the_pixels_of_its_files(tmp_path, amat):
    pixels, files = amat
    with Server(files=files) as server:
        dataset = build("binarized_mnist", tmp_path, server.url)
        assert [path for path, _ in server.asked] == [f"/{name}" for name in files]
    again = build("binarized_mnist", tmp_path)
    for split in SPLITS:
        np.testing.assert_array_equal(points(dataset)[split], stored("binarized_mnist", split, pixels[split]))
        assert torch.equal(again.points(split), dataset.points(split))
    assert dataset.points("train").shape == (6, 1, 28, 28)


def test_a_file_of_binarized_mnist_that_is_not_the_published_one_is_named(tmp_path, amat):
    _, files = amat
    name = "binarized_mnist_valid.amat"
    expected = binarized_mnist.SHA256["valid"]
    with (
        Server(files={**files, name: files[name].replace(b"1", b"0", 1)}) as server,
        pytest.raises(UserError, match=f"^{server.url}/{name}: its sha256 is [0-9a-f]{{64}}, expected {expected}: "),
    ):
        build("binarized_mnist", tmp_path, server.url)


@pytest.mark.parametrize("content", [b"0 1\n" * 100, b"2 1 " * 196 + b"0 1 " * 195 + b"0 1\n"])
def test_what_is_not_in_the_format_of_binarized_mnist_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^1 lines of 784 digits|digits that are 0 or 1$"):
        binarized_mnist._read("test", 1, path)


@needs_mirror
def test_a_real_file_of_binarized_mnist_has_its_checksum_and_is_read(tmp_path):
    content = lzma.decompress((MIRROR / "binarized_mnist_test.amat.xz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == binarized_mnist.SHA256["test"]
    (tmp_path / "file").write_bytes(content)
    images = binarized_mnist._read("test", 10_000, tmp_path / "file")["test"]
    assert images.shape == (10_000, 784)
    assert images.sum() == content.count(b"1") == 1_038_896


@pytest.mark.slow
@needs_mirror
def test_the_real_binarized_mnist_is_downloaded_whole(tmp_path):
    with subprocess.Popen([sys.executable, MIRROR / "serve.py"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            dataset = build("binarized_mnist", tmp_path, server.stdout.readline().strip())
        finally:
            server.terminate()
    sums = {split: (len(x), int(x.sum(dtype=torch.float64))) for split in SPLITS for x in [dataset.points(split)]}
    assert sums == {"train": (50_000, 5_118_041), "valid": (10_000, 1_028_036), "test": (10_000, 1_038_896)}


# mnist and fashion_mnist


def idx(images):
    return gzip.compress(struct.pack(">4I", 0x803, len(images), 28, 28) + images.astype(np.uint8).tobytes())


@pytest.fixture(params=["mnist", "fashion_mnist"])
def idx_set(request, monkeypatch):
    """Return the name, the grey levels and the files of a small set in IDX, which pass for the real."""
    train, test = (DRAWS.integers(0, 256, (size, 784)) for size in (7, 3))
    files = {"train": idx(train), "t10k": idx(test)}
    md5 = {part: hashlib.md5(content).hexdigest() for part, content in files.items()}
    monkeypatch.setattr(MODULES[request.param], "MD5", md5)
    for name, number in {"NUM_TRAIN": 7, "NUM_TEST": 3, "NUM_VALID": 2}.items():
        monkeypatch.setattr(mnist, name, number)
    grey = {"train": train[:5], "valid": train[5:], "test": test}
    return request.param, grey, {f"{part}-images-idx3-ubyte.gz": content for part, content in files.items()}


def test_sets_in_idx_are_binary_at_one_half_and_keep_their_last_training_images_for_validation(tmp_path, idx_set):
    name, grey, files = idx_set
    with Server(files=files) as server:
        dataset = build(name, tmp_path, server.url)
        assert [path for path, _ in server.asked] == [f"/{file}" for file in files]
    for split in SPLITS:
        np.testing.assert_array_equal(points(dataset)[split], stored(name, split, grey[split] / 255 > 0.5))


def test_sets_in_idx_are_drawn_where_that_is_asked_for_from_the_same_store(tmp_path, idx_set):
    name, grey, files = idx_set
    place(tmp_path, name, files)
    fixed, drawn = build(name, tmp_path), build(name, tmp_path, binarization="draw", seed=3)
    assert not torch.equal(fixed.points("train"), drawn.points("train"))
    certain = np.isin(stored(name, "train", grey["train"]), (0, 255))
    np.testing.assert_array_equal(points(drawn)["train"][certain], points(fixed)["train"][certain])
    assert not torch.equal(drawn.batch(0, 5, seed=1).sum(0), drawn.batch(1, 5, seed=1).sum(0))
    assert not torch.equal(drawn.points("test"), build(name, tmp_path, binarization="draw").points("test"))


GREY = np.zeros((3, 784))
WRONG_IDX = {
    "no gzip": b"<html>",
    "empty": b"",
    "a cut gzip": idx(GREY)[:-9],
    "too few images": idx(GREY[:2]),
    "too many bytes": gzip.compress(gzip.decompress(idx(GREY)) + b"0"),
    "labels": gzip.compress(struct.pack(">2I", 0x801, 3) + bytes(8 + 3 * 784)),
}


@pytest.mark.parametrize("content", WRONG_IDX.values(), ids=WRONG_IDX)
def test_what_is_not_the_idx_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"^a gzip of 3 images of 28 x 28 bytes in IDX$"):
        mnist.read_idx(tmp_path / "file", 3)


# omniglot and caltech_silhouettes


def matlab(tmp_path, arrays):
    scipy.io.savemat(tmp_path / "saved.mat", arrays, do_compression=True)
    return (tmp_path / "saved.mat").read_bytes()


def by_column(images):
    """Return images [N, 28, 28] as MATLAB has them, column by column, [N, 784]."""
    return np.stack([image.flatten(order="F") for image in images])


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """Return the grey levels of a small set in the form of Omniglot, and the arrays of its file."""
    train, test = (DRAWS.integers(0, 256, (size, 28, 28)) for size in (9, 4))
    for name, number in {"NUM_TRAIN": 9, "NUM_TEST": 4, "NUM_VALID": 3}.items():
        monkeypatch.setattr(omniglot, name, number)
    arrays = {"data": by_column(train).T / 255, "testdata": by_column(test).T / 255, "target": np.eye(3)}
    return train, test, arrays


def test_omniglot_is_upright_and_each_image_is_in_one_split(tmp_path, small_omniglot):
    train, test, arrays = small_omniglot
    place(tmp_path / "data", "omniglot", {"chardata.mat": matlab(tmp_path, arrays)})
    dataset = build("omniglot", tmp_path / "data", binarization="threshold")
    assert [len(dataset.points(split)) for split in SPLITS] == [6, 3, 4]
    np.testing.assert_array_equal(dataset.points("test").squeeze(1), stored("omniglot", "test", test > 127))
    images = [x.byte().numpy().tobytes() for split in ("train", "valid") for x in dataset.points(split)]
    assert sorted(images) == sorted(image.tobytes() for image in (train > 127).astype(np.uint8))


def test_omniglot_is_drawn_afresh_unless_asked_for_otherwise(tmp_path, small_omniglot):
    _, _, arrays = small_omniglot
    place(tmp_path / "data", "omniglot", {"chardata.mat": matlab(tmp_path, arrays)})
    dataset = build("omniglot", tmp_path / "data")
    assert not torch.equal(dataset.batch(0, 6, seed=1).sum(0), dataset.batch(1, 6, seed=1).sum(0))
    assert torch.equal(dataset.batch(1, 6, seed=1), build("omniglot", tmp_path / "data").batch(1, 6, seed=1))


@pytest.mark.parametrize("change", ["name", "shape", "negative", "above one", "nan", "no file"])
def test_what_is_not_omniglot_is_refused_in_one_line(tmp_path, small_omniglot, change):
    _, _, arrays = small_omniglot
    content = {
        "name": lambda: {"data": arrays["data"]},
        "shape": lambda: {**arrays, "data": arrays["data"].T},
        "negative": lambda: {**arrays, "data": arrays["data"] - 0.1},
        "above one": lambda: {**arrays, "testdata": 255 * arrays["testdata"]},
        "nan": lambda: {**arrays, "data": np.where(arrays["data"] > 0.5, np.nan, 0)},
    }.get(change)
    place(tmp_path, "omniglot", {"chardata.mat": matlab(tmp_path, content()) if content else b"<html>" * 100})
    with pytest.raises(UserError, match=r"^dataset omniglot: .*/chardata.mat: expected a MATLAB file with [^\n]*$"):
        build("omniglot", tmp_path)


def test_caltech_silhouettes_are_upright_and_keep_their_splits(tmp_path, monkeypatch):
    sizes = {"train": 5, "valid": 3, "test": 2}
    images = {split: DRAWS.integers(0, 2, (size, 28, 28), dtype=np.uint8) for split, size in sizes.items()}
    monkeypatch.setattr(caltech_silhouettes, "SIZES", sizes)
    arrays = {
        f"{name}_data": by_column(images[split]) for split, name in zip(SPLITS, ("train", "val", "test"), strict=True)
    }
    file = "caltech101_silhouettes_28_split1.mat"
    with Server(files={file: matlab(tmp_path, arrays)}) as server:
        dataset = build("caltech_silhouettes", tmp_path / "data", server.url)
    for split in SPLITS:
        expected = stored("caltech_silhouettes", split, images[split])
        np.testing.assert_array_equal(dataset.points(split).squeeze(1), expected)
    grey = matlab(tmp_path, {**arrays, "val_data": 0.5 * arrays["val_data"]})
    place(tmp_path / "other", "caltech_silhouettes", {file: grey})
    with pytest.raises(UserError, match="expected pixels that are 0 or 1: put the right file at"):
        build("caltech_silhouettes", tmp_path / "other")


# All of them


@pytest.mark.parametrize("name", MODULES)
def test_the_configuration_has_the_published_address_and_data_root_reaches_the_data_set(tmp_path, name):
    module = MODULES[name]
    assert compose([f"dataset={name}"]).config["dataset"]["url"] == module.URL
    with pytest.raises(UserError, match=f"^dataset {name}: {NOWHERE}/.* into {tmp_path}/{name}, or .*dataset=mnist5k"):
        build(name, tmp_path)


def test_a_data_set_that_is_not_downloaded_is_given_no_folder(tmp_path):
    config = compose(["dataset=shapes", "dataset.num_points=20", f"data_root={tmp_path}/none"]).config
    assert len(build_dataset(OmegaConf.create(config)).points("train")) == 20
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [*MODULES, "mnist5k", "shapes"])
def test_the_defaults_in_python_are_those_of_the_configuration(name):
    options = dict(compose([f"dataset={name}"]).config["dataset"])
    parameters = inspect.signature(resolve(options.pop("target"))).parameters
    assert {key: value.default for key, value in parameters.items() if key != "data_root"} == options
