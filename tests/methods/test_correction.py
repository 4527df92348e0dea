"""Biases and batch-norm statistics put right: moments by hand and by sampling, means that come out as in float."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import integrate, stats
from test_ptq import images, lived_in, rules
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.methods.dfq import BoundedReLU
from qbench.methods.shared.correction import (
    CorrectBias,
    ReestimateNorms,
    clipped_normal,
    input_means,
    output_means,
    through,
)
from qbench.methods.shared.fold import fold
from qbench.models.resnet import ResNetCIFAR
from qbench.models.tiny import Tiny
from qbench.quant import surgery
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Rule, State
from qbench.quant.passes import as_float, recalibrate
from qbench.quant.uniform import Uniform

torch.set_num_threads(1)


def state_of(net: nn.Module, *batches: Tensor) -> State:
    found: Any = SimpleNamespace(epoch=lambda epoch: [(x, x) for x in batches])
    return State(net, torch.Generator(), calibration=found)


def test_clipped_normal_by_hand() -> None:
    """1906.04721: beta = .5, gamma = 1 give .69780 behind a ReLU."""
    mean, _ = clipped_normal(torch.tensor(0.5), torch.tensor(1.0))
    assert mean.item() == pytest.approx(0.69780, abs=1e-5)


@pytest.mark.parametrize("bound", [float("inf"), 6.0, 1.0])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (-2.0, 1.5), (3.0, 0.2), (5.5, 2.0)])
def test_clipped_normal_by_integration(mean: float, std: float, bound: float) -> None:
    end = min(bound, mean + 12 * std)
    density = stats.norm(mean, std)
    first, second = (
        integrate.quad(lambda x, p=p: x**p * density.pdf(x), 0, end, points=[max(0, min(mean, end))])[0]
        + (0 if end < bound else bound**p * density.sf(bound))
        for p in (1, 2)
    )
    got = clipped_normal(torch.tensor(mean).double(), torch.tensor(std**2).double(), bound)
    assert got[0].item() == pytest.approx(first, rel=1e-6, abs=1e-9)
    assert got[1].item() == pytest.approx(second - first**2, rel=1e-5, abs=1e-9)


def test_no_spread_at_all() -> None:
    mean, variance = clipped_normal(torch.tensor([-1.0, 2.0]), torch.zeros(2))
    assert mean.tolist() == [0, 2]
    assert variance.tolist() == [0, 0]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_means_of_inputs_of_a_net_whose_batch_norms_are_true(shortcut: str) -> None:
    """The statistics are those of the very images, each channel nearly normal: what reaches a layer has that mean."""
    torch.manual_seed(0)
    net = ResNetCIFAR(channels=3, classes=10, size=16, depth=8, shortcut=shortcut)
    lived_in(net)
    x = images(128)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    net.train()(x)
    net.eval()
    surgery.quantize(net, rules(16, 16))
    found, seen = input_means(net), {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))  # type: ignore[misc]
        for name, layer in quant_layers(net)
    ]
    with as_float(net):
        net(x)
    for handle in handles:
        handle.remove()
    assert set(found) == set(seen) - {"conv1"}
    for name, mean in found.items():
        true = seen[name].mean([d for d in range(seen[name].dim()) if d != 1])
        assert (mean - true).norm() / true.norm() < 0.15, name


def test_through_is_the_layer_of_a_constant_image() -> None:
    torch.manual_seed(0)
    for groups in (1, 2, 6):
        conv = nn.Conv2d(6, 12, 3, groups=groups, bias=False)
        means = torch.randn(6)
        want = conv(means[None, :, None, None].expand(1, 6, 3, 3)).flatten()
        torch.testing.assert_close(through(QuantLayer(conv), conv.weight, means), want)
    linear, means = nn.Linear(12, 4, bias=False), torch.randn(3)
    torch.testing.assert_close(through(QuantLayer(linear), linear.weight, means), linear(means.repeat_interleave(4)))


def test_analytic_by_hand() -> None:
    """Input N(.5, 1) behind a ReLU, W = [.4] on the grid {0, 1/3, 2/3, 1} of a range 0..1: b - (1/3 - .4) .69780."""
    conv, bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
    nn.init.constant_(bn.bias, 0.5)
    net = nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(1, 2, 1)).eval()
    with torch.no_grad():
        net[3].weight.copy_(torch.tensor([0.4, 1.0]).reshape(2, 1, 1, 1))
        net[3].bias.zero_()
    surgery.quantize(net, [Rule(pair="BatchNorm*", replace=fold), Rule(weight=partial(Uniform, bits=2))])
    CorrectBias("analytic").after_calibrate(state_of(net))
    assert net[3].bias.tolist() == pytest.approx([(0.4 - 1 / 3) * 0.69780, 0], abs=1e-5)


def test_a_bound_counts() -> None:
    conv, bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
    act = BoundedReLU(1, 1.0)
    net = nn.Sequential(conv, bn, act, nn.Conv2d(1, 1, 1)).eval()
    surgery.quantize(net, [Rule(pair="BatchNorm*", replace=fold), Rule(weight=partial(Uniform, bits=2))])
    want = clipped_normal(torch.zeros(1), torch.ones(1), 1.0)[0]
    torch.testing.assert_close(input_means(net)["3"], want)


@pytest.mark.parametrize("a_bits", [3, 16])
def test_empirical_gives_each_layer_the_mean_of_the_float_net(a_bits: int) -> None:
    torch.manual_seed(0)
    net = lived_in(ResNetCIFAR(channels=3, classes=10, size=16, depth=8, shortcut="B"))
    x = images(32)
    surgery.quantize(net, rules(3, a_bits))
    recalibrate(net, [(x, x)])
    names = [n for n, _ in quant_layers(net)]
    with as_float(net):
        want = output_means(net, names, [(x, x)])
    before = output_means(net, names, [(x, x)])
    CorrectBias("empirical").after_calibrate(state_of(net, x[:20], x[20:]))
    now = output_means(net, names, [(x, x)])
    assert max((before[n] - want[n]).abs().max() for n in names) > 0.05
    for name in names:
        torch.testing.assert_close(now[name], want[name], rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_bias_gets_one_by_its_rule() -> None:
    for how, expected in (("none", False), ("empirical", True)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
        surgery.quantize(net, [Rule(weight=partial(Uniform, bits=3), corrected=how)])
        assert ("0.bias" in dict(net.named_parameters())) == expected


def test_batch_norms_see_the_quantized_net() -> None:
    torch.manual_seed(0)
    net = lived_in(Tiny(channels=3, classes=10, size=16))
    x = images(24)
    surgery.quantize(net, [Rule(weight=partial(Uniform, bits=2))])
    ReestimateNorms().after_calibrate(state_of(net, x[:12], x[12:]))
    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(m.momentum == 0.1 and not m.training for m in norms.values())
    first = net.conv1(x)
    torch.testing.assert_close(norms["bn1"].running_mean, first.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)
    both = [first[part].var((0, 2, 3)) for part in (slice(12), slice(12, 24))]
    torch.testing.assert_close(norms["bn1"].running_var, ((both[0] + both[1]) / 2).detach(), rtol=1e-4, atol=1e-5)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="bias_correction must be one of none, analytic, empirical, got 'both'"):
        CorrectBias("both")
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    surgery.quantize(net, [Rule(weight=partial(Uniform, bits=3))])
    with pytest.raises(UserError, match="of no layer do batch-norms tell the input"):
        CorrectBias("analytic").after_calibrate(state_of(net, torch.zeros(1, 2)))
    with pytest.raises(UserError, match="no batch-norm is left in the net"):
        ReestimateNorms().after_calibrate(state_of(net, torch.zeros(1, 2)))
