"""ptq: batch-norms folded by hand, and the whole method on small nets."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.data import load
from qbench.errors import UserError
from qbench.methods.dfq import BoundedReLU
from qbench.methods.shared.fold import fold
from qbench.models.resnet import ResNetCIFAR
from qbench.models.tiny import Tiny
from qbench.quant import surgery
from qbench.quant.floating import Floating
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Rule
from qbench.quant.uniform import Uniform
from qbench.training import evaluation
from qbench.training.build import Assembly, assemble
from qbench.training.trainer import Trainer

torch.set_num_threads(1)


def lived_in(model: nn.Module) -> nn.Module:
    """`model` in eval mode with statistics and affine parameters as after a training."""
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(m.weight, 0.5, 2, generator=generator)
            nn.init.normal_(m.bias, generator=generator)
    return model.eval()


def rules(w_bits: int, a_bits: int, **weight: object) -> list[Rule]:
    slots = {
        "weight": partial(Uniform, bits=w_bits, **{"per_channel": True, **weight}),
        "input": partial(Uniform, bits=a_bits),
    }
    return [Rule(pair="BatchNorm*", replace=fold, optional=True, **slots), Rule(**slots)]


def quantized(model: nn.Module, x: Tensor, recipe: list[Rule]) -> nn.Module:
    model = deepcopy(model)
    surgery.quantize(model, recipe)
    evaluation.calibrate(model, [(x, x)], torch.device("cpu"), "fp32", scratch=False)
    return model.eval()


def images(n: int = 16) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_fold_by_hand() -> None:
    """1712.05877: w=.4, gamma=1.5, beta=.3, mu=.1, var+eps=1 -> w_fold=.6, b_fold=.15."""
    conv, bn = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        conv.weight.fill_(0.4)
        bn.weight.fill_(1.5)
        bn.bias.fill_(0.3)
        bn.running_mean.fill_(0.1)
    layer = fold(conv, "replace", bn)
    assert layer.weight.item() == pytest.approx(0.6)
    assert layer.bias is not None
    assert layer.bias.item() == pytest.approx(0.15)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "bn", "shape"),
    [
        (partial(nn.Conv2d, 4, 6, 3), nn.BatchNorm2d, (5, 4, 6, 6)),
        (partial(nn.Conv2d, 6, 6, 3, groups=6, bias=False), nn.BatchNorm2d, (5, 6, 6, 6)),
        (partial(nn.Linear, 4, 6), nn.BatchNorm1d, (5, 4)),
    ],
)
def test_fold_leaves_the_function_alone(layer: partial, bn: type, shape: tuple[int, ...], affine: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pair = nn.Sequential(layer(), bn(6, affine=affine)).train()
    pair(x)
    pair.eval()
    expected = pair(x)
    assert torch.allclose(fold(pair[0], "replace", pair[1])(x), expected, atol=1e-5)


def test_fold_without_a_pair_is_the_layer_itself() -> None:
    layer = nn.Linear(3, 2)
    assert fold(layer, "replace").weight is layer.weight


@pytest.mark.parametrize("pair", [nn.ReLU(), nn.BatchNorm2d(1, track_running_stats=False)])
def test_fold_refuses(pair: nn.Module) -> None:
    with pytest.raises(ValueError, match="only a batch-norm with running statistics can be folded"):
        fold(nn.Conv2d(1, 1, 1), "replace", pair)


def test_every_layer_is_quantized_and_no_batch_norm_is_left() -> None:
    model = lived_in(ResNetCIFAR(channels=3, classes=10, size=16, depth=8, shortcut="B"))
    net = quantized(model, images(), rules(8, 8))
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) for m in net.modules())
    manifest = surgery.manifest(net, {})
    assert all(e["bits"] == 8 for name, e in manifest["weights"].items() if name.endswith("weight"))
    assert len(manifest["activations"]) == len(list(quant_layers(net))) == 10
    for _, layer in quant_layers(net):
        assert isinstance(layer, QuantLayer)
        for row in layer.quantized_weight():
            assert row.unique().numel() <= 256


def test_error_falls_with_bits() -> None:
    x, model = images(), lived_in(Tiny(channels=3, classes=10, size=16))
    y = model(x)
    errors = [(quantized(model, x, rules(b, b))(x) - y).norm() / y.norm() for b in (2, 4, 8, 16)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[2] < 0.02
    assert errors[3] < 1e-4


def test_per_channel_saves_weights_of_unlike_channels() -> None:
    x, model = images(), lived_in(Tiny(channels=3, classes=10, size=16))
    with torch.no_grad():
        model.get_submodule("bn2").weight.copy_(torch.logspace(-2, 2, 8))
    weight = fold(deepcopy(model.get_submodule("conv2")), "replace", model.get_submodule("bn2")).weight
    relative = []
    for per_channel in (False, True):
        layer = quantized(model, x, rules(4, 16, per_channel=per_channel)).get_submodule("conv2")
        assert isinstance(layer, QuantLayer)
        difference = (layer.quantized_weight() - weight).flatten(1)
        relative.append((difference.norm(dim=1) / weight.flatten(1).norm(dim=1)).max())
    assert relative[0] > 0.9  # the smallest channels are lost
    assert relative[1] < 0.2


def test_ranges_do_not_depend_on_how_the_images_are_cut_into_batches() -> None:
    x, model = images(), lived_in(Tiny(channels=3, classes=10, size=16))
    nets = []
    for size in (16, 4):
        net = deepcopy(model)
        surgery.quantize(net, rules(8, 8))
        evaluation.calibrate(net, [(part, part) for part in x.split(size)], torch.device("cpu"), "fp32", scratch=False)
        nets.append(net)
    for (_, a), (_, b) in zip(*(quant_layers(net) for net in nets), strict=True):
        assert a.input_quantizer is not None
        assert b.input_quantizer is not None
        assert torch.allclose(a.input_quantizer.hi, b.input_quantizer.hi, rtol=1e-5)


def test_trains_when_asked_to() -> None:
    model = lived_in(Tiny(channels=3, classes=10, size=16))
    net = quantized(model, images(), rules(4, 4)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images()), torch.arange(16) % 10)
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


# --- options, through the YAML


def assembled(*words: str) -> Assembly:
    here = ("budget=smoke", "device=cpu", "init=scratch", "dataset=synthetic", "dataset.train_size=64")
    net = () if any("model=" in w for w in words) else ("model=mobilenet_v2", "model.width=0.1")
    config = resolve_row(["method=ptq", "dataset.size=8", *here, *net, *words])
    return assemble(config, load(config["dataset"]), lived_in)


def run_of(tmp_path: Path, *words: str) -> tuple[nn.Module, dict[str, str], Trainer]:
    """The calibrated net, what was kept, and its loop."""
    net = assembled(*words)
    loop = net.trainer(tmp_path)
    net.calibrate(loop)
    return net.model.eval(), net.kept, loop


@pytest.mark.parametrize(("word", "bits"), [("fp16", 16), ("e4m3", 8), ("e5m2", 8)])
def test_weights_stored_as_floats(word: str, bits: int, tmp_path: Path) -> None:
    net, kept, _ = run_of(tmp_path, f"options.w_format={word}", f"w_bits={bits}")
    manifest = surgery.manifest(net, kept)
    weights = {n: e for n, e in manifest["weights"].items() if n.endswith("weight")}
    assert {(e["quantizer"], e["bits"], e["format"]) for e in weights.values()} == {("Floating", bits, word)}
    assert bits <= manifest["size"]["bits_per_weight"] < bits * 1.3
    assert manifest["size"]["bytes"] == sum(len(part.pack()) for part in surgery.packed(net).values())
    for _, layer in quant_layers(net):
        q = layer.weight_quantizer
        assert isinstance(q, Floating)
        assert q.grid().values(q.codes(layer.weight)).allclose(layer.quantized_weight(), rtol=1e-6, atol=0)


def test_an_option_of_each_kind_reaches_its_quantizer(tmp_path: Path) -> None:
    words = ("group=12", "w_range=std", "w_clip=2", "a_range=ema", "ema_decay=0.5", "a_symmetric=true")
    net, *_ = run_of(tmp_path, *(f"options.{w}" for w in words), "options.half_range=never")
    for _, layer in quant_layers(net):
        w, a = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(w, Uniform)
        assert isinstance(a, Uniform)
        assert (w.granularity, w.range, w.clip) == ("per_group", "std", 2)
        assert len(w.grid().step) * w.grid().view[1] == layer.weight.numel()
        assert (a.range, a.decay, a.half_range, a.bounds) == ("ema", 0.5, "never", (-128, 127))


SMALL = ("model=resnet20", "model.depth=8", "model.width=0.25")


@pytest.mark.parametrize(
    ("words", "net"),
    [
        (("equalize=true",), ()),
        (("equalize=true", "absorb=true", "relu6=relu", "bias_correction=analytic", "per_channel=false"), ()),
        (("bias_correction=empirical",), SMALL),
        (("fold=null", "reestimate=true", "bias_correction=empirical"), SMALL),
    ],
)
def test_what_is_put_right_travels_with_the_net(words: tuple[str, ...], net: tuple[str, ...], tmp_path: Path) -> None:
    """A net built afresh gives the same once it has read the state; without the option it is another net."""
    options = [f"options.{w}" for w in words]
    made, _, loop = run_of(tmp_path, *options, *net)
    plain, *_ = run_of(tmp_path, *net)
    (x, _), *_ = loop.state.calibration.epoch(0)
    assert not made(x).allclose(plain(x), rtol=1e-3)
    again = assembled(*options, *net, "seed=1").model.eval()
    again.load_state_dict(made.state_dict())
    assert again(x).equal(made(x))
    assert any(isinstance(m, BoundedReLU) for m in made.modules()) == (words == ("equalize=true",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("options.w_format=fp8", "w_bits=8"), "w_format must be one of integer, fp16, e4m3, e5m2, got 'fp8'"),
        (("options.w_format=fp16",), "weights stored as fp16 have 16 bits: w_bits=16, got 8"),
    ],
)
def test_formats_have_their_own_bits(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_row(["method=ptq", "model=tiny", "dataset=synthetic", *words])
