"""GPTQ: two weights by hand, the same by explicit inverses, all kinds of layers, and never worse than nearest."""

import copy
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ptq import lived_in
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.methods.gptq import Compensate, Weight, columns, compensate, second_moments
from qbench.methods.shared.fold import fold
from qbench.models.mobilenet import MobileNetV2
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Rule, StageState, State
from qbench.quant.passes import recalibrate, visits
from qbench.quant.uniform import Uniform

torch.set_num_threads(1)

WIDE = (-100, 100)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(n: int, groups: int = 1, seed: int = 0) -> Tensor:
    x = random(groups, n, 4 * n, seed=seed).double() + random(groups, 1, 4 * n, seed=seed + 1)  # of a common part
    return x @ x.mT / (4 * n)


def state_of(net: nn.Module, *batches: Tensor, step: int = 0) -> State:
    found: Any = SimpleNamespace(epoch=lambda epoch: [(x, x) for x in batches])
    return State(net, torch.Generator(), calibration=found, stage=StageState(step=step))


def quantized(net: nn.Module, bits: int = 3, a_bits: int | None = None, **options: Any) -> nn.Module:
    slots: dict[str, Any] = {"weight": partial(Weight, bits=bits, **{"per_channel": True, **options})}
    if a_bits is not None:
        slots["input"] = partial(Uniform, bits=a_bits)
    surgery.quantize(net, [Rule(pair="BatchNorm*", replace=fold, optional=True, **slots), Rule(optional=True, **slots)])
    return net.eval()


def test_two_weights_by_hand() -> None:
    """w = [.4, .4], H = [[1, .8], [.8, 1]]: .4 is rounded to 0, .4 + .4 * .8 / 1 = .72 to 1. Error .136, not .576."""
    w, h = torch.tensor([[[0.4, 0.4]]]), torch.tensor([[[1.0, 0.8], [0.8, 1.0]]]).double()
    one, none = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    found = compensate(w, h, one, none, WIDE, damp=0)
    assert found.tolist() == [[[0, 1]]]
    for hat, error in ((found, 0.136), (torch.zeros(1, 1, 2).double(), 0.576)):
        d = hat - w.double()
        assert (d @ h[0] @ d.mT).item() == pytest.approx(error)


def by_inverses(w: Tensor, h: Tensor, step: Tensor, order: list[int]) -> Tensor:
    """The same, one row after the other: the best answer of all free weights to each rounding, from H itself."""
    found = torch.zeros_like(w)
    for r, row in enumerate(w):
        now, free = row.clone(), list(order)
        for i in order:
            found[r, i] = (now[i] / step[r, i]).round()
            free = [j for j in free if j != i]
            if free:
                moved = torch.linalg.solve(h[free][:, free], h[free][:, i]) * (now[i] - found[r, i] * step[r, i])
                now[free] += moved
    return found


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_each_rounding_is_answered_as_best_can_be(block: int, act_order: bool) -> None:
    w, h = random(2, 5, 8).double(), moments(8, groups=2)
    step = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(1)).double() + 0.3
    found = compensate(w, h, step, torch.zeros_like(w), WIDE, damp=0.02, block=block, act_order=act_order)
    for g in range(2):
        damped = h[g] + 0.02 * h[g].diagonal().mean() * torch.eye(8)
        order = h[g].diagonal().argsort(descending=True).tolist() if act_order else list(range(8))
        assert found[g].equal(by_inverses(w[g], damped, step[g], order)), g


def test_codes_stay_within_their_bounds_and_zeros_count() -> None:
    w, zero = random(1, 4, 6) * 3, torch.full((1, 4, 6), 2.0)
    found = compensate(w, moments(6), torch.ones(1, 4, 6), zero, (0, 3))
    assert found.min() == -2
    assert found.max() == 1


def test_inputs_of_nothing_but_zeros_and_inputs_that_depend_on_each_other() -> None:
    x = random(1, 4, 30).double()
    x[:, 2] = 0
    w, one, none = random(1, 3, 4), torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    found = compensate(w, x @ x.mT, one, none, WIDE)
    assert found[0, :, 2].equal(w[0, :, 2].round().double())
    x[:, 2] = x[:, 1]
    h = x @ x.mT
    assert compensate(w, h, one, none, WIDE).isfinite().all()
    h[:, 2, 2] -= 1e-3
    with pytest.raises(UserError, match=r"use options\.damp above 0"):
        compensate(w, h, one, none, WIDE, damp=0)


# --- layers


LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (12,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), bias=False), (4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_weights_are_the_layer(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = QuantLayer(make()), random(3, *shape)
    seen, groups = columns(layer, x), layer.groups if layer.conv else 1
    product = layer.weight.reshape(groups, layer.weight_shape[0] // groups, -1) @ seen
    want = layer.apply_op(x, layer.weight, None)
    want = want.transpose(0, 1).flatten(1)
    torch.testing.assert_close(product.flatten(0, 1), want, rtol=1e-4, atol=1e-5)
    h = second_moments(layer, iter([(x[:1], x), (x[1:], x)]))
    torch.testing.assert_close(h.float(), seen @ seen.mT / seen.shape[2], rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYERS)),
    seed=st.integers(0, 999),
    bits=st.integers(2, 6),
    options=st.sampled_from([{}, {"symmetric": True}, {"per_channel": False}, {"group": 4}, {"range": "mse"}]),
    act_order=st.booleans(),
    damp=st.sampled_from([0.01, 10.0]),
)
def test_never_worse_than_nearest_on_the_layers_output(
    name: str, seed: int, bits: int, options: dict[str, Any], act_order: bool, damp: float
) -> None:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    float_layer, x = make(), random(8, *shape, seed=seed)
    want = float_layer(x)
    net = quantized(nn.Sequential(copy.deepcopy(float_layer)), bits, **options)
    layer = net[0]
    nearest, plain = (
        net(x),
        {k: v.clone() for k, v in layer.weight_quantizer.state_dict().items() if k != "_extra_state"},
    )
    act = Compensate(damp=damp, block=5, act_order=act_order)
    (done,) = act(state_of(net, x[:3], x[3:]))

    def error(y: Tensor) -> float:
        square = (y - want).square().sum(1)
        return square.mean().item()

    assert done.values["nearest"] == pytest.approx(error(nearest), rel=1e-3, abs=1e-6)
    assert done.values["gptq"] == pytest.approx(error(net(x)), rel=1e-3, abs=1e-6)
    assert done.values["gptq"] <= done.values["nearest"]
    torch.testing.assert_close(layer.quantized_weight(), layer.weight, rtol=1e-6, atol=1e-7)  # it lies on the grid
    after = layer.weight_quantizer.state_dict()
    assert all(v.equal(after[k]) for k, v in plain.items())  # and the grid is that of the float weight
    assert layer.weight_quantizer.codes(layer.weight).max() <= layer.weight_quantizer.bounds[1]


@pytest.mark.parametrize(("name", "a_bits"), [("resnet", None), ("resnet", 4), ("mobilenet", None)])
def test_it_helps_a_net(name: str, a_bits: int | None) -> None:
    """In all layers together by a third, and in what comes out; each sees what the layers before it give."""
    torch.manual_seed(0)
    shape = {"channels": 3, "classes": 10, "size": 8}
    net = ResNetCIFAR(**shape, depth=8, width=0.5) if name == "resnet" else MobileNetV2(**shape, width=0.1)
    lived_in(net)
    x = random(48, 3, 8, 8)
    want = net(x).detach()
    quantized(net, 4, a_bits)
    recalibrate(net, [(x, x)])
    before = (net(x) - want).norm()
    layers = dict(quant_layers(net))
    done = list(Compensate()(state_of(net, x[:30], x[30:])))
    assert [d.name for d in done] == list(layers)
    assert {d.total for d in done} == {len(layers)}
    assert sum(d.values["gptq"] / d.values["nearest"] for d in done) < 0.67 * len(done)
    if a_bits is None:
        assert (net(x) - want).norm() < 0.8 * before


def test_a_layer_is_given_what_the_layers_before_it_make_now() -> None:
    torch.manual_seed(0)
    net = quantized(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), 2)
    x, last = random(64, 6), copy.deepcopy(net[2].weight)
    list(Compensate()(state_of(net, x)))
    ((given, _),) = visits(net, net[2], [(x, x)])
    other = quantized(nn.Sequential(nn.Linear(6, 4)), 2)
    with torch.no_grad():
        other[0].weight.copy_(last)
    other[0].weight_quantizer.load_state_dict(net[2].weight_quantizer.state_dict())
    list(Compensate()(state_of(other, given)))
    assert other[0].weight.equal(net[2].weight)


def test_a_stage_that_was_cut_off_goes_on_behind_what_is_done() -> None:
    torch.manual_seed(0)
    net = quantized(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)))
    whole, x = copy.deepcopy(net), random(64, 6)
    list(Compensate()(state_of(whole, x)))
    next(iter(Compensate()(state_of(net, x))))
    done = list(Compensate()(state_of(net, x, step=1)))
    assert [d.name for d in done] == ["2", "4"]
    assert all(a.equal(b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))


def test_more_bits_have_less_error() -> None:
    torch.manual_seed(0)
    layer, x, errors = nn.Linear(16, 8), random(100, 16), []
    for bits in (2, 3, 4, 8):
        net = quantized(nn.Sequential(copy.deepcopy(layer)), bits)
        errors.append(next(iter(Compensate()(state_of(net, x)))).values["gptq"])
    assert all(b < a / 2 for a, b in pairwise(errors))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="damp must be at least 0 and block at least 1, got -1 and 128"):
        Compensate(damp=-1)
    with pytest.raises(UserError, match="its padding must be given in numbers, got 'same'"):
        columns(QuantLayer(nn.Conv2d(1, 1, 3, padding="same")), torch.zeros(1, 1, 3, 3))
