"""Public data sets: the same tensors from every form, and an answer where they are missing."""

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images, zip_folder
from PIL import Image

from qbench.data import Split, load, sources
from qbench.data.torchvision_loader import torchvision
from qbench.errors import UserError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, tuple[int, int, int]], None]:
    """Sets what counts as the whole of a data set: (train, test, classes)."""
    return lambda name, sizes: monkeypatch.setitem(sources.PUBLISHED, name, sizes)


Sized = Callable[[str, tuple[int, int, int]], None]


def write_python_batches(root: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of class folders as CIFAR-10's python batches in another order; their MD5 becomes the expected one."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    reader = torchvision().datasets.CIFAR10
    for split, file, attribute in (("train", "data_batch_1", "train_list"), ("test", "test_batch", "test_list")):
        paths = sorted((source / split).rglob("*.png"), key=lambda path: path.name)
        pixels = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1).reshape(-1) for path in paths])
        labels = [CIFAR10.index(path.parent.name) for path in paths]
        monkeypatch.setattr(reader, attribute, [write(file, {"data": pixels, "labels": labels})])
    name, md5 = write("batches.meta", {"label_names": list(CIFAR10)})
    monkeypatch.setattr(reader, "meta", {"filename": name, "key": "label_names", "md5": md5})


def test_cifar10_is_the_same_from_batches_folder_and_zip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sized: Sized
) -> None:
    sized("cifar10", (30, 10, 10))
    source = write_images(tmp_path / "source", classes=CIFAR10, train=3, test=1, size=(32, 32))
    roots = [tmp_path / name for name in ("batches", "folder", "zip", "bare")]
    write_python_batches(roots[0], source, monkeypatch)
    (roots[1] / "cifar10").mkdir(parents=True)
    for split in ("train", "test"):
        (source / split).rename(roots[1] / "cifar10" / split)
    roots[2].mkdir()
    zip_folder(roots[1] / "cifar10", roots[2] / "cifar10.zip")
    roots[3] = roots[1] / "cifar10"
    config = {"name": "cifar10", "channels": 3, "classes": 10, "size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    sets = [load(config | {"root": str(root)}) for root in [*roots, roots[2] / "cifar10.zip"]]
    assert len({data.checksum for data in sets}) == 1
    for data in sets:
        assert isinstance(data.train, Split)
        assert torch.equal(data.train.images, sets[0].train.images)  # type: ignore[union-attr]
        assert torch.equal(data.train.labels, sets[0].train.labels)
        assert torch.bincount(data.test.labels).tolist() == [1] * 10


def test_cifar_of_another_size_is_refused(tmp_path: Path, sized: Sized) -> None:
    sized("cifar100", (8, 4, 2))
    write_images(tmp_path / "cifar100", size=(8, 8))
    with pytest.raises(UserError, match=r"cifar100: the images are \(3, 8, 8\) .* asked \(3, 32, 32\)"):
        load({"name": "cifar100", "root": tmp_path, "channels": 3, "size": 32})


def write_mnist(root: Path, name: str = "MNIST") -> tuple[np.ndarray, np.ndarray]:
    """Random images in MNIST's format; returns the training images and labels."""
    folder, random = root / name / "raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    images, labels = random.integers(0, 256, (12, 28, 28), dtype=np.uint8), (np.arange(12) % 10).astype(np.uint8)
    for split in ("train", "t10k"):
        header = struct.pack(">HBB", 0, 8, 3) + struct.pack(">III", 12, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">HBB", 0, 8, 1) + struct.pack(">I", 12)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return images, labels


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_read(tmp_path: Path, name: str, folder: str, sized: Sized, caplog: pytest.LogCaptureFixture) -> None:
    sized(name, (12, 12, 10))
    images, labels = write_mnist(tmp_path, folder)
    data = load({"name": name, "root": str(tmp_path), "channels": 1, "size": 28, "mean": [0.1], "std": [0.3]})
    assert isinstance(data.train, Split)
    got = {(int(y), x.numpy().tobytes()) for x, y in zip(data.train.images, data.train.labels, strict=True)}
    assert got == {(int(y), x.tobytes()) for x, y in zip(images, labels, strict=True)}
    assert "the images to train and to test are the same" in caplog.text


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Ten random images of each part as SVHN's files, labelled 1..10; returns the images."""
    from scipy.io import savemat

    random, images, lists = np.random.default_rng(0), {}, {}
    for part in ("train", "test", "extra"):
        file = root / f"{part}_32x32.mat"
        images[part] = random.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
        savemat(file, {"X": images[part], "y": np.arange(1, 11)[:, None]})
        lists[part] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision().datasets.SVHN, "split_list", lists)
    return images


def test_svhn_is_read_and_extra_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sized: Sized) -> None:
    images = write_svhn(tmp_path, monkeypatch)
    sized("svhn", (10, 10, 10))
    sized("svhn with extra", (20, 10, 10))
    config = {"name": "svhn", "root": str(tmp_path), "channels": 3, "size": 32, "classes": 10}
    for extra, parts in ((False, ["train"]), (True, ["train", "extra"])):
        data = load(config | {"extra": extra})
        assert isinstance(data.train, Split)
        got = {(int(y), x.numpy().tobytes()) for x, y in zip(data.train.images, data.train.labels, strict=True)}
        want = {((k + 1) % 10, images[p][..., k].transpose(2, 0, 1).tobytes()) for p in parts for k in range(10)}
        assert got == want
        assert len(data.test) == 10
    with pytest.raises(UserError, match=r"dataset.extra must be true or false, got 'yes'"):
        load(config | {"extra": "yes"})


