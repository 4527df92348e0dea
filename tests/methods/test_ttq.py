"""Trained ternary quantization: values and all three gradients by hand, surgery."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from yamls import method_of

from qbench.methods.ttq import TTQ, PositiveScales
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import layers, surgery
from qbench.quant.method import State

W = torch.tensor([0.9, -0.2, 0.05, -0.6, 0.3, -0.01])


def make(wp: float = 1.0, wn: float = 1.0, **options: object) -> TTQ:
    q = TTQ(nn.Linear(6, 1), "weight", **options)  # type: ignore[arg-type]
    q.wp.data.fill_(wp)
    q.wn.data.fill_(wn)
    return q


def test_worked_example() -> None:
    """t = .05: Delta = .045, so that .05 survives and -.01 does not."""
    q, w = make(1.2, 0.8), W.clone().requires_grad_()
    assert q.threshold(w).item() == pytest.approx(0.045)
    hat = q(w)
    torch.testing.assert_close(hat, torch.tensor([1.2, -0.8, 1.2, -0.8, 1.2, 0]))
    hat.backward(torch.tensor([0.1, -0.2, 0.3, 0.4, -0.5, 0.6]))
    assert w.grad is not None
    assert q.wp.grad is not None
    assert q.wn.grad is not None
    torch.testing.assert_close(w.grad, torch.tensor([0.12, -0.16, 0.36, 0.32, -0.6, 0.6]))
    assert q.wp.grad.item() == pytest.approx(0.1 + 0.3 - 0.5)
    assert q.wn.grad.item() == pytest.approx(-(-0.2 + 0.4))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_the_scales_gradients_are_those_of_the_forward(seed: int) -> None:
    """A finite difference: the sign of dL/dWn follows from w_hat = -Wn."""
    generator = torch.Generator().manual_seed(seed)
    w, g = torch.randn(30, generator=generator), torch.randn(30, generator=generator)
    q = make(0.7, 0.9, t=0.3)
    (q(w) * g).sum().backward()
    for scale in (q.wp, q.wn):
        was = scale.item()
        ends = []
        for end in (was + 0.125, was - 0.125):
            scale.data.fill_(end)
            ends.append((q(w) * g).sum().item())
        scale.data.fill_(was)
        assert scale.grad is not None
        assert scale.grad.item() == pytest.approx((ends[0] - ends[1]) / 0.25, abs=1e-4)


def test_ties_are_zero_and_have_slope_one() -> None:
    q, w = make(2.0, 3.0, t=0.5), torch.tensor([1.0, 0.5, -0.5, 0.0, -1.0], requires_grad=True)
    hat = q(w)
    assert hat.tolist() == [2, 0, 0, 0, -3]
    hat.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [2, 1, 1, 1, 3]


def test_large_weights_are_not_clipped() -> None:
    q, w = make(), torch.tensor([50.0, -40.0, 0.1], requires_grad=True)
    q(w).backward(torch.ones(3))
    assert w.grad is not None
    assert w.grad.tolist() == [1, 1, 1]


def test_threshold_is_relative_to_the_maximum() -> None:
    assert torch.equal(make()(W), make()(10 * W))


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.5, 3), (2 / 3, 4)])
def test_sparsity_sets_the_share_of_zeros(sparsity: float, zeros: int) -> None:
    q = make(sparsity=sparsity)
    assert int((q(W) == 0).sum()) == zeros
    assert torch.equal(q(q(W)), q(W))


def test_scales_may_start_at_the_means_of_either_side() -> None:
    q = make(start="mean")
    q.calibrate(W)
    assert (q.wp.item(), q.wn.item()) == pytest.approx((1.25 / 3, 0.4))
    q = make(start="one")
    q.calibrate(W)
    assert (q.wp.item(), q.wn.item()) == (1, 1)


def test_codes_and_what_they_cost() -> None:
    q = make(1.2, 0.8)
    assert torch.equal(q.codes(W).values(), q(W))
    assert q.codes(W).codes.tolist() == [1, -1, 1, -1, 1, 0]
    assert q.stored_bits(W) == (12.0, 64.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "2..2, got 3"),
        ({"t": 1.0}, "t must be at least 0 and below 1, got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be at least 0 and below 1, got -0.1"),
        ({"start": "zero"}, "start must be one of one, mean"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make(**options)


def test_yaml_on_a_resnet_trains_and_scales_stay_positive() -> None:
    conf = OmegaConf.load("conf/method/ttq.yaml")
    conf.w_bits, conf.a_bits = 2, 32
    method = method_of(conf)
    assert method.param_groups[0]["weight_decay"] == "same"
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8)
    surgery.quantize(net, [*method.rules[2:]])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    state = State(net, torch.Generator())
    hook = next(h for h in method.hooks if isinstance(h, PositiveScales))
    for _ in range(2):
        optimizer.zero_grad()
        with layers.quantized_weights(net):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        hook.after_step(state)
    assert torch.isfinite(loss)
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    quantizer = net.fc.weight_quantizer
    quantizer.wp.data.fill_(-0.5)
    hook.after_step(state)
    assert quantizer.wp.item() == pytest.approx(1e-3)
