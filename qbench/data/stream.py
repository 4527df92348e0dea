"""ImageNet, and any set too large for memory: images decoded by worker processes while the model trains."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qbench.config.data import STREAM_AUGMENTATIONS
from qbench.data.batching import Batches, Layout, Normalize, generator, order_of
from qbench.data.cache import fingerprint
from qbench.data.folders import find_images
from qbench.data.images import read_image
from qbench.data.splits import Source, Split, Stream
from qbench.data.torchvision_loader import torchvision
from qbench.errors import UserError

# How PyTorch words what a machine short of memory does to the processes of a DataLoader.
LOST = ("killed by signal", "exited unexpectedly", "shared memory", "No space left", "Cannot allocate memory")


def imagenet(config: Mapping[str, Any]) -> tuple[Stream, Stream]:
    """The streams of root/imagenet/{train,val}/<class>/*, or of root/{train,val}/<class>/*.

    Errors: UserError that says where it was looked for and what the folder should hold.
    """
    root = Path(config["root"])
    source = next((folder for folder in (root / "imagenet", root) if (folder / "train").is_dir()), None)
    if source is None:
        raise UserError(
            f"imagenet is missing: looked for {root / 'imagenet' / 'train'} and {root / 'train'}. It may not be "
            "downloaded freely: get ILSVRC2012 from image-net.org, unpack it to train/<class>/* and val/<class>/*, "
            "and set dataset.root=FOLDER (or QBENCH_DATA)."
        )
    return image_stream({**config, "root": source})


def image_stream(config: Mapping[str, Any]) -> tuple[Stream, Stream]:
    """The streams of root/train/<class>/* and root/test/<class>/* (or val); see `find_images`.

    Errors: UserError where `root` is no folder, or its images are not to be had.
    """
    source = Path(config["root"])
    if source.is_file():
        raise UserError(f"images are streamed from a folder: unpack {source}, and set dataset.root to where they lie")
    found, size = find_images(source), config.get("size") or 224
    train, test = (
        _stream(source, found.names[part], found.labels[part], size, config.get("workers"))
        for part in ("train", "test")
    )
    return train, test


def _stream(source: Path, names: list[str], labels: Tensor, size: int, workers: int | None) -> Stream:
    sha = hashlib.sha256(f"{size}".encode())
    for name, length, _ in fingerprint(source, names)[1:]:
        sha.update(b"\n%s %d" % (os.fsencode(name), length))
    return Stream(tuple(str(source / name) for name in names), labels, size, sha.hexdigest(), workers)


class _Images(Dataset[tuple[Tensor, int]]):
    """Item (position, index) is image `index` as uint8 [size, size, 3], cropped as (seed, epoch, position) say."""

    def __init__(self, stream: Stream, augment: str, seed: int, epoch: int) -> None:
        self.stream, self.augment, self.key = stream, augment, (seed, epoch)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        position, index = item
        path, label = Path(self.stream.paths[index]), int(self.stream.labels[index])
        image = read_image(path.parent, path.name).convert("RGB")
        transforms = torchvision().transforms
        size = self.stream.size
        if self.augment == "none":
            steps = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        else:
            steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        # torchvision draws from the global generator: seed it per image, and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("augment", *self.key, position).initial_seed())
            for step in steps:
                image = step(image)
        return torch.from_numpy(np.array(image)), label


class StreamBatches:
    """The batches of a `Stream`, with the contract of `Batches`; `workers` processes decode (0: this one).

    `augment` is 'resized_crop_flip' (a random crop of 8..100 % of the area, resized to size x size, mirrored or not) or
    'none' (shorter side to size * 256 / 224, then the centre).

    Errors: ValueError on an argument out of range.
    """

    def __init__(
        self,
        split: Stream,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        workers: int | None = None,
    ) -> None:
        if augment not in STREAM_AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(STREAM_AUGMENTATIONS)}, got {augment!r}")
        self.layout = Layout(len(split), batch_size, rank, world, drop_last)
        self.normalize = Normalize(mean, std, device, channels_last)
        self.split, self.augment, self.shuffle, self.seed = split, augment, shuffle, seed
        workers = split.workers if workers is None else workers
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        self.device = torch.device(device)

    def __len__(self) -> int:
        return self.layout.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch`, from step `start` on; bit-identical to the same steps of the whole epoch."""
        self.layout.check_start(start)
        torchvision()  # before the workers fork, so that they find it imported
        order = order_of(self.layout.total, self.seed, epoch, self.shuffle).tolist()
        steps = [[(p, order[p]) for p in self.layout.positions(step)] for step in range(start, len(self))]
        loader = DataLoader(
            _Images(self.split, self.augment, self.seed, epoch),
            batch_sampler=steps,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=generator("workers", self.seed, epoch),
        )
        try:
            for images, labels in loader:
                yield self.normalize(images.permute(0, 3, 1, 2)), labels.to(self.device, non_blocking=True)
        except UserError as error:  # a worker's error arrives with its traceback in the message: keep the last line
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("qbench.errors.UserError: ")) from None
        except (RuntimeError, OSError) as error:
            if not any(words in str(error) for words in LOST):
                raise
            raise UserError(
                f"one of {self.workers} processes that decode images was lost ({str(error).splitlines()[0]}): out of "
                "memory, or of shared memory (/dev/shm). dataset.workers=N takes fewer, dataset.workers=0 none."
            ) from error


def batches(
    split: Source, *, whitening: tuple[Tensor, Tensor] | None = None, **options: Any
) -> Batches | StreamBatches:
    """The batches of a split, in memory or on disk; options as for `Batches`."""
    if isinstance(split, Split):
        return Batches(split, whitening=whitening, **options)
    return StreamBatches(split, **options)
