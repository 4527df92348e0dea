"""IR-Net: balanced weights and shift scales by hand, the error decay estimator over the epochs, surgery."""

import math

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from yamls import method_of

from qbench.methods.irnet import LibraWeight, standardize
from qbench.methods.shared.binary import HardTanh, Slope
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import surgery
from qbench.quant.method import Method, State

W = torch.tensor([[0.5, -0.3, 0.1, 0.9], [0.0, 0.0, -3.0, -1.0]])


def irnet(**options: object) -> Method:
    conf = OmegaConf.load("conf/method/irnet.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits = conf.a_bits = 1
    conf.options.update(options)
    return method_of(conf)


def test_weights_by_hand() -> None:
    """First row: mean .3, deviations (.2, -.6, -.2, .6), std sqrt(.8 / 3); mean|z| = .4 / .516398 = .774597 -> 2^0.

    Second row: mean -1, deviations (1, 1, -2, 0), std sqrt(2); mean|z| = 1 / 1.414214 = .707107 = 2^-.5 -> 2^0 (half
    to even); the deviation 0 counts as positive.
    """
    q = LibraWeight(nn.Linear(4, 2), "weight")  # type: ignore[arg-type]
    z = standardize(W)
    torch.testing.assert_close(z[0], torch.tensor([0.2, -0.6, -0.2, 0.6]) / math.sqrt(0.8 / 3))
    assert q(W).tolist() == [[1, -1, -1, 1], [1, 1, -1, 1]]
    assert q.codes(W).values().equal(q(W))
    assert q.stored_bits(W) == (8.0, 64.0)
    plain = LibraWeight(nn.Linear(4, 2), "weight", shift=False)  # type: ignore[arg-type]
    torch.testing.assert_close(plain(W)[:, 0], torch.tensor([0.774597, 0.707107]))
    peaked = torch.tensor([[0.0] * 15 + [16.0]])  # mean 1, deviations -1 and 15: std 4, mean|z| = 30 / 64 -> 2^-1
    assert q(peaked).abs().unique().tolist() == [0.5]


def test_gradient_flows_through_the_standardization() -> None:
    """With t = 1 the slope is 1 - tanh^2(z), and (w - mean) / std is differentiated as it stands."""
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(3, 7, generator=generator).requires_grad_(), torch.randn(3, 7, generator=generator)
    q = LibraWeight(nn.Linear(7, 3), "weight")  # type: ignore[arg-type]
    (got,) = torch.autograd.grad((q(w) * g).sum(), w)
    z = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
    scale = torch.exp2(z.detach().abs().mean(1, keepdim=True).log2().round())
    (want,) = torch.autograd.grad((z.tanh() * scale * g).sum(), w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(1), torch.zeros(3), atol=1e-6, rtol=0)  # a shift of a channel changes nothing


@pytest.mark.parametrize(
    ("epoch", "t", "k"), [(0, 1e-3, 1000), (100, 1e-2, 100), (200, 0.1, 10), (300, 1, 1), (399, 9.77237, 1)]
)
def test_error_decay_estimator(epoch: int, t: float, k: float) -> None:
    """t = 10^(-3 + 4 e / 400), k = max(1/t, 1); at 0 the slope is k t: 1 until epoch 300, then t."""
    hook = irnet().hooks[0]
    net = Slope("tanh")
    state = State(net, torch.Generator(), steps=400 * 10, step=epoch * 10)
    hook.before_step(state)
    assert float(net.t) == pytest.approx(t, rel=1e-5)
    for x in (0.0, 0.3, -2.0):
        want = k * t * (1 - math.tanh(t * x) ** 2)
        assert float(net(torch.tensor(x))) == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_equal_weights_stay_finite() -> None:
    w = torch.full((2, 4), 0.25).requires_grad_()
    hat = LibraWeight(nn.Linear(4, 2), "weight")(w)  # type: ignore[arg-type]
    assert hat.isfinite().all()
    hat.sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least two weights"):
        LibraWeight(nn.Linear(1, 3), "weight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1\.\.1, got 2"):
        LibraWeight(nn.Linear(2, 3), "weight", bits=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient must be one of"):
        LibraWeight(nn.Linear(2, 3), "weight", gradient="ede")  # type: ignore[arg-type]


def test_yaml_on_a_resnet_trains(still_after_training) -> None:
    method = irnet()
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut_per_conv=True)
    surgery.quantize(net, method.rules)
    assert [n for n, m in net.named_modules() if isinstance(m, HardTanh)][-1] == "layer3.0.relu2"
    seen: list[Tensor] = []
    net.layer1[0].conv2.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    assert not still_after_training(net, method, torch.optim.SGD(net.parameters(), 0.1))
    assert float(seen[0].detach().abs().max()) <= 1
