"""Images decoded: one by one, or all of a folder or zip into memory."""

import io
import logging
import multiprocessing
import os
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from qbench.data.folders import ImageFiles, open_zip
from qbench.data.splits import Split
from qbench.errors import UserError

log = logging.getLogger(__name__)
# Below this many images one process is done before two have started.
PARALLEL_FROM = 4000
LARGEST = 1 << 28  # bytes of one file: Pillow's limit of some 90 million pixels, as a bitmap


def read_images(found: ImageFiles, size: int | None = None, channels: int | None = None) -> tuple[Split, Split]:
    """Decodes all images into (train, test); `size` fits each into size x size, else all must be equal squares.

    `channels` is 1 (grey) or 3 (colour); None means 1 if all images are grey.

    Errors: UserError naming the file that is not an image, is damaged, or has another size than the first.
    """
    decoded = {split: decode_all(found.source, names, size, channels) for split, names in found.names.items()}
    train, test = (pixels for pixels, _ in decoded.values())
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"the images of {found.source} differ in size: train {_pixels(train)}, test {_pixels(test)}; "
            "set dataset.size=PIXELS to resize them"
        )
    if channels is None:
        grey, total = sum(grey for _, grey in decoded.values()), len(train) + len(test)
        if grey == total:
            train, test = train[:, :1], test[:, :1]
        elif grey:
            message = (
                "%d of the %d images of %s are grey: taken as colour, like the others (dataset.channels=1: all as grey)"
            )
            log.warning(message, grey, total, found.source)
    train, test = np.ascontiguousarray(train), np.ascontiguousarray(test)
    return Split(torch.from_numpy(train), found.labels["train"]), Split(torch.from_numpy(test), found.labels["test"])


def decode_all(source: Path, names: list[str], size: int | None, channels: int | None) -> tuple[np.ndarray, int]:
    """`decode` of all `names`, by one process per core where there are many."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 1 or len(names) < PARALLEL_FROM or multiprocessing.current_process().daemon:
        return decode(source, names, size, channels)
    log.info("decoding %d images of %s, once", len(names), source)
    # One part per worker: each opens the zip once. Processes, since Pillow's WebP decoder holds the interpreter's lock.
    parts = [names[len(names) * i // workers : len(names) * (i + 1) // workers] for i in range(workers)]
    try:
        with warnings.catch_warnings(), ProcessPoolExecutor(workers) as pool:
            # Python warns of a fork beside threads; the children run Pillow and NumPy only, never PyTorch's threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            decoded = list(pool.map(decode, [source] * workers, parts, [size] * workers, [channels] * workers))
    except (BrokenProcessPool, OSError, ImportError) as error:  # killed, for memory say; or no semaphores to be had
        log.warning("decoding in one process, as several cannot (%s)", error)
        return decode(source, names, size, channels)
    for part, (images, _) in zip(parts, decoded, strict=True):
        if images.shape[1:] != decoded[0][0].shape[1:]:
            raise _unequal(source, part[0], images.shape[1:], decoded[0][0].shape[1:])
    return np.concatenate([images for images, _ in decoded]), sum(grey for _, grey in decoded)


def decode(source: Path, names: Sequence[str], size: int | None, channels: int | None) -> tuple[np.ndarray, int]:
    """The images `names` of a folder or zip as uint8 [N, C, H, W], and how many of them are grey; C = 3 for None."""
    archive = None if source.is_dir() else open_zip(source)
    images, grey = np.empty((0, 0, 0, 0), np.uint8), 0
    for k, name in enumerate(names):
        image = read_image(source, name, archive)
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        elif image.width != image.height:
            raise UserError(f"{name} in {source} is {image.width} x {image.height}; set dataset.size=PIXELS to resize")
        grey += image.mode in ("1", "L", "LA")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        if not k:
            images = np.empty((len(names), *pixels.shape), np.uint8)
        elif pixels.shape != images.shape[1:]:
            raise _unequal(source, name, pixels.shape, images.shape[1:])
        images[k] = pixels
    return images, grey


def read_image(source: Path, name: str, archive: zipfile.ZipFile | None = None) -> Image.Image:
    """The image `name` of a folder, or of the `archive` opened from `source`, its pixels loaded.

    Errors: UserError naming the file where it is too large, damaged, no image or of more than 8 bits per channel.
    """
    try:
        length = archive.getinfo(name).file_size if archive else (source / name).stat().st_size
        if length > LARGEST:
            raise UserError(f"{name} in {source} is too large for an image: {length:,} bytes (at most {LARGEST:,})")
        content = archive.read(name) if archive else (source / name).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata: the pixels are all that is taken
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
            image.load()
        if image.mode.startswith(("I", "F")):
            raise UserError(
                f"{name} in {source} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits"
            )
        return image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} in {source} is not an image; remove it or put the right file there") from error
    except Exception as error:  # whatever a damaged file makes Pillow, zipfile and the decompressors raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} in {source} is damaged ({reason}); get the file again") from error


def _unequal(source: Path, name: str, got: Sequence[int], first: Sequence[int]) -> UserError:
    return UserError(
        f"{name} in {source} is {got[1]} x {got[2]} pixels, others are {first[1]} x {first[2]}; "
        "set dataset.size=PIXELS to resize them"
    )


def _pixels(images: np.ndarray) -> str:
    return f"{images.shape[2]} x {images.shape[3]}"
