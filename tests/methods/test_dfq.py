"""DFQ: factors by hand, nets that give what they gave before, absorption, and MobileNet's weights at 8 bits."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ptq import images, lived_in, rules
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.methods import dfq
from qbench.methods.dfq import BoundedReLU, Equalize, chains, factors, relu6
from qbench.models.mobilenet import MobileNetV2
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Rule, State
from qbench.quant.passes import as_float, recalibrate

torch.set_num_threads(1)


def state_of(net: nn.Module, x: Tensor) -> State:
    batches: Any = SimpleNamespace(epoch=lambda epoch: [(x, x)])
    return State(net, torch.Generator(), calibration=batches)


def prepared(net: nn.Module, w_bits: int = 8, becomes: str = "bound", **weight: Any) -> nn.Module:
    bounded = Rule(kind="ReLU6", replace=partial(relu6, becomes=becomes), channels=True, optional=True)
    surgery.quantize(net, [*rules(w_bits, 16, **weight), bounded])
    return net.eval()


def test_factors_by_hand() -> None:
    """r1 = [8, .5], r2 = [.5, 2]: s = [4, .5], and both ranges become [2, 1]; twice is no change."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-8.0], [0.5]]))
        net[0].bias.copy_(torch.tensor([2.0, 3.0]))
        net[2].weight.copy_(torch.tensor([[0.5, -2.0]]))
    prepared(net)
    (chain,) = chains(net)
    chain.first.moments = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.5])
    s = factors(chain)
    assert s.tolist() == [4, 0.5]
    dfq.scale(chain, s)
    assert net[0].weight.flatten().tolist() == [-2, 1]
    assert net[0].bias.tolist() == [0.5, 6]
    assert net[2].weight.flatten().tolist() == [2, -1]
    assert [t.tolist() for t in chain.first.moments] == [[0.25, 4], [1, 1]]
    assert factors(chain).tolist() == [1, 1]


def test_a_channel_without_weights_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0], [0.5]]))
        net[2].weight.copy_(torch.tensor([[0.5, 0.0]]))
    (chain,) = chains(prepared(net))
    assert factors(chain).tolist() == [1, 1]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_second_layer_and_a_flattened_image(groups: int) -> None:
    """r2 of an input channel is what its own group has; a linear layer has four inputs of each channel."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU6(),
        nn.Conv2d(4, 8, 3, groups=groups),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    x, plain = torch.randn(7, 3, 6, 6), deepcopy(net)
    prepared(net)
    found = list(chains(net))
    assert len(found) == 2
    s = factors(found[0])
    for c in range(4):
        group, place = divmod(c, 4 // groups)
        readers = plain[2].weight.detach().unflatten(0, (groups, -1))[group, :, place]
        r1 = plain[0].weight[c].abs().max()
        assert s[c].item() == pytest.approx((r1 / readers.abs().max()).sqrt().item(), rel=1e-5)
    Equalize().after_calibrate(state_of(net, x))
    assert all(factors(c).sub(1).abs().max() < 1e-4 for c in chains(net))
    with as_float(net):
        torch.testing.assert_close(net(x), plain(x), rtol=1e-5, atol=1e-5)


NETS = {
    "resnet20": lambda: ResNetCIFAR(channels=3, classes=10, size=16, depth=20, width=0.5),
    "mobilenet_v2": lambda: MobileNetV2(channels=3, classes=10, size=16, width=0.25),
}
# ResNet-20: the two convolutions of nine blocks. MobileNetV2: stem, expansion, depthwise and projection: two chains in
# each of 17 blocks (the first has none for an expansion), the stem's, and that from the last conv to the classifier.
CHAINS = {"resnet20": 9, "mobilenet_v2": 16 * 2 + 1 + 1 + 1}


@pytest.mark.parametrize("name", NETS)
def test_the_float_net_gives_what_it_gave(name: str) -> None:
    torch.manual_seed(0)
    net = lived_in(NETS[name]())
    x = images(4)
    want = net(x).detach()
    prepared(net, 16)
    ranges = {n: layer.weight.detach().abs().max() for n, layer in quant_layers(net)}
    Equalize().after_calibrate(state_of(net, x))
    with as_float(net):
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert len(list(chains(net))) == CHAINS[name]
    moved = [n for n, layer in quant_layers(net) if layer.weight.abs().max() != ranges[n]]
    assert len(moved) > CHAINS[name]
    assert (net(x) - want).norm() / want.norm() < 0.005  # on the ranges of the new weights and activations


def test_per_tensor_weights_of_unlike_channels_are_saved() -> None:
    """The same net with channels a hundredfold apart: at 8 bits little is left of it, until it is equalized."""
    torch.manual_seed(0)
    net = prepared(lived_in(NETS["mobilenet_v2"]()), per_channel=False)
    x = images(4)
    with as_float(net):
        want = net(x).detach()
    for chain in chains(net):
        dfq.scale(chain, torch.rand(chain.first.weight_shape[0]).mul(2).sub(1).mul(2.3).exp())
    errors = []
    for equalize in (False, True):
        recalibrate(net, [(x, x)])
        Equalize(equalize).after_calibrate(state_of(net, x))
        errors.append(((net(x) - want).norm() / want.norm()).item())
    assert errors[1] < errors[0] / 3, errors


def test_absorption_by_hand() -> None:
    """beta = 1, gamma = .2: c = .4 moves from b1 to W2 c in b2; a channel of beta = .5, gamma = 1 keeps its bias."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU6(), nn.Linear(2, 3))
    prepared(net)
    (chain,) = chains(net)
    chain.first.moments = torch.tensor([1.0, 0.5]), torch.tensor([0.2, 1.0])
    b1, b2 = net[0].bias.detach().clone(), net[2].bias.detach().clone()
    assert dfq.absorb(chain)
    assert (b1 - net[0].bias).tolist() == pytest.approx([0.4, 0])
    torch.testing.assert_close(net[2].bias - b2, 0.4 * net[2].weight[:, 0])
    assert chain.first.moments[0].tolist() == pytest.approx([0.6, 0.5])
    assert net[1].bound.tolist() == pytest.approx([5.6, 6])


