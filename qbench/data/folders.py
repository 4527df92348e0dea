"""Data sets as people keep them: train/<class>/<image> and test/<class>/<image>, in a folder or a zip."""

import logging
import os
import unicodedata
import zipfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from qbench.errors import UserError

log = logging.getLogger(__name__)
SPLITS = ("train", "test", "val")
# What torchvision's ImageFolder takes, and GIF; another file in a class folder is not one of its images.
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder or zip by split ("train", "test"): their names in `source`, and int64 labels.

    A label is the rank of the class folder's name in alphabetical order.
    """

    source: Path
    names: dict[str, list[str]]
    labels: dict[str, torch.Tensor]


def find_images(source: Path) -> ImageFiles:
    """Lists a folder or zip with train/<class>/* and test/<class>/* (or val/<class>/*); a zip may have folders around.

    Files that are no images, by their endings, and what is no file at all are left aside, and said; hidden ones unsaid.

    Errors: UserError when `source` is neither, when a split is missing, when train and test differ in classes, or when
    there is one class alone.
    """
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}  # split -> name -> class
    aside, around = [], set()
    for name, own in sorted(_in_zip(source) if source.is_file() else _in_folder(source)):
        parts = name.split("/")
        at = next((place for place, part in enumerate(parts) if part in SPLITS), len(parts))
        if at == len(parts) or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue  # hidden files and the __MACOSX folder of a Finder zip are not the user's images
        if own and len(parts) >= at + 3 and name.lower().endswith(IMAGES):
            around.add("/".join(parts[:at]))
            found[parts[at]][own] = parts[at + 1]
        else:
            aside.append(name)
    if len(around) > 1:
        raise UserError(f"{source} holds several data sets, in {some(around)}; set dataset.root to one of them")
    if aside:
        log.warning("%s: left aside, as no images in class folders: %s", source, some(aside))
    if found["test"] and found["val"]:
        log.warning("%s has test and val images: val is left aside; dataset.val draws from train", source)
    return _labelled(source, {"train": found["train"], "test": found["test"] or found["val"]})


def _labelled(source: Path, chosen: dict[str, dict[str, str]]) -> ImageFiles:
    for split, images in chosen.items():
        if not images:
            raise UserError(
                f"{source} holds no {split}/<class>/<image>; expected train/<class>/* and test/<class>/*, "
                f"images ending in {', '.join(IMAGES)}"
            )
    train, test = (set(images.values()) for images in chosen.values())
    if train != test:
        raise UserError(
            f"the classes of {source} differ between train and test: missing in test: {some(train - test)}; "
            f"missing in train: {some(test - train)}"
        )
    if len(train) == 1:
        raise UserError(f"{source} holds one class, {some(train)}; expected a folder for each class: train/<class>/*")
    number = {name: label for label, name in enumerate(sorted(train))}
    labels = {split: torch.tensor([number[name] for name in images.values()]) for split, images in chosen.items()}
    return ImageFiles(source, {split: list(images) for split, images in chosen.items()}, labels)


def open_zip(source: Path) -> zipfile.ZipFile:
    """The zip file `source`.

    Errors: UserError where it is none, or damaged.
    """
    try:
        return zipfile.ZipFile(source)
    except Exception as error:  # whatever a damaged directory makes zipfile raise
        raise UserError(
            f"{source} is not a readable zip file ({error}); get it again or set dataset.root=FOLDER"
        ) from error


def _in_zip(source: Path) -> Iterator[tuple[str, str]]:
    """(name as the user knows it, the archive's own) of each file.

    The name has slashes where Windows wrote backslashes; it is UTF-8 where the bytes are, since many programs write
    that without the flag that says so; and it is composed (NFC), as a Mac takes letters and accents apart.
    """
    with open_zip(source) as archive:
        for entry in archive.infolist():
            name = entry.filename
            if not entry.flag_bits & 0x800:
                with suppress(UnicodeError):
                    name = name.encode("cp437").decode()
            name = unicodedata.normalize("NFC", name.replace("\\", "/"))
            if not name.endswith("/"):
                yield name, entry.filename


def _in_folder(source: Path) -> Iterator[tuple[str, str]]:
    """(name, composed as in `_in_zip`; the same as the folder has it, or "" for what is no file) below the splits."""
    if not source.is_dir():
        raise UserError(f"{source} does not exist; set dataset.root to a folder or zip with train/<class>/* in it")
    for split in SPLITS:
        if (source / split).is_dir():
            above = {_mark(source), _mark(source / split)}
            for entry in _entries(source / split):
                top = f"{split}/{entry.name}"
                for name, own in _below(source, top, above) if entry.is_dir() else [(top, "")]:
                    yield unicodedata.normalize("NFC", name), own


def _below(source: Path, top: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """The files below the folder `top`; each real folder once and none of `above`, where a link may lead back to."""
    seen, waiting = set(above), [top]
    while waiting:
        folder = waiting.pop()
        if (mark := _mark(source / folder)) in seen:
            yield folder, ""
            continue
        seen.add(mark)
        for entry in _entries(source / folder):
            name = f"{folder}/{entry.name}"
            if entry.is_dir():
                waiting.append(name)
            else:  # a broken link is kept, for whoever reads it to name; a pipe would be read for ever
                yield name, name if entry.is_file() or not os.path.exists(entry.path) else ""


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _mark(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def some(words: Collection[str]) -> str:
    """The first five words, and how many more there are."""
    shown = ", ".join(sorted(words)[:5]) or "none"
    return shown + (f" and {len(words) - 5} more" if len(words) > 5 else "")
