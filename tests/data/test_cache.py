"""The cache of parsed data sets."""

import os
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_images, zip_folder

from qbench.data import Batches, DataSet, Split, load
from qbench.data.cache import cached, canonical


def splits(seed: int = 0) -> tuple[Split, Split]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8, generator=random)
    return Split(images[:20], torch.arange(20) % 3), Split(images[20:], torch.arange(10) % 3)


def never() -> tuple[Split, Split]:
    raise AssertionError("parsed although it was cached")


def test_parsed_once_per_key() -> None:
    first = cached("set", ["key"], splits)
    again = cached("set", ["key"], never)
    assert torch.equal(first[0].images, again[0].images)
    assert torch.equal(first[1].labels, again[1].labels)
    assert again[0].images.dtype == torch.uint8
    assert again[0].labels.dtype == torch.int64
    with pytest.raises(AssertionError, match="parsed although"):
        cached("set", ["other key"], never)


def test_the_order_is_of_the_content_alone() -> None:
    train, _ = splits()
    shuffled = train.take(torch.randperm(20, generator=torch.Generator().manual_seed(5)))
    assert shuffled.digest != train.digest
    assert canonical(shuffled).digest == canonical(train).digest
    assert canonical(train).digest != canonical(Split(train.images, train.labels.flip(0))).digest


def test_a_mapped_set_is_batched_without_a_copy_and_written_without_harm() -> None:
    cached("set", ["key"], splits)
    train, _ = cached("set", ["key"], never)
    made = Batches(train, batch_size=5, mean=[0.5] * 3, std=[0.25] * 3)
    assert made.images.data_ptr() == train.images.data_ptr()
    train.images.zero_()  # a write stays with the writer
    again, _ = cached("set", ["key"], never)
    assert again.images.any()


@pytest.mark.parametrize("place", [0, 20, 150, 400, -1])
def test_one_changed_byte_is_noticed(cache: Path, caplog: pytest.LogCaptureFixture, place: int) -> None:
    first = cached("set", ["key"], splits)
    (file,) = cache.glob("*.tensors")
    content = bytearray(file.read_bytes())
    content[place] ^= 0x15
    file.write_bytes(content)
    again = cached("set", ["key"], splits)
    assert again[0].digest == first[0].digest
    assert f"{file} is damaged" in caplog.text
    caplog.clear()
    cached("set", ["key"], never)
    assert not caplog.records


@pytest.mark.parametrize("length", [0, 100, 300, 1500])
def test_a_truncated_file_is_noticed(cache: Path, caplog: pytest.LogCaptureFixture, length: int) -> None:
    cached("set", ["key"], splits)
    (file,) = cache.glob("*.tensors")
    os.truncate(file, length)
    cached("set", ["key"], splits)
    assert f"{file} is damaged" in caplog.text


def test_an_unwritable_cache_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert cached("set", ["key"], splits)[0].digest == canonical(splits()[0]).digest
    assert "set QBENCH_CACHE to a writable" in caplog.text


def test_two_at_once_parse_once() -> None:
    parsed, ready = [], threading.Barrier(2)

    def parse() -> tuple[Split, Split]:
        parsed.append(1)
        return splits()

    def work() -> None:
        ready.wait()
        cached("set", ["key"], parse)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(parsed) == 1


def test_a_changed_source_is_parsed_again(tmp_path: Path, cache: Path) -> None:
    def load_set() -> DataSet:
        return load({"name": "image_folder", "root": archive})

    root = write_images(tmp_path / "set")
    archive = zip_folder(root, tmp_path / "set.zip")
    first = load_set()
    assert load_set().checksum == first.checksum
    assert len(list(cache.glob("*.tensors"))) == 1
    write_images(root, seed=1)
    zip_folder(root, archive)
    os.utime(archive, ns=(1, 1))
    assert load_set().checksum != first.checksum
    folder = load({"name": "image_folder", "root": root})
    named_zip = tmp_path / "named.zip"  # a folder of that name is known by its files, not by its own time stamp
    root.rename(named_zip)
    kept = os.stat(named_zip)
    assert load({"name": "image_folder", "root": named_zip}).checksum == folder.checksum
    write_images(named_zip, seed=2)
    os.utime(named_zip, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert load({"name": "image_folder", "root": named_zip}).checksum != folder.checksum
    write_images(named_zip, seed=1)
    named_zip.rename(root)
    (root / "train" / "cat" / "0.png").unlink()
    assert load({"name": "image_folder", "root": root}).checksum != folder.checksum
