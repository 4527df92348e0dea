"""What a configuration that came with a file may build: nets, and nothing that runs other code."""

import sys
from pathlib import Path
from typing import Any

import pytest

from qbench.cli.overrides import resolve_row
from qbench.config.allowed import check, check_words
from qbench.errors import UserError
from qbench.records import read_config

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def config(target: Any) -> dict[str, Any]:
    return {"model": {"_target_": "qbench.models.tiny.Tiny", "parts": [{"deep": {"_target_": target}}]}}


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "logging.os.system",
        "pathlib.Path.write_text",
        "joblib.load",
        "numpy.load",
        "builtins.open",
        "torch.load",
        "torch.nn.Module.load_state_dict",
        "torch.nn.modules.module.torch.load",
        "torch.nn.os",
        "torch.nn.init.torch.load",
        "torch.optim.Optimizer.load_state_dict",
        "torchvision.models._api.load_state_dict_from_url",
        "torchvision.models.resnet.load_state_dict_from_url",
        "qbench.files.atomic_write",
        "qbench.load",
        "qbench.methods.shared.lsq.torch.load",
        "qbench.methods.shared.lsq.nn",
        "qbench.quant.surgery.quantize",
        "qbench.models.tiny.Tiny.load_state_dict",
        "qbench.nothing.At.all",
        "hydra.utils.get_method",
        "eval",
        "",
        5,
        None,
        ["os", "system"],
        {"_target_": "torch.nn.Identity"},
        "${oc.env:HOME}",
    ],
)
def test_what_could_run_code_is_refused_wherever_it_stands(target: Any) -> None:
    with pytest.raises(UserError, match=r"there/config\.yaml: model\.parts\.0\.deep\._target_"):
        check(config(target), "there/config.yaml")


@pytest.mark.parametrize("place", ["method.check", "train.optimizer", "parent.optimizer", "train.loss"])
def test_dotted_paths_elsewhere_are_refused_too(place: str) -> None:
    group, _, name = place.partition(".")
    with pytest.raises(UserError, match=rf"{place} names 'os\.system'.*allow=os"):
        check({group: {name: "os.system"}}, "there")
    check({group: {name: "sgd"}}, "there")


def test_an_interpolation_could_become_anything() -> None:
    text = "${oc.create:{_target_: torch.load}}"
    with pytest.raises(UserError, match=r"model\.width is '\$\{oc\.create"):
        check({"model": {"width": text}}, "there")


def test_nothing_foreign_is_imported_for_the_answer() -> None:
    assert "antigravity" not in sys.modules
    with pytest.raises(UserError):
        check(config("antigravity.fly"), "there")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "target",
    ["torch.nn.Identity", "torch.optim.NAdam", "torchvision.models.resnet18", "qbench.methods.bnn.ShiftAdaMax"],
)
def test_nets_and_optimizers_may_be_built(target: str) -> None:
    check(config(target), "there")


@pytest.mark.parametrize("words", [("method=bnn",), ("method=flexor",), ("method=ptq",), ("method=fda_bnn",)])
def test_our_own_configurations_may_be_built(words: tuple[str, ...]) -> None:
    check(resolve_row(list(words)), "there")


def test_a_package_that_the_user_names_may_be_built() -> None:
    check(config("mine.nets.Net"), "there", allow=("other", "mine"))
    for name in ("minefield.Net", "nets.mine.Net"):
        with pytest.raises(UserError):
            check(config(name), "there", allow=("other", "mine"))


@pytest.mark.parametrize(
    "word",
    [
        "+model._target_=os.system",
        "model={_target_: torch.load, f: x}",
        "method.rules=[{weight:{'_target_': numpy.load}}]",
        "++method.check=os.system",
        "train.optimizer=joblib.load",
        "hydra.searchpath=[/elsewhere]",
        "+hydra.callbacks.x=1",
        "dataset.root=${oc.env:HOME}",
    ],
)
def test_words_of_a_card_are_held_to_the_same(word: str) -> None:
    with pytest.raises(UserError, match="card"):
        check_words(["method=pact", word], "card")


def test_words_of_a_card_that_may_stand() -> None:
    check_words(["train.optimizer=qbench.methods.bnn.ShiftAdaMax", "train.optimizer=adam", "train.lr=2.5"], "card")


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("config.yaml")), ids=lambda p: p.parent.name)
def test_runs_that_are_committed_may_be_built_wherever_their_classes_lay_then(path: Path) -> None:
    check(read_config(path.parent), str(path))
