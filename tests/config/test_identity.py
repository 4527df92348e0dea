"""What a run is known by: fields that decide, classes by name, options that came later, and old names of classes."""

import shutil
from copy import deepcopy
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from qbench.cli.overrides import resolve_row
from qbench.config import catalog
from qbench.config.identity import UNDECIDING, class_name, digest, folder_name, identity, mark, named
from qbench.config.moved import MOVED, today
from qbench.quant.method import Method

DECIDING = ("name", "rules", "hooks", "param_groups", "stages")
DATA = {"name": "synthetic", "checksum": "0", "augment": "none", "mean": [0.5], "std": [0.5]}
# Of the configuration: what is in the identity under its own or another name, and what decides no number.
COUNTED = ("w_bits", "a_bits", "seed", "init", "init_head", "method", "options", "model", "dataset", "train", "distill",
           "workers", "compile", "kernels", "precision", "protocol", "parent", "bits",
           "layer_bits")  # fmt: skip
NOT_COUNTED = ("name", "device", "threads", "channels_last", "graph", "out", "checkpoint_seconds", "time_limit",
               "tensorboard", "figures", "force", "plan", "debug", "budget")  # fmt: skip


def key(config: dict[str, Any]) -> str:
    return digest(identity(config, DATA, "scratch"))


def row(*words: str) -> dict[str, Any]:
    return resolve_row(["dataset=synthetic", "model=tiny", *words])


def test_each_field_of_a_method_counts_or_is_named_as_one_that_does_not() -> None:
    assert {f.name for f in fields(Method)} == {*DECIDING, *UNDECIDING}
    config = row("method=pact")
    for name in DECIDING:
        other = deepcopy(config)
        other["method"][name] = [{"name": "x", "recipe": {}}] if name == "stages" else "x"
        assert key(other) != key(config), name
    for name in UNDECIDING:
        assert key({**config, "method": {**config["method"], name: "x" if name != "added" else {}}}) == key(config)
    assert key({**config, "method": {**config["method"], "unheard_of": 1}}) != key(config)


def test_each_option_of_a_run_counts_or_is_named_as_one_that_does_not() -> None:
    whole = yaml.safe_load((catalog.conf_folder() / "config.yaml").read_text())
    assert {*whole} - {"defaults", "hydra"} | {"method", "model", "dataset", "budget"} == {*COUNTED, *NOT_COUNTED}
    config = row("method=pact")
    for name in NOT_COUNTED:
        assert key({**config, name: "other"}) == key(config), name
    for name, value in {"seed": 5, "compile": True, "kernels": "torch", "workers": 2, "init_head": "new"}.items():
        assert key({**config, name: value}) != key(config), name


def test_a_class_counts_by_its_own_name() -> None:
    assert class_name("qbench.methods.shared.pact.PACT") == "PACT"
    assert class_name("torch.nn.Identity") == "torch.Identity"
    assert class_name("mypkg.quantizers.deep.Mine") == "mypkg.Mine"
    assert class_name("adam") == "adam"
    config = row("method=pact", "train.optimizer=torch.optim.SGD")
    text = yaml.safe_dump(config).replace("qbench.methods.shared.pact.PACT", "qbench.elsewhere.PACT")
    text = text.replace("qbench.models.tiny.Tiny", "qbench.nets.Tiny")
    assert "qbench.elsewhere" in text
    assert "qbench.nets" in text
    assert key(yaml.safe_load(yaml.safe_dump(config))) == key(config)  # tuples too
    assert key(yaml.safe_load(text)) == key(config)
    assert key(yaml.safe_load(text.replace("elsewhere.PACT", "elsewhere.PACT2"))) != key(config)


def test_the_wording_of_a_reason_and_empty_values_decide_nothing() -> None:
    assert named({"keep": "first layer", "a": None, "b": {}, "c": [], "d": 0}) == {"keep": True, "d": 0}


def test_marked_arguments_and_what_holds_nothing_else_are_left_out() -> None:
    hook = {"_target_": "qbench.quant.hooks.EnableAfter", "share": "${options.delay}"}
    node = {"hooks": [hook, {**hook, "match": "x"}], "weight": {"_target_": "a.B", "bits": 2, "eps": "${options.eps}"}}
    assert named(mark(node, {"${options.delay}", "${options.eps}"})) == {
        "hooks": [{"_target_": "EnableAfter", "match": "x"}],
        "weight": {"_target_": "a.B", "bits": 2},
    }


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ in which a method may be changed."""
    folder = tmp_path / "conf"
    shutil.copytree(catalog.conf_folder(), folder)
    monkeypatch.setattr(catalog, "conf_folder", lambda: folder)
    return folder


def test_an_option_that_came_later_renames_nothing_at_its_neutral_value(conf: Path) -> None:
    before = key(row("method=pact"))
    path = conf / "method" / "pact.yaml"
    text = path.read_text()
    hook = '  hooks:\n    - {_target_: qbench.quant.hooks.EnableAfter, share: "${options.delay}"}\n'
    changed = text.replace(
        'alpha: "${options.alpha}", init', 'alpha: "${options.alpha}", floor: "${options.floor}", init'
    )
    assert changed != text
    changed = changed.replace("  param_groups:", f"  added: {{delay: 0.0, floor: null}}\n{hook}  param_groups:")
    path.write_text(changed.rstrip() + "\n  delay: 0.0\n  floor: null\n")
    assert key(row("method=pact")) == before
    assert key(row("method=pact", "options.delay=0.5")) != before
    assert key(row("method=pact", "options.floor=1")) != before


def test_a_changed_default_renames(conf: Path) -> None:
    before = key(row("method=pact"))
    path = conf / "method" / "pact.yaml"
    path.write_text(path.read_text().replace("detach: false ", "detach: true "))
    assert key(row("method=pact")) != before


def test_classes_of_old_runs_are_where_the_table_says() -> None:
    for old, new in MOVED.items():
        module, _, last = new.rpartition(".")
        try:
            import_module(new)
        except ImportError:
            assert hasattr(import_module(module), last), new
        with pytest.raises(ImportError):
            import_module(old)
    assert today("qbench.quantizers.FixedPoint") == "qbench.quant.fixed_point.FixedPoint"
    assert today("qbench.quantizers.DoReFaWeight") == "qbench.methods.shared.dorefa_weight.DoReFaWeight"
    assert today("qbench.methods.pact.PACT") == "qbench.methods.shared.pact.PACT"
    assert today("qbench.methods.wage.WageWeight") == "qbench.methods.wage.WageWeight"


def test_learned_bits_stand_in_the_name() -> None:
    config = row("method=pact")
    assert folder_name(config, "k") == "pact-w4a4-tiny-synthetic-k"
    config["method"]["w_bits"] = {"learned": True}
    assert folder_name(config, "k") == "pact-wlearneda4-tiny-synthetic-k"
