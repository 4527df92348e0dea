"""BNN: binary activations by hand, what is binary in its nets, the order of layers, two steps of training."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from yamls import method_of

from qbench.config.recipe import Recipe
from qbench.methods.binaryconnect import BinaryConnect, OutputNorm
from qbench.methods.bnn import BinaryActivation, ShiftAdaMax, ShiftBatchNorm
from qbench.models.mlp import MLP
from qbench.models.resnet import ResNetCIFAR
from qbench.models.vgg_small import VGGSmall
from qbench.quant import layers, surgery
from qbench.quant.method import Method, State
from qbench.training import optim

X = [-1.5, -1.0, -0.2, 0.0, 0.4, 1.0, 2.0]


def make(**options: object) -> BinaryActivation:
    q = BinaryActivation(nn.ReLU(), "replace", **options)  # type: ignore[arg-type]
    q.generator = torch.Generator().manual_seed(0)
    return q


@pytest.mark.parametrize(("clip", "want"), [(True, [0, 1, 1, 1, 1, 1, 0]), (False, [1] * 7)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_sign_and_its_gradient(stochastic: bool, clip: bool, want: list[float]) -> None:
    """sign(0) = +1; the gradient is hardtanh's, both bounds inside, whatever was drawn."""
    q, x = make(clip_gradients=clip, stochastic=stochastic), torch.tensor(X, requires_grad=True)
    y = q(x)
    if not stochastic:
        assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert set(y.tolist()) == {-1, 1}
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == want


def test_stochastic_signs_have_the_hard_sigmoids_probabilities() -> None:
    q, x = make(stochastic=True), torch.tensor(X).repeat(40_000, 1)
    torch.testing.assert_close(q(x).mean(0), torch.tensor(X).clamp(-1, 1), atol=0.02, rtol=0)
    assert torch.equal(q.eval()(x), make()(x))  # drawn in the training alone
    assert q.describe()["stochastic"] is True


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"1\.\.1, got 2"):
        make(bits=2)


@pytest.mark.parametrize("shape", [(4, 1), (1, 1, 4), (2, 1, 2, 1)])
def test_shift_batch_norm_by_hand(shape: tuple[int, ...]) -> None:
    """x = 1, 2, 3, 6: c = -2, -1, 0, 3, AP2(c) = -2, -1, 0, 4, variance 17/4, AP2(1 / sqrt(17/4)) = 1/2, AP2(3) = 4."""
    net = ShiftBatchNorm(nn.BatchNorm1d(1, eps=0.0, momentum=0.25))
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.bias.fill_(1.0)
    x = torch.tensor([1.0, 2, 3, 6]).reshape(shape).requires_grad_()
    y = net(x)
    assert y.shape == x.shape
    assert y.flatten().tolist() == [-3, -1, 1, 7]
    y.backward(torch.tensor([1.0, 0, 0, 0]).reshape(shape))
    assert x.grad.flatten().tolist() == [1, -0.75, -0.5, 0.5]  # type: ignore[union-attr]
    assert (net.weight.grad.tolist(), net.bias.grad.tolist()) == ([-1], [1])  # type: ignore[union-attr]
    assert (net.running_mean.tolist(), net.running_var.tolist()) == ([0.75], [0.75 + 17 / 16])  # type: ignore[union-attr]
    y = net.eval()(x)  # 1 / sqrt(1.8125) = 0.743, by a shift 1
    assert y.flatten().tolist() == [4 * (v - 0.75) + 1 for v in (1, 2, 3, 6)]


def test_shift_adamax_by_hand() -> None:
    """g = 3, -1: m = 3/8, 13/64; v = 3, 2.997, both 4 by a shift; rates 8 lr and lr / 0.234, by a shift 4 lr."""
    w = nn.Parameter(torch.ones(1))
    optimizer = ShiftAdaMax([w], lr=2**-10)
    w.grad = torch.tensor([3.0])
    optimizer.step()
    assert w.item() == 1 - 2**-7 * (3 / 8) / 4
    w.grad = torch.tensor([-1.0])
    optimizer.step()
    assert w.item() == pytest.approx(1 - 2**-7 * (3 / 8) / 4 - 2**-8 * (13 / 64) / 4, abs=1e-7)
    w.grad, before = torch.zeros(1), w.item()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert w.item() == before


def _method(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/bnn.yaml")
    conf.w_bits, conf.a_bits = 1, 1
    conf.options.update(options)
    return method_of(conf)


def _vgg() -> nn.Module:
    return VGGSmall(channels=3, classes=10, size=8, width=0.1, preactivation=True, hidden=[32, 32])


def _mlp() -> nn.Module:
    return MLP(channels=1, classes=10, size=8, hidden=[16, 16, 16], batch_norm=True, dropout=0.5, dropout_in=0.2)


def _resnet() -> nn.Module:
    return ResNetCIFAR(channels=3, classes=10, size=8, depth=8, preactivation=True)


def test_the_order_of_the_papers_net() -> None:
    """conv, pool, batch-norm, sign; pooling never sees signs. All weights are binary, the image is not."""
    net = _vgg()
    surgery.quantize(net, _method().rules)
    kinds = [type(m).__name__ for _, m in net.named_children()]
    assert kinds[:7] == [
        "QuantLayer", "BatchNorm2d", "BinaryActivation", "QuantLayer", "MaxPool2d", "BatchNorm2d", "BinaryActivation",
    ]  # fmt: skip
    assert kinds[-4:] == ["QuantLayer", "BatchNorm1d", "BinaryActivation", "OutputNorm"]
    seen = {}
    for name, layer in layers.quant_layers(net):
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    net.eval()(torch.randn(2, 3, 8, 8))
    assert len(seen) == 9
    assert len(seen.pop("conv1").unique()) > 2
    assert all(set(x.unique().tolist()) <= {-1, 1} for x in seen.values())
    assert all(isinstance(layer.weight_quantizer, BinaryConnect) for _, layer in layers.quant_layers(net))


@pytest.mark.parametrize(("clip", "shift"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("net", [_vgg, _mlp, _resnet])
def test_two_steps(net, clip: bool, shift: bool) -> None:
    method = _method(clip_gradients=clip, clip_weights=clip, stochastic_activations=clip, shift_batch_norm=shift)
    torch.manual_seed(0)
    model = net()
    surgery.quantize(model, method.rules)
    assert surgery.size(model)["bits_per_weight"] == 1
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert isinstance(model.fc, OutputNorm)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {isinstance(m, ShiftBatchNorm) for m in norms} == {shift}
    named = "qbench.methods.bnn.ShiftAdaMax" if shift else "adam"
    recipe = Recipe(steps=2, optimizer=named, lr=1e-2, loss="squared_hinge")
    optimizer = optim.make_optimizers(optim.parameter_groups(model, [], method, recipe), recipe)
    state = State(model, torch.Generator())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(16, 1 if net is _mlp else 3, 8, 8), torch.arange(16) % 10
    for _ in range(2):
        method.hooks[0].before_step(state)
        optimizer.zero_grad()
        with layers.quantized_weights(model):
            loss = optim.criterion(recipe, model(x), y)
        loss.backward()
        optimizer.step()
        method.hooks[0].after_step(state)
    assert torch.isfinite(loss)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    latents = torch.cat([layer.weight.flatten() for _, layer in layers.quant_layers(model)])
    assert (latents.abs().max() <= 1) == clip
