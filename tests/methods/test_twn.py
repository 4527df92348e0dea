"""Ternary weight networks: thresholds and scales by hand, their optimum, surgery."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from yamls import method_of

from qbench.methods.twn import TernaryWeight
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import layers, surgery

W = torch.tensor([[0.9, -0.2, 0.05, -0.6, 0.3, -0.01]])


def make(**options: object) -> TernaryWeight:
    return TernaryWeight(nn.Linear(6, 1), "weight", **options)  # type: ignore[arg-type]


def error(w: Tensor, hat: Tensor) -> Tensor:
    return (w - hat).square().sum()


@pytest.mark.parametrize(("factor", "delta"), [(0.7, 0.240333), (0.75, 0.2575)])
def test_worked_example(factor: float, delta: float) -> None:
    """E|w| = 0.343333; 0.9, 0.6 and 0.3 survive, their mean is 0.6; the binary code's error is 0.5953."""
    q = make(factor=factor)
    assert q.threshold(W).item() == pytest.approx(delta, abs=1e-6)
    torch.testing.assert_close(q(W), torch.tensor([[0.6, 0, 0, -0.6, 0.6, 0]]))
    assert error(W, q(W)).item() == pytest.approx(0.2226, abs=1e-6)
    assert error(W, W.abs().mean() * W.sign()).item() == pytest.approx(0.5953, abs=1e-4)


def test_the_optimal_threshold_keeps_two_weights() -> None:
    """(0.9 + 0.6)^2 / 2 = 1.125 beats 0.81, 1.8^2 / 3 = 1.08 and the rest; error 1.3026 - 1.125."""
    hat = make(rule="optimal")(W)
    torch.testing.assert_close(hat, torch.tensor([[0.75, 0, 0, -0.75, 0, 0]]))
    assert error(W, hat).item() == pytest.approx(0.1776, abs=1e-6)


def test_the_gradient_goes_to_the_weights_unchanged() -> None:
    w, g = W.clone().requires_grad_(), torch.arange(6.0).view(1, 6)
    make()(w).backward(g)
    assert w.grad is not None
    assert torch.equal(w.grad, g)


def test_scales_of_a_filter_and_of_a_layer() -> None:
    w = torch.tensor([[1.0, -0.1, 0.1, 0.0], [10.0, -1.0, 1.0, 0.0]])
    assert make(per="filter")(w).tolist() == [[1, 0, 0, 0], [10, 0, 0, 0]]
    assert make(per="layer")(w).tolist() == [[0, 0, 0, 0], [10, 0, 0, 0]]  # Delta = 0.75 * 13.2 / 8 = 1.24
    assert make(per="layer", rule="max", factor=0.05)(w).tolist() == [[3.25, 0, 0, 0], [3.25, -3.25, 3.25, 0]]
    assert make(per="layer").stored_bits(w) == (16.0, 32.0)
    assert make(per="filter").stored_bits(w) == (16.0, 64.0)


def test_ties_and_nothing_above_the_threshold() -> None:
    assert make(factor=1.0)(torch.tensor([[2.0, -2.0]])).tolist() == [[0, 0]]  # |w| = Delta is 0; no NaN
    assert make()(torch.zeros(2, 3)).tolist() == torch.zeros(2, 3).tolist()
    w = torch.tensor([[2.0, -2.0, 2.0]])
    assert make()(w).tolist() == make(rule="optimal")(w).tolist() == w.tolist()


def test_the_gaussian_optimum_is_near_the_papers_factor() -> None:
    """For N(0, 1) the best Delta is 0.612 = 0.767 E|w|."""
    w = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    assert make(rule="optimal").threshold(w).item() == pytest.approx(0.612, abs=0.02)
    errors = {c: error(w, make(factor=c)(w)).item() for c in (0.5, 0.7, 0.75, 1.0)}
    assert min(errors, key=errors.__getitem__) == 0.75


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["mean", "max", "optimal"]))
def test_optimal_is_the_best_and_every_rule_is_idempotent(seed: int, rule: str) -> None:
    w = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed))
    q = make(rule=rule, factor=0.75 if rule == "mean" else 0.3)
    hat = q(w)
    assert q.idempotent
    assert torch.equal(q(hat), hat)
    assert torch.equal(q.codes(w).values(), hat)
    assert all(len(row.unique()) <= q.levels for row in hat)
    best = make(rule="optimal")(w)
    for row, chosen, mine in zip(w, best, hat, strict=True):
        assert error(row, chosen) <= error(row, mine) + 1e-6
        kept = itertools.chain.from_iterable(itertools.combinations(range(7), k) for k in range(1, 8))
        most = max(float(row.abs()[list(s)].sum()) ** 2 / len(s) for s in kept)
        assert float(error(row, chosen)) == pytest.approx(float(row.square().sum()) - most, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "2..2, got 1"),
        ({"rule": "median"}, "rule must be one of mean, max, optimal"),
        ({"per": "channel"}, "per must be one of filter, layer"),
        ({"factor": 0.0}, "factor must be above 0, got 0.0"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make(**options)


def test_yaml_on_a_resnet_trains() -> None:
    conf = OmegaConf.load("conf/method/twn.yaml")
    conf.w_bits, conf.a_bits = 2, 32
    conf.method.rules[0].weight.bits = conf.method.rules[1].weight.bits = 2
    method = method_of(conf)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8)
    surgery.quantize(net, method.rules)
    assert all(layer.weight_quantizer is not None for _, layer in layers.quant_layers(net))
    assert 2 < surgery.size(net)["bits_per_weight"] < 2.3
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    for _ in range(2):
        optimizer.zero_grad()
        with layers.quantized_weights(net):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
