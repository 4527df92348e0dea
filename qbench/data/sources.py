"""The public data sets by name: where each may lie under `root`, how it is parsed, how it is fetched."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbench.data.cache import Splits, cached, fingerprint, locked
from qbench.data.folders import find_images
from qbench.data.idx import read_idx
from qbench.data.images import read_images
from qbench.data.splits import Source, Split
from qbench.data.torchvision_loader import torchvision
from qbench.errors import UserError
from qbench.files import cache_folder


@dataclass(frozen=True)
class Original:
    """torchvision's class for a data set, and of each part the files below `root` that hold it."""

    reader: str
    parts: dict[str, str]


ORIGINALS = {
    "mnist": Original("MNIST", {"train": "MNIST/raw/train-*-ubyte*", "test": "MNIST/raw/t10k-*-ubyte*"}),
    "fashion_mnist": Original(
        "FashionMNIST", {"train": "FashionMNIST/raw/train-*-ubyte*", "test": "FashionMNIST/raw/t10k-*-ubyte*"}
    ),
    "cifar10": Original(
        "CIFAR10", {"train": "cifar-10-batches-py/data_batch_*", "test": "cifar-10-batches-py/test_batch"}
    ),
    "cifar100": Original("CIFAR100", {"train": "cifar-100-python/train", "test": "cifar-100-python/test"}),
    "svhn": Original("SVHN", {part: f"{part}_32x32.mat" for part in ("train", "test", "extra")}),
}
IN_FOLDERS = ("cifar10", "cifar100")
IN_IDX = {"train": "train", "test": "t10k"}  # how MNIST's files begin
# Images to train and to test, and classes, as published; whoever names a set means the whole of it.
PUBLISHED = {
    "mnist": (60_000, 10_000, 10),
    "fashion_mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "svhn": (73_257, 26_032, 10),
    "svhn with extra": (73_257 + 531_131, 26_032, 10),
    "imagenet": (1_281_167, 50_000, 1000),
}


def original(config: Mapping[str, Any]) -> Splits:
    """A data set in the files of its authors; downloaded into `root` where it is missing.

    CIFAR is also taken from a folder or zip of class folders; `extra` adds SVHN's easier images to the training images.

    Errors: UserError that says what is missing, where it was looked for and how to get it.
    """
    name, root = config["name"], Path(config["root"])
    if name in IN_FOLDERS and (source := _class_folders(root, name)):
        return image_folder({**config, "root": source, "size": None})
    parts = {k: v for k, v in ORIGINALS[name].parts.items() if k != "extra" or config.get("extra")}
    if _missing(root, parts):
        with locked(cache_folder() / name):  # of several runs that start together, one downloads
            if missing := _missing(root, parts):
                _download(name, root, missing)
    files = sorted(file for pattern in parts.values() for file in root.glob(pattern))
    key = [name, fingerprint(root, [str(file.relative_to(root)) for file in files])]
    return cached(name, key, lambda: _parse(name, root, list(parts)))


def image_folder(config: Mapping[str, Any]) -> Splits:
    """A folder or zip of class folders; classes are their names in alphabetical order."""
    root, size, channels = Path(config["root"]), config.get("size"), config.get("channels")
    if _is_zip(root):  # listed only when it is parsed: its stat is enough
        found, files = None, fingerprint(root)
    else:
        found = find_images(root)
        files = fingerprint(root, found.names["train"] + found.names["test"])
    key = ["images", files, size, channels]
    return cached(config["name"], key, lambda: read_images(found or find_images(root), size, channels))


def _is_zip(root: Path) -> bool:
    return root.is_file() or (root.suffix == ".zip" and not root.is_dir())


def _class_folders(root: Path, name: str) -> Path | None:
    """The zip or folder of class folders that stands for `name` at `root`, or None."""
    if _is_zip(root):
        return root
    if (root / f"{name}.zip").is_file():
        return root / f"{name}.zip"
    return next((folder for folder in (root / name, root) if (folder / "train").is_dir()), None)


def _missing(root: Path, parts: Mapping[str, str]) -> list[str]:
    return [part for part, pattern in parts.items() if not any(root.glob(pattern))]


