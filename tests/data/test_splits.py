"""Drawing validation images and examples from a split."""

from typing import Any

import pytest
import torch

from qbench.data import Split, Stream
from qbench.data.splits import draw, stratified
from qbench.errors import UserError

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def a_split(labels: torch.Tensor = LABELS) -> Split:
    return Split(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


def ids(split: Any) -> list[int]:
    return split.images.flatten().tolist()


def test_every_prefix_of_the_stratified_order_is_in_proportion() -> None:
    order = stratified(LABELS, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for first in (10, 20, 50, 100):
        counts = torch.bincount(LABELS[order[:first]], minlength=3)
        assert (counts - first * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1
    assert torch.equal(order, stratified(LABELS, seed=0))
    assert not torch.equal(order, stratified(LABELS, seed=1))


@pytest.mark.parametrize("val", [0.2, 20])
def test_validation_images_come_off_the_training_images(val: float) -> None:
    train, test, validation, checksum = draw(a_split(), a_split(), {"val": val})
    assert isinstance(validation, Split)
    assert torch.bincount(validation.labels).tolist() == pytest.approx([12, 6, 2], abs=1)
    assert sorted(ids(train) + ids(validation)) == list(range(100))
    assert ids(test) == list(range(100))
    again = draw(a_split(), a_split(), {"val": val})
    assert ids(again[0]) == ids(train)
    assert again[3] == checksum
    assert draw(a_split(), a_split(), {"val": val, "val_seed": 1})[3] != checksum


def test_examples_limit_train_and_test() -> None:
    train, test, validation, checksum = draw(
        a_split(), a_split(), {"val": 0, "train_examples": 10, "test_examples": 20}
    )
    assert torch.bincount(train.labels).tolist() == pytest.approx([6, 3, 1], abs=1)
    assert len(test) == 20
    assert validation is None
    whole = draw(a_split(), a_split(), {})
    assert checksum != whole[3]
    assert draw(a_split(), a_split(), {"train_examples": 1000, "val_seed": 7})[3] == whole[3]  # the same tensors


def test_the_checksum_is_of_pixels_and_labels() -> None:
    checksum = draw(a_split(), a_split(), {})[3]
    assert draw(a_split(), a_split(LABELS.flip(0)), {})[3] != checksum
    assert draw(Split(a_split().images + 1, LABELS), a_split(), {})[3] != checksum


def test_streams_are_drawn_like_splits() -> None:
    stream = Stream(tuple(f"{i}.jpg" for i in range(100)), LABELS, 8, "digest")
    train, _, validation, _ = draw(stream, stream, {"val": 20})
    split_train, _, split_validation, _ = draw(a_split(), a_split(), {"val": 20})
    assert isinstance(train, Stream)
    assert isinstance(validation, Stream)
    assert [int(path[:-4]) for path in train.paths] == ids(split_train)
    assert torch.equal(validation.labels, split_validation.labels)  # type: ignore[union-attr]


@pytest.mark.parametrize("val", [1, 2, 98, 100, 1000, 0.001, 0.999])
def test_a_validation_set_and_what_it_leaves_hold_an_image_for_each_class(val: Any) -> None:
    with pytest.raises(UserError, match=rf"dataset.val must be .*: 3 to 97 of the 100 train images; got {val}$"):
        draw(a_split(), a_split(), {"val": val})
