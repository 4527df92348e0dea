"""ABC-Net: bases, coefficients and gradients by hand, the product of bases, learned shifts, surgery."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from yamls import method_of

from qbench.methods.abcnet import BinaryActivations, BinaryBases, spread
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import layers, surgery
from qbench.quant.method import Method

W = torch.tensor([[-1.0, -0.5, 0.0, 0.2, 0.4, 0.9]])  # mean 0, std .613732 with n in its denominator


def abcnet(w_bits: int = 3, a_bits: int = 3, **options: object) -> Method:
    conf = OmegaConf.load("conf/method/abcnet.yaml")
    assert isinstance(conf, DictConfig)
    conf.w_bits, conf.a_bits = w_bits, a_bits
    conf.options.update(options)
    return method_of(conf)


def bases(m: int, **options: object) -> BinaryBases:
    return BinaryBases(nn.Linear(6, 1), "weight", bits=m, **options)  # type: ignore[arg-type]


def activations(n: int, **options: object) -> BinaryActivations:
    return BinaryActivations(nn.Linear(6, 1), "input", bits=n, **options)  # type: ignore[arg-type]


def test_three_bases_by_hand() -> None:
    """u = -1, 0, 1: only .9 passes .613732, zero counts as positive, only -1 fails -.613732."""
    q = bases(3)
    codes = q.codes(W)
    assert codes.codes[:, 0].tolist() == [[-1, -1, -1, -1, -1, 1], [-1, -1, 1, 1, 1, 1], [-1, 1, 1, 1, 1, 1]]
    torch.testing.assert_close(codes.tensors["coefficients"].flatten(), torch.tensor([0.375, 0.35, 0.225]))
    hat = q(W)
    torch.testing.assert_close(hat, codes.values())
    assert float((W - hat).square().sum()) == pytest.approx(0.085, abs=1e-6)
    one = bases(1)(W)
    assert float((W - one).square().sum()) == pytest.approx(0.76, abs=1e-6)
    assert len(hat.unique()) == q.levels == 4
    assert q.stored_bits(W) == (18.0, 96.0)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_coefficients_are_least_squares(m: int) -> None:
    w = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(m))
    q = BinaryBases(nn.Conv2d(5, 4, 3), "weight", bits=m)  # type: ignore[arg-type]
    codes = q.codes(w)
    planes = codes.codes.flatten(1).double()
    want = torch.linalg.lstsq(planes.T, w.flatten().double().unsqueeze(1)).solution.flatten()
    torch.testing.assert_close(codes.tensors["coefficients"].flatten().double(), want, rtol=1e-4, atol=1e-6)


def test_bases_that_coincide_share_their_coefficient() -> None:
    w = torch.tensor([[1.0, -1.0]])  # std 1; u = -.5 and .5 give the same base
    q = BinaryBases(nn.Linear(2, 1), "weight", bits=2, shifts=[-0.5, 0.5])  # type: ignore[arg-type]
    torch.testing.assert_close(q(w), w)
    torch.testing.assert_close(q.codes(w).tensors["coefficients"].flatten(), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(("gradient", "want"), [("identity", [0.95] * 6), ("clipped", None)])
def test_gradient_of_the_weights(gradient: str, want: list[float] | None) -> None:
    """sum alpha = .95 for the identity; else alpha_m counts where |w + u_m std| <= 1."""
    w = W.clone().requires_grad_()
    bases(3, gradient=gradient)(w).backward(torch.full((1, 6), 2.0))
    if want is None:
        alpha, shifts = (0.375, 0.35, 0.225), (-0.613732, 0.0, 0.613732)
        want = [sum(a for a, s in zip(alpha, shifts, strict=True) if abs(x + s) <= 1) for x in W.flatten().tolist()]
    torch.testing.assert_close(w.grad, 2 * torch.tensor([want]))


def test_activations_by_hand() -> None:
    """v = -1.5, 0, 1.5: thresholds at 2, .5 and -1; windows 1.5..2.5, 0..1 and -1.5..-.5, bounds inside."""
    q = activations(3)
    with torch.no_grad():
        q.beta.copy_(torch.tensor([1.0, 2.0, 4.0]))
    x = torch.tensor([[-1.5, -1.0, 0.0, 0.5, 1.25, 2.0]], requires_grad=True)
    y = q(x)
    assert y.tolist() == [[-7, 1, 1, 5, 5, 7]]
    y.backward(torch.tensor([[1.0, 10.0, 100.0, 1e3, 1e4, 1e5]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[4, 40, 200, 2000, 0, 1e5]]
    assert q.v.grad is not None
    assert q.v.grad.tolist() == [1e5, 2200, 44]
    signs = torch.tensor([[-1.0] * 5 + [1], [-1.0] * 3 + [1] * 3, [-1.0] + [1] * 5])
    assert q.beta.grad is not None
    assert q.beta.grad.tolist() == (signs @ torch.tensor([1.0, 10, 100, 1e3, 1e4, 1e5])).tolist()


def test_the_product_is_m_times_n_binary_products() -> None:
    """sum_mn alpha_m beta_n conv(B_m, A_n), padding zeros in each."""
    torch.manual_seed(0)
    layer = layers.QuantLayer(nn.Conv2d(4, 3, 3, padding=1, bias=False))
    layer.set_weight_quantizer(BinaryBases(layer, "weight", bits=3))
    q = layer.input_quantizer = BinaryActivations(layer, "input", bits=2, shifts=[-0.5, 0.75])
    with torch.no_grad():
        q.beta.copy_(torch.tensor([0.7, 1.3]))
    x = torch.randn(2, 4, 5, 5)
    codes = layer.weight_quantizer.codes(layer.weight)  # type: ignore[union-attr]
    want: Tensor | float = 0.0
    for base, alpha in zip(codes.codes.float(), codes.tensors["coefficients"].flatten(), strict=True):
        for beta, v in zip(q.beta, q.v, strict=True):
            plane = torch.where((x + v).clamp(0, 1) >= 0.5, 1.0, -1.0)
            want = want + alpha * beta * F.conv2d(plane, base, padding=1)
    torch.testing.assert_close(layer(x), want)


def test_first_shifts() -> None:
    assert activations(1).v.tolist() == [0]
    assert activations(3).v.tolist() == [-1.5, 0, 1.5]
    assert activations(5, bases=3).v.tolist() == activations(5, bases=5).v.tolist() == [-3.5, -2.5, -1.5, 0, 2.5]
    torch.testing.assert_close(activations(3, bases=5).v.detach(), torch.tensor([-0.9, 0, 0.9]))
    assert bases(5, inputs=1).u.tolist() == [-2, -1, 0, 1, 2]
    assert bases(5, inputs=3).u.tolist() == [-1, -0.5, 0, 0.5, 1]
    torch.testing.assert_close(activations(4).v.detach(), torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    assert spread(5, 1.0) == [-1, -0.5, 0, 0.5, 1]
    assert activations(2).traces() == {"v0": -1.5, "v1": 1.5, "beta0": 1.0, "beta1": 1.0}


def test_errors() -> None:
    with pytest.raises(ValueError, match="needs 3 shifts of weights"):
        bases(3, shifts=[0.0])
    with pytest.raises(ValueError, match="needs 2 shifts of inputs"):
        activations(2, shifts=[0.0])
    with pytest.raises(ValueError, match=r"1\.\.8, got 9"):
        bases(9)


@pytest.mark.parametrize(("w_bits", "a_bits"), [(3, 3), (5, 1)])
def test_yaml_on_a_resnet_trains(w_bits: int, a_bits: int, still_after_training) -> None:
    method = abcnet(w_bits, a_bits)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, preactivation=True)
    surgery.quantize(net, method.rules)
    assert [n for n, m in net.named_modules() if isinstance(m, nn.ReLU)] == ["relu"]
    still = still_after_training(net, method, torch.optim.SGD(net.parameters(), 0.01))
    assert not [n for n in still if a_bits > 1 or not n.endswith("beta")]  # batch-norm cancels the one beta