def _parse(name: str, root: Path, parts: Sequence[str]) -> Splits:
    """(train, test); what `parts` names beside these two is added to train."""
    try:
        splits = {part: _as_split(*_arrays(name, root, part)) for part in parts}
    except Exception as error:  # of any kind: they come from files that their reader cannot read
        raise _unusable(name, root, "is incomplete or damaged", error) from error
    test, train = splits.pop("test"), list(splits.values())
    return Split(torch.cat([s.images for s in train]), torch.cat([s.labels for s in train])), test


def _arrays(name: str, root: Path, part: str) -> tuple[Any, Any]:
    """(images, labels) of one part, as its files hold them."""
    reader = ORIGINALS[name].reader
    if name.endswith("mnist"):  # not by torchvision, which unpacks beside the packed files, on whatever disk
        files = (root / reader / "raw" / f"{IN_IDX[part]}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
        images, labels = (read_idx(file) for file in files)
        return images, labels
    data = _torchvision(name, root, part)
    return data.data, data.labels if hasattr(data, "labels") else data.targets


def _torchvision(name: str, root: Path, part: str, download: bool = False) -> Any:
    reader: Callable[..., Any] = getattr(torchvision().datasets, ORIGINALS[name].reader)
    which = {"split": part} if name == "svhn" else {"train": part == "train"}
    return reader(str(root), download=download, **which)


def _download(name: str, root: Path, parts: Sequence[str]) -> None:
    """Fetch `parts` whole or not at all; neither replaces a file nor leaves an empty folder where it fails."""
    made = []
    try:
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as place:
            for part in parts:
                _torchvision(name, Path(place), part, download=True)
            for file in Path(place).rglob("*"):
                target = root / file.relative_to(place)
                if file.is_file() and file.suffix != ".gz" and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
    except Exception as error:  # of any kind: they come from the network, the disk or torchvision
        raise _unusable(name, root, "could not be downloaded", error) from error
    finally:
        for folder in made:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()


def _unusable(name: str, root: Path, what: str, error: Exception) -> UserError:
    original = ORIGINALS[name]
    places = [str(root / pattern) for pattern in original.parts.values()]
    places += [f"{root / name}.zip", f"{root / name}/train/<class>/*"] if name in IN_FOLDERS else []
    why = " ".join(str(error).split()) or type(error).__name__  # torchvision's own message may have many lines
    return UserError(
        f"{name} {what} ({why}). Looked for {', '.join(places)}. On a machine with network run "
        f"python -c \"import torchvision; torchvision.datasets.{original.reader}('data', download=True)\", "
        "copy its folder 'data' here, and set dataset.root=FOLDER or QBENCH_DATA."
    )


def _as_split(images: Any, labels: Any) -> Split:
    """Images and labels as an original's files hold them, as uint8 [N, C, H, W] and int64 [N].

    Errors: ValueError where their counts differ.
    """
    images, labels = torch.as_tensor(np.asarray(images), dtype=torch.uint8), torch.as_tensor(labels, dtype=torch.int64)
    if labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but labels of shape {tuple(labels.shape)}")
    if images.ndim == 3:  # MNIST: [N, H, W]
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR: [N, H, W, 3]; SVHN is [N, 3, H, W] already
        images = images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), labels)


def check_published(config: Mapping[str, Any], train: Source, test: Source) -> None:
    """Whether a data set that goes by a public name has the sizes that were published under it.

    Errors: UserError with both, and how to take part of a set or other images.
    """
    name = config["name"] + (" with extra" if config.get("extra") else "")
    if name not in PUBLISHED:
        return
    got = len(train), len(test), len(torch.cat([train.labels, test.labels]).unique())
    if got != PUBLISHED[name]:
        said = ["{:,} train and {:,} test images of {:,} classes".format(*sizes) for sizes in (got, PUBLISHED[name])]
        raise UserError(
            f"what lies at {config['root']} is not {name}: {said[0]}, not {said[1]}. A part of it is drawn from the "
            "whole by dataset.train_examples=N; images of your own are dataset=image_folder or image_stream."
        )
