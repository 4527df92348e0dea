"""SQNR: steps and ratios of a Gaussian, the rule by hand, budgets that are kept, steps that are powers of two."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor, nn

from qbench.methods.sqnr import AllocateBits, FixedPointStep, allocate, distortion, stepsize
from qbench.models.tiny import Tiny
from qbench.quant import surgery
from qbench.quant.layers import quant_layers
from qbench.quant.method import Rule, State
from qbench.quant.passes import recalibrate

torch.set_num_threads(1)

STEPS = [1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308]  # mid-rise, N(0, 1), 1 to 8 bits
RATIOS = [4.396, 9.250, 14.267, 19.377, 24.565, 29.829, 35.167, 40.571]  # dB


def quantizer(x: Tensor, site: str = "input", **options: Any) -> FixedPointStep:
    q = FixedPointStep(nn.Linear(1, 1), site, **options)
    q.calibrate(x)
    q.finish_calibration()
    return q


def gauss(n: int = 200_000) -> Tensor:
    """Quantiles: a sample without noise."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.double) + 0.5) / n).float()


@pytest.mark.parametrize("bits", range(1, 9))
def test_steps_and_ratios_of_a_gaussian(bits: int) -> None:
    assert stepsize(bits) == pytest.approx(STEPS[bits - 1], abs=6e-5)
    assert -10 * math.log10(distortion(stepsize(bits), bits)) == pytest.approx(RATIOS[bits - 1], abs=6e-4)
    found = optimize.minimize_scalar(distortion, args=(bits,), bounds=(0.1 / 2**bits, 8 / 2**bits), method="bounded")
    assert stepsize(bits) == pytest.approx(found.x, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_distortion_is_that_of_a_sample(bits: int) -> None:
    x, step = gauss().double(), stepsize(bits)
    hat = ((x / step).floor() + 0.5).clamp(0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5) * step
    assert (x - hat).square().mean().item() == pytest.approx(distortion(step, bits), rel=1e-3)


def test_many_bits_have_ever_smaller_steps() -> None:
    steps = [stepsize(b) for b in range(1, 18)]
    assert all(0.45 < b / a < 0.7 for a, b in pairwise(steps))


def test_the_step_by_hand() -> None:
    """xi = .5 at 4 bits: s = .1676, two fractional bits, used step .25."""
    x = torch.tensor([[0.5, -0.5, 0.5, -0.5]])
    assert quantizer(x, "weight", bits=4, fixed_point=False).step.item() == pytest.approx(0.1676, abs=1e-4)
    q = quantizer(x, "weight", bits=4)
    assert q.step.item() == 0.25
    y = torch.tensor([0.3, -9.0, 9.0, -0.37], requires_grad=True)
    q(y).sum().backward()
    assert q(y).tolist() == [0.25, -2, 1.75, -0.25]
    assert y.grad is not None
    assert y.grad.tolist() == [1, 0, 0, 1]


def test_what_is_never_negative_has_half_the_step() -> None:
    q = quantizer(gauss().abs(), bits=3, fixed_point=False)
    assert (q.bounds, q.signed) == ((0, 7), False)
    assert q.step.item() == pytest.approx(STEPS[3], rel=1e-3)


def test_a_power_of_two_stays_and_zeros_have_a_step() -> None:
    x = torch.ones(4) * (0.25 / stepsize(4))
    x[0] *= -1
    assert quantizer(x.double() * (1 - 1e-6), "weight", bits=4).step.item() == 0.25
    assert quantizer(torch.zeros(3), bits=4).step.item() == 1


def test_the_rule_by_hand() -> None:
    """Ten times the size costs 2 bits at kappa = 5, a thousand times 10 bits at kappa = 3."""
    assert allocate([100, 1000, 10_000], 4.22, 5) == [8, 6, 4]  # 800 + 6000 + 40,000 of 46,842
    assert allocate([10, 10, 10], 5, 5) == [5, 5, 5]
    assert allocate([10, 10, 10], 4.5, 5) == [5, 4, 4]
    assert allocate([10, 10_000], 4.01, 3) == [14, 4]
    assert allocate([10, 10_000], 4.0, 3) == [14, 3]  # the large one would be next


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=20),
    mean=st.floats(2, 16),
    kappa=st.floats(2, 7),
)
def test_a_budget_is_kept_and_the_rule_up_to_a_bit(sizes: list[int], mean: float, kappa: float) -> None:
    found = allocate(sizes, mean, kappa)
    used = sum(n * b for n, b in zip(sizes, found, strict=True))
    assert used <= mean * sum(sizes) + 1e-3
    assert used > (mean - 1) * sum(sizes) - 1e-3
    assert all(2 <= b <= 16 for b in found)
    for i, n in enumerate(sizes):  # never more bits to the larger, and no further apart than the rule and a rounding
        for j, m in enumerate(sizes):
            assert found[i] >= found[j] - (n == m) or n > m
            if max(found[i], found[j]) < 16 and min(found[i], found[j]) > 2:
                assert abs(found[i] - found[j] - 10 / kappa * math.log10(m / n)) < 1 + 1e-6


def test_a_net_has_its_bits_in_budget_and_keeps_them() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        net = Tiny(channels=3, classes=10, size=8)
        slots = {site: partial(FixedPointStep, bits=bits) for site, bits in (("weight", 4), ("input", 5))}
        surgery.quantize(net, [Rule("conv1", weight=partial(FixedPointStep, bits=9)), Rule(**slots)])
        return net.eval()

    net, x = build(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches: Any = SimpleNamespace(epoch=lambda epoch: [(x, x)])
    recalibrate(net, [(x, x)])
    AllocateBits(4.0, 5.0).after_calibrate(State(net, torch.Generator(), calibration=batches))
    layers = [layer for name, layer in quant_layers(net) if name != "conv1"]
    assert net.conv1.weight_quantizer.bits == 9  # given beforehand
    for site, mean in (("weight", 4), ("input", 5)):
        made = [getattr(layer, f"{site}_quantizer") for layer in layers]
        assert mean - 1 < sum(q.bits * q.values for q in made) / sum(q.values for q in made) <= mean
        assert len({q.bits for q in made}) > 1
        for q in made:
            want = 2 ** math.ceil(math.log2(float(q.xi) * stepsize(q.bits + (not q.signed))))
            assert q.step.item() == want
    shapes = [layer.weight.numel() for layer in layers]
    assert [layer.weight_quantizer.values for layer in layers] == shapes  # type: ignore[union-attr]
    other = build()
    other.load_state_dict(net.state_dict())
    assert other(x).equal(net(x))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="kappa must be above 0 dB per bit, got 0"):
        AllocateBits(4, 4, 0)
    with pytest.raises(ValueError, match=r"bits must be a whole number in 2\.\.16, got 1"):
        FixedPointStep(nn.Linear(1, 1), "weight", bits=1.5)
