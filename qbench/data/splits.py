"""What a data set is: splits of images in memory or on disk, and how parts of them are drawn."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbench.data import whiten
from qbench.errors import UserError


@dataclass(frozen=True)
class Split:
    """Labelled images in memory: `images` uint8 [N, C, H, W], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """The split of the images at `indices` [M], in that order."""
        return Split(self.images[indices], self.labels[indices])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes, pixels and labels, 64 hex digits."""
        sha = hashlib.sha256(str(tuple(self.images.shape)).encode())
        sha.update(self.images.contiguous().numpy().data)
        sha.update(self.labels.contiguous().numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True)
class Stream:
    """Labelled images on disk, read when a batch asks for them: `paths` of N files, `labels` int64 [N], `size` pixels.

    Whether an image is cropped at random or in the centre is the `augment` of the batches, as with a `Split`. `digest`
    is a SHA-256 over names and sizes of the whole split's files: hashing the pixels of ImageNet would take an epoch.
    `workers` is how many processes decode them; None for as many as are of use.
    """

    paths: tuple[str, ...]
    labels: Tensor
    size: int
    digest: str
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Stream":
        """The stream of the files at `indices` [M], in that order."""
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()), labels=self.labels[indices])


Source = Split | Stream


@dataclass(frozen=True)
class DataSet:
    """A data set ready for training.

    `mean` and `std` are per channel, in units of the full range (pixel / 255). `checksum` is a SHA-256 over all that
    decides the tensors: pixels, labels, and which images went to train, val and test. `preprocess` is standard, for
    (pixel / 255 - mean) / std, or gcn_zca.
    """

    name: str
    train: Source
    test: Source
    val: Source | None
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    checksum: str
    preprocess: str = "standard"

    @cached_property
    def whitening(self) -> tuple[Tensor, Tensor] | None:
        """(mean, matrix) of `whiten.fit` on the training images with `preprocess=gcn_zca`, else None."""
        if self.preprocess == "standard":
            return None
        assert isinstance(self.train, Split)
        return whiten.fit(self.train.images)


def stratified(labels: Tensor, seed: int) -> Tensor:
    """A seeded order of all N images in which every prefix holds the classes in proportion; int64 [N].

    Within a class of c images the order is random and image k gets the place (k + u) / c with u random in [0, 1);
    the places of all classes are then sorted.
    """
    random = np.random.default_rng(seed)
    place = np.empty(len(labels))
    values = labels.numpy()
    for label in np.unique(values):
        members = random.permutation(np.flatnonzero(values == label))
        place[members] = (np.arange(len(members)) + random.random(len(members))) / len(members)
    return torch.from_numpy(np.argsort(place, kind="stable"))


def draw(train: Source, test: Source, config: Mapping[str, Any]) -> tuple[Source, Source, Source | None, str]:
    """Draws (train, test, val) and their checksum from whole splits by `val`, `val_seed`, `*_examples`.

    Validation images come off the training images first; `train_examples` then limits what is left.

    Errors: UserError when `val` leaves fewer images than classes to validate or to train on.
    """
    seed = config.get("val_seed", 0)
    held_out = _held_out(config.get("val", 0), train.labels)
    order = stratified(train.labels, seed) if held_out else torch.arange(len(train))
    # Sorted, so that what is kept stands in the order of the whole split, however it was drawn.
    kept, validation = order[held_out:].sort().values, order[:held_out].sort().values
    kept = kept[_first(config, "train_examples", train.labels[kept], seed)]
    tested = _first(config, "test_examples", test.labels, seed)
    sha = hashlib.sha256(f"{train.digest} {test.digest}".encode())
    for indices in (kept, validation, tested):
        sha.update(f" {len(indices)} ".encode() + indices.numpy().tobytes())
    whole_train, whole_test = len(kept) == len(train), len(tested) == len(test)
    return (
        train if whole_train else train.take(kept),
        test if whole_test else test.take(tested),
        train.take(validation) if held_out else None,
        sha.hexdigest(),
    )


def _held_out(val: float, labels: Tensor) -> int:
    """The number of validation images that `val` asks for: a fraction of all, or a count."""
    total, classes = len(labels), len(labels.unique())
    count = val if isinstance(val, int) else round(val * total)
    if val and not classes <= count <= total - classes:
        raise UserError(
            "dataset.val must be 0, a fraction in (0, 1) or a count, with no fewer images than classes on either side: "
            f"{classes} to {total - classes} of the {total} train images; got {val}"
        )
    return count


def _first(config: Mapping[str, Any], key: str, labels: Tensor, seed: int) -> Tensor:
    limit = config.get(key)
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    return stratified(labels, seed)[:limit].sort().values
