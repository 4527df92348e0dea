"""Every option of a data set at and beyond its bounds; roots that are odd."""

import os
from pathlib import Path
from typing import Any

import pytest

from qbench.data import load, options
from qbench.errors import UserError

NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "root": [None, 5, "", " ", ["a"], True, "a\0b", "\ud800"],
    "channels": [0, -1, 1.0, "3", True, 65],
    "classes": [0, 2.5, "ten", False, [10]],
    "size": [0, -16, "big", 4097, NAN],
    "mean": [5, "abc", [], ["a"], [[0.5]], [NAN], [-0.1], [123.7], [None], {"a": 1}, True],
    "std": [0.5, [0.0], [INF], [INF, 1, 1], [NAN], [-0.2], [58.4], [True], "abc"],
    "preprocess": [5, ["standard"], True],
    "augment": [5, ["crop"], {}],
    "val": [-1, 1.5, 1.0, -0.1, True, "half", None, NAN, INF, [5]],
    "val_seed": [-1, None, 0.5, "one", NAN],
    "train_examples": [0, -3, 0.5, True, "all", NAN],
    "test_examples": [0, -3, 0.5, True, "all", NAN],
    "train_size": [0, 1.5, "many", None, 10**12],
    "test_size": [0, 1.5, "many", None],
    "seed": [-1, "abc", None, 1.5],
    "noise": [NAN, INF, -1, "loud", None, [1.0]],
    "extra": [1, "true", None],
    "workers": [-1, 257, "two", 1.5, True],
}
OWNER = {key: name for name, own in options.OWN.items() for key in own}


def test_each_option_has_wrong_values_here() -> None:
    assert set(WRONG) == {*options.OPTIONS, *OWNER}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_answered_with_what_is_allowed(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        load({"name": OWNER.get(key, "digits"), key: value})
    assert str(caught.value).startswith(f"dataset.{key} must be ")
    assert str(caught.value).endswith(f", got {value!r}")


def test_an_option_that_the_data_set_does_not_read_is_refused() -> None:
    with pytest.raises(UserError, match="unknown option of dataset=digits 'noise'"):
        load({"name": "digits", "noise": 1.0})
    with pytest.raises(UserError, match="Did you mean 'train_examples'"):
        load({"name": "digits", "train_example": 100})


def test_a_set_beyond_memory_is_answered() -> None:
    sizes = {"train_size": 10**9, "test_size": 10, "classes": 10, "channels": 3, "size": 4096}
    with pytest.raises(UserError, match="the images of dataset=synthetic do not fit into memory"):
        load({"name": "synthetic", **sizes})


@pytest.mark.parametrize("name", ["image_folder", "image_stream", "imagenet", "mnist", "cifar10", "svhn"])
def test_roots_that_are_odd(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no zip")
    (tmp_path / "empty.zip").touch()
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "loop").symlink_to("loop")
    for root in (
        *tmp_path.iterdir(),
        tmp_path,
        tmp_path / "file" / "below",
        "~nobody-of-that-name/data",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "x" * 300,
        "a/" * 2500,
        "na\nme",
    ):
        with pytest.raises(UserError):
            load({"name": name, "root": str(root)})
