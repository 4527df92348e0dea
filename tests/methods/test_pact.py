"""PACT, by the numbers of arXiv 1805.06085, and the DoReFa weights it uses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.methods.shared.dorefa_weight import DoReFaWeight
from qbench.methods.shared.pact import PACT, SMALLEST
from qbench.models.resnet import ResNetCIFAR
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Rule
from qbench.quant.surgery import quantize

X = torch.tensor([-0.4, 0.2, 0.5, 0.9, 1.7])


def pact(bits: int = 2, alpha: float | None = 1.0, **options: str) -> PACT:
    return PACT(nn.ReLU(), "replace", bits=bits, alpha=alpha, **options)


def dorefa(bits: int, **options: object) -> DoReFaWeight:
    return DoReFaWeight(nn.Linear(1, 1), "weight", bits=bits, **options)  # type: ignore[arg-type]


def gradient(q: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    return x.grad


def test_an_input_of_both_signs_gets_levels_on_both_sides() -> None:
    """n = 3, alpha = 1: levels -1, -1/3, 1/3, 1; the gradient of alpha is 1 above and -1 below."""
    q = PACT(nn.Linear(1, 1), "input", bits=2, alpha=1.0)
    assert q.bypass(X).equal(X)
    q.calibrate(X)
    assert q.signed
    x = torch.tensor([-1.7, -0.6, -0.1, 0.5, 0.9, 1.7])
    torch.testing.assert_close(q(x), torch.tensor([-1, -1 / 3, -1 / 3, 1 / 3, 1, 1]))
    assert gradient(q, x).tolist() == [0, 1, 1, 1, 1, 0]
    assert q.alpha.grad == 0  # one of each
    q.alpha.grad = None
    gradient(q, torch.tensor([-2.0, -3.0, 0.3]))
    assert q.alpha.grad == -2
    torch.testing.assert_close(q.grid().values(q.codes(x)), q(x))
    other = PACT(nn.Linear(1, 1), "input", bits=2, alpha=1.0)
    other.load_state_dict(q.state_dict())
    assert other.signed
    plain = PACT(nn.Linear(1, 1), "input", bits=2, alpha=1.0)
    plain.calibrate(X.relu())
    torch.testing.assert_close(plain(X.relu()), pact()(X))


def test_the_clip_of_an_input_of_both_signs_is_that_of_least_squared_error() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    q = PACT(nn.Linear(1, 1), "input", bits=2)
    q.calibrate(x)
    q.finish_calibration()
    assert 1.4 < q.alpha.item() < 1.6  # 1.4936: three half steps of the uniform 4-level grid of a Gaussian (0.9957)


def test_worked_example() -> None:
    q = pact()
    torch.testing.assert_close(q(X), torch.tensor([0, 1 / 3, 2 / 3, 1, 1]))
    assert gradient(q, X).tolist() == [0, 1, 1, 1, 0]
    assert q.alpha.grad is not None
    assert q.alpha.grad.item() == 1  # only x = 1.7; the residual of LSQ would add 0.1333 + 0.1667 + 0.1


def test_bounds_belong_to_x_at_0_and_to_alpha_at_alpha() -> None:
    q = pact()
    assert gradient(q, torch.tensor([0.0, 1.0])).tolist() == [1, 0]
    assert q.alpha.grad is not None
    assert q.alpha.grad.item() == 1


def test_scaled_upstream_gradient_is_summed_over_what_is_clipped() -> None:
    q = pact(alpha=0.5)
    x = X.clone().requires_grad_()
    (q(x) * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad is not None
    assert q.alpha.grad is not None
    assert x.grad.tolist() == [0, 2, 0, 0, 0]
    assert q.alpha.grad.item() == 3 + 4 + 5


@given(st.integers(1, 8), st.floats(0.05, 20), st.lists(st.floats(-30, 30), min_size=1, max_size=30))
def test_levels_codes_idempotence(bits: int, alpha: float, values: list[float]) -> None:
    q, x = pact(bits, alpha), torch.tensor(values)
    y, codes = q(x).detach(), q.codes(x)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal(q.grid().values(codes), y)
    torch.testing.assert_close(q(y).detach(), y)


def test_an_alpha_below_zero_stays_usable_and_can_return() -> None:
    q = pact(alpha=0.1)
    with torch.no_grad():
        q.alpha.fill_(-1.0)
    y = q(X)
    y.sum().backward()
    assert y.max().item() == pytest.approx(SMALLEST)
    assert q.alpha.grad is not None
    assert q.alpha.grad.item() == 4


def test_bypass_is_relu() -> None:
    q = pact()
    q.enabled = False
    assert torch.equal(q(X), X.relu())


def calibrated(q: PACT, *batches: Tensor) -> float:
    for x in batches:
        q.calibrate(x)
    q.finish_calibration()
    return q.alpha.item()


def test_alpha_starts_at_the_papers_10_from_scratch_and_calibrated_from_a_float_net() -> None:
    x = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert calibrated(pact(alpha=None, init="scratch"), x) == 10
    assert calibrated(pact(alpha=3.0, init="float"), x) == 3
    # the best 2-bit clip of a half normal: 3 steps of about 0.65, far below its maximum of 4
    two, eight = (calibrated(pact(bits, None, init="float"), x[:4], x[4:]) for bits in (2, 8))
    assert 1.7 < two < 2.3
    assert two < eight <= x.max()


def test_alpha_stays_where_no_image_excites_the_layer() -> None:
    assert calibrated(pact(alpha=None, init="float"), -torch.ones(100)) == 10


@pytest.mark.parametrize("options", [{"bits": 0}, {"bits": 17}, {"bits": 2.5}, {"alpha": 0.0}, {"alpha": -1.0}])
def test_arguments_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        pact(**options)  # type: ignore[arg-type]


W = torch.tensor([-0.8, -0.1, 0.05, 0.4, 1.2])


def test_dorefa_weights_of_the_facts() -> None:
    torch.testing.assert_close(dorefa(2)(W), torch.tensor([-1, -1 / 3, 1 / 3, 1 / 3, 1]))
    detached = torch.tensor([0.6706, 1.1876, 1.1965, 1.0264, 0.3659])
    torch.testing.assert_close(gradient(dorefa(2, detach=True), W), detached, atol=1e-4, rtol=0)
    detached[-1] = 0.1465
    torch.testing.assert_close(gradient(dorefa(2), W), detached, atol=1e-4, rtol=0)


def test_dorefa_gradient_is_that_of_the_map_without_its_round() -> None:
    w = torch.tensor([[0.3, -1.5, 0.7], [1.5, 0.1, -0.2]], requires_grad=True)  # the arg-max is a tie
    g = torch.tensor([[1.0, 2.0, -3.0], [0.5, 1.5, 4.0]])
    (w.tanh() / w.tanh().abs().amax() * g).sum().backward()
    expected, w.grad = w.grad, None
    (dorefa(3)(w) * g).sum().backward()
    torch.testing.assert_close(w.grad, expected)


def test_fitting_the_scale_keeps_the_size_of_the_weights_and_the_gradient_behind_batch_norm() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(8, 3, 6, 6)
    found = []
    for init in ("scratch", "float"):
        q = dorefa(3, init=init)
        q.calibrate(layer.weight)
        w = layer.weight.detach().clone().requires_grad_()
        y = torch.nn.functional.conv2d(x, q(w))
        (nn.BatchNorm2d(4, eps=1e-12)(y) ** 3).sum().backward()
        found.append((q, q(w).detach(), w.grad))
    (plain, _, expected), (fitted, hat, grad) = found
    assert plain.scale.item() == 1
    assert plain.stored_bits(layer.weight)[1] == 0
    assert fitted.stored_bits(layer.weight)[1] == 32
    assert torch.linalg.norm(hat - layer.weight) < 0.2 * torch.linalg.norm(layer.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(fitted.grid(layer.weight).values(fitted.codes(layer.weight)), hat, atol=1e-6)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_an_all_zero_weight_keeps_its_scale_and_its_gradient(bits: int, together: bool) -> None:
    """m = 0 counts as 1, and no scale fits better than 1: w_hat = Q's half rounded to even, 1 / n; dL/dw = g."""
    q, w = dorefa(bits, init="float"), torch.zeros(2, 3, requires_grad=True)
    q.calibrate(w)
    assert q.scale.item() == 1
    hat = DoReFaWeight.quantize_all([w], [q])[0] if together else q(w)
    g = torch.arange(6.0).view(2, 3)
    hat.backward(g)
    want = 0.0 if bits == 1 else 1 / (2**bits - 1)
    assert hat.detach().flatten().tolist() == pytest.approx([want] * 6)
    assert w.grad is not None
    torch.testing.assert_close(w.grad, g)
    assert set(q.codes(w).flatten().tolist()) == {2 ** (bits - 1)}


