"""Every file of conf/dataset: its keys, its values, and the two sets that need no file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from qbench.data import READERS, batches, load, options

FILES = sorted((Path(__file__).parents[2] / "conf" / "dataset").glob("*.yaml"))
KEYS = [
    "description",
    "name",
    "root",
    "channels",
    "classes",
    "size",
    "mean",
    "std",
    "preprocess",
    "augment",
    "val",
    "val_seed",
    "train_examples",
    "test_examples",
]


def read(file: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def test_each_data_set_has_its_file() -> None:
    assert [file.stem for file in FILES] == sorted(READERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_keys_and_values(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QBENCH_DATA", raising=False)
    config = read(file)
    assert list(config)[: len(KEYS)] == KEYS
    assert config["name"] == file.stem
    assert config["root"] == "data"
    assert config["val"] == 0
    options.check(file.stem, config)
    assert set(config) == {"name", "description", *options.OPTIONS, *options.OWN.get(file.stem, {})}
    if config["channels"]:
        assert len(config["mean"]) == len(config["std"]) == config["channels"]
    monkeypatch.setenv("QBENCH_DATA", "/elsewhere")
    assert read(file)["root"] == "/elsewhere"


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_sets_without_files_load_and_are_normalized(name: str) -> None:
    (file,) = (file for file in FILES if file.stem == name)
    data = load(read(file))
    made = batches(data.train, batch_size=len(data.train), mean=data.mean, std=data.std, augment=data.augment)
    ((x, y),) = made.epoch(0)
    assert x.shape[1:] == (data.channels, data.size, data.size)
    assert int(y.max()) == data.classes - 1
    assert x.mean().abs() < 0.1
    assert 0.8 < x.std() < 1.2
    assert torch.isfinite(x).all()
