"""DoReFa-Net, by the numbers of arXiv 1606.06160."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.methods.dorefa import DoReFaError
from qbench.methods.shared.dorefa_activation import DoReFaActivation
from qbench.methods.shared.dorefa_weight import DoReFaWeight
from qbench.models.tiny import Tiny
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Rule
from qbench.quant.surgery import quantize

W = torch.tensor([-1.0, -0.3, 0.1, 0.6])
A = torch.tensor([0.1, 0.4, 0.5, 0.9])
D = torch.tensor([[0.04, -0.01, 0.002, -0.03]])


def weight(bits: int) -> DoReFaWeight:
    return DoReFaWeight(nn.Linear(1, 1), "weight", bits=bits)


def activation(bits: int, bound: str = "clip") -> DoReFaActivation:
    return DoReFaActivation(nn.ReLU(), "replace", bits=bits, bound=bound)


def test_an_input_of_both_signs_gets_levels_on_both_sides() -> None:
    """2 round(3 (x + 1) / 2) / 3 - 1, as weights have it; the gradient is 1 within -1..1."""
    q = DoReFaActivation(nn.Linear(1, 1), "input", bits=2, bound="abs")
    x = torch.tensor([-1.5, -0.7, -0.2, 0.1, 0.7, 1.5], requires_grad=True)
    q.calibrate(x)
    y = q(x)
    torch.testing.assert_close(y, torch.tensor([-1, -1, -1 / 3, 1 / 3, 1, 1]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    torch.testing.assert_close(q.grid().values(q.codes(x)), y.detach())


def error(bits: int, seed: int = 0) -> DoReFaError:
    q = DoReFaError(nn.Linear(1, 1), "error", bits=bits)
    q.generator = torch.Generator().manual_seed(seed)
    return q


def gradient(q: nn.Module, x: Tensor) -> list[float]:
    x = x.clone().requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


@pytest.mark.parametrize(
    ("bits", "values"),
    [(1, [-0.5, -0.5, 0.5, 0.5]), (2, [-1, -1 / 3, 1 / 3, 1]), (3, [-1, -0.428571, 0.142857, 0.714286])],
)
def test_weights(bits: int, values: list[float]) -> None:
    torch.testing.assert_close(weight(bits)(W), torch.tensor(values))


def test_one_bit_weights_have_the_identity_as_gradient_and_sign_of_0_is_1() -> None:
    assert gradient(weight(1), W) == [1, 1, 1, 1]
    torch.testing.assert_close(weight(1)(torch.tensor([0.0, -1.0])), torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize(
    ("bits", "values"),
    [(1, [0.0, 0.0, 0.0, 1.0]), (2, [0, 1 / 3, 2 / 3, 1]), (3, [0.142857, 0.428571, 0.571429, 0.857143])],
)
def test_activations(bits: int, values: list[float]) -> None:
    torch.testing.assert_close(activation(bits)(A), torch.tensor(values))


def test_activation_bounds_and_gradients() -> None:
    x = torch.tensor([-2.0, -0.6, 0.0, 0.4, 1.0, 1.1])
    torch.testing.assert_close(activation(2)(x), torch.tensor([0, 0, 0, 1 / 3, 1, 1]))
    assert gradient(activation(2), x) == [0, 0, 1, 1, 1, 0]  # both bounds inside
    torch.testing.assert_close(activation(2, "abs")(x), torch.tensor([1, 2 / 3, 0, 1 / 3, 1, 1]))
    assert gradient(activation(2, "abs"), x) == [0, -1, 0, 1, 1, 0]


@given(st.integers(1, 8), st.sampled_from(["clip", "abs"]), st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_activation_codes_and_idempotence(bits: int, bound: str, values: list[float]) -> None:
    q, x = activation(bits, bound), torch.tensor(values)
    y, codes = q(x), q.codes(x)
    assert 0 <= codes.min() <= codes.max() <= 2**bits - 1
    torch.testing.assert_close(q.grid().values(codes), y, atol=1e-6, rtol=0)
    assert torch.equal(q(y), y)


def test_bypass_is_relu() -> None:
    q = activation(2)
    q.enabled = False
    assert q(torch.tensor([-1.0, 3.0])).tolist() == [0, 3]


def test_error_without_noise() -> None:
    torch.testing.assert_close(error(2).eval()(D), torch.tensor([[0.04, -0.04 / 3, 0.04 / 3, -0.04]]))


def test_error_with_noise_is_unbiased_on_four_levels() -> None:
    draws = 20000
    out = error(2)(D.expand(draws, 4))
    assert {round(v, 5) for v in out.unique().tolist()} <= {-0.04, -0.01333, 0.01333, 0.04}
    spread = 0.04 * 2 / 3 / 2 / math.sqrt(draws)  # the largest standard deviation of the mean: half a step
    assert (out.mean(0) - D[0]).abs().max() < 4.5 * spread


def test_error_range_is_that_of_each_image() -> None:
    d = torch.stack([D[0], 100 * D[0], torch.zeros(4)])
    out = error(8)(d)
    torch.testing.assert_close(out.abs().amax(1), torch.tensor([0.04, 4.0, 0.0]))
    torch.testing.assert_close(out, d, atol=2 * 4 / 255, rtol=0)


@given(st.integers(1, 8), st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.integers(0, 100))
def test_error_levels_and_idempotence(bits: int, values: list[float], seed: int) -> None:
    y = error(bits, seed)(torch.tensor([values]))
    assert y.unique().numel() <= 2**bits
    assert y.abs().max() <= max(abs(torch.tensor(values))) * (1 + 1e-6)
    torch.testing.assert_close(error(bits, seed + 1).eval()(y), y)


def test_error_noise_comes_from_the_given_generator() -> None:
    d = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(error(2, 5)(d), error(2, 5)(d))
    assert not torch.equal(error(2, 5)(d), error(2, 6)(d))


@pytest.mark.parametrize("make", [weight, activation, error])
@pytest.mark.parametrize("bits", [0, 17, 1.5])
def test_bits_out_of_range(make: type, bits: float) -> None:
    with pytest.raises(ValueError, match="bits must be"):
        make(bits)


def test_unknown_bound() -> None:
    with pytest.raises(ValueError, match="clip, abs"):
        activation(2, "tanh")


def test_two_steps_with_quantized_gradients() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Tiny(channels=3, classes=4, size=8)
    quantize(
        net,
        [
            Rule(match="@first", keep="first"),
            Rule(match="@last", keep="last"),
            Rule(
                weight=lambda layer, site: DoReFaWeight(layer, site, bits=1),
                error=lambda layer, site: DoReFaError(layer, site, bits=4),
            ),
            Rule(kind="ReLU*", replace=lambda layer, site: DoReFaActivation(layer, site, bits=2)),
        ],
    )
    assert isinstance(net.conv2, QuantLayer)
    assert isinstance(net.relu1, DoReFaActivation)
    seen: list[Tensor] = []
    assert net.conv2.error_quantizer is not None
    net.conv2.error_quantizer.register_forward_hook(lambda module, args, out: seen.append(out))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())
    assert not [name for name, p in net.named_parameters() if torch.equal(p, before[name])]
    assert len(seen) == 2
    assert max(image.unique().numel() for image in seen[0]) <= 16
    assert net.conv2.quantized_weight().unique().numel() == 2


def bit_planes(x: Tensor, y: Tensor, m: int, k: int) -> int:
    """sum over planes of 2^(i + j) popcount(and(c_i(x), c_j(y))), Eq. 3, on words of one bit per element."""

    def word(codes: Tensor, plane: int) -> int:
        return sum((c >> plane & 1) << i for i, c in enumerate(codes.tolist()))

    return sum((word(x, i) & word(y, j)).bit_count() << i + j for i in range(m) for j in range(k))


def test_bit_planes_by_hand() -> None:
    """(3, 1, 2) . (1, 3, 2) = 3 + 3 + 4."""
    assert bit_planes(torch.tensor([3, 1, 2]), torch.tensor([1, 3, 2]), 2, 2) == 10


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_bit_planes_give_the_real_product(w_bits: int, a_bits: int, seed: int) -> None:
    """w_hat . a_hat = step_w step_a (sum of planes - zero_w sum of a's codes)."""
    generator = torch.Generator().manual_seed(seed)
    w, a = torch.randn(37, generator=generator), torch.rand(37, generator=generator)
    cw, ca = weight(w_bits).codes(w), activation(a_bits).codes(a)
    gw = weight(w_bits).grid(w)
    planes = bit_planes(cw, ca, w_bits, a_bits)
    assert planes == int((cw * ca).sum())
    product = planes - float(gw.zero) * int(ca.sum())
    product *= float(gw.step) * float(activation(a_bits).grid().step)
    real = (weight(w_bits)(w) * activation(a_bits)(a)).sum()
    assert product == pytest.approx(float(real), rel=1e-4, abs=1e-4)