@pytest.mark.parametrize("padding", [0, 1])
def test_absorption_leaves_what_lies_above_alone_and_keeps_out_of_padding(padding: int) -> None:
    """Exact where all values exceed c: clip(x - c, 0, 6 - c) + c is clip(x, 0, 6) then."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4)
    nn.init.constant_(bn.weight, 0.1)
    nn.init.constant_(bn.bias, 2.0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), bn, nn.ReLU6(), nn.Conv2d(4, 4, 3, groups=2, padding=padding))
    x = torch.rand(5, 3, 6, 6)
    want = net.eval()(x)
    prepared(net)
    Equalize(absorb=True).after_calibrate(state_of(net, x))
    moments = net[0].moments
    assert moments is not None
    assert bool((moments[0] > 3.5 * moments[1]).all()) == bool(padding)
    with as_float(net):
        torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)


def test_a_bounded_relu_is_a_relu6_with_its_gradient() -> None:
    x = torch.tensor([[-1.0, 0.5], [3.0, 9.0]], requires_grad=True)
    net = BoundedReLU(2)
    net.bound.copy_(torch.tensor([2.0, 6.0]))
    net(x).sum().backward()
    assert net(x).tolist() == [[0, 0.5], [2, 6]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1], [0, 0]]
    fresh = torch.randn(3, 4, 5, 5) * 9
    assert BoundedReLU(4)(fresh).equal(nn.ReLU6()(fresh))
    assert isinstance(relu6(nn.ReLU6(), "replace", 3, "relu"), nn.ReLU)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="absorb=true is for equalize=true"):
        Equalize(equalize=False, absorb=True)
    with pytest.raises(ValueError, match="relu6 must be one of bound, relu, got 'six'"):
        relu6(nn.ReLU6(), "replace", 3, "six")
    net = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2))
    with pytest.raises(UserError, match="no two layers of this net follow each other"):
        Equalize().after_calibrate(state_of(prepared(net), torch.zeros(1, 2)))


def test_a_loaded_net_gives_the_same() -> None:
    torch.manual_seed(0)
    net = prepared(lived_in(NETS["mobilenet_v2"]()))
    x = images(4)
    Equalize().after_calibrate(state_of(net, x))
    other = prepared(lived_in(NETS["mobilenet_v2"]()))
    other.load_state_dict(net.state_dict())
    assert other(x).equal(net(x))
    assert all(isinstance(layer, QuantLayer) for _, layer in quant_layers(other))
