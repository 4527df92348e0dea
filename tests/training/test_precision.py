"""precision=auto and formats that are too narrow: decided by what is known, never by the machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qbench.cli.overrides import resolve_row
from qbench.models.mobilenet import MobileNetV2
from qbench.models.resnet import ResNetCIFAR
from qbench.training import precision

SMALL = ("model=tiny", "dataset=synthetic", "budget=smoke")


def decided(*words: str, model: Callable[..., nn.Module] = ResNetCIFAR) -> tuple[str, str, list[str]]:
    """(precision of the training, that of the parent, what is said)."""
    config = precision.decided(resolve_row([*SMALL, *words]), lambda: model(channels=3, classes=10, size=16))
    return config["train"]["precision"], config["parent"]["precision"], precision.told(config)


def test_auto_is_fp32_for_depthwise_nets_and_above_8_bits() -> None:
    slow = "precision=auto: fp32 (the net has depthwise convolutions, which are slower in bf16 on a CPU)"
    wide = "precision=auto: fp32 (10 bits are asked for, and bf16 carries 8)"
    auto = "precision=auto"
    assert decided("method=pact", "bits=4", auto) == ("bf16", "bf16", ["precision=auto: bf16"])
    assert decided("method=pact", "bits=8", auto) == ("bf16", "bf16", ["precision=auto: bf16"])
    assert decided("method=pact", "bits=4/32", auto) == ("bf16", "bf16", ["precision=auto: bf16"])
    assert decided("method=float", auto) == ("bf16", "bf16", ["precision=auto: bf16"])
    assert decided("method=pact", "bits=4", auto, model=MobileNetV2) == ("fp32", "fp32", [slow])
    for bits in ("10", "4/10", "10/4", "10/32"):
        train, parent, said = decided("method=pact", f"bits={bits}", auto)
        assert (train, parent) == ("fp32", "bf16")
        assert said == [wide, "float parent: precision=auto: bf16"]


def test_a_format_that_cannot_carry_the_bits_gives_way() -> None:
    said = ["precision=bf16: fp32 (10 bits are asked for, and bf16 carries 8)"]
    assert decided("method=lsq", "bits=10", "precision=bf16") == ("fp32", "bf16", said)
    assert decided("method=lsq", "bits=8", "precision=bf16") == ("bf16", "bf16", [])
    assert decided("method=lsq", "bits=10", "precision=fp32") == ("fp32", "fp32", [])
    # the bits of some layers alone
    assert decided("method=lsq", "bits=4", "options.first_last=10", "precision=bf16") == ("fp32", "bf16", said)
    assert decided("method=lsq", "bits=4", "options.first_last=32", "precision=bf16") == ("bf16", "bf16", [])


def test_each_stage_trains_in_what_was_decided() -> None:
    config = resolve_row([*SMALL, "method=lsq", "bits=10", "precision=bf16"])
    stages = [{"name": name, "recipe": {"precision": p, "lr": 0.1}} for name, p in (("a", "bf16"), ("b", "auto"))]
    config["method"]["stages"] = stages
    found = precision.decided(config, lambda: ResNetCIFAR(channels=3, classes=10, size=16))["method"]["stages"]
    assert found == [{**stage, "recipe": {"precision": "fp32", "lr": 0.1}} for stage in stages]
    assert stages[0]["recipe"]["precision"] == "bf16"  # what was given is as it was


def test_tf32_carries_11_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert decided("method=lsq", "bits=11", "precision=tf32") == ("tf32", "tf32", [])
    said = ["precision=tf32: fp32 (12 bits are asked for, and tf32 carries 11)"]
    assert decided("method=lsq", "bits=12", "precision=tf32") == ("fp32", "tf32", said)


def test_so_many_levels_survive_a_format() -> None:
    for bits, left in ((4, 16), (8, 256), (9, 385), (10, 513)):
        levels = torch.arange(2**bits) / (2**bits - 1)
        assert len(levels.bfloat16().unique()) == left


def test_auto_is_the_run_that_names_what_it_took(tiny: Callable[..., Any], tmp_path: Path) -> None:
    said = tiny("method=float", "precision=auto", "out=o")
    assert said.status == 0, said.err
    assert said.out.count("precision=auto: bf16") == 1
    (path,) = (tmp_path / "o").rglob("result.json")
    result = json.loads(path.read_text())
    assert result["precision"] == "bf16"
    assert result["auto"]["precision"]["train"] == "precision=auto: bf16"
    assert "auto" not in json.dumps(result["identity"])
    assert "done before" in tiny("method=float", "precision=auto", "threads=1", "out=o").out
    assert "done before" in tiny("method=float", "precision=bf16", "out=o").out
    assert len(list((tmp_path / "o").rglob("result.json"))) == 1


def test_a_run_of_more_bits_than_bf16_carries_is_that_in_fp32(tiny: Callable[..., Any], tmp_path: Path) -> None:
    words = ("method=pact", "bits=10", "init=scratch", "out=o")
    said = tiny(*words, "precision=bf16")
    assert said.status == 0, said.err
    assert "precision=bf16: fp32 (10 bits are asked for, and bf16 carries 8)" in said.out
    assert "done before" in tiny(*words, "precision=fp32").out