def test_what_goes_by_a_public_name_is_all_of_it(tmp_path: Path) -> None:
    write_images(tmp_path / "cifar10", classes=("cat", "dog", "emu"), train=3, test=1, size=(32, 32))
    said = (
        "is not cifar10: 9 train and 3 test images of 3 classes, not 50,000 train and 10,000 test images of 10 classes"
    )
    with pytest.raises(UserError, match=rf"{said}. A part of it .* dataset.train_examples=N; .* dataset=image_folder"):
        load({"name": "cifar10", "root": tmp_path, "channels": 3, "classes": 10, "size": 32})
    write_mnist(tmp_path)
    with pytest.raises(UserError, match="is not mnist: 12 train and 12 test images of 10 classes, not 60,000"):
        load({"name": "mnist", "root": tmp_path})


def test_the_sizes_are_the_published_ones() -> None:
    told = {name: Path(f"conf/dataset/{name}.yaml").read_text() for name in sources.PUBLISHED if " " not in name}
    for name, text in told.items():
        train, test, classes = sources.PUBLISHED[name]
        assert f"{train:,} train, {test:,}" in text
        assert f"classes: {classes}\n" in text
    assert sources.PUBLISHED["svhn with extra"][0] == 604_388


def test_packed_mnist_is_read_where_nothing_can_be_written(tmp_path: Path, sized: Sized) -> None:
    sized("mnist", (12, 12, 10))
    write_mnist(tmp_path)
    config = {"name": "mnist", "root": str(tmp_path), "mean": [0.1], "std": [0.3]}
    unpacked = load(config)
    folder = tmp_path / "MNIST" / "raw"
    for file in list(folder.iterdir()):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    before = sorted(folder.iterdir())
    folder.chmod(0o500)
    assert load(config).checksum == unpacked.checksum
    folder.chmod(0o700)
    assert sorted(folder.iterdir()) == before
    images = folder / "train-images-idx3-ubyte.gz"
    content = images.read_bytes()
    for damaged in (content[:200], content[:100] + b"\0" * 50 + content[150:]):
        images.write_bytes(damaged)
        with pytest.raises(UserError, match="mnist is incomplete or damaged"):
            load(config)


def test_counts_of_images_and_labels_that_differ_are_told(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">HBBI", 0, 8, 1, 11) + bytes(11))
    with pytest.raises(UserError, match=r"mnist is incomplete or damaged \(12 images, but labels of shape \(11,\)\)"):
        load({"name": "mnist", "root": str(tmp_path)})
    labels.write_bytes(struct.pack(">HBBI", 0, 8, 1, 4_000_000_000) + bytes(11))
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte should hold 4000000000 bytes after its header"):
        load({"name": "mnist", "root": str(tmp_path)})
    labels.unlink()
    os.mkfifo(labels)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is not an ordinary file"):
        load({"name": "mnist", "root": str(tmp_path)})


def test_a_download_is_whole_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sized: Sized
) -> None:
    sized("mnist", (12, 12, 10))
    root = tmp_path / "some" / "where"

    def fetch(root: str, train: bool, download: bool) -> None:
        assert download
        write_mnist(Path(root)) if train else (Path(root) / "MNIST" / "raw" / "x.gz").touch()

    monkeypatch.setattr(torchvision().datasets, "MNIST", fetch)
    data = load({"name": "mnist", "root": str(root)})
    assert len(data.train) == 12
    raw = root / "MNIST" / "raw"
    assert [path.name for path in root.iterdir()] == ["MNIST"]
    assert len(list(raw.iterdir())) == 4
    mine = raw / "t10k-labels-idx1-ubyte"
    for file in raw.glob("train*"):
        file.unlink()
    mine.write_bytes(mine.read_bytes()[:-1] + b"\7")
    load({"name": "mnist", "root": str(root)})
    assert mine.read_bytes()[-1] == 7


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_missing_without_network(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        load({"name": name, "root": str(tmp_path / "data")})
    message = str(caught.value)
    assert message.startswith(f"{name} could not be downloaded")
    assert f"Looked for {tmp_path / 'data'}" in message
    assert "download=True" in message
    assert "dataset.root=" in message
    assert (f"{name}.zip" in message) == name.startswith("cifar")
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError):
        load({"name": name, "root": str(tmp_path / "data")})
    assert not list((tmp_path / "data").iterdir())


def test_a_damaged_original_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"mnist is incomplete or damaged .* Looked for .*MNIST/raw"):
        load({"name": "mnist", "root": str(tmp_path)})
    assert file.stat().st_size == 500  # the user's file is left as it is
    (tmp_path / "cifar-10-batches-py").mkdir()
    for part in ("data_batch_1", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / part).write_bytes(b"half")
    with pytest.raises(UserError, match="cifar10 is incomplete or damaged"):
        load({"name": "cifar10", "root": str(tmp_path)})


def test_torchvision_is_not_imported_for_files_that_are_there(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    code = (
        "import sys; from qbench.data import load, sources; sources.PUBLISHED.clear(); "
        f"load({{'name': 'mnist', 'root': {str(tmp_path)!r}}}); print('torchvision' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
