"""TGA: the truncated Gaussian's mean, the threshold's gradient by hand, turns, surgery."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from yamls import method_of

from qbench.config.recipe import Recipe
from qbench.methods.tga import TGA, tail_mean
from qbench.models.tiny import Tiny
from qbench.quant import layers, surgery
from qbench.quant.method import State
from qbench.training import optim


def make(delta: float | None = None, **options: object) -> TGA:
    q = TGA(nn.Linear(6, 1), "weight", **options)  # type: ignore[arg-type]
    if delta is not None:
        q.delta.data.fill_(delta)
    return q


@pytest.mark.parametrize(
    ("delta", "mean", "slope"), [(0, 0.7979, 0.6366), (0.3, 0.9982, 0.6969), (0.6, 1.2150, 0.7473), (1, 1.5251, 0.8009)]
)
def test_mean_of_the_truncated_gaussian(delta: float, mean: float, slope: float) -> None:
    got = tail_mean(torch.tensor(float(delta)))
    assert (got[0].item(), got[1].item()) == pytest.approx((mean, slope), abs=1e-4)


def test_the_tail_mean_far_out() -> None:
    """lambda(a) is about a + 1/a, where phi(a) and 1 - Phi(a) are 0 in float32."""
    mean, slope = tail_mean(torch.tensor(30.0))
    assert mean.item() == pytest.approx(30 + 1 / 30, abs=1e-3)
    assert slope.isfinite()


def test_the_closed_form_is_the_mean_of_the_survivors() -> None:
    w = 0.05 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for delta in (0.0, 0.02, 0.06):
        hat = make(delta)(w)
        assert hat.max().item() == pytest.approx(w[w.abs() > delta].abs().mean().item(), rel=1e-2)


def test_values_and_gradients_by_hand() -> None:
    """w of standard deviation 1 and mean 0; Delta = 0.6: S = 1.2150, dS/dDelta = 0.7473, sum(g t) = 1 - 3 = -2."""
    w = torch.tensor([math.sqrt(2), -0.5, 0.5, -math.sqrt(2), 0.0, 0.0], requires_grad=True)
    w = (w.detach() / w.detach().std(correction=0)).requires_grad_()
    q = make(0.6)
    hat = q(w)
    torch.testing.assert_close(hat, 1.2150 * torch.tensor([1.0, 0, 0, -1, 0, 0]), atol=1e-4, rtol=0)
    hat.backward(torch.tensor([1.0, 2, 4, 3, 5, 6]))
    assert w.grad is not None
    assert q.delta.grad is not None
    assert w.grad.tolist() == [0, 2, 4, 0, 5, 6]  # |w| = 1.633 lies outside the clip at 1
    assert q.delta.grad.item() == pytest.approx(-2 * 0.7473, abs=1e-3)


def test_bounds() -> None:
    w = torch.tensor([0.5, -0.5, 0.1], requires_grad=True)
    assert (make(0.5)(w) != 0).tolist() == [True, True, False]  # |w| = Delta survives
    assert (make(9.0)(w) != 0).tolist() == [True, True, False]  # the largest always does
    assert make(0.0)(torch.zeros(3)).tolist() == [0, 0, 0]
    w = torch.tensor([1.0, 0.99, -3.0], requires_grad=True)
    make(0.1)(w).backward(torch.ones(3))
    assert w.grad is not None
    assert w.grad.tolist() == [0, 1, 0]


def test_start_codes_and_cost() -> None:
    w = torch.tensor([0.9, -0.2, 0.05, -0.6, 0.3, -0.01])
    q = make()
    q.calibrate(w)
    assert q.delta.item() == pytest.approx(0.045)
    assert q.codes(w).codes.tolist() == [1, -1, 1, -1, 1, 0]
    assert torch.equal(q.codes(w).values(), q(w))
    assert q.stored_bits(w) == (12.0, 32.0)
    assert q.levels == len(q(w).unique()) == 3


def test_a_batch_norm_behind_takes_the_thresholds_gradient() -> None:
    """It undoes the scale, through which alone Delta acts; without one the gradient is there."""
    torch.manual_seed(0)
    x, g = torch.randn(64, 6), torch.randn(64, 4)
    sizes = []
    for norm in (nn.Identity(), nn.BatchNorm1d(4, eps=1e-12)):
        q, w = make(0.1), torch.randn(4, 6)
        norm(F.linear(x, q(w))).backward(g)
        assert q.delta.grad is not None
        sizes.append(abs(q.delta.grad.item()))
    assert sizes[0] > 1e-2
    assert sizes[1] < 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(bits=1), r"2\.\.2, got 1"),
        (lambda: make(threshold=1.0), "threshold must be at least 0 and below 1, got 1.0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("turn", [0, 1])
def test_each_batch_moves_thresholds_then_weights(turn: int) -> None:
    """Fig. 1: on each batch the thresholds, then, at the new thresholds, the weights."""
    conf = OmegaConf.load("conf/method/tga.yaml")
    conf.w_bits, conf.a_bits, conf.options.turn = 2, 32, turn
    method = method_of(conf)
    torch.manual_seed(0)
    net = Tiny(channels=3, classes=10, size=8)
    surgery.quantize(net, method.rules)
    assert len(list(layers.quant_layers(net))) == 3  # first and last too
    recipe = Recipe(steps=1, lr=0.1, batch_size=8)
    optimizer = optim.make_optimizers(optim.parameter_groups(net, [], method, recipe), recipe)
    assert optimizer.turns == [0, 1][: turn + 1]
    named = dict(net.named_parameters())
    thresholds = {id(p) for n, p in named.items() if n.endswith(".delta")}
    of = {t: {id(p) for m in ms for g in m.param_groups for p in g["params"]} for t, ms in optimizer.by_turn.items()}
    assert of == (
        {0: {*map(id, named.values())}} if turn == 0 else {0: thresholds, 1: {*map(id, named.values())} - thresholds}
    )
    net.fc.weight_quantizer.delta.data.fill_(-0.5)
    method.hooks[0].after_step(State(net, torch.Generator()))
    assert net.fc.weight_quantizer.delta.item() == 0
