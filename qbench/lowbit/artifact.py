"""A trained net into one file of packed parts, and out of it again."""

import json
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench import __version__
from qbench.errors import UserError
from qbench.lowbit import container, describe, sizes
from qbench.lowbit.container import Container
from qbench.quant import packing, surgery
from qbench.quant.coding import decode
from qbench.quant.grid import Grid
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.packing import Part
from qbench.quant.quantizer import Quantizer, evaluating

STATE = "state."  # before the names of what only qbench itself reads
NUMBERS = {torch.uint8, torch.int8, torch.bool, torch.int32, torch.int64, torch.float32}


def pack(model: nn.Module, config: Mapping[str, Any], run: Mapping[str, Any], image: Tensor) -> bytes:
    """The packed file of a net in evaluation.

    config: what the net is built from again. run: what is told of its training. image: zeros, a batch of one.

    Errors: UserError where the packed codes would not give the net's weights back, bit for bit, or a tensor is of a
    kind that the format does not have.
    """
    with evaluating(model):
        return container.seal(*_content(model, config, run, image))


def _content(
    model: nn.Module, config: Mapping[str, Any], run: Mapping[str, Any], image: Tensor
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the header says, and the parts."""
    held = surgery.packed(model)
    names = _names(held)
    weights = {name: _weight(name, layer, names) for name, layer in quant_layers(model) if layer.weight_quantizer}
    activations = {
        name: {"bits": q.bits, "quantizer": type(q).__name__, "grid": describe.words(q.grid(), name, encoder=True)}
        for name, q in surgery.activation_quantizers(model).items()
    }
    parts, arrays = {}, {}
    grids = {f"{n}.weight": w["grid"] for n, w in weights.items()} | {n: a["grid"] for n, a in activations.items()}
    for key, part in held.items():
        name = names[key]
        owner, _, leaf = name.rpartition(".")
        role = "shared" if not isinstance(key, str) else "float"
        if owner in grids:
            role = "encoder" if owner in activations else "weight"
        parts[name], arrays[name] = _stored(part, role, grids.get(owner, {}), leaf)
    state, extra = _rest(model, {n for n, p in parts.items() if p["role"] == "float"})
    for name, tensor in state.items():
        parts[STATE + name] = {"role": "state", "shape": list(tensor.shape)}
        arrays[STATE + name] = tensor.detach().cpu().contiguous().numpy()
    layers = sizes.costs(model, image)
    meta = {
        "made_by": f"qbench {__version__}",
        "run": dict(run),
        "config": dict(config),
        "parts": parts,
        "weights": weights,
        "activations": activations,
        "extra_state": extra,
        "sizes": sizes.sizes(model, held, names, weights),
        "layers": layers,
    }
    return meta, arrays


def _names(held: Mapping[Hashable, Part]) -> dict[Hashable, str]:
    """The names of parts in a file; tables that layers share are counted."""
    shared = [key for key in held if not isinstance(key, str)]
    return {key: key if isinstance(key, str) else f"shared.{shared.index(key)}" for key in held}


def _weight(name: str, layer: QuantLayer, names: Mapping[Hashable, str]) -> dict[str, Any]:
    """How to decode the weight of a layer. Errors: UserError where that gives other values."""
    q, source = layer.weight_quantizer, layer.source().detach()
    assert q is not None
    grid, coding = q.grid(source.float()), q.coding()
    with torch.no_grad():
        wanted = layer.quantized_weight()
        given = source if coding["kind"] == "floats" else grid.values(q.codes(source)).reshape(wanted.shape)
    if not given.equal(wanted):
        off = f"by up to {(given - wanted).abs().max().item():.3g}" if q.enabled else "as its quantizer is switched off"
        raise UserError(f"{name}: its codes do not stand for its weights, {off}; the net cannot be packed")
    roles = {coding.get("bits"): "bits"}
    parts = {roles.get(part, part): f"{name}.weight.{part}" for part in q.stored(source)}
    if (key := next(iter(q.shared()), None)) is not None:
        parts["wiring"] = names[key]
    words = {k: v for k, v in coding.items() if k != "bits"} | {"parts": parts}
    about = {"quantizer": type(q).__name__, "granularity": q.granularity, "signed": q.signed}
    shape = {"shape": list(layer.weight_shape), "bits": q.bits}
    return shape | about | {"coding": words, "grid": describe.words(grid, f"{name}.weight")}


def _stored(part: Part, role: str, grid: Mapping[str, Any], leaf: str) -> tuple[dict[str, Any], np.ndarray]:
    """A part's entry and its bytes: integers packed, floats as they are."""
    entry: dict[str, Any] = {"role": role, "shape": list(part.numbers.shape)}
    if part.numbers.is_floating_point():
        return entry, np.frombuffer(part.pack(), "<f4").reshape(entry["shape"])
    width: Any = part.widths
    if isinstance(width, Tensor):
        width = grid["width"]
        if isinstance(width, dict) and leaf == "codes" and grid.get("view"):
            width = width | {"view": grid["view"]}
    return entry | {"width": width}, np.frombuffer(part.pack(), np.uint8)


def _left_out(model: nn.Module) -> list[nn.Module]:
    """Modules that inference does not have, or whose parts stand in a packed file in another form."""
    found = [m for m in model.modules() if getattr(m, "training_only", False)]
    for _, layer in quant_layers(model):
        found += [m for m in (layer.weight_quantizer, layer.error_quantizer, layer.folded_norm) if m is not None]
    return found


def _rest(model: nn.Module, floats: set[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors, other state) of what is neither packed nor a float of the net: the state of activation quantizers.

    Errors: UserError on what a file of plain numbers cannot hold.
    """
    inside = {id(m) for whole in _left_out(model) for m in whole.modules()}
    quantized = {id(layer) for _, layer in quant_layers(model) if layer.weight_quantizer or layer.folded_norm}
    state, extra = {}, {}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        dot = f"{name}." if name else ""
        for leaf, tensor in module.state_dict(keep_vars=True).items():
            if "." in leaf or leaf == "_extra_state" or f"{dot}{leaf}" in floats:
                continue
            if (id(module) in quantized and leaf in ("weight", "bias")) or leaf == "num_batches_tracked":
                continue
            if tensor.dtype not in NUMBERS:
                raise UserError(f"{dot}{leaf} is of {tensor.dtype}, which the packed format does not have")
            state[f"{dot}{leaf}"] = tensor
        if isinstance(module, Quantizer):
            try:
                extra[name] = json.loads(json.dumps(module.get_extra_state()))
            except TypeError as error:
                raise UserError(f"{name}: its state is not plain ({error}); the net cannot be packed") from error
    return state, extra


class Artifact:
    """The parts of a packed file, as numbers."""

    def __init__(self, file: Container) -> None:
        self.file, self.meta = file, file.meta
        self.part = cache(self._part)

    def _part(self, name: str) -> Part:
        entry, array = self.meta["parts"][name], self.file.arrays[name]
        if "width" not in entry:
            return Part(torch.from_numpy(array.copy()))
        shape, width = tuple(entry["shape"]), entry["width"]
        if isinstance(width, dict):
            each = self.part(width["part"]).numbers + width["plus"]
            width = each.expand(width.get("view", shape)).reshape(shape)
        return Part(packing.unpack(array.tobytes(), shape, width), width)

    def grid(self, name: str) -> Grid:
        """That of the weight of a layer."""
        return describe.grid_of(self.meta["weights"][name]["grid"], self.part)

    def codes(self, name: str) -> Tensor:
        """Of the weight of a layer, int32. Errors: ValueError where it has none."""
        entry = self.meta["weights"][name]
        coding = {"bits": "bits", **entry["coding"]}
        parts = {role: self.part(part) for role, part in coding.pop("parts").items()}
        return decode(coding, parts, parts.get("wiring"), tuple(entry["shape"]), self.grid(name))

    def values(self, name: str) -> Tensor:
        """The weight of a layer, float32."""
        entry = self.meta["weights"][name]
        if entry["coding"]["kind"] == "floats":
            return self.part(entry["coding"]["parts"]["weights"]).numbers
        return self.grid(name).values(self.codes(name)).reshape(entry["shape"])


class Stored(Quantizer):
    """In place of a weight's quantizer the codes and grid that were read. The layer's weight holds their values."""

    def __init__(self, artifact: Artifact, name: str) -> None:
        super().__init__()
        entry = artifact.meta["weights"][name]
        self.artifact, self.name = artifact, name
        self.bits, self.signed, self.granularity = entry["bits"], entry["signed"], entry["granularity"]

    def quantize(self, x: Tensor) -> Tensor:
        return x

    def grid(self, x: Tensor | None = None) -> Grid:
        return self.artifact.grid(self.name)

    def codes(self, x: Tensor) -> Tensor:
        return self.artifact.codes(self.name)

    def coding(self) -> dict[str, str]:
        coding = self.artifact.meta["weights"][self.name]["coding"]
        words = {key: value for key, value in coding.items() if key != "parts"}
        return words | ({"bits": _leaf(coding["parts"]["bits"])} if "bits" in coding["parts"] else {})

    def stored(self, x: Tensor) -> dict[str, Part]:
        parts = self.artifact.meta["weights"][self.name]["coding"]["parts"]
        return {_leaf(part): self.artifact.part(part) for role, part in parts.items() if role != "wiring"}

    def restored(self, parts: dict[str, Part]) -> Tensor:
        shared = next(iter(self.shared().values()), None)
        shape = tuple(self.artifact.meta["weights"][self.name]["shape"])
        return decode(self.coding(), parts, shared, shape, self.grid())

    def shared(self) -> dict[Hashable, Part]:
        wiring = self.artifact.meta["weights"][self.name]["coding"]["parts"].get("wiring")
        return {} if wiring is None else {(self.artifact.file.source, wiring): self.artifact.part(wiring)}


def _leaf(part: str) -> str:
    return part.rpartition(".")[2]


def install(model: nn.Module, artifact: Artifact) -> nn.Module:
    """Put the packed weights, and all else of a file, into the net that its configuration builds; returns it.

    A layer that folds its batch-norm becomes one without, as the file holds the weight and bias of inference.

    Errors: UserError where file and net do not fit.
    """
    try:
        return _install(model, artifact)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError, OverflowError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        where = f"{artifact.file.source} is refused"
        raise UserError(f"{where}: its parts do not fit its configuration ({what})") from error


def _install(model: nn.Module, artifact: Artifact) -> nn.Module:
    entries, found = artifact.meta["weights"], dict(quant_layers(model))
    if odd := sorted(set(entries) ^ {n for n, layer in found.items() if layer.weight_quantizer is not None}):
        raise ValueError(f"'{odd[0]}' is quantized in one of them only")
    for name, layer in found.items():
        if layer.folded_norm is not None:
            layer = layer.of_inference()
            model.set_submodule(name, layer)
        if name in entries:
            values = artifact.values(name)
            if tuple(values.shape) != layer.weight_shape:
                raise ValueError(f"the weight of '{name}' is {list(values.shape)}, not {list(layer.weight_shape)}")
            layer.weight, layer.weight_quantizer = nn.Parameter(values.contiguous()), Stored(artifact, name)
    given: dict[str, Any] = {}
    for name, entry in artifact.meta["parts"].items():
        if entry["role"] in ("float", "state"):
            given[name.removeprefix(STATE) if entry["role"] == "state" else name] = artifact.part(name).numbers
    extra = {f"{name}._extra_state": state for name, state in artifact.meta["extra_state"].items()}
    lacks = model.load_state_dict({**given, **extra}, strict=False)
    constants = {name for name, _ in model.named_buffers()}  # those that no checkpoint holds either
    if odd := [name for name in lacks.unexpected_keys if name not in constants]:
        raise ValueError(f"there is no '{odd[0]}' in the net")
    _check_all_there(model, set(given), set(lacks.missing_keys))
    return model.eval()


def _check_all_there(model: nn.Module, given: set[str], missing: set[str]) -> None:
    """Errors: ValueError naming a tensor that inference needs and the file does not hold."""
    inside = {id(t) for m in _left_out(model) for t in (*m.parameters(), *m.buffers())}
    inside |= {id(layer.weight) for _, layer in quant_layers(model) if layer.weight_quantizer is not None}
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    there = inside | {id(tensors[name]) for name in given if name in tensors}
    for name in missing:
        if name in tensors and id(tensors[name]) not in there and not name.endswith("num_batches_tracked"):
            raise ValueError(f"it lacks '{name}'")
