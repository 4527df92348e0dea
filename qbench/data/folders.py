"""Data sets as people keep them: train/<class>/<image> and test/<class>/<image>, in a folder or a zip."""

import io
import logging
import multiprocessing
import os
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from qbench.data.splits import Split
from qbench.errors import UserError

log = logging.getLogger(__name__)
# Below this many images one process is done before two have started.
PARALLEL_FROM = 4000


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder or zip by split ("train", "test"): paths relative to `source`, and int64 labels.

    A label is the rank of the class folder's name in alphabetical order.
    """

    source: Path
    names: dict[str, list[str]]
    labels: dict[str, torch.Tensor]


def find_images(source: Path) -> ImageFiles:
    """Lists a folder or zip with train/<class>/* and test/<class>/* (or val/<class>/*); a zip may have a folder around.

    Errors: UserError when `source` is neither, when a split is missing, or when train and test differ in classes.
    """
    found: dict[str, dict[str, str]] = {"train": {}, "test": {}, "val": {}}  # split -> name -> class
    for name in sorted(_zip_names(source) if source.is_file() else _folder_names(source)):
        parts = name.split("/")
        at = 0 if parts[0] in found else 1
        if any(part.startswith((".", "__MACOSX")) for part in parts):
            continue  # hidden files and the __MACOSX folder of a Finder zip are not the user's images
        if len(parts) >= at + 3 and parts[at] in found:
            found[parts[at]][name] = parts[at + 1]
    if found["test"] and found["val"]:
        log.warning("%s has test and val images: val is left aside; dataset.val draws from train", source)
    chosen = {"train": found["train"], "test": found["test"] or found["val"]}
    for split, images in chosen.items():
        if not images:
            raise UserError(f"{source} holds no {split}/<class>/<image>; expected train/<class>/* and test/<class>/*")
    train, test = (set(images.values()) for images in chosen.values())
    if train != test:
        raise UserError(
            f"the classes of {source} differ between train and test: missing in test: {_some(train - test)}; "
            f"missing in train: {_some(test - train)}"
        )
    number = {name: label for label, name in enumerate(sorted(train))}
    labels = {split: torch.tensor([number[name] for name in images.values()]) for split, images in chosen.items()}
    return ImageFiles(source, {split: list(images) for split, images in chosen.items()}, labels)


def read_images(found: ImageFiles, size: int | None = None, channels: int | None = None) -> tuple[Split, Split]:
    """Decodes all images into (train, test); `size` fits each into size x size, else all must be equal squares.

    `channels` is 1 (grey) or 3 (colour); None means 1 if the first image is grey.

    Errors: UserError naming the file that is not an image, is damaged, or has another size than the first.
    """
    if channels is None:
        channels = _channels_of(found)
    train, test = (
        Split(torch.from_numpy(decode_all(found.source, found.names[split], size, channels)), found.labels[split])
        for split in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"the images of {found.source} differ in size: train {_pixels(train)}, test {_pixels(test)}; "
            "set dataset.size=PIXELS to resize them"
        )
    return train, test


def decode_all(source: Path, names: list[str], size: int | None, channels: int) -> np.ndarray:
    """The images `names` as uint8 [N, C, H, W], decoded by one process per core where there are many."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 1 or len(names) < PARALLEL_FROM or multiprocessing.current_process().daemon:
        return decode(source, names, size, channels)
    log.info("decoding %d images of %s, once", len(names), source)
    # One part per worker: each opens the zip once. Processes, since Pillow's WebP decoder holds the interpreter's lock.
    parts = [names[len(names) * i // workers : len(names) * (i + 1) // workers] for i in range(workers)]
    with warnings.catch_warnings(), ProcessPoolExecutor(workers) as pool:
        # Python warns of a fork beside threads; the children run Pillow and NumPy only, never PyTorch's threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded = list(pool.map(decode, [source] * workers, parts, [size] * workers, [channels] * workers))
    for part, images in zip(parts, decoded, strict=True):
        if images.shape[1:] != decoded[0].shape[1:]:
            raise _unequal(source, part[0], images.shape[1:], decoded[0].shape[1:])
    return np.concatenate(decoded)


def decode(source: Path, names: Sequence[str], size: int | None, channels: int) -> np.ndarray:
    """The images `names` of a folder or zip as uint8 [N, C, H, W]."""
    archive = _open_zip(source) if source.is_file() else None
    images: list[np.ndarray] = []
    for name in names:
        image = _decode_one(source, name, archive)
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        elif image.width != image.height:
            raise UserError(f"{name} in {source} is {image.width} x {image.height}; set dataset.size=PIXELS to resize")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        if images and pixels.shape != images[0].shape:
            raise _unequal(source, name, pixels.shape, images[0].shape)
        images.append(pixels)
    return np.stack(images)


def _decode_one(source: Path, name: str, archive: zipfile.ZipFile | None) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(archive.read(name) if archive else (source / name).read_bytes()))
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name} in {source} is not an image; remove it or put the right file there") from error
    except (OSError, SyntaxError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise UserError(f"{name} in {source} is damaged ({error}); get the file again") from error
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"{name} in {source} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits"
        )
    return image


def _channels_of(found: ImageFiles) -> int:
    archive = _open_zip(found.source) if found.source.is_file() else None
    return 1 if _decode_one(found.source, found.names["train"][0], archive).mode in ("1", "L", "LA") else 3


def _open_zip(source: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{source} is not a readable zip file ({error}); get it again or set dataset.root=FOLDER"
        ) from error


def _zip_names(source: Path) -> list[str]:
    with _open_zip(source) as archive:
        return [entry.filename for entry in archive.infolist() if not entry.is_dir()]


def _folder_names(source: Path) -> list[str]:
    if not source.is_dir():
        raise UserError(f"{source} does not exist; set dataset.root to a folder or zip with train/<class>/* in it")
    return [
        Path(os.path.relpath(folder, source)).as_posix() + "/" + file
        for split in ("train", "test", "val")
        for folder, _, files in os.walk(source / split, followlinks=True)
        for file in files
    ]


def _unequal(source: Path, name: str, got: Sequence[int], first: Sequence[int]) -> UserError:
    return UserError(
        f"{name} in {source} is {got[1]} x {got[2]} pixels, others are {first[1]} x {first[2]}; "
        "set dataset.size=PIXELS to resize them"
    )


def _some(words: set[str]) -> str:
    shown = ", ".join(sorted(words)[:5]) or "none"
    return shown + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def _pixels(split: Split) -> str:
    return f"{split.images.shape[2]} x {split.images.shape[3]}"
