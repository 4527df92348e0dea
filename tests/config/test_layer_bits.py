"""Widths of single layers: from words to what the manifest says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yamls
from torch import nn

from qbench.config import catalog
from qbench.config.identity import digest, folder_name, identity
from qbench.config.layer_bits import read
from qbench.data import load
from qbench.errors import UserError
from qbench.quant.surgery import manifest
from qbench.training.build import make_method, make_model, quantize

METHODS = {m["name"]: m for m in catalog.methods()}


def config(method: str, given: Any, *words: str) -> dict[str, Any]:
    from omegaconf import OmegaConf, open_dict

    from qbench.config.resolve import resolve

    whole = yamls.composed(f"method={method}", "model=tiny", "dataset=synthetic", "budget=smoke").copy()
    whole.merge_with_dotlist([*words])
    with open_dict(whole):
        whole.layer_bits = OmegaConf.create(given) if isinstance(given, dict) else given
    return resolve(whole)


def bits(conf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({layer: bits of its weight}, {quantizer of activations: bits})."""
    net = make_model(conf, load(conf["dataset"]))
    found = manifest(net, quantize(conf, net, make_method(conf)))
    weights = {
        n.removesuffix(".weight"): e["bits"]
        for n, e in found["weights"].items()
        if n.endswith(".weight") and len(e["shape"]) > 1
    }
    return weights, {n: e["bits"] for n, e in found["activations"].items()}


def layers() -> list[str]:
    conf = config("lsq", None)
    net = make_model(conf, load(conf["dataset"]))
    return [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def test_the_first_pattern_that_fits_counts_and_the_others_keep_their_bits() -> None:
    first, second, last = layers()
    weights, inputs = bits(config("lsq", {second: "2/3", "conv*": "32/5"}, "bits=4", "options.first_last=7"))
    assert weights == {first: 32, second: 2, last: 7}
    assert inputs == {f"{first}.input_quantizer": 5, f"{second}.input_quantizer": 3, f"{last}.input_quantizer": 7}


def test_a_layer_that_the_method_keeps_in_float_can_be_quantized() -> None:
    *_, last = layers()
    before, _ = bits(config("pact", None, "bits=4"))
    after, _ = bits(config("pact", {"@last": 8}, "bits=4"))
    assert before[last] == 32
    assert after == {**before, last: 8}


def test_one_layer_alone() -> None:
    name = layers()[1]
    weights, inputs = bits(config("ptq", {name: 2}, "bits=32"))
    assert {n for n, b in weights.items() if b == 2} == {name}
    assert {b for n, b in weights.items() if n != name} == {32}
    assert inputs == {f"{name}.input_quantizer": 2}


def test_activations_that_stand_in_place_of_a_relu_are_named_by_it() -> None:
    conf = config("pact", {"*relu*": 3}, "bits=4")
    _, found = bits(conf)
    assert found
    assert set(found.values()) == {3}
    with pytest.raises(UserError, match=r"'@last' fits no quantizer of activations.*protocol=uniform"):
        bits(config("pact", {"@last": "8/8"}))
    middle = layers()[1]
    _, found = bits(config("pact", {middle: "8/3"}, "protocol=uniform", "bits=4"))
    assert found[f"{middle}.input_quantizer"] == 3


def test_a_method_of_weights_alone_takes_one_number() -> None:
    assert read({"fc": 2}, METHODS["twn"]) == [{"match": "fc", "w": 2, "a": 32, "either": True}]
    with pytest.raises(UserError, match="method=twn takes 32 \\(float\\) for activations, got 8"):
        read({"fc": "2/8"}, METHODS["twn"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fcc": 4}, "'fcc' fits nothing; there are .*conv"),
        ({"*": 4, "@last": 8}, "'@last' comes too late"),
        ({"@last": 1}, "'@last': method=lsq takes .* in 2..16 or 32 .float. for weights, got 1"),
        ({"@last": "4/17"}, "for activations, got 17"),
        ({"@last": "many"}, "bits must be a number such as 4 or 0.8, got 'many'"),
        ({"@last": [4]}, "takes patterns of layers and their bits"),
        ({"@last": True}, "got True"),
        ({}, "layer_bits must be patterns"),
        ("nowhere.yaml", "a YAML file that is there, got 'nowhere.yaml'"),
    ],
)
def test_what_is_wrong_is_named(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bits(config("lsq", given))


def test_a_file_says_the_same_and_its_content_names_the_run(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text('"@last": 8/8\nconv*: 3\n')
    from_file = config("lsq", str(path))
    here = config("lsq", {"@last": "8/8", "conv*": 3})
    assert from_file["layer_bits"] == here["layer_bits"]
    data = {"name": "synthetic", "checksum": "0"}
    keys = [
        digest(identity(c, data, "scratch"))
        for c in (from_file, here, config("lsq", None), config("lsq", {"@last": 8}))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert folder_name(here, "x") == "lsq-w4a4-mixed-tiny-synthetic-x"
    path.write_text("[1, 2")
    with pytest.raises(UserError, match=r"layer_bits=.*plan\.yaml: .*layer_bits takes patterns"):
        config("lsq", str(path))


def test_nothing_is_renamed_by_the_option_being_there() -> None:
    conf = config("pact", None)
    data = {"name": "synthetic", "checksum": "0"}
    old = {k: v for k, v in conf.items() if k != "layer_bits"}
    assert digest(identity(conf, data, "scratch")) == digest(identity(old, data, "scratch"))
    assert "uniform" not in str(conf["method"]["rules"])


def test_what_more_than_eight_bits_mean_for_the_precision_counts_single_layers() -> None:
    from qbench.training.precision import _widths

    assert max(_widths(config("lsq", {"@last": 12}, "bits=4"))) == 12
    assert torch.finfo(torch.bfloat16).bits == 16
