"""XNOR-Net: K by hand, bit arithmetic, gradients, the order of layers, the released code's changes."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from yamls import method_of

from qbench.methods.shared.binary import BinaryWeight, Sign
from qbench.methods.xnor import CenterAndClamp, XnorLayer
from qbench.models.resnet import ResNetCIFAR
from qbench.models.tiny import Tiny
from qbench.models.vgg_small import VGGSmall
from qbench.quant import layers, surgery
from qbench.quant.method import Method, State

IMAGE = torch.tensor([[[1.0, -2, 0.5], [0, 1, -1], [2, -1, 3]], [[-1.0, 0, 0.5], [2, -1, 1], [0, 1, -1]]])[None]


def _layer(layer: nn.Conv2d | nn.Linear, **options: bool) -> XnorLayer:
    made = XnorLayer(layer, "replace", **options)
    made.input_quantizer = Sign(made, "input")
    made.set_weight_quantizer(BinaryWeight(made, "weight"))
    return made


def _method(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/xnor.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def test_k_of_the_worked_example() -> None:
    layer = _layer(nn.Conv2d(2, 4, 3, bias=False))
    torch.testing.assert_close(layer.input_scale(IMAGE).flatten(), torch.tensor([9.5 / 9]))
    padded = _layer(nn.Conv2d(2, 4, 3, padding=1)).input_scale(IMAGE)
    assert padded.shape == (1, 1, 3, 3)
    torch.testing.assert_close(padded[0, 0, 0, 0], torch.tensor(4 / 9))  # A = [[1, 1], [1, 1]] and five zeros


def test_output_is_signs_times_k_times_alpha_plus_bias() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3)
    w, bias = conv.weight.detach().clone(), conv.bias.detach().clone()  # type: ignore[union-attr]
    y = _layer(conv)(IMAGE)
    alpha = w.abs().mean((1, 2, 3))
    dots = (torch.where(IMAGE >= 0, 1.0, -1.0) * torch.where(w >= 0, 1.0, -1.0)).sum((1, 2, 3))
    torch.testing.assert_close(y.flatten(), dots * alpha * 9.5 / 9 + bias)
    without = _layer(nn.Conv2d(2, 4, 3, bias=False), k=False)
    w = without.weight.detach()
    dots = (torch.where(IMAGE >= 0, 1.0, -1.0) * torch.where(w >= 0, 1.0, -1.0)).sum((1, 2, 3))
    torch.testing.assert_close(without(IMAGE).flatten(), dots * w.abs().mean((1, 2, 3)))


def test_k_of_linear_and_grouped_layers() -> None:
    assert _layer(nn.Linear(3, 2)).input_scale(torch.tensor([[1.0, -2, 3]])).tolist() == [[2.0]]
    grouped = _layer(nn.Conv2d(2, 4, 1, groups=2)).input_scale(IMAGE)
    assert torch.equal(grouped, IMAGE.abs().repeat_interleave(2, 1))


def test_bit_arithmetic() -> None:
    """A dot product of n signs is 2 popcount(xnor) - n."""
    n = 37
    generator = torch.Generator().manual_seed(0)
    layer = _layer(nn.Linear(n, 5, bias=False), k=False)
    x = torch.randn(4, n, generator=generator)

    def word(row: Tensor) -> int:
        return sum(1 << i for i, value in enumerate(row.tolist()) if value >= 0)

    y = layer(x) / layer.weight.abs().mean(1)
    for i, j in ((i, j) for i in range(4) for j in range(5)):
        xnor = ~(word(x[i]) ^ word(layer.weight[j])) & (1 << n) - 1
        assert round(float(y[i, j].detach())) == 2 * xnor.bit_count() - n


def test_gradient_of_the_input() -> None:
    """Through the sign: 1[|x| < 1]. Through K: sign(x) times the mean share."""
    x = torch.tensor([[0.5, -1.0, -0.25, 2.0]], requires_grad=True)
    layer = _layer(nn.Linear(4, 1, bias=False), k_gradient=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, -1.0, 1.0]]))
    k, dot = 3.75 / 4, 2.0 + 0.0  # signs (+, -, -, +) against (+, +, -, +): 1 - 1 + 1 + 1
    y = layer(x)
    assert float(y.detach()) == pytest.approx(dot * k)
    (without,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(without, k * torch.tensor([[1.0, 0, -1, 0]]))
    layer.k_gradient = True
    (full,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(full - without, dot / 4 * torch.tensor([[1.0, -1, -1, 1]]))


def test_without_input_quantization_there_is_no_k() -> None:
    layer = _layer(nn.Conv2d(2, 4, 3, bias=False))
    layer.input_quantizer.enabled = False  # type: ignore[union-attr]
    torch.testing.assert_close(layer(IMAGE), F.conv2d(IMAGE, layer.quantized_weight()))


def test_k_is_float32_under_autocast() -> None:
    layer = _layer(nn.Conv2d(2, 4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.input_scale(IMAGE.bfloat16()).dtype == torch.float32
        assert layer(IMAGE).dtype == torch.bfloat16


def test_center_and_clamp() -> None:
    net = nn.Sequential(_layer(nn.Conv2d(4, 3, 1)), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([4.0, 0, 0, 0]).view(1, 4, 1, 1).expand(3, 4, 1, 1))
    plain = net[1].weight.detach().clone()
    CenterAndClamp(center=True, clamp=True).after_step(State(net, torch.Generator()))
    assert net[0].weight[0].flatten().tolist() == [1.0, -1.0, -1.0, -1.0]  # 4 - 1 clipped, 0 - 1
    assert torch.equal(net[1].weight, plain)


@pytest.mark.parametrize("released", [False, True])
def test_yaml_on_a_preactivation_resnet_trains(released: bool, still_after_training) -> None:
    changes = {"k": False, "gradient": "released", "center": True, "clamp": True} if released else {}
    method = _method(**changes)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B", preactivation=True)
    kept = surgery.quantize(net, method.rules)
    assert {k for k in kept if "shortcut" in k} == {"layer2.0.shortcut.0", "layer3.0.shortcut.0"}
    assert [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)] == ["relu"]
    members = [layer for _, layer in layers.quant_layers(net)]
    assert len(members) == 6
    assert all(isinstance(m, XnorLayer) for m in members)
    assert not still_after_training(net, method, torch.optim.Adam(net.parameters(), 1e-3))
    if released:
        assert all(float(m.weight.detach().mean(1).abs().max()) < 1e-6 for m in members)


@pytest.mark.parametrize("net", ["vgg", "tiny"])
def test_inputs_of_binary_layers_see_both_signs(net: str) -> None:
    size = {"channels": 3, "classes": 10, "size": 8}
    model = VGGSmall(**size, width=0.1, preactivation=True) if net == "vgg" else Tiny(**size)
    surgery.quantize(model, _method().rules)
    seen = {}
    for name, layer in layers.quant_layers(model):
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    model(torch.randn(4, 3, 8, 8))
    assert seen
    assert all(0.2 < float((x >= 0).float().mean()) < 0.8 for x in seen.values())


def test_another_gradient_through_the_signs_is_an_option_and_null_changes_nothing() -> None:
    def net(**options: object) -> Tiny:
        torch.manual_seed(0)
        tiny = Tiny(channels=3, classes=10, size=8)
        surgery.quantize(tiny, _method(**options).rules)
        return tiny

    plain, other = net(), net(act_gradient="polynomial", weight_gradient="identity")
    assert plain.conv2.input_quantizer.slope is plain.conv2.weight_quantizer.slope is None
    assert other.conv2.input_quantizer.slope.kind == "polynomial"
    assert other.conv2.weight_quantizer.slope.kind == "identity"
    assert plain.state_dict().keys() == other.state_dict().keys()
    x = torch.randn(2, 8, 4, 4)
    assert plain.conv2(x).equal(other.conv2(x))
    leaf = torch.tensor([-0.5, 0.25, 1.5]).requires_grad_()
    for module, want in ((plain, [1, 1, 0]), (other, [1, 1.5, 0])):
        (got,) = torch.autograd.grad(module.conv2.input_quantizer(leaf).sum(), leaf)
        assert got.tolist() == want
