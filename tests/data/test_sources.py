"""Public data sets: the same tensors from every form, and an answer where they are missing."""

import hashlib
import pickle
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images, zip_folder
from PIL import Image

from qbench.data import Split, load
from qbench.data.torchvision_loader import torchvision
from qbench.errors import UserError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


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


def test_cifar10_is_the_same_from_batches_folder_and_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cifar_of_another_size_is_refused(tmp_path: Path) -> None:
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
def test_mnist_is_read(tmp_path: Path, name: str, folder: str) -> None:
    images, labels = write_mnist(tmp_path, folder)
    data = load({"name": name, "root": str(tmp_path), "channels": 1, "size": 28, "mean": [0.1], "std": [0.3]})
    assert isinstance(data.train, Split)
    got = {(int(y), x.numpy().tobytes()) for x, y in zip(data.train.images, data.train.labels, strict=True)}
    assert got == {(int(y), x.tobytes()) for x, y in zip(images, labels, strict=True)}


def test_svhn_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    random = np.random.default_rng(0)
    images, lists = random.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8), {}
    for split in ("train", "test"):
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": images, "y": np.arange(1, 11)[:, None]})
        lists[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision().datasets.SVHN, "split_list", lists)
    data = load({"name": "svhn", "root": str(tmp_path), "channels": 3, "size": 32, "classes": 10})
    assert isinstance(data.train, Split)
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert np.array_equal(image.numpy().transpose(1, 2, 0), images[..., (int(label) - 1) % 10])


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


def test_a_damaged_original_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"mnist is incomplete or damaged .* Looked for .*MNIST/raw"):
        load({"name": "mnist", "root": str(tmp_path)})
    assert file.stat().st_size == 500  # the user's file is left as it is
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(UserError, match="cifar10 is incomplete or damaged"):
        load({"name": "cifar10", "root": str(tmp_path)})


def test_torchvision_is_not_imported_where_the_cache_suffices(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    code = (
        "import sys; from qbench.data import load; "
        f"load({{'name': 'mnist', 'root': {str(tmp_path)!r}}}); print('torchvision' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    shown = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [line.strip() for line in shown] == ["True", "False"]
