"""Images that are read while the model trains."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torch import Tensor

from qbench.data import DataSet, Stream, StreamBatches, batches, load, sources, stream
from qbench.errors import UserError

CONFIG = {"name": "image_stream", "mean": [0.5] * 3, "std": [0.25] * 3, "augment": "resized_crop_flip", "size": 16}


@pytest.fixture
def tiny(tmp_path: Path) -> DataSet:
    write_images(tmp_path, train=6, test=2, size=(24, 20), test_name="val")
    return load(CONFIG | {"root": str(tmp_path), "classes": 2})


def make(data: DataSet, **options: Any) -> StreamBatches:
    defaults = {"batch_size": 4, "mean": data.mean, "std": data.std, "augment": data.augment, "workers": 0}
    made = batches(data.train, **(defaults | options))
    assert isinstance(made, StreamBatches)
    return made


def same(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(got, want, strict=True)
    )


def test_the_set_is_found(tiny: DataSet) -> None:
    assert isinstance(tiny.train, Stream)
    assert (len(tiny.train), len(tiny.test), tiny.classes, tiny.channels, tiny.size) == (12, 4, 2, 3, 16)
    assert tiny.train.labels.tolist() == [0] * 6 + [1] * 6
    x, y = next(make(tiny).epoch(0))
    assert x.shape == (4, 3, 16, 16)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64


def test_evaluation_resizes_and_takes_the_centre(tiny: DataSet) -> None:
    got = list(make(tiny, augment="none", shuffle=False, drop_last=False, batch_size=5).epoch(0))
    assert [len(y) for _, y in got] == [5, 5, 2]
    assert isinstance(tiny.train, Stream)
    image = Image.open(tiny.train.paths[0]).resize((21, 18), Image.Resampling.BILINEAR)  # 20 -> 16 * 256 / 224 = 18
    pixels = np.asarray(image.crop((2, 1, 18, 17)), dtype=np.float32).transpose(2, 0, 1)
    torch.testing.assert_close(got[0][0][0].contiguous(), torch.from_numpy((pixels / 255 - 0.5) / 0.25))


def test_epochs_repeat_and_resume_bit_for_bit_whatever_the_workers(tiny: DataSet) -> None:
    whole = list(make(tiny).epoch(1))
    assert len(whole) == len(make(tiny)) == 3
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(list(make(tiny).epoch(1)), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(list(make(tiny).epoch(1, 2)), whole[2:])
    assert same(list(make(tiny, workers=2).epoch(1)), whole)
    assert not same(list(make(tiny).epoch(2)), whole)
    assert not same(list(make(tiny, seed=1).epoch(1)), whole)


def test_ranks_take_slices(tiny: DataSet) -> None:
    whole = list(make(tiny).epoch(0))
    parts = zip(*[list(make(tiny, rank=rank, world=2).epoch(0)) for rank in range(2)], strict=True)
    joined = [(torch.cat([x for x, _ in part]), torch.cat([y for _, y in part])) for part in parts]
    assert same(joined, whole)


def test_the_checksum_follows_names_and_sizes(tiny: DataSet, tmp_path: Path) -> None:
    config = CONFIG | {"root": str(tmp_path)}
    assert load(config).checksum == tiny.checksum
    assert load(config | {"size": 8}).checksum != tiny.checksum
    (tmp_path / "train" / "cat" / "0.png").unlink()
    assert load(config).checksum != tiny.checksum


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tiny: DataSet, workers: int) -> None:
    assert isinstance(tiny.train, Stream)
    Path(tiny.train.paths[3]).write_text("no image")
    with pytest.raises(UserError, match=r"^3.png in \S*train/cat is not an image; remove it or put"):
        list(make(tiny, workers=workers).epoch(0))


def test_what_does_not_fit_is_refused(tiny: DataSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imagenet is missing: looked for .*nowhere/imagenet/train"):
        load(CONFIG | {"name": "imagenet", "root": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="must be one of none, resized_crop_flip, or null, got 'crop_flip'"):
        load(CONFIG | {"root": str(tmp_path), "augment": "crop_flip"})
    with pytest.raises(ValueError, match="augment must be one of none, resized_crop_flip, got 'crop'"):
        make(tiny, augment="crop")


def test_what_goes_by_the_name_of_imagenet_is_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "imagenet", train=6, test=2, size=(24, 20), test_name="val")
    config = CONFIG | {"name": "imagenet", "root": str(tmp_path), "classes": 1000}
    said = (
        r"is not imagenet: 12 train and 4 test images of 2 classes, not 1,281,167 train and 50,000 test images of 1,000"
    )
    with pytest.raises(UserError, match=said):
        load(config)
    monkeypatch.setitem(sources.PUBLISHED, "imagenet", (12, 4, 2))
    assert load(config).checksum == load(CONFIG | {"root": str(tmp_path / "imagenet")}).checksum


def test_strange_files_are_left_aside_before_the_training(tiny: DataSet, tmp_path: Path) -> None:
    (tmp_path / "train" / "cat" / "Thumbs.db").write_text("junk")
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    assert load(CONFIG | {"root": str(tmp_path)}).checksum == tiny.checksum


def test_images_of_more_bits_are_refused_and_not_cut_to_white(tiny: DataSet) -> None:
    assert isinstance(tiny.train, Stream)
    Image.fromarray(np.full((20, 20), 3000, np.uint16)).save(tiny.train.paths[0])
    with pytest.raises(UserError, match=r"0.png in .* has more than 8 bits per channel"):
        list(make(tiny).epoch(0))


def test_the_number_of_loaders_is_an_option(tiny: DataSet, tmp_path: Path) -> None:
    config = CONFIG | {"root": str(tmp_path), "workers": 3}
    data = load(config | {"val": 4})
    assert data.val is not None
    for split in (data.train, data.val, data.test):
        made = batches(split, batch_size=2, mean=data.mean, std=data.std)
        assert isinstance(made, StreamBatches)
        assert made.workers == 3
    assert load(config).checksum == tiny.checksum
    with pytest.raises(UserError, match=r"dataset.workers must be null or a whole number from 0 to 256, got -1"):
        load(config | {"workers": -1})


def test_a_lost_loader_is_told_with_the_way_out(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "read_image", lambda *_: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(UserError, match=r"one of 1 processes that decode images was lost .* dataset.workers=0 none"):
        list(make(tiny, workers=1).epoch(0))


def test_a_zip_is_not_streamed(tmp_path: Path) -> None:
    (tmp_path / "set.zip").touch()
    with pytest.raises(UserError, match=r"streamed from a folder: unpack .*set.zip"):
        load(CONFIG | {"root": str(tmp_path / "set.zip")})
