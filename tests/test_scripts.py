"""scripts/xnor_k.py: the parts of K, and how the inputs' strength varies; scripts/rekey.py: results keep
their names."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from qbench.cli.overrides import resolve_row
from qbench.config.identity import digest, identity, parent_of
from qbench.methods.shared.binary import Sign
from qbench.methods.xnor import XnorLayer
from qbench.papers import results
from qbench.records import read_config, read_result

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script() -> ModuleType:
    return load("xnor_k")


def test_the_variants_are_the_parts_of_k(script: ModuleType) -> None:
    layer = XnorLayer(nn.Conv2d(1, 2, 3, padding=1), "conv")
    layer.input_quantizer = Sign(layer, "input")
    x = torch.stack([torch.full((1, 4, 4), v) for v in (1.0, 3.0)])
    k = script.paper(layer, x)  # 4/9 of the value in the corners, 6/9 on the edges, all of it within
    assert k[0, 0, 0, :2].tolist() == pytest.approx([4 / 9, 6 / 9])
    assert script.unpadded(layer, x).flatten(1).tolist() == [pytest.approx([v] * 16) for v in (1.0, 3.0)]
    mean = (4 * 4 / 9 + 8 * 6 / 9 + 4) / 16
    assert script.image(layer, x).flatten().tolist() == pytest.approx([mean, 3 * mean])
    torch.testing.assert_close(script.pattern(layer, x), (k[:1] * 2).expand(2, 1, 4, 4))
    assert script.batch(layer, x).flatten().tolist() == pytest.approx([2 * mean])


def test_a_variant_is_trained_apart_and_its_inputs_are_measured(process: Any, tmp_path: Path) -> None:
    words = ("model=resnet20", "model.depth=8", "model.width=0.25", "dataset=synthetic", "budget=smoke", "device=cpu")
    trained = process.script(ROOT / "scripts" / "xnor_k.py", "train", "batch", *words)
    said, error = trained.communicate()
    assert trained.returncode == 0, said + error
    (run,) = (tmp_path / "outputs" / "batch").glob("xnor-*/")
    measured = process.script(ROOT / "scripts" / "xnor_k.py", "spread", run, "data")
    said, error = measured.communicate()
    assert measured.returncode == 0, error
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert len(lines) == 6, "the six binary convs of a ResNet-8"
    assert all(0 < float(v.removesuffix(" %")) < 100 for v in lines.values())


def test_what_it_cannot_do_is_answered_with_what_it_can(process: Any) -> None:
    asked = process.script(ROOT / "scripts" / "xnor_k.py", "train", "bach")
    _, error = asked.communicate()
    assert asked.returncode == 1
    assert "VARIANT: unpadded, image, pattern, batch" in error


# scripts/rekey.py


@pytest.fixture
def rekey() -> Any:
    return load("rekey")


def test_a_run_that_is_said_in_other_words_is_the_same_run(rekey: Any) -> None:
    old = resolve_row(["method=pact", "bits=4"])
    new = json.loads(json.dumps(old))  # tuples are lists in a file
    new["method"]["rules"] = []
    del new["dataset"]["preprocess"]
    assert rekey.difference(old, new) == []
    new["train"]["optimizer"] = "qbench.methods.bnn.ShiftAdaMax"
    moved = {**new, "train": {**new["train"], "optimizer": "qbench.elsewhere.ShiftAdaMax"}}
    assert rekey.difference(new, moved) == []
    assert rekey.difference(old, new) == ["train.optimizer: None -> ShiftAdaMax"]
    detached = {**old, "options": {**old["options"], "detach": True}}
    assert rekey.difference(old, detached) == ["options.detach: False -> True"]


def test_a_committed_run_has_the_name_that_its_words_give_today(rekey: Any) -> None:
    for path in rekey.RESULTS.rglob("result.json"):
        result, config = read_result(path), read_config(path.parent)
        new = rekey.today(config)
        assert rekey.difference(config, new) == []
        data = result["identity"]["data"]
        parent = digest(identity(parent_of(new), data, "scratch"))
        whole = identity(new, data, f"float {parent}" if config["init"] == "float" else "scratch")
        assert digest(whole) == result["key"]
        assert path.parent.name.endswith(result["key"])


@pytest.mark.slow
def test_a_checkout_has_nothing_to_rename_against_itself(rekey: Any, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = sum(e["earlier"] for f in rekey.RESULTS.iterdir() if f.is_dir() for e in results.read(f).entries)
    assert rekey.main([str(ROOT)]) == 0
    assert capsys.readouterr().out.count("of earlier code already") == earlier


def test_what_is_no_checkout_is_answered(rekey: Any, tmp_path: Path) -> None:
    assert rekey.main([str(tmp_path)]) == 2
    assert rekey.main([]) == 2
