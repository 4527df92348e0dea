"""The public data sets by name: where each may lie under `root`, how it is parsed, how it is fetched."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbench.data.cache import Splits, cached, fingerprint, locked
from qbench.data.folders import find_images, read_images
from qbench.data.splits import Split
from qbench.data.torchvision_loader import torchvision
from qbench.errors import UserError
from qbench.files import cache_folder

# name -> torchvision's class, and the files below `root` that it reads.
ORIGINALS = {
    "mnist": ("MNIST", "MNIST/raw/*-ubyte"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw/*-ubyte"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/*_batch*"),
    "cifar100": ("CIFAR100", "cifar-100-python/t*"),
    "svhn": ("SVHN", "t*_32x32.mat"),
}
IN_FOLDERS = ("cifar10", "cifar100")


def original(config: Mapping[str, Any]) -> Splits:
    """A data set in the files of its authors, read by torchvision; downloaded into `root` where it is missing.

    CIFAR is also taken from a folder or zip of class folders.

    Errors: UserError that says what is missing, where it was looked for and how to get it.
    """
    name, root = config["name"], Path(config["root"]).expanduser()
    _, pattern = ORIGINALS[name]
    if name in IN_FOLDERS and (source := _class_folders(root, name)):
        return image_folder({**config, "root": source, "size": None})
    if not any(root.glob(pattern)):
        with locked(cache_folder() / name):  # of several runs that start together, one downloads
            if not any(root.glob(pattern)):
                _torchvision_split(config, train=True, download=True)
                _torchvision_split(config, train=False, download=True)
    key = [name, fingerprint(root, (str(file.relative_to(root)) for file in sorted(root.glob(pattern))))]
    return cached(name, key, lambda: (_torchvision_split(config, train=True), _torchvision_split(config, train=False)))


def image_folder(config: Mapping[str, Any]) -> Splits:
    """A folder or zip of class folders; classes are their names in alphabetical order."""
    root = Path(config["root"]).expanduser()
    size, channels = config.get("size"), config.get("channels")
    zipped = root.is_file() or root.suffix == ".zip"  # a zip is listed only when it is parsed: its stat is enough
    if zipped:
        files = fingerprint(root)
    else:
        names = find_images(root).names
        files = fingerprint(root, names["train"] + names["test"])
    key = ["images", files, size, channels]
    return cached(config["name"], key, lambda: read_images(find_images(root), size, channels))


def _class_folders(root: Path, name: str) -> Path | None:
    """The zip or folder of class folders that stands for `name` at `root`, or None."""
    if root.is_file() or root.suffix == ".zip":
        return root
    if (root / f"{name}.zip").is_file():
        return root / f"{name}.zip"
    return next((folder for folder in (root / name, root) if (folder / "train").is_dir()), None)


def _torchvision_split(config: Mapping[str, Any], train: bool, download: bool = False) -> Split:
    name, root = config["name"], Path(config["root"]).expanduser()
    class_name, pattern = ORIGINALS[name]
    reader: Callable[..., Any] = getattr(torchvision().datasets, class_name)
    part = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = reader(str(root), download=download, **part)
    except Exception as error:  # of any kind: they all come from the network or from files that torchvision cannot read
        kinds = f", {root / name}.zip and {root / name}/train/<class>/*" if name in IN_FOLDERS else ""
        why = " ".join(str(error).split())  # torchvision's own message may have many lines
        got = "could not be downloaded" if download else "is incomplete or damaged"
        raise UserError(
            f"{name} {got} ({why}). Looked for {root / pattern}{kinds}. On a machine with network run "
            f"python -c \"import torchvision; torchvision.datasets.{class_name}('data', download=True)\", "
            "copy its folder 'data' here, and set dataset.root=FOLDER or QBENCH_DATA."
        ) from error
    return _as_split(data)


def _as_split(data: Any) -> Split:
    """Images and labels of a torchvision data set as uint8 [N, C, H, W] and int64 [N]."""
    images = torch.as_tensor(np.asarray(data.data), dtype=torch.uint8)
    if images.ndim == 3:  # MNIST: [N, H, W]
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR: [N, H, W, 3]; SVHN is [N, 3, H, W] already
        images = images.permute(0, 3, 1, 2)
    labels = data.labels if hasattr(data, "labels") else data.targets
    return Split(images.contiguous(), torch.as_tensor(labels, dtype=torch.int64))
