"""Folders and zips of class folders: what is found, what is refused, and by which words."""

import os
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images, zip_folder
from PIL import Image

from qbench.data import Split, folders, images, load
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
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (flat / folder).mkdir(parents=True)
        Image.new("RGB", (20, 10), (10, 200, 30)).save(flat / folder / "0.png")
    assert load_folder(flat, size=5)[0].images[0, :, 2, 2].tolist() == [10, 200, 30]


def test_parallel_decoding_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set", train=5)
    found = folders.find_images(zip_folder(root, tmp_path / "set.zip"))
    alone = images.read_images(found)
    monkeypatch.setattr(images, "PARALLEL_FROM", 3)
    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    together = images.read_images(found)
    assert torch.equal(alone[0].images, together[0].images)
    (root / "train" / "dog" / "4.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"train/dog/4.png in .*set is not an image"):
        images.read_images(folders.find_images(root))
    Image.new("RGB", (9, 9)).save(root / "train" / "dog" / "4.png")
    with pytest.raises(UserError, match=r"train/dog/4.png"):
        images.read_images(folders.find_images(root))


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
    with pytest.raises(
        UserError,
        match=r"holds no train/<class>/<image>; expected .* images ending in .jpg,",
    ):
        load_folder(root)


@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_not_an_image_or_damaged_is_named(tmp_path: Path, zipped: bool) -> None:
    def attempt() -> None:
        load_folder(zip_folder(root, tmp_path / "set.zip") if zipped else root)

    root = write_images(tmp_path / "set", size=(40, 40))
    where = f"in {tmp_path / 'set.zip' if zipped else root}"
    notes = root / "train" / "cat" / "notes.png"
    notes.write_text("hello")
    with pytest.raises(UserError, match=f"train/cat/notes.png {where} is not an image"):
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
        for name in ("train/a/0.png", "train/b/0.png", "test/b/0.png", "test/a/0.png"):
            file.writestr(name, b"x" * 100)
        at = file.getinfo("test/a/0.png").header_offset
    archive.write_bytes(archive.read_bytes()[: at + 60] + b"y" + archive.read_bytes()[at + 61 :])
    found = folders.find_images(archive)
    with pytest.raises(UserError, match=r"test/a/0.png in .*set.zip is damaged \(Bad CRC-32"):
        images.decode(found.source, found.names["test"], None, 3)


def test_one_grey_image_that_sorts_first_does_not_take_the_colours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_images(tmp_path / "set")
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(root / "train" / "cat" / "0.png")
    train, test = load_folder(root)
    assert train.images.shape == (8, 3, 8, 8)
    assert test.images.shape == (4, 3, 8, 8)
    assert sum(bool((image == 77).all()) for image in train.images) == 1
    assert "1 of the 12 images" in caplog.text
    caplog.clear()
    assert load_folder(root, channels=1)[0].images.shape == (8, 1, 8, 8)
    assert not caplog.records


def test_other_files_are_left_aside_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "set")
    whole = load_folder(root)
    for name in ("train/cat/Thumbs.db", "test/dog/notes.txt", "train/loose.png"):
        (root / name).write_text("junk")
    os.mkfifo(root / "train" / "dog" / "pipe.png")
    assert torch.equal(load_folder(root)[0].images, whole[0].images)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "left aside, as no images in class folders: test/dog/notes.txt, train/cat/Thumbs.db, train/dog/pipe.png, "
        "train/loose.png"
    )


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    whole = load_folder(root)
    (tmp_path / "more").mkdir()
    (root / "train" / "cat" / "3.png").rename(tmp_path / "more" / "3.png")
    for at, to in (("cat/up", ".."), ("cat/here", "."), ("dog/root", root), ("cat/a", tmp_path / "more")):
        (root / "train" / at).symlink_to(to)
    (tmp_path / "more" / "back").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "again").symlink_to(tmp_path / "more")
    assert torch.equal(load_folder(root)[0].images, whole[0].images)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    for to, why in (("nowhere", "No such file"), ("9.png", "Too many levels of symbolic links")):
        (root / "train" / "cat" / "9.png").symlink_to(to)
        with pytest.raises(UserError, match=rf"cannot read .*train/cat/9.png: {why}"):
            load_folder(root)
        (root / "train" / "cat" / "9.png").unlink()


