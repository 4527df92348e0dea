"""A reader of packed files that follows docs/format.md and uses nothing of qbench, against what qbench computes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yamls
from numpy.typing import NDArray

from qbench.quant.layers import quant_layers
from qbench.training import packed
from qbench.training.build import make_method, make_model, quantize


class Reader:
    """docs/format.md in NumPy."""

    def __init__(self, data: bytes) -> None:
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + n])
        self.meta = json.loads(header.pop("__metadata__")["qbench"])
        assert (self.meta["format"], self.meta["version"]) == ("qbench.packed", 1)
        noted = self.meta["sha256"].encode()
        assert hashlib.sha256(data.replace(noted, b"0" * 64)).hexdigest() == noted.decode()
        self.raw = {name: (e["dtype"], data[8 + n :][slice(*e["data_offsets"])]) for name, e in header.items()}
        for name, (_, part) in self.raw.items():
            assert hashlib.sha256(part).hexdigest() == self.meta["parts"][name]["sha256"]

    def part(self, name: str) -> NDArray[Any]:
        entry, (dtype, data) = self.meta["parts"][name], self.raw[name]
        if "width" not in entry:
            return np.frombuffer(data, {"F32": "<f4", "I64": "<i8"}[dtype]).reshape(entry["shape"])
        count = int(np.prod(entry["shape"]))
        widths = np.broadcast_to(self.width(entry["width"], entry["shape"]), count)
        bits, ends = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"), widths.cumsum()
        found = [int(bits[e - w : e].astype(np.int64) @ (1 << np.arange(w))) for e, w in zip(ends, widths, strict=True)]
        assert not bits[ends[-1] if count else 0 :].any()
        return np.array(found, np.int64).reshape(entry["shape"])

    def width(self, given: Any, shape: list[int]) -> Any:
        if isinstance(given, int):
            return given
        return np.broadcast_to(self.part(given["part"]) + given["plus"], given.get("view", shape)).reshape(-1)

    def number(self, given: Any) -> NDArray[Any]:
        return self.part(given) if isinstance(given, str) else np.float32(given)  # type: ignore[return-value]

    def kept(self, parts: dict[str, str], numel: int) -> NDArray[Any]:
        if "mask" in parts:
            return self.part(parts["mask"]) == 1
        bits, k = self.part(parts["gaps"]), self.part(parts["rice"]).item()
        kept, at, place = np.zeros(numel, bool), 0, -1
        while at < len(bits):
            one = at + int(bits[at:].argmax())
            gap = (one - at << k) + int(bits[one + 1 : one + 1 + k] @ (1 << np.arange(k)))
            at, place = one + 1 + k, place + gap + 1
            kept[place] = True
        return kept

    def codes(self, entry: dict[str, Any]) -> NDArray[Any]:
        parts, grid, shape = entry["coding"]["parts"], entry["grid"], entry["shape"]
        if entry["coding"]["kind"] == "codes":
            return self.part(parts["codes"]) + grid["lo"]
        q, wiring, numel = grid["planes"], self.part(parts["wiring"]), int(np.prod(shape))
        bits = self.part(parts["bits"]).reshape(q, -1, wiring.shape[-1])
        y = bits @ np.swapaxes(wiring, -1, -2) % 2
        if "patches" in parts:
            flat = y.reshape(-1, y.shape[-1])
            flat[np.repeat(np.arange(len(flat)), self.part(parts["patch_counts"])), self.part(parts["patches"])] ^= 1
        y = (y if entry["coding"]["order"] == "slices" else np.swapaxes(y, 1, 2)).reshape(q, -1)[:, :numel]
        codes = (y << np.arange(q)[:, None]).sum(0)
        return np.where(self.kept(parts, numel), codes, 2**q).reshape(shape) if grid["pruned"] else codes.reshape(shape)

    def values(self, layer: str) -> NDArray[Any]:
        entry, f = self.meta["weights"][layer], np.float32
        if entry["coding"]["kind"] == "floats":
            return self.part(entry["coding"]["parts"]["weights"])
        grid, codes = entry["grid"], self.codes(entry)
        if grid["kind"] in ("affine", "ends") and grid["view"]:
            codes = codes.reshape(grid["view"])
        if grid["kind"] == "affine":
            zero = self.number(grid["zero"]) + (f(grid["lo"]) if isinstance(grid["zero"], str) else f(0))
            found = (codes.astype(f) - zero.astype(f)) * self.number(grid["step"])
            found = found if grid["offset"] == 0 else found + self.number(grid["offset"])
        elif grid["kind"] == "ends":
            least, greatest = self.part(grid["ends"])
            h = (2 ** self.width(grid["width"], [len(codes), 1]) - 1).astype(f).reshape(-1, 1)
            found = least + codes.astype(f) * ((greatest - least) / h)
        elif grid["kind"] in ("multiples", "book"):
            if grid["kind"] == "multiples":
                table = f(grid["factors"]) * self.number(grid["scale"])[..., None]
            else:
                table = self.part(grid["table"])
                for code, value in sorted(grid["fixed"].items(), key=lambda item: int(item[0])):
                    table = np.insert(table, int(code), f(value), -1)
            table = np.broadcast_to(table, (*codes.shape, table.shape[-1]))
            found = np.take_along_axis(table, codes[..., None], -1)[..., 0]
        else:
            found = f(0)
            for i, c in enumerate(self.number(grid["coefficients"])):
                found = found + c * (2 * (codes >> i & 1) - 1).astype(f) if i else c * (2 * (codes & 1) - 1).astype(f)
            found = np.where(grid["pruned"] & (codes == grid["hi"]), f(0), found)
        assert found.dtype == f
        return found.reshape(entry["shape"])


@pytest.mark.parametrize(
    ("words", "kinds", "also"),
    [
        (("method=lsq", "bits=3"), {("codes", "affine")}, ["codes"]),  # step stored, zero a constant
        (("method=qat", "bits=3", "options.per_channel=true"), {("codes", "affine")}, ["codes"]),  # zero stored too
        (("method=dorefa", "bits=2"), {("codes", "affine")}, ["codes"]),  # a half of a code as its zero
        (("method=twn",), {("codes", "affine")}, ["codes"]),
        (("method=ttq",), {("codes", "book")}, ["codes"]),
        (("method=inq", "bits=5"), {("codes", "multiples")}, ["codes"]),
        (("method=bwn",), {("codes", "planes")}, ["codes"]),
        (("method=abcnet", "w_bits=8"), {("codes", "planes")}, ["codes"]),
        (("method=bnn",), {("codes", "planes")}, ["codes"]),  # nothing but the signs is stored
        (("method=binaryconnect", "options.stochastic=true"), {("floats", "planes")}, ["weights"]),
        (("method=diffq", "w_bits=8"), {("codes", "ends")}, ["codes"]),
        (("method=flexor", "bits=0.8"), {("xor", "planes")}, ["wiring"]),
        (("method=flexor", "bits=2"), {("xor", "planes")}, ["wiring"]),  # two planes, a matrix of each
        (("method=xor_encrypt", "options.n_out=300"), {("xor", "planes")}, ["patches", "patch_counts", "gaps", "rice"]),
        (("method=xor_encrypt", "bits=3", "options.sparsity=0.3"), {("xor", "planes")}, ["mask"]),  # a mask bit by bit
    ],
    ids=lambda words: "-".join(words) if isinstance(words, tuple) else "",
)
def test_a_stranger_decodes_the_weights_exactly(
    words: tuple[str, ...], kinds: set[tuple[str, str]], also: list[str]
) -> None:
    config = yamls.config_of("model=tiny", "dataset=synthetic", "budget=smoke", "device=cpu", *words)
    model = make_model(config, packed._Images(3, 10, 8))  # type: ignore[arg-type]
    quantize(config, model, make_method(config))
    config["dataset"]["size"] = 8
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():  # learned numbers, each of its own
            if "logits" in name:
                p.copy_(4 * torch.randn(p.shape, generator=draw))
            elif "alpha" in name or "scale" in name:
                p.mul_(1 + torch.rand(p.shape, generator=draw))
    reader = Reader(packed.file_of(model.eval(), config, {}))
    weights = {name: layer for name, layer in quant_layers(model) if layer.weight_quantizer is not None}
    assert set(weights) == set(reader.meta["weights"])
    assert weights
    assert {(w["coding"]["kind"], w["grid"]["kind"]) for w in reader.meta["weights"].values()} == kinds
    assert {role for w in reader.meta["weights"].values() for role in w["coding"]["parts"]} >= set(also)
    for name, layer in weights.items():
        with torch.no_grad():
            np.testing.assert_array_equal(reader.values(name), layer.quantized_weight().numpy(), err_msg=name)


def test_the_example_of_the_page_is_its_text() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
    assert "[1, 2, 3] in 3 bits each are the bytes D1 00" in page
    reader = Reader.__new__(Reader)
    reader.meta, reader.raw = {"parts": {"a": {"shape": [3], "width": 3}}}, {"a": ("U8", b"\xd1\x00")}
    assert reader.part("a").tolist() == [1, 2, 3]
