"""FDA-BNN: the Fourier gradient and the noise adaptation module by hand, its fading, what is stored, surgery."""

import math

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from yamls import method_of

from qbench.methods.fda_bnn import Fade, FourierInput, FourierSign, FourierWeight, Noise, PReLU
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import layers, surgery
from qbench.quant.method import Method, State


def fda_bnn(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/fda_bnn.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def test_sine_module_by_hand() -> None:
    """omega = pi/2, n = 0: the slope is 2 cos(pi t / 2); 0 beyond half a period, |t| >= 2; sign(0) = +1."""
    sign = FourierSign(5, omega=math.pi / 2, noise=False)
    sign.slope.terms.fill_(0)
    t = torch.tensor([[0.0, -0.1, 0.5, 1.0, 2.5]], requires_grad=True)
    y = sign(t)
    assert y.tolist() == [[1, -1, 1, 1, 1]]
    y.sum().backward()
    torch.testing.assert_close(t.grad, torch.tensor([[2, 1.9754, 1.4142, 0, 0]]), rtol=1e-4, atol=1e-6)


def test_ten_terms_are_narrow_and_oscillate() -> None:
    sign = FourierSign(1, omega=math.pi / 2, noise=False)
    t = torch.tensor([[0.0], [0.05], [0.15]], requires_grad=True)
    sign(t).sum().backward()
    assert t.grad is not None
    assert float(t.grad[0]) == pytest.approx(20)
    want = [2 * sum(math.cos((2 * i + 1) * math.pi / 2 * x) for i in range(10)) for x in (0.05, 0.15)]
    assert t.grad[1:].flatten().tolist() == pytest.approx(want, rel=1e-3)
    assert want[1] < 0 < want[0]
    zeros = torch.tensor([[0.1], [0.5], [1.0]], requires_grad=True)
    sign(zeros).sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.flatten().tolist() == pytest.approx([0, 0, 0], abs=1e-5)


def test_gradient_with_the_noise_module() -> None:
    """Eq. 15-17: dL/dt = g s' + alpha (g W2^T * 1[t W1 > 0] W1^T + g a cos t), and the gradients of W1 and W2."""
    torch.manual_seed(0)
    sign = FourierSign(6, k=2)
    assert sign.noise is not None
    t, g = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    y = sign(t)
    assert y.detach().unique().tolist() == [-1, 1]
    y.backward(g)
    w1, w2 = sign.noise.fc1.weight.detach().T, sign.noise.fc2.weight.detach().T
    assert w1.shape == (6, 3)
    x, alpha = t.detach(), 0.1
    inner = g @ w2.T * (x @ w1 > 0)
    slope = sum(torch.cos((2 * i + 1) * 0.1 * x) for i in range(10)) * 4 * 0.1 / math.pi
    torch.testing.assert_close(t.grad, g * slope + alpha * (inner @ w1.T + g * 0.1 * x.cos()))
    torch.testing.assert_close(sign.noise.fc1.weight.grad, alpha * (x.T @ inner).T)
    torch.testing.assert_close(sign.noise.fc2.weight.grad, alpha * ((x @ w1).relu().T @ g).T)


@pytest.mark.parametrize(("shortcut", "want"), [("none", 0.0), ("linear", 0.05), ("sine", 0.1 * math.sin(0.5))])
def test_shortcuts_of_the_noise_module(shortcut: str, want: float) -> None:
    noise = Noise(3, 64, shortcut, 0.1)
    nn.init.zeros_(noise.fc2.weight)
    torch.testing.assert_close(noise(torch.full((2, 3), 0.5)), torch.full((2, 3), want))


def test_noise_in_the_forward_pass_is_an_option_of_the_training() -> None:
    sign = FourierSign(4, noise_forward=True)
    t = torch.randn(3, 4)
    assert sign.noise is not None
    signs = torch.where(t >= 0, 1.0, -1.0)
    torch.testing.assert_close(sign(t), signs + 0.1 * sign.noise(t))
    assert sign.eval()(t).equal(signs)


def test_weights_are_dorefas_with_the_new_gradient() -> None:
    """w = (.5, -.2, .3, -.4): E|w| = .35 for the layer; the scale is not in the gradient."""
    q = FourierWeight(nn.Linear(2, 2), "weight", noise=False)  # type: ignore[arg-type]
    w = torch.tensor([[0.5, -0.2], [0.3, -0.4]], requires_grad=True)
    torch.testing.assert_close(q(w), torch.tensor([[0.35, -0.35], [0.35, -0.35]]))
    torch.testing.assert_close(q.codes(w).values(), q(w))
    assert q.stored_bits(w) == (4.0, 32.0)
    q(w).sum().backward()
    slope = sum(torch.cos((2 * i + 1) * 0.1 * w.detach()) for i in range(10)) * 4 * 0.1 / math.pi
    torch.testing.assert_close(w.grad, slope)


def test_inputs_are_vectors_of_channels() -> None:
    layer = layers.QuantLayer(nn.Conv2d(6, 2, 3, groups=2))
    q = FourierInput(layer, "input")
    assert q.sign.noise is not None
    assert q.sign.noise.fc1.in_features == 6
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    q(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert q.eval()(torch.randn(3, 6)).shape == (3, 6)


def test_fade() -> None:
    sign = FourierSign(2)
    state = State(sign, torch.Generator(), steps=10)
    for state.step, want in ((0, 0.2), (5, 0.1), (9, 0.02)):
        Fade(0.2).before_step(state)
        assert float(sign.alpha) == pytest.approx(want)


def test_prelu() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    prelu = PReLU(nn.Linear(1, 1), "output")  # type: ignore[arg-type]
    y = prelu(x)
    y.sum().backward()
    assert y.tolist() == [-0.5, 0, 3]
    assert x.grad is not None
    assert x.grad.tolist() == [0.25, 0.25, 1]
    assert float(prelu.a.grad) == -2  # type: ignore[arg-type]


def test_errors() -> None:
    with pytest.raises(ValueError, match="k must be a whole number"):
        Noise(4, 0, "sine", 0.1)
    with pytest.raises(ValueError, match="shortcut must be one of none, linear, sine"):
        Noise(4, 2, "cosine", 0.1)
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        Fade(-1)
    with pytest.raises(ValueError, match="got 2"):
        FourierInput(nn.Linear(2, 2), "input", bits=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"noise": False, "prelu": False}])
def test_yaml_on_a_resnet_trains_and_stores_no_noise_module(changes: dict[str, object], still_after_training) -> None:
    method = fda_bnn(**changes)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8)
    surgery.quantize(net, method.rules)
    assert [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)] == ["layer3.0.relu2"]
    still = still_after_training(net, method, torch.optim.SGD(net.parameters(), 0.1))
    assert not still
    noise = sum(p.numel() for m in net.modules() if isinstance(m, Noise) for p in m.parameters())
    assert (noise > 0) == ("noise" not in changes)
    weights = sum(m.weight.numel() for _, m in layers.quant_layers(net))
    rest = sum(p.numel() for p in net.parameters()) - weights - noise
    rest += sum(b.numel() for n, b in net.named_buffers() if "running" in n)
    assert surgery.size(net)["bytes"] == (weights + 32 * 6 + 32 * rest) / 8
