"""Tiny data sets on disk, in a cache of their own."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QBENCH_CACHE", str(folder))
    return folder


def write_images(
    folder: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    train: int = 4,
    test: int = 2,
    size: tuple[int, int] = (8, 8),
    channels: int = 3,
    test_name: str = "test",
    seed: int = 0,
) -> Path:
    """Lossless random images as folder/train/<class>/<k>.png and folder/test/<class>/<k>.png."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train), (test_name, test)):
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                shape = (size[1], size[0], 3) if channels == 3 else (size[1], size[0])
                pixels = random.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return folder


def zip_folder(folder: Path, archive: Path, inside: str = "") -> Path:
    """The files of `folder` as a zip, below the folder `inside`."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, inside + path.relative_to(folder).as_posix())
    return archive
