"""A part of a net by itself: in float, calibrated, its input and its output; on a net with residual blocks."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.methods.shared.fold import fold
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.layers import quant_layers, quantized_weights
from qbench.quant.method import SITES, Rule
from qbench.quant.passes import ACTIVATIONS, as_float, at_site, calibrating, layer_io, recalibrate, visits
from qbench.quant.quantizer import Quantizer
from qbench.quant.uniform import Uniform

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def batches() -> Batches:
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 8, 8, generator=random), torch.zeros(n, dtype=torch.long)) for n in (4, 4, 3)]


@pytest.fixture
def nets(batches: Batches) -> tuple[nn.Module, nn.Module]:
    """(float net, the same quantized to 3 bits with its batch-norms folded and all sites of the stem in use)."""
    torch.manual_seed(0)
    net = ResNetCIFAR(channels=3, classes=10, size=8, depth=8, shortcut="B").train()
    for x, _ in batches * 5:
        net(x)
    quantized = deepcopy(net.eval())
    slots = {"weight": partial(Uniform, bits=3, per_channel=True), "input": partial(Uniform, bits=3)}
    ends = {s: partial(Uniform, bits=3) for s in ("output", "error")}
    surgery.quantize(
        quantized,
        [
            Rule("@first", pair="BatchNorm*", replace=fold, **slots, **ends),
            Rule(pair="BatchNorm*", replace=fold, **slots),
            Rule(**slots),
            Rule(kind="ReLU", match="layer1*relu1", replace=partial(Relu, bits=3)),
        ],
    )
    with torch.no_grad(), calibrating(quantized):
        for x, _ in batches:
            quantized(x)
    return net, quantized.eval()


class Relu(Uniform):
    """In place of a ReLU."""

    def bypass(self, x: Tensor) -> Tensor:
        return x.relu()

    def quantize(self, x: Tensor) -> Tensor:
        return super().quantize(x.relu())


def logits(net: nn.Module, batches: Batches) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(x) for x, _ in batches])


def enabled(net: nn.Module) -> list[bool]:
    return [m.enabled for m in net.modules() if isinstance(m, Quantizer)]


def test_a_net_as_float_is_the_float_net(nets: tuple[nn.Module, nn.Module], batches: Batches) -> None:
    net, quantized = nets
    before = logits(quantized, batches)
    with as_float(quantized):
        torch.testing.assert_close(logits(quantized, batches), logits(net, batches), rtol=1e-4, atol=1e-5)
    assert (logits(quantized, batches) - logits(net, batches)).abs().max() > 0.05
    assert logits(quantized, batches).equal(before)


@pytest.mark.parametrize("part", ["layer2.0", "layer2.0.conv2", "fc", "layer1.0.relu1"])
def test_one_layer_or_block_as_float(part: str, nets: tuple[nn.Module, nn.Module], batches: Batches) -> None:
    _, quantized = nets
    inside = {id(m) for m in quantized.get_submodule(part).modules()}
    with as_float(quantized.get_submodule(part)):
        for m in quantized.modules():
            assert not isinstance(m, Quantizer) or m.enabled is (id(m) not in inside)
    assert all(enabled(quantized))


@pytest.mark.parametrize("sites", [SITES, ("weight",), ACTIVATIONS, ("error",), ()])
def test_sites(sites: tuple[str, ...], nets: tuple[nn.Module, nn.Module]) -> None:
    _, quantized = nets
    counts = {site: len(at_site(quantized, site)) for site in SITES}
    assert counts == {"weight": 10, "input": 11, "output": 1, "error": 1}
    with as_float(quantized, sites):
        assert enabled(quantized).count(False) == sum(counts[site] for site in sites)
    assert all(enabled(quantized))


def test_what_was_off_stays_off_also_after_an_error(nets: tuple[nn.Module, nn.Module]) -> None:
    _, quantized = nets
    quantized.get_submodule("fc").weight_quantizer.enabled = False  # type: ignore[union-attr]
    before = enabled(quantized)
    seen: list[bool] = []

    def fails() -> None:
        with as_float(quantized), as_float(quantized.get_submodule("fc")):
            seen.extend(enabled(quantized))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not any(seen)
    assert enabled(quantized) == before
    assert before.count(False) == 1


def test_as_float_does_not_read_weights_that_were_quantized_before(
    nets: tuple[nn.Module, nn.Module], batches: Batches
) -> None:
    net, quantized = nets
    with quantized_weights(quantized):
        hats = {name: layer.quantized_weight() for name, layer in quant_layers(quantized)}
        with as_float(quantized):
            torch.testing.assert_close(logits(quantized, batches), logits(net, batches), rtol=1e-4, atol=1e-5)
        assert all(layer.quantized_weight() is hats[name] for name, layer in quant_layers(quantized))


@pytest.mark.parametrize(
    ("part", "theirs"), [("conv1", "bn1"), ("layer1.0", "layer1.0"), ("layer2.0.conv2", "layer2.0.bn2"), ("fc", "fc")]
)
def test_input_and_output_of_a_part(
    part: str, theirs: str, nets: tuple[nn.Module, nn.Module], batches: Batches
) -> None:
    """Of the float net, where a layer's batch-norm is folded; and x -> y by the part alone."""
    net, quantized = nets
    module = quantized.get_submodule(part)
    for context in (partial(as_float, quantized), partial(as_float, quantized, ())):
        with context():
            x, y = layer_io(quantized, module, batches)
            assert len(x) == len(y) == 11
            with torch.no_grad():
                torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-5)
    with as_float(quantized):
        found = layer_io(quantized, module, batches)[1]
    torch.testing.assert_close(found, layer_io(net, net.get_submodule(theirs), batches)[1], rtol=1e-4, atol=1e-5)
    assert not y.allclose(found, atol=1e-2)