def unmarked(raw: bytes) -> bytes:
    """A zip whose names stay UTF-8, without the flag that says so."""
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        first, *parts = raw.split(mark)
        raw = mark.join([first, *(part[: at - 4] + b"\0\0" + part[at - 2 :] for part in parts)])
    return raw


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: "My data\\set\\" + name.replace("/", "\\"),
        lambda name: f"a/b/c/{name}",
        lambda name: unicodedata.normalize("NFD", name),
        str,
    ],
    ids=["backslashes", "folders around", "decomposed", "unmarked"],
)
def test_zips_of_windows_and_of_a_mac(
    tmp_path: Path, spell: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    root = write_images(tmp_path / "set", classes=("zebra", "\u00e9l\u00e9phant"))
    archive = write_zip(root, tmp_path / "set.zip", spell)
    if "unmarked" in request.node.name:
        archive.write_bytes(unmarked(archive.read_bytes()))
        assert "\u00e9" not in "".join(zipfile.ZipFile(archive).namelist())
    for got, want in zip(load_folder(archive), load_folder(root), strict=True):
        assert torch.equal(got.images, want.images)
        assert torch.equal(got.labels, want.labels)


def write_zip(root: Path, archive: Path, spell: Callable[[str], str]) -> Path:
    """The images of `root`, each by the name that `spell` makes of its own."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*.png")):
            entry = zipfile.ZipInfo("x")
            entry.filename = spell(path.relative_to(root).as_posix())
            file.writestr(entry, path.read_bytes())
    return archive


def test_two_sets_in_one_zip_are_not_mixed(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set")
    archive = write_zip(root, tmp_path / "set.zip", lambda name: ("a/" if "cat" in name else "b/") + name)
    with pytest.raises(UserError, match=r"set.zip holds several data sets, in a, b; set dataset.root to one"):
        load_folder(archive)


def test_one_class_is_no_task(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", classes=("images",))
    with pytest.raises(UserError, match=r"holds one class, images; expected a folder for each class"):
        load_folder(root)


def test_bombs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "set", size=(40, 40))
    image = root / "train" / "cat" / "0.png"
    content = image.read_bytes()
    for pixels in (10_000, 100_000):  # Pillow warns of the first and refuses the second
        header = b"IHDR" + struct.pack(">II", pixels, pixels) + content[24:29]
        image.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
        with pytest.raises(UserError, match=r"train/cat/0.png in .* is damaged \(Image size .* decompression bomb"):
            load_folder(root)
    monkeypatch.setattr(images, "LARGEST", 10_000)
    image.write_bytes(bytes(10_001))
    for source in (root, zip_folder(root, tmp_path / "set.zip")):
        with pytest.raises(UserError, match=r"train/cat/0.png in .* is too large for an image: 10,001 bytes"):
            load_folder(source)


def test_damaged_packing_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", size=(40, 40))
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*.png")):
            file.write(path, path.relative_to(root).as_posix())
        at = file.getinfo("train/dog/1.png").header_offset + 30 + len("train/dog/1.png")
    raw = archive.read_bytes()
    archive.write_bytes(raw[:at] + b"\xff" * 8 + raw[at + 8 :])
    with pytest.raises(UserError, match=r"train/dog/1.png in .*set.zip is damaged \(Error -3 while decompressing"):
        load_folder(archive)


def test_any_flipped_bit_of_a_zip_is_answered_or_harmless(tmp_path: Path) -> None:
    archive = zip_folder(write_images(tmp_path / "set", train=1, test=1), tmp_path / "set.zip")
    whole = images.read_images(folders.find_images(archive))
    raw, random = archive.read_bytes(), np.random.default_rng(0)
    answered = 0
    for at in random.integers(0, len(raw), 300).tolist():
        archive.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << int(random.integers(8)))]) + raw[at + 1 :])
        got = None
        with suppress(UserError):
            got = images.read_images(folders.find_images(archive))
        answered += got is None
        assert got is None or all(torch.equal(a.images, b.images) for a, b in zip(got, whole, strict=True))
    assert answered > 150


@pytest.mark.parametrize("mode", ["LAB", "CMYK", "RGBA", "P", "1", "LA"])
def test_images_of_any_mode_are_read(tmp_path: Path, mode: str) -> None:
    root = write_images(tmp_path / "set")
    path = root / "train" / "cat" / ("9.tiff" if mode in ("LAB", "CMYK") else "9.png")
    Image.new(mode, (8, 8)).save(path)
    assert load_folder(root)[0].images.shape == (9, 3, 8, 8)


def test_lost_processes_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = folders.find_images(write_images(tmp_path / "set"))
    alone = images.read_images(found)
    monkeypatch.setattr(images, "PARALLEL_FROM", 3)
    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    parent, real = os.getpid(), images.read_image
    monkeypatch.setattr(
        images, "read_image", lambda *args: real(*args) if os.getpid() == parent else os.kill(os.getpid(), 9)
    )
    assert torch.equal(images.read_images(found)[0].images, alone[0].images)
    assert "decoding in one process, as several cannot" in caplog.text
