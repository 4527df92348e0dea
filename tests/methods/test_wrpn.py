"""WRPN against numbers worked out by hand (arXiv 1709.01134)."""

import pytest
import torch
from torch import nn
from yamls import config_of

from qbench.config.identity import parent_of
from qbench.methods.shared.dorefa_activation import DoReFaActivation
from qbench.methods.wrpn import WRPNWeight
from qbench.models.resnet import ResNetCIFAR
from qbench.quant.layers import QuantLayer
from qbench.quant.surgery import quantize
from qbench.training.build import make_method

W = torch.tensor([-1.4, -0.6, -0.1, 0.2, 0.45, 0.9])


def wrpn(bits: int = 3, bound: str = "unit", **options: bool) -> WRPNWeight:
    return WRPNWeight(QuantLayer(nn.Linear(6, 1)), "weight", bits=bits, bound=bound, **options)


def test_weights_by_hand() -> None:
    w = W.clone().requires_grad_()
    hat = wrpn()(w)  # three steps on each side: 3 w = -4.2, -1.8, -.3, .6, 1.35, 2.7
    assert hat.tolist() == pytest.approx([-1, -2 / 3, 0, 1 / 3, 1 / 3, 1])
    hat.backward(g := torch.arange(1.0, 7.0))
    assert w.grad is not None
    assert torch.equal(w.grad, g)
    assert wrpn().codes(W).tolist() == [-3, -2, 0, 1, 1, 3]
    assert (wrpn(2).levels, wrpn(4).levels) == (3, 15)
    assert wrpn().grid().tables() == {}


def test_the_gradient_may_end_at_the_bound() -> None:
    w = torch.tensor([-1.0, 1.0, 1.01], requires_grad=True)
    wrpn(clip_gradient=True)(w).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1, 1, 0]


def test_small_weights_are_all_0_in_the_papers_unit_and_not_in_one_that_fits() -> None:
    w = 0.05 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    plain, fitted = wrpn(2), wrpn(2, "fit")
    for q in (plain, fitted):
        q.calibrate(w)
    assert plain.bound.item() == 1
    assert not plain(w).any()
    # three levels fit a Gaussian best with a step of 1.224 deviations
    assert fitted.bound.item() == pytest.approx(1.224 * 0.05, rel=0.1)
    assert sum(part.bits for part in fitted.grid().tables().values()) == 32
    torch.testing.assert_close(fitted(w), fitted.bound * plain(w / fitted.bound))


def test_all_zero_weights_keep_the_unit() -> None:
    q = wrpn(2, "fit")
    q.calibrate(torch.zeros(6))
    assert q.bound.item() == 1


def test_activations_lie_between_0_and_1() -> None:
    q = DoReFaActivation(nn.ReLU(), "replace", bits=2)
    assert q(torch.tensor([-1.0, 0.1, 0.4, 0.8, 3.0])).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])


def test_a_wider_net_is_an_option_of_the_model() -> None:
    config = config_of("method=wrpn", "model=resnet20", "model.width=2")
    assert parent_of(config)["model"]["width"] == config["model"]["width"] == 2
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, width=2.0)
    quantize(net, make_method(config).rules)
    inner = [m for m in net.modules() if isinstance(m, QuantLayer)]
    assert [m.weight.shape[0] for m in inner] == [32, 32, 64, 64, 128, 128]
    assert {type(m.weight_quantizer) for m in inner} == {WRPNWeight}


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 17}, {"bound": "2"}])
def test_arguments_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        wrpn(**options)  # type: ignore[arg-type]