def test_listening_leaves_nothing_behind(nets: tuple[nn.Module, nn.Module], batches: Batches) -> None:
    _, quantized = nets
    quantized.train()
    layer_io(quantized, quantized.get_submodule("layer2.0"), batches)
    with pytest.raises(UserError):
        layer_io(quantized, quantized.get_submodule("layer1.0.add"), batches)
    assert quantized.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in quantized.modules())


def test_what_a_later_module_does_in_place_is_not_seen() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    y = layer_io(net, net[0], [(x, x)])[1]
    assert y.equal(net[0](x))
    assert (y < 0).any()
    assert layer_io(net, net[1], [(x, x)])[0].equal(y)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda net: (Twice(), None, "fc"), r"'fc' must run once in each pass, but ran 2 times in 1"),
        (lambda net: (net, nn.Linear(2, 2), ""), r"a Linear outside must run once in each pass, but ran 0 times in 1"),
        (lambda net: (net, None, "layer1.0.add"), r"'layer1.0.add' must take one tensor as its input"),
    ],
)
def test_parts_that_cannot_be_looked_at(
    make: Callable[..., tuple[nn.Module, nn.Module | None, str]], said: str, nets: tuple[nn.Module, nn.Module]
) -> None:
    net, layer, name = make(nets[0])
    x = torch.ones(1, 2) if isinstance(net, Twice) else torch.ones(1, 3, 8, 8)
    with pytest.raises(UserError, match=said):
        layer_io(net, layer or net.get_submodule(name), [(x, x)])


def test_calibrating_a_part_moves_its_ranges_alone(nets: tuple[nn.Module, nn.Module], batches: Batches) -> None:
    _, quantized = nets
    block = quantized.get_submodule("layer2.0")
    x, _ = layer_io(quantized, block, batches)
    steps = {n: q.step.clone() for n, q in surgery.activation_quantizers(quantized).items() if isinstance(q, Uniform)}
    with torch.no_grad(), calibrating(block):
        assert not any(q.enabled for q in surgery.activation_quantizers(block).values())
        block(2 * x)
    assert all(enabled(quantized))
    moved = {n for n, q in surgery.activation_quantizers(quantized).items() if not q.grid().step.equal(steps[n])}  # type: ignore[attr-defined]
    assert moved == {n for n in steps if n.startswith("layer2.0.")}

    def fails() -> None:
        with calibrating(block):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(enabled(quantized))
    assert not any(m._forward_pre_hooks for m in quantized.modules())


def test_visits_are_the_input_and_output_batch_by_batch_and_end_the_pass(
    nets: tuple[nn.Module, nn.Module], batches: Batches
) -> None:
    _, net = nets
    for name, layer in quant_layers(net):
        want_x, want_y = layer_io(net, layer, batches)
        seen = list(visits(net, layer, batches))
        assert [len(x) for x, _ in seen] == [4, 4, 3], name
        assert torch.cat([x for x, _ in seen]).equal(want_x), name
        assert torch.cat([y for _, y in seen]).equal(want_y), name
    runs: list[int] = []
    handle = net.get_submodule("fc").register_forward_hook(lambda *args: runs.append(1))
    list(visits(net, net.get_submodule("layer1.0.conv1"), batches))
    assert runs == []
    handle.remove()
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(UserError, match="does not run in a pass"):
        next(visits(net, nn.Linear(1, 1), batches))


def test_all_ranges_are_found_again(nets: tuple[nn.Module, nn.Module], batches: Batches) -> None:
    """Of a weight and an input ten times as large they are ten times as wide."""
    _, net = nets
    layer, name = net.get_submodule("layer1.0.conv1"), "layer1.0.conv1"
    before = {s: getattr(layer, f"{s}_quantizer").hi.clone() for s in ("weight", "input")}
    with torch.no_grad():
        layer.weight.mul_(10)
        net.get_submodule("conv1").weight.mul_(10)
        net.get_submodule("conv1").bias.mul_(10)
    net.get_submodule("conv1").output_quantizer = None
    recalibrate(net, batches)
    torch.testing.assert_close(layer.weight_quantizer.hi, 10 * before["weight"])
    assert layer.input_quantizer.hi > 5 * before["input"], name
    assert enabled(net) == [True] * len(enabled(net))
