"""Folders and zips of class folders: what is found, what is refused, and by which words."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images, zip_folder
from PIL import Image

from qbench.data import Split, folders, load
from qbench.errors import UserError


def load_folder(root: Path, **options: object) -> tuple[Split, Split]:
    data = load({"name": "image_folder", "root": str(root), **options})
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    return data.train, data.test


def test_pixels_labels_and_shape_are_read_off_the_images(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    data = load({"name": "image_folder", "root": root, "augment": "crop_flip"})
    assert isinstance(data.train, Split)
    assert (data.classes, data.channels, data.size) == (2, 3, 8)
    assert data.train.images.shape == (8, 3, 8, 8)
    for label, name in enumerate(("cat", "dog")):
        of_class = {image.numpy().tobytes() for image in data.train.images[data.train.labels == label]}
        files = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in (root / "train" / name).iterdir()]
        assert of_class == {pixels.tobytes() for pixels in files}


@pytest.mark.parametrize("inside", ["", "pets/"])
def test_a_zip_is_the_same_data_set(tmp_path: Path, inside: str) -> None:
    root = write_images(tmp_path / "set")
    (root / "train" / "cat" / ".DS_Store").write_text("junk")
    (root / "__MACOSX" / "train").mkdir(parents=True)
    (root / "__MACOSX" / "train" / "x").write_text("junk")
    (root / "README.txt").write_text("about")
    archive = zip_folder(root, tmp_path / "set.zip", inside)
    from_folder, from_zip = load_folder(root), load_folder(archive)
    assert torch.equal(from_folder[0].images, from_zip[0].images)
    assert torch.equal(from_folder[1].labels, from_zip[1].labels)


def test_val_stands_for_test_and_grey_stays_grey(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "set", channels=1, test_name="val")
    train, test = load_folder(root)
    assert train.images.shape == (8, 1, 8, 8)
    assert len(test) == 4
    assert not caplog.records
    write_images(root, channels=1, test=1)
    assert len(load_folder(root)[1]) == 2
    assert "val is left aside" in caplog.text
    assert load_folder(root, channels=3)[0].images.shape == (8, 3, 8, 8)


def test_size_resizes(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", size=(12, 8))
    assert load_folder(root, size=4)[0].images.shape == (8, 3, 4, 4)
    flat = tmp_path / "flat"
    for split in ("train", "test"):
        (flat / split / "a").mkdir(parents=True)
        Image.new("RGB", (20, 10), (10, 200, 30)).save(flat / split / "a" / "0.png")
    assert load_folder(flat, size=5)[0].images[0, :, 2, 2].tolist() == [10, 200, 30]


def test_parallel_decoding_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set", train=5)
    found = folders.find_images(zip_folder(root, tmp_path / "set.zip"))
    alone = folders.read_images(found)
    monkeypatch.setattr(folders, "PARALLEL_FROM", 3)
    monkeypatch.setattr(folders.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    together = folders.read_images(found)
    assert torch.equal(alone[0].images, together[0].images)
    (root / "train" / "dog" / "4.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"train/dog/4.png in .*set is not an image"):
        folders.read_images(folders.find_images(root))
    Image.new("RGB", (9, 9)).save(root / "train" / "dog" / "4.png")
    with pytest.raises(UserError, match=r"train/dog/4.png"):
        folders.read_images(folders.find_images(root))


def test_unequal_sizes(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    Image.new("RGB", (9, 9)).save(root / "train" / "dog" / "9.png")
    with pytest.raises(UserError, match=r"train/dog/9.png in .* is 9 x 9 pixels, others are 8 x 8; set dataset.size="):
        load_folder(root)
    Image.new("RGB", (9, 5)).save(root / "train" / "dog" / "9.png")
    with pytest.raises(UserError, match=r"train/dog/9.png in .* is 9 x 5; set dataset.size=PIXELS"):
        load_folder(root)
    assert len(load_folder(root, size=8)[0]) == 9
    root = write_images(tmp_path / "other")
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", (6, 6)).save(path)
    with pytest.raises(UserError, match="differ in size: train 8 x 8, test 6 x 6"):
        load_folder(root)


def test_class_folders_must_agree(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    write_images(root, classes=("emu",), test=0)
    with pytest.raises(UserError, match="missing in test: emu; missing in train: none"):
        load_folder(root)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; set dataset.root"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot read .*nowhere.zip: No such file"):
        load_folder(tmp_path / "nowhere.zip")
    root = write_images(tmp_path / "set", train=0)
    with pytest.raises(UserError, match=r"holds no train/<class>/<image>; expected train/<class>/\* and test"):
        load_folder(root)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_not_an_image_or_damaged_is_named(tmp_path: Path, zipped: bool) -> None:
    def attempt() -> None:
        load_folder(zip_folder(root, tmp_path / "set.zip") if zipped else root)

    root = write_images(tmp_path / "set", size=(40, 40))
    where = f"in {tmp_path / 'set.zip' if zipped else root}"
    notes = root / "train" / "cat" / "notes.txt"
    notes.write_text("hello")
    with pytest.raises(UserError, match=f"train/cat/notes.txt {where} is not an image"):
        attempt()
    notes.unlink()
    image = root / "test" / "dog" / "1.png"
    image.write_bytes(image.read_bytes()[:2000])
    with pytest.raises(UserError, match=f"test/dog/1.png {where} is damaged"):
        attempt()
    Image.fromarray(np.zeros((40, 40), dtype=np.uint16)).save(image)
    with pytest.raises(UserError, match=f"test/dog/1.png {where} has more than 8 bits"):
        attempt()


def test_damaged_zips_are_named(tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    archive.write_text("this is no zip")
    with pytest.raises(UserError, match=r"set.zip is not a readable zip file \(File is not a zip file\)"):
        load_folder(archive)
    zip_folder(write_images(tmp_path / "set", size=(40, 40)), archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"set.zip is not a readable zip file"):
        load_folder(archive)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/a/0.png", b"x" * 100)
        file.writestr("test/a/0.png", b"x" * 100)
        at = file.getinfo("test/a/0.png").header_offset
    archive.write_bytes(archive.read_bytes()[: at + 60] + b"y" + archive.read_bytes()[at + 61 :])
    found = folders.find_images(archive)
    with pytest.raises(UserError, match=r"test/a/0.png in .*set.zip is damaged \(Bad CRC-32"):
        folders.decode(found.source, found.names["test"], None, 3)
