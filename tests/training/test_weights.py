"""Which tensor of a checkpoint goes where."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.training.weights import fit, tensors_of

FILE = Path("net.pt")


class Two(nn.Module):
    """Two convolutions of one shape with batch-norm, and a classifier: tensors that could change places."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


OWN = Two().state_dict()


def other(classes: int = 10) -> dict[str, Tensor]:
    """Another net's weights, each tensor different from all others."""
    return {k: torch.full_like(v, i) for i, (k, v) in enumerate(Two(classes).state_dict().items())}


def lands(given: dict[str, Any], **options: Any) -> dict[str, float]:
    return {k: float(v.flatten()[0]) for k, v in fit(OWN, given, FILE, **options)[0].items()}


RIGHT = lands(other())
COUNTED = {k: v for k, v in RIGHT.items() if not k.endswith("tracked")}


def test_names_decide_whatever_the_order() -> None:
    assert {k: i for i, k in enumerate(OWN)} == RIGHT
    backwards = dict(reversed(other().items()))
    assert lands(backwards) == RIGHT
    assert fit(OWN, backwards, FILE)[1] == []


def test_a_file_without_counters_goes_by_name_too() -> None:
    short = {k: v for k, v in reversed(other().items()) if not k.endswith("tracked")}
    assert lands(short) == COUNTED


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model.module._orig_mod."])
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", None])
def test_prefixes_and_wrappers_come_off(prefix: str, wrapper: str | None) -> None:
    given: dict[str, Any] = {prefix + k: v for k, v in reversed(other().items())}
    content = {"epoch": 3, wrapper: given} if wrapper else given
    assert lands(tensors_of(content, FILE)) == RIGHT


def test_a_name_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"'fc\.bias' twice"):
        fit(OWN, {**other(), "module.fc.bias": torch.zeros(10)}, FILE)


def test_other_names_go_by_the_order_of_modules_and_by_last_names_within() -> None:
    renamed = {"first": "conv1", "norm_a": "bn1", "second": "conv2", "norm_b": "bn2", "head": "fc"}
    given = {}
    for new, old in renamed.items():
        inside = {k: v for k, v in other().items() if k.startswith(old + ".") and not k.endswith("tracked")}
        given |= {k.replace(old, new, 1): v for k, v in reversed(inside.items())}  # bias before weight
    assert lands(given) == COUNTED
    assert "norm_a.bias -> bn1.bias" in fit(OWN, given, FILE)[1]
    with pytest.raises(UserError, match="another architecture"):  # a sorted file's order says nothing
        fit(OWN, given, FILE, ordered=False)


def test_names_that_are_shifted_by_one_are_not_crossed() -> None:
    given = {k.replace("2", "3").replace("1", "2"): v for k, v in other().items()}  # conv2, bn2, conv3, bn3, fc
    with pytest.raises(UserError, match=r"lacks conv1\.weight.*has no conv3\.weight"):
        fit(OWN, given, FILE)


def test_missing_and_spare_tensors_are_named() -> None:
    given = {k: v for k, v in other().items() if k != "bn2.bias"}
    with pytest.raises(UserError, match=r"holds 11 tensors, the model has 12; it lacks bn2\.bias") as refused:
        fit(OWN, given, FILE)
    assert "has no" not in str(refused.value)
    with pytest.raises(UserError, match=r"the model has no extra\.weight"):
        fit(OWN, {**other(), "extra.weight": torch.zeros(1)}, FILE)


def test_another_head_is_left_out_on_request_only() -> None:
    with pytest.raises(UserError, match=r"fc\.weight has shape \[100, 4\].*\[10, 4\]; init_head=new"):
        fit(OWN, other(100), FILE)
    assert lands(other(100), new_head=True) == {k: v for k, v in RIGHT.items() if not k.startswith("fc.")}
    renamed = {k.replace("fc.", "classifier."): v for k, v in other(100).items()}
    assert lands(renamed, new_head=True) == lands(other(100), new_head=True)


def test_quantizers_are_left_behind_and_said_so() -> None:
    extra = {"conv1.weight_quantizer._extra_state": {"enabled": True}, "conv1.weight_quantizer.step": torch.ones(4)}
    found, said = fit(OWN, {**other(), **extra}, FILE)
    assert found.keys() == OWN.keys()
    assert said == ["1 tensors of quantizers are left behind, they start anew"]
    with pytest.raises(UserError, match=r"it lacks conv1\.weight"):
        fit(OWN, {**{k: v for k, v in other().items() if k != "conv1.weight"}, **extra}, FILE)


@pytest.mark.parametrize("content", [[1], {}, 5, {"state_dict": {"a": 1}}, {"epoch": 3}])
def test_what_is_no_state_dict_is_refused(content: Any) -> None:
    with pytest.raises(UserError, match=r"net\.pt holds no state_dict"):
        tensors_of(content, FILE)
