"""What every method promises, tried on every YAML in conf/method; a new method is tested without a new line here."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import yamls
from evidence import computing_tests
from torch import Tensor, nn

from qbench.config import bits, catalog
from qbench.config.identity import parent_of
from qbench.data import DataSet, load
from qbench.lowbit import container
from qbench.lowbit.artifact import Artifact
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.grid import Affine, Grid
from qbench.quant.layers import QuantLayer, quant_layers, quantized_weights
from qbench.quant.method import Method
from qbench.quant.quantizer import Quantizer, evaluating
from qbench.records import read_metrics
from qbench.training import checkpoint, optim, packed, trainer
from qbench.training.build import assemble, make_batches, make_model
from qbench.training.recorder import Recorder
from qbench.training.telemetry import record_activations

FILES = sorted((catalog.conf_folder() / "method").glob("*.yaml"))
NAMES = [path.stem for path in FILES if path.stem not in catalog.aliases()]
# What the lowest or highest width of a method needs beside itself.
WITH = {("flexor", 0.05): ("options.n_tap=1",)}


def config_of(name: str, *words: str) -> dict[str, Any]:
    data = ("model=tiny", "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=32", "dataset.size=8")
    here = ("budget=smoke", "device=cpu", "threads=1", "checkpoint_seconds=1e9")
    return yamls.config_of(f"method={name}", *data, *here, *words)


@dataclass
class Case:
    """A method on a net with sane batch-norm statistics, after calibration."""

    config: dict[str, Any]
    data: DataSet
    method: Method
    model: nn.Module
    kept: dict[str, str]
    loop: trainer.Trainer
    x: Tensor


def build(config: dict[str, Any], folder: Path) -> Case:
    data, cpu = load(config["dataset"]), torch.device("cpu")
    x = next(make_batches(config, data, data.train, cpu, True).epoch(0))[0]

    teachers = []

    def warmed(model: nn.Module) -> None:
        teachers.append(deepcopy(model).eval().requires_grad_(False))
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(x)

    net = assemble(config, data, warmed, cpu)
    loop = net.trainer(folder, teacher=teachers[0])
    net.calibrate(loop)
    return Case(config, data, net.method, net.model, net.kept, loop, x)


def widths(spec: dict[str, Any]) -> list[float]:
    """The default, the lowest, the highest and a middle one of the widths that a YAML allows."""
    if "only" in spec:
        return sorted(set(spec["only"]))
    lo, hi = spec["lo"], spec["hi"]
    return sorted({spec["default"], lo, hi, *([2] if bits.allows(spec, 2) else [])})


NODES = {m["name"]: m for m in catalog.methods()}


def width_cases() -> Iterator[tuple[str, float, float]]:
    for name in NAMES:
        node = NODES[name]
        w, a = widths(node["w_bits"]), widths(node["a_bits"])
        cells = [(w[min(i, len(w) - 1)], a[min(i, len(a) - 1)]) for i in range(max(len(w), len(a)))]
        cells += [(bits.FLOAT, a[0])] if node["w_bits"].get("float") else []
        cells += [(w[0], bits.FLOAT)] if node["a_bits"].get("float") else []
        yield from ((name, *cell) for cell in cells)


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return build(config_of(request.param, "train.steps=2"), tmp_path)


def eval_logits(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def weight_layers(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in quant_layers(model) if layer.weight_quantizer is not None}


def test_every_file_is_a_method_or_an_alias_of_one() -> None:
    assert len(FILES) == len(NAMES) + len(catalog.aliases())
    assert sorted(m["name"] for m in catalog.methods()) == NAMES
    assert set(catalog.aliases().values()) <= set(NAMES)
    assert len(NAMES) >= 5


@pytest.mark.parametrize("alias", sorted(catalog.aliases()))
def test_alias_is_the_method_it_names(alias: str) -> None:
    assert config_of(alias) == config_of(catalog.aliases()[alias])


def file_of(name: str) -> Path:
    return catalog.conf_folder() / "method" / f"{name}.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_read(name: str) -> None:
    whole = yaml.safe_load(file_of(name).read_text())
    read = set(re.findall(r"\boptions\.(\w+)", str(whole)))
    read |= {key for rule in whole["method"].get("rules") or () for key in rule.get("only") or ()}
    assert set(whole.get("options") or {}) == read


@pytest.mark.parametrize("name", NAMES)
def test_method_has_a_test_that_computes_with_it(name: str) -> None:
    """In tests/methods, in a file named after the method or its module: see `evidence`."""
    whole = yaml.safe_load(file_of(name).read_text())
    if not whole["method"].get("rules"):
        assert name == "float"
        return
    targets = re.findall(r"qbench\.methods\.((?:shared\.)?\w+)\.(\w+)", str(whole))
    wanted = {built for _, built in targets} or {f"conf/method/{name}.yaml"}
    files = {Path(__file__).parent / "methods" / f"test_{stem}.py" for stem in (name, *(m for m, _ in targets))}
    found = {path.stem: computing_tests(path.read_text(), wanted) for path in files if path.is_file()}
    assert any(found.values()), f"{name}: no test in {sorted(found)} computes with {sorted(wanted)}"


def test_every_rule_and_parameter_group_matches(case: Case) -> None:
    fresh = make_model(case.config, case.data)
    chosen = [id(rule) for rule in surgery.matches(fresh, case.method.rules).values()]
    dead = [r for r in case.method.rules if id(r) not in chosen and not r.optional]
    assert not dead
    groups = optim.parameter_groups(case.model, case.loop.own_hooks(), case.method, case.loop.recipe)
    names = [n for n, _ in case.model.named_parameters()]
    names += [f"hook.{n}" for h in case.loop.own_hooks() for n, _ in h.named_parameters()]
    names += [n for n, _ in ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B").named_parameters()]
    for group in case.method.param_groups:  # `optional` is for other widths and nets; all must be found here, or there
        assert any(fnmatchcase(n, group["match"]) for n in names), group["match"]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) >= {id(p) for p in case.model.parameters()}


def test_two_steps_leave_a_finite_loss_and_move_every_parameter(case: Case) -> None:
    hooks = {f"hook.{n}": p for h in case.loop.own_hooks() for n, p in h.named_parameters()}
    named = {**dict(case.model.named_parameters()), **hooks}
    before = {name: p.detach().clone() for name, p in named.items()}
    losses: list[float] = []
    forward = case.loop._forward_backward
    case.loop._forward_backward = lambda share: (losses.append(float(loss := forward(share))), loss)[1]  # type: ignore[method-assign]
    state = {k: v.clone() for k, v in case.model.state_dict().items() if isinstance(v, Tensor)}
    case.loop.train()
    if case.method.only_acts:  # then there are no steps, whatever is asked for, and what acts moves what it will
        assert losses == []
        assert [k for k, v in case.model.state_dict().items() if isinstance(v, Tensor) and not v.equal(state[k])]
        return
    assert len(losses) == 2 * len(case.loop.optimizer.turns)
    assert all(map(math.isfinite, losses))
    allowed = case.method.unmoved
    still = [n for n, p in named.items() if p.detach().equal(before[n]) or p.grad is None or not p.grad.any()]
    assert not [n for n in still if not any(fnmatchcase(n, pattern) for pattern in allowed)]
    assert all(p.isfinite().all() for p in named.values())


def test_unmoved_patterns_name_parameters(case: Case) -> None:
    names = [n for n, _ in case.model.named_parameters()]
    names += [f"hook.{n}" for h in case.loop.own_hooks() for n, _ in h.named_parameters()]
    assert all(any(fnmatchcase(n, pattern) for n in names) for pattern in case.method.unmoved)


def _groups(q: Quantizer, x: Tensor, hat: Tensor) -> Iterator[tuple[Tensor, float]]:
    """(values that share a scale and a width, the most of them that the bits allow)."""
    grid = q.grid(x)
    if isinstance(grid, Affine) and grid.view:  # groups: those of an equal grid are one
        scales = [torch.as_tensor(t).double().expand(grid.view[0], 1) for t in (grid.step, grid.zero, grid.hi)]
        same = torch.cat(scales, 1).unique(dim=0, return_inverse=True)[1]
        most = torch.as_tensor(2**grid.width).expand(grid.view[0], 1)
        assert q.bits == pytest.approx(most.double().log2().mean().item())
        yield from ((hat.reshape(grid.view)[same == i], most[same == i][0].item()) for i in same.unique())
    else:
        rows = hat.flatten(1) if q.granularity == "per_channel" else hat.reshape(1, -1)
        yield from ((row, 2 ** math.ceil(q.bits)) for row in rows)


@pytest.mark.parametrize(("name", "w_bits", "a_bits"), list(width_cases()))
def test_bits_mean_levels(name: str, w_bits: float, a_bits: float, tmp_path: Path) -> None:
    case = build(config_of(name, f"w_bits={w_bits}", f"a_bits={a_bits}", *WITH.get((name, w_bits), ())), tmp_path)
    case.model.eval()  # a grid is that of evaluation
    layers = weight_layers(case.model)
    manifest = surgery.manifest(case.model, case.kept)
    assert json.loads(json.dumps(manifest, allow_nan=False))["size"]["bytes"] > 0  # a run writes it
    assert set(manifest["weights"]) == {n for n, _ in case.model.named_parameters()}
    for entry in manifest["weights"].values():
        assert ("quantizer" in entry) + ("why" in entry) + ("part_of" in entry) == 1
    if not layers:  # nothing to count: the manifest must say so
        assert w_bits == bits.FLOAT
        assert not [e for e in manifest["weights"].values() if "quantizer" in e]
        assert manifest["size"]["bits_per_weight"] == 32
    elif w_bits < bits.FLOAT and NODES[name]["w_bits"].get("learned"):
        mean = surgery.learned_bits(case.model, NODES[name])["w_bits_learned"]
        assert w_bits - 1 < mean < w_bits + 0.01
    elif w_bits < bits.FLOAT:
        assert any(abs(layer.weight_quantizer.bits - w_bits) < 0.01 for layer in layers.values())  # type: ignore[union-attr]
    for layer_name, layer in layers.items():
        q = layer.weight_quantizer
        assert q is not None
        entry = manifest["weights"][f"{layer_name}.weight"]
        assert entry["bits"] == q.bits
        assert tuple(entry["shape"]) == layer.weight_shape
        with torch.no_grad(), evaluating(q):  # in training it may add noise
            hat = q(layer.weight)
        assert tuple(hat.shape) == layer.weight_shape
        # below one bit per weight neighbours share their bits, and a whole channel may happen to be equal
        least = 2 if q.bits >= 1 else 1
        assert len(hat.unique()) >= 2
        for row, most in _groups(q, layer.source().detach(), hat):
            rounded = (
                row / row.abs().max().clamp_min(1e-30) * 2**20
            ).round()  # sums of the same planes may differ in their last bit
            assert least <= len(rounded.unique()) <= min(most, q.levels), layer_name
    seen = _activation_outputs(case)
    for q_name, (q, outputs) in seen.items():
        if q.granularity == "per_tensor":
            assert len(outputs.unique()) <= min(2**q.bits, q.levels), q_name
            assert manifest["activations"][q_name]["bits"] == q.bits
    if a_bits < bits.FLOAT and NODES[name]["a_bits"].get("learned"):
        assert min(q.bits for q, _ in seen.values()) <= a_bits <= max(q.bits for q, _ in seen.values())
    elif a_bits < bits.FLOAT:
        assert any(q.bits == a_bits for q, _ in seen.values())
    elif not any("first" in str(k) or "last" in str(k) for k in case.config["options"]):
        assert not seen


def _activation_outputs(case: Case) -> dict[str, tuple[Quantizer, Tensor]]:
    seen: dict[str, tuple[Quantizer, Tensor]] = {}
    handles = [
        q.register_forward_hook(lambda q, args, y, name=name: seen.update({name: (q, y)}))  # type: ignore[misc]
        for name, q in surgery.activation_quantizers(case.model).items()
    ]
    eval_logits(case.model, case.x)
    for handle in handles:
        handle.remove()
    return seen


def test_quantizing_twice_changes_nothing_where_the_paper_is_idempotent(case: Case) -> None:
    case.model.eval()
    for name, layer in weight_layers(case.model).items():
        q = layer.weight_quantizer
        assert q is not None
        if q.idempotent:
            with torch.no_grad(), evaluating(q):
                hat = q(layer.weight)
                torch.testing.assert_close(q(hat), hat, rtol=1e-6, atol=1e-9, msg=name)
    for name, (q, y) in _activation_outputs(case).items():
        if q.idempotent and q.granularity == "per_tensor":
            torch.testing.assert_close(q(y).detach(), y, rtol=1e-6, atol=1e-9, msg=name)


def _seen(case: Case) -> dict[str, tuple[Quantizer, Tensor]]:
    """{name: (quantizer, what it quantizes in evaluation)} of all weights, activations and errors."""
    case.model.eval()
    seen: dict[str, tuple[Quantizer, Tensor]] = {}
    for name, layer in quant_layers(case.model):
        if layer.weight_quantizer is not None:
            seen[f"{name}.weight"] = (layer.weight_quantizer, layer.source().detach())
        if layer.error_quantizer is not None:
            seen[f"{name}.error"] = (layer.error_quantizer, torch.randn(4, 3, 2, 2))
    found = surgery.activation_quantizers(case.model)
    handles = [
        q.register_forward_pre_hook(lambda q, args, name=name: seen.update({name: (q, args[0].detach())}))  # type: ignore[misc]
        for name, q in found.items()
    ]
    eval_logits(case.model, case.x)
    for handle in handles:
        handle.remove()
    assert set(found) <= set(seen)
    return seen


def _same(a: Grid, b: Grid, names: Sequence[str] = ()) -> bool:
    """Whether two grids are of a kind and equal, in all fields or in those named."""

    def plain(grid: Grid) -> dict[str, Any]:
        values = {name: getattr(grid, name) for name in names or [f.name for f in fields(grid)]}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}

    return type(a) is type(b) and plain(a) == plain(b)


def test_codes_on_the_grid_are_the_forward(case: Case) -> None:
    for name, (q, x) in _seen(case).items():
        grid, codes = q.grid(x), q.codes(x)
        with torch.no_grad():
            hat = q.quantize(x)
        assert codes.dtype == torch.int32, name
        rows = codes.reshape(grid.view) if isinstance(grid, Affine) and grid.view else codes
        assert ((grid.lo <= rows) & (rows <= grid.hi)).all(), name
        assert torch.as_tensor(grid.hi < grid.lo + 2**grid.width).all(), name
        torch.testing.assert_close(grid.values(codes), hat, rtol=1e-5, atol=1e-6 * float(hat.abs().max()), msg=name)
        assert len(codes.unique()) <= grid.levels == q.levels, name
        least, greatest = (end.abs().max().item() for end in grid.ends())
        most, near = hat.abs().max().item(), max(least, greatest)
        assert most <= near * (1 + 1e-5), name
        assert most == pytest.approx(near, rel=1e-5) or not q.grid().dynamic, name  # a scale of x's own fits x
        assert not grid.dynamic, name
        assert not any(t.requires_grad for t in vars(grid).values() if isinstance(t, Tensor)), name


def test_a_grid_needs_no_data_and_a_forward_does_not_move_it(case: Case, tmp_path: Path) -> None:
    """Without data the kind, the codes and their number are known; all else too, where no tensor decides it."""
    case.model.eval()
    quantizers = {n: m for n, m in case.model.named_modules() if isinstance(m, Quantizer)}
    before = {name: q.grid() for name, q in quantizers.items()}
    seen = _seen(case)
    for name, q in quantizers.items():
        assert _same(q.grid(), before[name]), name
    for name, (q, x) in seen.items():
        free, own = q.grid(), q.grid(x)
        assert _same(free, own, ("lo", "hi", "levels")), name
        assert free.dynamic or _same(free, own), name
    other = build(config_of(case.config["method"]["name"], "train.steps=2", "seed=1"), tmp_path)
    other.model.load_state_dict(case.model.state_dict())
    assert {n: _same(m.grid(), before[n]) for n, m in other.model.named_modules() if n in before} == dict.fromkeys(
        before, True
    )


def test_the_ends_of_a_grid_are_attained(case: Case) -> None:
    for name, q in surgery.activation_quantizers(case.model).items():
        grid = q.eval().grid()
        assert not grid.dynamic, f"{name}: an executor must know the range of an activation"
        x = next(x for n, (_, x) in _seen(case).items() if n == name)
        wide = torch.linspace(-1, 1, 4001) * 3 * max(1.0, *(float(end.abs().max()) for end in grid.ends()))
        with torch.no_grad():
            hat = q.quantize(wide.view(-1, *[1] * (x.dim() - 1)).expand(-1, *x.shape[1:]))
        for found, end in ((hat.amin(), grid.ends()[0].min()), (hat.amax(), grid.ends()[1].max())):
            torch.testing.assert_close(found, end, rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_stored_gives_the_codes_back_and_its_length_is_the_size(case: Case) -> None:
    case.model.eval()
    parts = surgery.packed(case.model)
    files = {name: part.pack() for name, part in parts.items()}
    manifest = surgery.manifest(case.model, case.kept)
    assert manifest["size"]["bytes"] == sum(map(len, files.values()))
    bits = numel = 0
    for name, layer in weight_layers(case.model).items():
        q, source = layer.weight_quantizer, layer.source().detach()
        assert q is not None
        stored, tables = q.stored(source), q.grid(source).tables()
        read = {part: held.unpack(files[f"{name}.weight.{part}"]) for part, held in stored.items()}
        assert q.restored(read).equal(q.codes(source)), name
        entry = manifest["weights"][f"{name}.weight"]
        assert entry["stored_bits"] == sum(p.bits for p in (*stored.values(), *tables.values()))
        assert entry["scale_bits"] == sum(p.bits for p in tables.values())
        bits, numel = bits + entry["stored_bits"], numel + entry["numel"]
    shared = sum(part.bits for name, part in parts.items() if not isinstance(name, str))
    if numel:
        assert manifest["size"]["bits_per_weight"] == pytest.approx((bits + shared) / numel)


def test_a_packed_file_gives_the_net_and_is_as_large_as_the_manifest_says(case: Case) -> None:
    """Decoded from the codes alone: the same weights and logits, bit for bit; the bytes are those of its parts."""
    wanted, values = eval_logits(case.model, case.x), {n: m.quantized_weight() for n, m in quant_layers(case.model)}
    data = packed.file_of(case.model, case.config, {})
    file = Artifact(container.opened(data, "file"))
    model = packed.net_of(file)
    assert eval_logits(model, case.x).equal(wanted)
    assert {n: m.quantized_weight().equal(values[n]) for n, m in quant_layers(model)} == dict.fromkeys(values, True)
    roles = {name: entry["role"] for name, entry in file.meta["parts"].items()}
    held = sum(array.nbytes for name, array in file.file.arrays.items() if roles[name] != "state")
    assert held == surgery.manifest(case.model, case.kept)["size"]["bytes"] == file.meta["sizes"]["bytes"]
    assert surgery.size(model) == surgery.size(case.model)
    for name, layer in weight_layers(case.model).items():
        codes, q = layer.weight_quantizer.codes(layer.source().detach()), model.get_submodule(name).weight_quantizer
        assert q.codes(layer.weight).equal(codes), name
        assert q.restored(q.stored(layer.weight)).equal(codes), name
    again = container.opened(packed.file_of(model, case.config, {}), "again")
    packed_parts = [name for name, role in roles.items() if role in ("weight", "shared")]
    assert all(again.arrays[name].tobytes() == file.file.arrays[name].tobytes() for name in packed_parts)


def test_state_dict_carries_everything(case: Case, tmp_path: Path) -> None:
    case.loop.train()
    name = case.config["method"]["name"]
    other = build(config_of(name, "train.steps=2", "seed=1"), tmp_path)
    assert not eval_logits(other.model, case.x).equal(eval_logits(case.model, case.x))
    path = tmp_path / "model.pt"
    checkpoint.save(path, case.model.state_dict())
    other.model.load_state_dict(checkpoint.load(path))
    assert eval_logits(other.model, case.x).equal(eval_logits(case.model, case.x))


def test_one_pass_over_all_weights_equals_each_layer_alone(case: Case) -> None:
    layers = weight_layers(case.model)
    case.model.train()
    gradients = []
    for together in (True, False):
        for q in [m for m in case.model.modules() if isinstance(m, Quantizer)]:
            q.generator = torch.Generator().manual_seed(0)
        case.model.zero_grad()
        hats = []
        if together:
            with quantized_weights(case.model):
                hats = [layer.quantized_weight() for layer in layers.values()]
            assert all(layer._weight_hat is None for layer in layers.values())
        else:
            hats = [layer.quantized_weight() for layer in layers.values()]
        case.model.zero_grad()
        draw = torch.Generator().manual_seed(0)
        torch.autograd.backward(hats, [torch.randn(hat.shape, generator=draw) for hat in hats])
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in case.model.named_parameters()}
        gradients.append(([h.detach() for h in hats], grads))
    for a, b in zip(gradients[0][0], gradients[1][0], strict=True):
        assert a.equal(b)
    for name, g in gradients[0][1].items():
        h = gradients[1][1][name]
        assert (g is None) == (h is None), name
        if g is not None:
            torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-7, msg=name)
    alone = eval_logits(case.model, case.x)
    with quantized_weights(case.model):
        assert eval_logits(case.model, case.x).equal(alone)


def test_evaluation_is_deterministic_and_changes_nothing(case: Case, tmp_path: Path) -> None:
    case.loop.train()
    before = {k: v.clone() for k, v in case.model.state_dict().items() if isinstance(v, Tensor)}
    first = eval_logits(case.model, case.x)
    assert first.isfinite().all()
    with closing(Recorder(tmp_path / "activations", tensorboard=False)) as recorder:
        record_activations(case.model, case.loop.state, recorder)
    found = [*read_metrics(recorder.folder), {"activations": {}}][0]["activations"]
    assert len(found) == sum(q.enabled for q in surgery.activation_quantizers(case.model).values())
    assert all(h["count"] and not h["nonfinite"] and h["codes"]["distinct"] <= h["levels"] for h in found.values())
    assert eval_logits(case.model, case.x).equal(first)
    for key, value in case.model.state_dict().items():
        assert not isinstance(value, Tensor) or value.equal(before[key])


@pytest.mark.parametrize("name", NAMES)
def test_the_float_parents_checkpoint_loads(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    data = load(config["dataset"])
    parent = make_model({**parent_of(config), "seed": 1}, data)
    checkpoint.save(tmp_path / "model.pt", parent.state_dict())
    model = make_model(config, data)
    assert checkpoint.load_weights(model, tmp_path / "model.pt") == []
    x = torch.randn(4, 3, 8, 8)
    assert eval_logits(model, x).equal(eval_logits(parent, x))


@pytest.mark.parametrize("name", [n for n in NAMES if NODES[n].get("w_bits", {}).get("float")])
def test_thirty_two_bits_leave_the_net_in_float(name: str, tmp_path: Path) -> None:
    node = NODES[name]
    a_bits = 32 if bits.allows(node["a_bits"], 32) else node["a_bits"]["default"]
    case = build(config_of(name, "w_bits=32", f"a_bits={a_bits}"), tmp_path)
    quantized = {n: q.bits for n, layer in weight_layers(case.model).items() if (q := layer.weight_quantizer)}
    own = {v for v in case.config["options"].values() if isinstance(v, int | float)}  # say 8 bits for first and last
    assert set(quantized.values()) <= own
