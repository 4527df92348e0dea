"""ReCU: standardization, quantiles and scales by hand, where the gradient stops, tau over the training, surgery."""

import math

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from yamls import method_of

from qbench.methods.recu import RaiseTau, ReCUInput, ReCUWeight, _quantiles
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.method import Method, State

W = torch.tensor([[0.1, -0.2, 0.3, -2.0], [0.0, 0.5, -0.5, 0.4]])  # mean|w| = .5


def recu(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/recu.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def weight(**options: object) -> ReCUWeight:
    return ReCUWeight(nn.Linear(4, 2), "weight", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tau", "top"), [(0.85, 0.5 * 1.2039728), (0.99, 0.5 * 3.912023)])
def test_laplace_quantiles_by_hand(tau: float, top: float) -> None:
    """Q(tau) = -mean|w| ln(2 - 2 tau): -ln .3 and -ln .02 times .5."""
    q = weight(b=None)
    q.tau.fill_(tau)
    torch.testing.assert_close(q.clamped(W), W.clamp(-top, top))


def test_empirical_quantiles() -> None:
    q = weight(b=None, quantile="empirical")
    lo, hi = torch.quantile(W.flatten(), 0.15), torch.quantile(W.flatten(), 0.85)
    torch.testing.assert_close(q.clamped(W), W.clamp(lo, hi))


def test_empirical_quantiles_of_more_weights_than_torch_quantile_takes() -> None:
    n = 2**24 + 101
    found = _quantiles(torch.arange(n, dtype=torch.float32), torch.tensor([0.25, 0.75]))
    assert found.tolist() == pytest.approx([0.25 * (n - 1), 0.75 * (n - 1)], abs=1)


def test_scale_is_the_mean_of_the_clamped_weights() -> None:
    top = 0.6019864
    q = weight(b=None)
    alphas = torch.tensor([[(0.6 + top) / 4], [1.4 / 4]])
    torch.testing.assert_close(q(W), alphas * torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, 1]]))
    torch.testing.assert_close(q.codes(W).values(), q(W))
    assert q.stored_bits(W) == (8.0, 64.0)


def test_standardization_to_b_star() -> None:
    """(w - mean) / std * 2 sqrt(2): zero mean, variance 8 in each channel."""
    q = weight()
    q.tau.fill_(0.99999)  # nothing is clamped
    v = q.clamped(100 * W)
    torch.testing.assert_close(v.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(v.var(1), torch.full((2,), 8.0))


def test_gradient_stops_at_the_quantiles() -> None:
    w = W.clone().requires_grad_()
    weight(b=None)(w).backward(torch.ones(2, 4))
    first, second = (0.6 + 0.6019864) / 4, 0.35
    torch.testing.assert_close(w.grad, torch.tensor([[first, first, first, 0], [second] * 4]))


def test_gradient_flows_through_the_standardization() -> None:
    w = W.clone().requires_grad_()
    weight()(w).backward(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert w.grad is not None
    torch.testing.assert_close(w.grad.sum(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_learned_scale_starts_at_the_mean_and_gets_a_gradient() -> None:
    q = weight(scale="learned")
    q.calibrate(W)
    torch.testing.assert_close(q(W), weight()(W))
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    q(W).backward(g)
    assert q.alpha is not None
    signs = torch.where(W - W.mean(1, keepdim=True) >= 0, 1.0, -1.0)
    torch.testing.assert_close(q.alpha.grad, (g * signs).sum(1, keepdim=True))


def test_tau_over_the_training() -> None:
    q, hook = weight(), RaiseTau()
    state = State(q, torch.Generator(), steps=100)
    for state.step, share in ((0, 0.0), (50, math.expm1(0.5) / math.expm1(1)), (100, 1.0)):
        hook.before_step(state)
        assert float(q.tau) == pytest.approx(0.85 + 0.14 * share)
    assert math.expm1(0.5) / math.expm1(1) == pytest.approx(0.377541, abs=1e-5)


def test_inputs_normalized_in_training_alone() -> None:
    """std 2: the slope at x / 2 is 2 - |x|, and it is divided by 2, but for what flows through the std."""
    layer = nn.Conv2d(1, 1, 1)
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(1, 1, 2, 2)
    x = x * 2 / x.std()
    plain, normal = ReCUInput(layer, "input"), ReCUInput(layer, "input", normalize=True)  # type: ignore[arg-type]
    assert plain(x).equal(normal(x))
    leaf = x.clone().requires_grad_()
    normal(leaf).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.flatten()[1:3], ((2 - x.abs()) / 2).flatten()[1:3], rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    normal.eval()(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, (2 - 2 * x.abs()).clamp_min(0))


def test_errors() -> None:
    with pytest.raises(ValueError, match="b must be above 0"):
        weight(b=0)
    with pytest.raises(ValueError, match="quantile must be one of"):
        weight(quantile="normal")
    with pytest.raises(ValueError, match="scale must be one of"):
        weight(scale="none")
    with pytest.raises(ValueError, match="tau must rise"):
        RaiseTau(0.99, 0.85)


@pytest.mark.parametrize("changes", [{}, {"scale": "learned", "normalize": True}])
def test_yaml_on_a_resnet_trains(changes: dict[str, object], still_after_training) -> None:
    method = recu(**changes)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut_per_conv=True)
    surgery.quantize(net, method.rules)
    still = still_after_training(net, method, torch.optim.SGD(net.parameters(), 0.1))
    assert not [name for name in still if not name.endswith("alpha")]  # the batch-norm behind cancels a learned scale
