"""Packed files from the outside: written, shown, loaded, evaluated; damaged ones are refused."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yamls
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qbench
from qbench.errors import UserError
from qbench.lowbit import container, sizes
from qbench.lowbit.artifact import Artifact
from qbench.models.mobilenet import MobileNetV2
from qbench.quant.grid import Grid, affine
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.packing import Part
from qbench.quant.passes import macs
from qbench.quant.quantizer import Quantizer
from qbench.training import packed
from qbench.training.build import make_method, make_model, quantize


def net(*words: str) -> tuple[nn.Module, dict[str, Any]]:
    """A net as the method's surgery leaves it, for images of 3 x 8 x 8."""
    config = yamls.config_of("model=tiny", "dataset=synthetic", "budget=smoke", "device=cpu", *words)
    config["dataset"]["size"] = 8
    model = make_model(config, packed._Images(3, 10, 8))  # type: ignore[arg-type]
    quantize(config, model, make_method(config))
    return model.eval(), config


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    return found


def test_a_run_exported_is_shown_loaded_and_evaluated(tiny: Callable[..., Any], cli: Callable[..., Any]) -> None:
    tiny("method=pact", "bits=3", "out=o", "dataset.size=8", "init=scratch")
    [run] = Path("o").glob("pact*")
    result = json.loads((run / "result.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    said = cli("export", run)
    file = run / "packed.safetensors"
    assert said.status == 0, said.err
    assert str(file) in said.out
    sized = result["sizes"]
    assert file.stat().st_size == sized["file_bytes"]
    assert sized["bytes"] == result["bytes"] == manifest["size"]["bytes"]
    assert sized["code_bytes"] < sized["folded_bytes"] < sized["bytes"] < sized["file_bytes"]
    assert sized["entropy_bytes"] <= sized["code_bytes"]
    assert result["macs"] == sum(layer["macs"] for layer in manifest["costs"].values())
    assert result["bit_operations"] == sum(layer["bit_operations"] for layer in manifest["costs"].values())

    wanted = logits(qbench.load(run))
    moved = Path("elsewhere") / "net.bin"
    moved.parent.mkdir()
    shutil.move(file, moved)
    accuracy = cli("eval", run).out.split("accuracy")[1]
    shutil.rmtree(run)
    model = qbench.load(moved)
    assert not model.training
    assert logits(model).equal(wanted)

    said = cli("inspect", moved)
    assert said.status == 0
    assert "pact on tiny, synthetic" in said.out
    for name, entry in manifest["costs"].items():
        assert any(line.startswith(name) and f"{entry['macs']:,}" in line for line in said.out.splitlines()), name
    assert f"{sized['file_bytes']:,}" in said.out
    said = cli("eval", moved, "device=cpu")
    assert said.status == 0, said.err
    assert said.out.split("accuracy")[1] == accuracy
    assert cli("eval", moved, "dataset.test_size=16").out != said.out
    assert "Did you mean 'test_size'" in cli("eval", moved, "dataset.test_sise=16").err
    assert "only dataset.*, device and allow" in cli("eval", moved, "train.lr=1").err


def test_what_cannot_be_exported_or_shown_says_why(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for words, said in (
        (("export",), "takes one run's folder, got 0"),
        (("export", "run"), "not a finished run"),
        (("export", "run", "format=onxx"), "unknown format 'onxx'"),
        (("export", "run", "ot=a"), "Did you mean 'out'"),
        (("inspect",), "takes one file"),
        (("inspect", "none"), "no packed file at none"),
    ):
        answer = cli(*words)
        assert (answer.status, said in answer.err) == (2, True), (words, answer.err)


def test_no_place_of_who_trained_it_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = net("method=ptq", "bits=4", "dataset.root=somebody/secret", "out=somebody/out")
    assert b"somebody" not in packed.file_of(model, config, {})


def test_a_layer_that_folds_its_norm_becomes_plain(tmp_path: Path) -> None:
    for words in (("method=qat", "bits=4"), ("method=qat", "w_bits=32", "a_bits=8")):  # the latter: folded, in float
        model, config = net(*words)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if "running_var" in name:
                    buffer.copy_(torch.rand_like(buffer) + 0.5)
        (tmp_path / "net").write_bytes(packed.file_of(model, config, {}))
        read = qbench.load(tmp_path / "net")
        assert logits(read).equal(logits(model))
        assert not [m for m in read.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(type(m) is QuantLayer for _, m in quant_layers(read))


class Lying(Quantizer):
    """Its grid is not where its values are."""

    bits = 2

    def __init__(self, layer: nn.Module, site: str) -> None:
        super().__init__()

    def quantize(self, x: Tensor) -> Tensor:
        return x.sign() * 0.1

    def grid(self, x: Tensor | None = None) -> Grid:
        return affine(0.1000001, -1, 1)


def test_codes_that_do_not_stand_for_the_weights_are_not_packed() -> None:
    model, config = net("method=ptq", "bits=4")
    layer = model.get_submodule("conv2")
    assert isinstance(layer, QuantLayer)
    kept = layer.weight_quantizer
    layer.weight_quantizer = Lying(layer, "weight")
    with pytest.raises(UserError, match="conv2: its codes do not stand for its weights, by up to"):
        packed.file_of(model, config, {})
    assert kept is not None
    layer.weight_quantizer, kept.enabled = kept, False
    with pytest.raises(UserError, match=r"conv2: .*, as its quantizer is switched off"):
        packed.file_of(model, config, {})


@pytest.fixture(scope="module")
def whole() -> bytes:
    model, config = net("method=lsq", "bits=3")
    return packed.file_of(model, config, {"accuracy_last": 12.5})


def opened(data: bytes, folder: Path) -> nn.Module:
    (folder / "net").write_bytes(data)
    return qbench.load(folder / "net")


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One of many kinds of damage."""
    kind, at = draw.randrange(6), draw.randrange(len(data))
    if kind == 0:  # bits
        other = bytearray(data)
        for place in [at, *(draw.randrange(len(data)) for _ in range(draw.randrange(3)))]:
            other[place] ^= 1 << draw.randrange(8)
        return bytes(other)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + bytes(draw.randrange(1, 9))
    if kind == 3:  # a piece is missing, or comes twice
        end = min(len(data), at + draw.randrange(1, 99))
        return data[:at] + data[end:] if draw.random() < 0.5 else data[:end] + data[at:]
    if kind == 4:  # zeros
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    n = int.from_bytes(data[:8], "little")  # a number, or a letter, in the header
    places = [i for i in range(8, 8 + n) if data[i : i + 1].isalnum()]
    place = draw.choice(places)
    return data[:place] + draw.choice("0123456789abcxyz").encode() + data[place + 1 :]


def test_two_hundred_damaged_files_are_refused_or_the_same(whole: bytes, tmp_path: Path) -> None:
    draw, wanted, same = random.Random(0), logits(opened(whole, tmp_path)), 0
    for _ in range(200):
        data = damaged(whole, draw)
        if data == whole:
            same += 1
            assert logits(opened(data, tmp_path)).equal(wanted)
            continue
        with pytest.raises(UserError, match=str(tmp_path / "net")):
            opened(data, tmp_path)
    assert same < 20


def test_what_is_wrong_is_named(whole: bytes, tmp_path: Path) -> None:
    begin = 8 + int.from_bytes(whole[:8], "little")
    place = whole.index(b"qbench.packed")
    header = json.loads(whole[8:begin])
    first, last = header["conv2.weight.codes"]["data_offsets"]
    flipped = bytearray(whole)
    flipped[begin + first] ^= 1
    for data, said in (
        (b"", "not a safetensors file"),
        (b"PK" + whole, "not a safetensors file"),
        (whole[: begin - 9], "cut off within its header"),
        (whole[: begin + last - 1], "cut off in its part 'conv2.weight.codes', 1 bytes before"),
        (whole + b"\0", "1 bytes follow its last part"),
        (bytes(flipped), "part 'conv2.weight.codes' is not what was written"),
        (whole[:place] + b"Q" + whole[place + 1 :], "its format is 'Qbench.packed'"),
        (whole.replace(b"conv2.weight.codes", b"conv3.weight.codes", 1), "has no description|damaged|has no data"),
        (whole.replace(b'\\"seed\\":0', b'\\"seed\\":1'), "the checksum of the whole differs"),
    ):
        with pytest.raises(UserError, match=said):
            opened(data, tmp_path)


def sealed(whole: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with another description under checksums that agree: forged, or of another version."""
    file = container.opened(whole, "file")
    change(file.meta)
    return container.seal({k: v for k, v in file.meta.items() if k != "sha256"}, file.arrays)


def test_forged_descriptions_are_refused_with_the_reason(whole: bytes, tmp_path: Path) -> None:
    def set_(*path: Any) -> Callable[[dict[str, Any]], object]:
        def change(meta: dict[str, Any]) -> None:
            for key in path[:-2]:
                meta = meta[key]
            meta[path[-2]] = path[-1]

        return change

    assert logits(opened(sealed(whole, lambda meta: None), tmp_path)).equal(logits(opened(whole, tmp_path)))
    for change, said in (
        (set_("version", 2), "is of version 2 of the format, and this qbench reads up to 1"),
        (set_("config", "model", "_target_", "os.system"), "'os.system', and calling that could run any code"),
        (set_("config", "seed", "${oc.env:HOME}"), "config.seed must be a whole number"),
        (set_("config", "model", "width", "${oc.env:HOME}"), "holds no interpolation"),
        (set_("weights", "conv2", "grid", "kind", "cubic"), "a grid of the kind 'cubic' is unknown"),
        (set_("weights", "conv2", "coding", "kind", "rot13"), "coding 'rot13' gives no codes"),
        (set_("weights", "conv2", "coding", "parts", {}), "it has no 'codes'"),
        (set_("weights", "conv2", "grid", "step", "conv9.step"), "it has no 'conv9.step'"),
        (set_("weights", "conv2", "shape", [3]), "do not fit"),
        (set_("parts", "conv2.weight.codes", "width", 4), "do not fit"),
        (set_("parts", "conv2.weight.codes", "width", 99), "width must be"),
        (set_("parts", "conv2.weight.codes", "width", {"part": "conv2.weight.codes", "plus": 0}), "do not fit"),
        (lambda meta: meta["weights"].pop("conv2"), "'conv2' is quantized in one of them only"),
        (lambda meta: meta.pop("layers"), "it has no 'layers'"),
    ):
        with pytest.raises(UserError, match=said):
            opened(sealed(whole, change), tmp_path)
    file = container.opened(whole, "file")
    del file.meta["parts"]["fc.bias"], file.arrays["fc.bias"], file.meta["sha256"]
    with pytest.raises(UserError, match=r"it lacks 'fc\.bias'"):
        opened(container.seal(file.meta, file.arrays), tmp_path)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [p for key, value in items for p in [(*path, key), *leaves(value, (*path, key))]]


def test_any_forged_field_is_read_or_refused(whole: bytes, tmp_path: Path) -> None:
    """None ends in another error, whatever it becomes."""
    draw, refused = random.Random(1), 0
    read = container.opened(whole, "file").meta
    places = leaves({k: read[k] for k in ("parts", "weights", "activations", "extra_state", "config", "run")})
    places = [path for path in places if path[0] != "parts" or len(path) > 2]  # an entry of these holds a checksum
    for _ in range(60):
        path, value = draw.choice(places), draw.choice([None, -1, 10**6, "text", [], {}, True, 0.5, [1, 2]])

        def change(meta: dict[str, Any], path: tuple[Any, ...] = path, value: Any = value) -> None:
            for key in path[:-1]:
                meta = meta[key]
            meta[path[-1]] = value

        try:
            opened(sealed(whole, change), tmp_path)
        except UserError:
            refused += 1
    assert refused > 20


def test_multiplications_are_those_that_torch_counts() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = MobileNetV2(channels=3, classes=10, size=32, width=0.25).eval()  # strides, groups, 1x1 and 3x3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert sum(macs(model, x).values()) == counter.get_total_flops() // 2


def test_costs_and_sizes_by_hand() -> None:
    model, config = net("method=pact", "w_bits=3", "a_bits=2")
    meta = Artifact(container.opened(packed.file_of(model, config, {}), "file")).meta
    layers = meta["layers"]
    conv2 = model.get_submodule("conv2")
    assert isinstance(conv2, QuantLayer)
    outputs = 8 * 8 * 8  # channels, height and width; of 8 and 3 channels of 3 x 3
    assert layers["conv2"] == {"macs": outputs * 72, "w_bits": 3, "a_bits": 2, "bit_operations": outputs * 72 * 6}
    assert layers["conv1"] == {"macs": outputs * 27, "w_bits": 32, "a_bits": 32, "bit_operations": outputs * 27 * 1024}
    assert layers["fc"]["macs"] == 80
    numel = math.prod(conv2.weight_shape)
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert meta["sizes"]["nominal_bits"] == 3
    assert meta["sizes"]["code_bytes"] == -(-3 * numel // 8)
    assert meta["sizes"]["bytes"] - meta["sizes"]["folded_bytes"] == 4 * 3 * norms


def test_entropy() -> None:
    assert sizes.entropy(Part(torch.tensor([0, 0, 1, 3]), 2)) == pytest.approx(2 * 1 + 2 * 2)
    assert sizes.entropy(Part(torch.zeros(9, dtype=torch.int32), 4)) == 0
    mixed = Part(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1], [2]]))  # by width: a bit each
    assert sizes.entropy(mixed) == pytest.approx(4)
    assert sizes.entropy(Part(torch.zeros(5))) == 160
