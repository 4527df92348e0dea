"""Every primitive: forward, gradient, bounds, and what holds for all inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant import ops

floats = st.floats(-1e6, 1e6, width=32)
rows = st.lists(floats, min_size=1, max_size=30)
TIES = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
SIGNS = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])


def gradient(function: object, x: Tensor, upstream: Tensor | None = None) -> Tensor:
    x = x.clone().requires_grad_()
    y = function(x)  # type: ignore[operator]
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    assert x.grad is not None
    return x.grad


def test_round_is_half_to_even_with_gradient_one() -> None:
    assert ops.round(TIES).tolist() == [-2, -2, 0, 0, 2, 2]
    assert gradient(ops.round, TIES).tolist() == [1] * 6


def test_floor() -> None:
    assert ops.floor(torch.tensor([-0.1, 0.0, 0.9, 1.0, -1.0])).tolist() == [-1, 0, 0, 1, -1]
    assert gradient(ops.floor, TIES).tolist() == [1] * 6


def test_straight_through_passes_the_gradient_as_it_is() -> None:
    upstream = torch.tensor([3.0, -2.0])
    assert gradient(lambda x: ops.straight_through(x, x.sign() * 7), torch.tensor([1.0, -1.0]), upstream).equal(
        upstream
    )


def test_straight_through_gives_no_gradient_to_the_value_and_no_alias_of_it() -> None:
    x, value = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    y = ops.straight_through(x, value)
    y.sum().backward()
    assert value.grad is None
    assert y.data_ptr() != value.data_ptr()


def test_sign_of_zero_is_plus_one() -> None:
    for function in (ops.sign_value, ops.sign, ops.sign_clipped):
        assert function(SIGNS).tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert gradient(ops.sign, SIGNS).tolist() == [1] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sign_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert ops.sign_value(SIGNS.to(dtype)).dtype == dtype


def test_sign_clipped_gradient_with_and_without_the_bound() -> None:
    assert gradient(ops.sign_clipped, SIGNS).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert gradient(lambda x: ops.sign_clipped(x, True), SIGNS).tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_clip_counts_both_bounds_as_inside() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 2.0, 2.0001])
    assert ops.clip(x, -1, 2).tolist() == [-1, -1, 0, 2, 2]
    assert gradient(lambda x: ops.clip(x, -1, 2), x).tolist() == [0, 1, 1, 1, 0]


def test_scale_grad_is_the_identity_forward() -> None:
    upstream = torch.tensor([1.0, -2.0])
    x = torch.tensor([0.3, 0.4])
    assert ops.scale_grad(x, 0.25).equal(x)
    assert gradient(lambda x: ops.scale_grad(x, 0.25), x, upstream).tolist() == [0.25, -0.5]


def test_on_backward_changes_the_gradient_alone() -> None:
    upstream = torch.tensor([0.4, -2.6])
    x = torch.tensor([1.0, 2.0])
    assert ops.on_backward(x, torch.round).equal(x)
    assert gradient(lambda x: ops.on_backward(x, torch.round), x, upstream).tolist() == [0, -3]


def test_stochastic_round_is_unbiased_and_stays_beside_x() -> None:
    x = torch.tensor([-1.75, -0.5, 0.0, 0.1, 2.9]).repeat(20000, 1)
    y = ops.stochastic_round(x, torch.Generator().manual_seed(0))
    assert set((y - x.floor()).unique().tolist()) == {0.0, 1.0}
    spread = ((x - x.floor()) * (1 - x + x.floor()))[0].sqrt() / math.sqrt(20000)
    assert ((y.mean(0) - x[0]).abs() <= 5 * spread).all()
    assert y[:, 2].eq(0).all()


def test_stochastic_round_follows_its_generator() -> None:
    x = torch.linspace(-3, 3, 1000)

    def drawn(seed: int) -> Tensor:
        return ops.stochastic_round(x, torch.Generator().manual_seed(seed))

    assert drawn(1).equal(drawn(1))
    assert not drawn(1).equal(drawn(2))
    before = torch.get_rng_state()
    drawn(1)
    assert torch.get_rng_state().equal(before)  # its own generator, not the global one


@given(rows)
def test_round_is_idempotent_and_within_half(values: list[float]) -> None:
    x = torch.tensor(values)
    y = ops.round(x)
    assert ops.round(y).equal(y)
    assert ((y - x).abs() <= 0.5).all()


@given(rows, floats, st.floats(0, 1e6, width=32))
def test_clip_stays_inside_and_its_gradient_is_where_nothing_moved(values: list[float], lo: float, span: float) -> None:
    x, hi = torch.tensor(values), lo + span
    y = ops.clip(x, lo, hi)
    assert (y >= torch.tensor(lo)).all()
    assert (y <= torch.tensor(hi)).all()
    assert gradient(lambda x: ops.clip(x, lo, hi), x).bool().equal((x >= lo) & (x <= hi))


@given(rows)
def test_signs_are_plus_or_minus_one(values: list[float]) -> None:
    x = torch.tensor(values)
    assert ops.sign(x).abs().eq(1).all()
    assert (ops.sign(x) * x).equal(x.abs())


@given(rows, st.integers(0, 2**31))
def test_stochastic_round_of_whole_numbers_changes_nothing(values: list[float], seed: int) -> None:
    x = torch.tensor(values).round()
    assert ops.stochastic_round(x, torch.Generator().manual_seed(seed)).equal(x)


@pytest.mark.parametrize(
    "function",
    [ops.round, ops.sign, ops.sign_clipped, lambda x: ops.clip(x, -1, 1), lambda x: ops.scale_grad(x, 2.0)],
)
def test_a_second_derivative_is_refused(function: object) -> None:
    x = torch.ones(2, requires_grad=True)
    (first,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_sign_with_slope_multiplies_the_gradient() -> None:
    x, slope = torch.tensor([-0.5, -0.0, 2.0]), torch.tensor([3.0, -1.0, 0.5], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 4.0])
    assert ops.sign_with_slope(x, slope).tolist() == [-1, 1, 1]
    assert gradient(lambda x: ops.sign_with_slope(x, slope), x, upstream).tolist() == [3, -2, 2]
    assert slope.grad is None


@pytest.mark.parametrize("n", [0, 1, 9, 18])
def test_fourier_slope_is_the_sum_of_cosines(n: int) -> None:
    omega = math.pi / 2
    x = torch.cat([torch.linspace(-2.5, 2.5, 101), torch.tensor([0.0, 1e-6, 1.9999])]).double()
    want = sum(torch.cos((2 * i + 1) * omega * x) for i in range(n + 1)) * 4 * omega / math.pi
    want = torch.where(omega * x.abs() < math.pi, want, 0.0)
    torch.testing.assert_close(ops.fourier_slope(x, torch.tensor(n), omega), want, rtol=1e-6, atol=1e-6)


def test_fourier_slope_by_hand() -> None:
    """omega = pi/2: one term is 2 cos(pi x / 2); ten terms are 20 at 0 and oscillate around 0 elsewhere."""
    x = torch.tensor([0.0, 0.1, 0.5, 1.0])
    one = ops.fourier_slope(x, torch.tensor(0), math.pi / 2)
    torch.testing.assert_close(one, torch.tensor([2.0, 1.9754, 1.4142, 0.0]), rtol=1e-4, atol=1e-6)
    ten = ops.fourier_slope(x, torch.tensor(9), math.pi / 2)
    torch.testing.assert_close(ten, torch.tensor([20.0, 0.0, 0.0, 0.0]), rtol=1e-4, atol=1e-4)


def test_tanh_slope_by_hand() -> None:
    """k = max(1/t, 1): 1 at 0 while t <= 1, then t."""
    for t, at_zero in ((1e-3, 1.0), (0.5, 1.0), (1.0, 1.0), (10.0, 10.0)):
        assert float(ops.tanh_slope(torch.zeros(()), torch.tensor(t))) == pytest.approx(at_zero)
    got = ops.tanh_slope(torch.tensor([0.1]), torch.tensor(10.0))
    torch.testing.assert_close(got, torch.tensor([10 * (1 - math.tanh(1) ** 2)]))


def test_ap2_is_the_nearest_power_of_two_of_the_logarithm() -> None:
    """log2(1.4) = 0.49, log2(1.5) = 0.58; powers of two are themselves, 0 stays."""
    assert ops.ap2(torch.tensor([0.0, 1.4, -1.5, 3.0, 0.3])).tolist() == [0, 1, -2, 4, 0.25]
    powers = torch.tensor([2.0**k for k in range(-100, 100)])
    assert torch.equal(ops.ap2(powers), powers)
