"""A checkpoint is what was written, or is refused; reading one runs no code of its own."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qbench.errors import UserError
from qbench.methods.shared.lsq import LSQ
from qbench.training import checkpoint
from qbench.training.optim import load_state

STATE = {"weight": torch.arange(200.0).reshape(2, 100), "bias": torch.ones(2)}


def test_every_flipped_bit_is_found_but_for_those_of_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 3, **STATE})
    whole, torch_alone = path.read_bytes(), torch.load(path, weights_only=True)
    assert torch_alone["step"] == 3, "others read the file as ever"
    mark = whole.rindex(checkpoint.MARK)
    for place in range(0, mark - 2, 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"checkpoint\.pt is not a readable checkpoint"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert torch.equal(checkpoint.load(path)["weight"], STATE["weight"])


@pytest.mark.parametrize("extra", [argparse.Namespace(lr=0.1), np.float64(0.5), np.int64(3), np.arange(3)])
def test_options_and_numbers_beside_the_weights_are_read(tmp_path: Path, extra: Any) -> None:
    torch.save({"state_dict": STATE, "extra": extra}, tmp_path / "net.pt")
    net = nn.Linear(100, 2)
    assert checkpoint.load_weights(net, tmp_path / "net.pt") == []
    assert torch.equal(net.weight, STATE["weight"])


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_an_object_that_could_run_code_is_named_and_not_called_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content, name in ((Evil(), "mkdir"), (nn.Linear(1, 1), "torch.nn.modules.linear.Linear")):
        torch.save({"state_dict": STATE, "net": content}, "net.pt")
        with pytest.raises(UserError, match=name) as refused:
            checkpoint.load(Path("net.pt"))
        assert "delete" not in str(refused.value)
    assert not Path("ran").exists()


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(STATE, path)
    net = nn.Linear(100, 2)
    assert checkpoint.load_weights(net, path) == []
    assert torch.equal(net.weight, STATE["weight"])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"net\.safetensors is not a readable safetensors file"):
        checkpoint.load_weights(net, path)


OUTCOME = {"accuracy_last": 90.0, "accuracy_best": None, "epoch_best": None, "seconds": 1.0}
WHOLE: dict[str, Any] = {
    **{"step": 10, "stage": [0, 10], "model": {}, "hooks": {}, "optimizer": [{"state": {}, "param_groups": [{}]}]},
    **{"randoms": [{"global": {}, "own": torch.zeros(1)}], "outcome": OUTCOME, "running": [[], torch.tensor(1), 2]},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", step) for step in (10**12, -1, True, 2.0, None, "3")),
        ("stage", [0, None]),
        ("optimizer", {}),
        ("randoms", [{"global": {}, "own": 5}]),
        ("outcome", {**OUTCOME, "seconds": None}),
        ("running", "none"),
    ],
)
def test_a_field_that_the_run_cannot_have(field: str, value: Any) -> None:
    with (
        pytest.raises(UserError, match=r"c\.pt does not belong to this run"),
        checkpoint.belonging(Path("c.pt"), {**WHOLE, field: value}, 10),
    ):
        pytest.fail("was taken for the run's own")
    with checkpoint.belonging(Path("c.pt"), WHOLE, 10) as content:
        assert content == WHOLE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["state"][0].update(momentum_buffer=None), "momentum_buffer of a parameter"),
        (lambda s: s["state"][0].update(momentum_buffer="x"), "momentum_buffer of a parameter"),
        (lambda s: s["state"][0].update(momentum_buffer=torch.zeros(7)), "momentum_buffer of a parameter"),
        (lambda s: s["param_groups"][0].update(weight_decay="x"), "weight_decay of a group"),
        (lambda s: s["param_groups"][0].update(nesterov=None), "nesterov of a group"),
    ],
)
def test_the_state_of_an_optimizer_is_checked(change: Any, said: str) -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    load_state(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), saved)
    change(saved)
    with pytest.raises(ValueError, match=said):
        load_state(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), saved)


@pytest.mark.parametrize(
    "state",
    [{"enabled": "x", "signed": True}, {"enabled": True, "signed": {}}, {"enabled": None, "signed": True}, {}, 5],
)
def test_what_a_quantizer_keeps_beside_tensors_is_checked(state: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        LSQ(nn.Linear(3, 2), "weight", bits=4).set_extra_state(state)


def test_a_checkpoint_is_checked_before_anything_is_made_of_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {**WHOLE, "records": torch.zeros(3)})
    with pytest.raises(UserError, match=r"checkpoint\.pt does not belong to this run: records must be"):
        checkpoint.load_unfinished(path)
    checkpoint.save(path, WHOLE)
    assert checkpoint.load_unfinished(path)["step"] == 10
    for cut in (1, 30, 60):  # of the hash
        checkpoint.save(path, WHOLE)
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(UserError, match="its hash differs"):
            checkpoint.load(path)
