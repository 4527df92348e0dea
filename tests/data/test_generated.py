"""Data sets that need no file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qbench.data import Split, load
from qbench.errors import UserError

SYNTHETIC = {"name": "synthetic", "channels": 3, "classes": 4, "size": 8, "mean": [0.5] * 3, "std": [0.3] * 3} | {
    "train_size": 64,
    "test_size": 32,
    "seed": 0,
    "noise": 1.0,
}


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = load({"name": "digits", "mean": [0.3], "std": [0.3], "size": 16, "channels": 1, "classes": 10})
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    assert (len(data.train), len(data.test)) == (898, 899)
    assert data.train.images.shape[1:] == (1, 16, 16)
    assert torch.bincount(data.test.labels).tolist() == [88, 91, 86, 91, 92, 91, 91, 89, 88, 92]
    assert torch.equal(torch.cat([data.train.labels, data.test.labels]), torch.from_numpy(load_digits().target).long())
    originals = load_digits().images.reshape(-1, 64).mean(1) * 255 / 16
    means = torch.cat([data.train.images, data.test.images]).float().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.from_numpy(originals).float(), rtol=0, atol=2)
    assert data.train.images.max() == 255
    assert data.checksum == load({"name": "digits", "mean": [0.3], "std": [0.3]}).checksum


def test_synthetic_is_a_function_of_its_seed() -> None:
    data, again = load(SYNTHETIC), load(SYNTHETIC)
    assert isinstance(data.train, Split)
    assert data.train.images.shape == (64, 3, 8, 8)
    assert torch.bincount(data.train.labels).tolist() == [16] * 4
    assert torch.equal(data.train.images, again.train.images)  # type: ignore[union-attr]
    assert data.checksum == again.checksum
    assert load(SYNTHETIC | {"seed": 1}).checksum != data.checksum
    assert (data.classes, data.channels, data.size, data.augment) == (4, 3, 8, "none")


def test_synthetic_can_be_learnt() -> None:
    data = load(SYNTHETIC)
    assert isinstance(data.train, Split)
    assert isinstance(data.test, Split)
    x, y = data.train.images.float().flatten(1), data.train.labels
    means = torch.stack([x[y == label].mean(0) for label in range(4)])
    nearest = torch.cdist(data.test.images.float().flatten(1), means).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.9


@pytest.mark.parametrize("key", ["train_size", "test_size", "classes", "size"])
@pytest.mark.parametrize("value", [0, 1.5, "many"])
def test_synthetic_numbers_are_checked(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"dataset.{key} must be a positive whole number"):
        load(SYNTHETIC | {key: value})


def test_what_the_configuration_says_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown data set 'cifar'. Did you mean 'cifar10'"):
        load({"name": "cifar"})
    with pytest.raises(UserError, match=r"dataset.name is missing"):
        load({})
    with pytest.raises(UserError, match=r"asked \(1, 28, 28\)"):
        load({"name": "digits", "size": 28})
    with pytest.raises(UserError, match=r"dataset.classes=5, but digits .* holds 10 classes"):
        load({"name": "digits", "classes": 5})
    with pytest.raises(UserError, match="need 1 values each"):
        load({"name": "digits", "mean": [0.1, 0.2], "std": [1, 1]})
    with pytest.raises(UserError, match="augment must be one of none, crop, crop_flip, or null, got 'mixup'"):
        load({"name": "digits", "augment": "mixup"})


def test_mean_and_std_are_measured_where_they_are_null() -> None:
    data = load({"name": "digits", "mean": None, "std": None})
    assert isinstance(data.train, Split)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx([pixels.mean().item()], rel=1e-5)
    assert data.std == pytest.approx([pixels.std().item()], rel=1e-5)