@given(st.integers(1, 8), st.lists(st.floats(-3, 3), min_size=2, max_size=30))
def test_dorefa_weight_levels_and_codes(bits: int, values: list[float]) -> None:
    q, w = dorefa(bits), torch.tensor(values)
    hat, codes = q(w), q.codes(w)
    assert hat.unique().numel() <= 2**bits
    assert 0 <= codes.min() <= codes.max() <= 2**bits - 1
    torch.testing.assert_close(q.grid(w).values(codes), hat, atol=1e-6, rtol=1e-6)


def test_two_steps_of_a_pre_activation_resnet() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = ResNetCIFAR(channels=3, classes=10, size=16, depth=8, width=0.5, preactivation=True)

    def weight(layer: nn.Module, site: str) -> DoReFaWeight:
        return DoReFaWeight(layer, site, bits=2, init="float")

    kept = quantize(
        net,
        [
            Rule(match="@first", keep="first"),
            Rule(match="@last", keep="last"),
            Rule(weight=weight),
            Rule(kind="ReLU*", replace=lambda layer, site: PACT(layer, site, bits=2, alpha=1.0)),
        ],
    )
    assert kept == {"conv1": "first", "fc": "last"}
    layers = [m for m in net.modules() if isinstance(m, QuantLayer)]
    clips = [m for m in net.modules() if isinstance(m, PACT)]
    assert (len(layers), len(clips)) == (6, 7)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-4)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(torch.randn(8, 3, 16, 16)), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())
    assert not [name for name, p in net.named_parameters() if torch.equal(p, before[name])]
    assert all(layer.quantized_weight().unique().numel() <= 4 for layer in layers)
