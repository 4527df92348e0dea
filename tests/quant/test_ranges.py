"""The ranges and grids of qbench.quant.ranges, by hand and by their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qbench.errors import UserError
from qbench.quant import ranges

torch.set_num_threads(1)

VALUES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 40)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)
GRIDS = st.tuples(st.integers(2, 16), st.booleans(), st.booleans())


def quantized(x: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool, restricted: bool) -> Tensor:
    bounds = ranges.code_bounds(bits, symmetric, restricted)
    step, zero = (t[..., None] for t in ranges.grid(lo, hi, bounds, symmetric))
    return (ranges.codes(x, step, zero).clamp(*bounds) - zero) * step


def error(x: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool, restricted: bool) -> Tensor:
    return (quantized(x, lo, hi, bits, symmetric, restricted) - x).square().mean(-1)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((8, False, False), (0, 255)),
        ((8, False, True), (1, 255)),  # Jacob's weights: 255 codes
        ((8, True, False), (-128, 127)),
        ((8, True, True), (-127, 127)),
        ((2, True, True), (-1, 1)),
    ],
)
def test_code_bounds(grid: tuple[int, bool, bool], expected: tuple[int, int]) -> None:
    assert ranges.code_bounds(*grid) == expected


def test_affine_grid_by_hand() -> None:
    lo, hi = torch.tensor(-0.37), torch.tensor(1.13)
    step, zero = ranges.grid(lo, hi, (0, 15), False)
    assert step.item() == pytest.approx(0.1)
    assert zero.item() == 4
    x = torch.tensor([-0.37, 0.0, 0.5, 1.13])
    assert ranges.codes(x, step, zero).tolist() == [0, 4, 9, 15]
    assert quantized(x, lo, hi, 4, False, False).tolist() == pytest.approx([-0.4, 0, 0.5, 1.1])


def test_nudged_range_by_hand() -> None:
    """1712.05877 Sec. 3: [-0.37, 1.13] with 256 levels moves to [-0.3705882, 1.1294118]."""
    step, zero = ranges.grid(torch.tensor(-0.37), torch.tensor(1.13), (0, 255), False)
    assert step.item() == pytest.approx(0.0058823529)
    assert zero.item() == 63
    assert (-zero * step).item() == pytest.approx(-0.3705882)
    assert ((255 - zero) * step).item() == pytest.approx(1.1294118)


def test_grid_is_widened_to_zero_and_survives_a_dead_channel() -> None:
    lo, hi = torch.tensor([0.5, -3.0, 0.0]), torch.tensor([1.5, -1.0, 0.0])
    step, zero = ranges.grid(lo, hi, (0, 15), False)
    assert step.tolist() == pytest.approx([0.1, 0.2, 1.0])
    assert zero.tolist() == [0, 15, 0]


def test_symmetric_grid_by_hand() -> None:
    step, zero = ranges.grid(torch.tensor(-0.7), torch.tensor(0.3), (-7, 7), True)
    assert step.item() == pytest.approx(0.1)
    assert zero.item() == 0


def test_codes_round_half_to_even() -> None:
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert ranges.codes(halves, torch.tensor(1.0), torch.tensor(0.0)).tolist() == [-2, -2, 0, 0, 2, 2]


def test_percentile_agrees_with_numpy() -> None:
    x = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    for percent in (99.0, 99.9, 99.99, 100.0):
        lo, hi = ranges.percentile(x, percent)
        assert lo.numpy() == pytest.approx(np.percentile(x.numpy(), 100 - percent, axis=1), rel=1e-4)
        assert hi.numpy() == pytest.approx(np.percentile(x.numpy(), percent, axis=1), rel=1e-4)


def test_percentile_of_weighted_values_by_hand() -> None:
    """0, 1 and 2, the middle one three times: they stand for 0..1, 1..4 and 4..5, with middles 0.5, 2.5 and 4.5.

    A quarter of the way between the outer middles is 1.5, halfway from 0 to 1; three quarters 3.5, halfway to 2.
    """
    lo, hi = ranges.percentile(torch.tensor([1.0, 2.0, 0.0]), 75, torch.tensor([3.0, 1.0, 1.0]))
    assert (lo.item(), hi.item()) == (0.5, 1.5)
    lo, hi = ranges.percentile(torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 8.0]]), 75, torch.tensor([3.0, 1.0, 1.0]))
    assert (lo.tolist(), hi.tolist()) == ([0.5, 1.5], [1.5, 5.0])  # of 0, 0, 0, 4, 8: middles 1.5, 3.5 and 4.5


@pytest.mark.parametrize("percent", [50, 0, 100.1, -1])
def test_percentile_refuses(percent: float) -> None:
    with pytest.raises(ValueError, match="percentile must be above 50"):
        ranges.percentile(torch.zeros(3), percent)


def test_mse_cuts_an_outlier() -> None:
    x = torch.cat([torch.linspace(-1, 1, 2001), torch.tensor([20.0])])
    lo, hi = ranges.mse(x, 3)
    assert lo.item() < 0
    assert hi.item() < 10
    assert error(x, lo, hi, 3, False, False) < 0.75 * error(x, *ranges.minmax(x), 3, False, False)


def test_mse_reaches_no_further_than_0_and_the_values() -> None:
    for x, ends in (((0.25, 1.0), (0.0, 1.0)), ((-0.5, 0.25), (-0.5, 0.25)), ((-1.0, -0.25), (-1.0, 0.0))):
        lo, hi = ranges.mse(torch.linspace(*x, 1000), 8)
        assert (lo.item(), hi.item()) == pytest.approx(ends, abs=0.01)
        assert ends[0] <= lo <= hi <= ends[1]


def test_mse_is_close_to_the_best_of_all_pairs_of_ends() -> None:
    x = torch.cat([torch.linspace(-1, 1, 501), torch.tensor([3.0])])
    shares = torch.arange(1, 65) / 64
    low, high = torch.cartesian_prod(-shares, 3 * shares).T
    best = error(x.expand(len(low), -1), low, high, 4, False, False).min()
    assert error(x, *ranges.mse(x, 4), 4, False, False) < 1.05 * best


def test_kl_cuts_a_thin_tail_and_keeps_a_uniform_one() -> None:
    generator = torch.Generator().manual_seed(0)
    tail = torch.cat([torch.randn(50_000, generator=generator).abs(), torch.tensor([30.0])])
    lo, hi = ranges.kl(tail, 4)
    assert lo == 0
    assert 1 < hi.item() < 6
    flat = torch.rand(50_000, generator=generator)
    assert ranges.kl(flat, 4)[1].item() > 0.95


def test_kl_by_hand() -> None:
    """Bins 40 40 10 10 0 0 0 1, two levels: T = 4 keeps both pairs; 8 merges four bins, 2 puts 21 into the last."""
    x = torch.tensor([0.5] * 40 + [1.5] * 40 + [2.5] * 10 + [3.5] * 10 + [8.0])
    assert ranges.kl(x, 1, bins=8)[1].item() == 4
    assert ranges.kl(x, 2, symmetric=True, bins=8)[1].item() == 4  # one bit of two is the sign
    even = torch.tensor([0.5] * 3 + [1.5] * 3 + [2.5] * 2 + [4.0] * 2)
    assert ranges.kl(even, 1, bins=4)[1].item() == 4  # merged without loss


def test_kl_with_more_levels_than_bins_is_the_maximum() -> None:
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    lo, hi = ranges.kl(x, 16)
    assert torch.equal(lo, x.amin(-1))
    assert torch.equal(hi, x.amax(-1))


RANGES = ("minmax", "kl", "mse")


def draws(kind: str, rows: int, n: int) -> Tensor:
    u = torch.rand(rows, n, generator=torch.Generator().manual_seed(n)).double().clamp(1e-6, 1 - 1e-6)
    gauss = 2**0.5 * torch.erfinv(2 * u - 1)
    laplace = -(2 * u - 1).sign() * (1 - (2 * u - 1).abs()).log()
    return {"gauss": gauss, "relu": gauss.relu(), "laplace": laplace, "uniform": u - 0.5}[kind].float()


@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "uniform"])
@pytest.mark.parametrize(("rows", "n"), [(30, 9), (30, 576), (5, 2500), (3, 8192), (1, 100_000)])
@pytest.mark.parametrize("grid", [(4, False, False), (8, False, False), (8, True, False)])
def test_kl_has_at_most_about_twice_the_error_of_minmax(
    kind: str, rows: int, n: int, grid: tuple[int, bool, bool]
) -> None:
    x = draws(kind, rows, n)
    whole, cut, best = (error(x, *ranges.find(k, x, bits=grid[0], symmetric=grid[1]), *grid) for k in RANGES)
    assert (cut <= 2.2 * whole).all()
    assert n < 10 or (cut <= (2.5 if grid[0] == 8 else 4) * best).all()  # where n < 10 it is minmax


def test_kl_of_few_values_is_their_maximum() -> None:
    """Not .0625, where two full bins remain and the divergence is 0."""
    lo, hi = ranges.kl(torch.tensor([0.0622, 0.5, -0.6, 0.7, -0.8, 0.9, 1.0]), 8, symmetric=True)
    assert (lo.item(), hi.item()) == (pytest.approx(-0.8), 1.0)


def test_kl_is_continuous_at_zero_and_mirrored() -> None:
    x = draws("relu", 1, 50_000)[0] * 2
    for bits in (4, 8):
        hi = ranges.kl(x, bits)[1]
        lo, again = ranges.kl(torch.cat([x, torch.tensor([-1e-3])]), bits)
        assert (lo.item(), again.item()) == (pytest.approx(-1e-3), pytest.approx(hi.item(), rel=0.02))
        for values in (x, x - 0.3):
            lo, hi = ranges.kl(values, bits)
            assert [t.item() for t in ranges.kl(-values, bits)] == [-hi.item(), -lo.item()]


def test_kl_cuts_an_outlier_over_empty_bins() -> None:
    x = torch.cat([draws("relu", 1, 2**21)[0], torch.tensor([40.0])])
    assert 3 < ranges.kl(x, 8)[1].item() < 8


@pytest.mark.parametrize("kind", ranges.KINDS)
def test_denormal_values_have_a_range_and_infinite_ones_an_answer(kind: str) -> None:
    small = torch.full((5000,), 1e-45)
    lo, hi = ranges.find(kind, small, bits=8, symmetric=False)
    assert 0 <= lo <= hi <= 1e-44
    for wrong in (torch.inf, -torch.inf, torch.nan):
        with pytest.raises(UserError, match="holds infinite values or NaN"):
            ranges.find(kind, torch.tensor([1.0, wrong]), bits=8, symmetric=False)
    assert ranges.find(kind, torch.full((2,), 3e38), bits=8, symmetric=False)[1] == torch.tensor(3e38)


def test_mse_cuts_an_outlier_hundreds_of_times_the_rest() -> None:
    """2^18 values of variance 1 and one 400: the cut costs 400^2, all else at 0 costs 2^18; 400 / 64 is too wide."""
    x = torch.cat([draws("gauss", 1, 2**18)[0], torch.tensor([400.0])])
    lo, hi = ranges.mse(x, 2)
    assert 0.5 < hi.item() < 3
    assert error(x, lo, hi, 2, False, False) < 0.9 * error(x, lo.clamp_min(-2), torch.tensor(6.25), 2, False, False)


def test_symmetric_codes_of_values_that_are_not_negative() -> None:
    assert ranges.code_bounds(8, True, False, signed=False) == (0, 255)
    assert ranges.code_bounds(8, True, True, signed=False) == (0, 255)  # the lowest is 0, which is needed
    assert ranges.code_bounds(8, False, True, signed=False) == (1, 255)
    x = draws("relu", 1, 10_000)[0]
    for kind in ranges.KINDS:
        hi = ranges.find(kind, x, bits=4, symmetric=True, signed=False)[1]
        assert hi == pytest.approx(ranges.find(kind, x, bits=4, symmetric=False)[1].item())


@pytest.mark.parametrize("kind", ["percentile", "mse", "kl"])
def test_a_weight_counts_as_so_many_equal_values(kind: str) -> None:
    x = draws("laplace", 1, 4096)[0]
    weights = 1 + (torch.arange(4096) % 3).float()
    options = {"bits": 4, "symmetric": False, "percent": 97.0}
    found = ranges.find(kind, x, weights=weights, **options)
    many = ranges.find(kind, x.repeat_interleave(weights.int()), **options)
    assert [t.item() for t in found] == pytest.approx([t.item() for t in many], rel=0.01)
    even = ranges.find(kind, x, weights=torch.ones(4096), **options)
    assert [t.item() for t in even] == pytest.approx([t.item() for t in ranges.find(kind, x, **options)], rel=1e-5)


@given(x=VALUES, grid=GRIDS)
@settings(max_examples=50, deadline=None)
def test_every_range_is_ordered_and_inside_the_values(x: np.ndarray, grid: tuple[int, bool, bool]) -> None:
    bits, symmetric, restricted = grid
    values = torch.from_numpy(x)
    low, high = ranges.minmax(values)
    for kind in ranges.KINDS:
        lo, hi = ranges.find(kind, values, bits=bits, symmetric=symmetric, restricted=restricted, percent=99)
        assert lo.shape == hi.shape == (len(values),)
        assert (lo <= hi).all()
        assert (lo >= low.clamp_max(0)).all()
        assert (hi <= high.clamp_min(0)).all()


@given(x=VALUES, grid=GRIDS)
@settings(max_examples=50, deadline=None)
def test_mse_is_never_worse_than_minmax(x: np.ndarray, grid: tuple[int, bool, bool]) -> None:
    values = torch.from_numpy(x)
    best = error(values, *ranges.mse(values, *grid), *grid)
    assert (best <= error(values, *ranges.minmax(values), *grid)).all()


@given(x=VALUES, grid=GRIDS)
@settings(max_examples=50, deadline=None)
def test_minmax_covers_the_values_to_one_step(x: np.ndarray, grid: tuple[int, bool, bool]) -> None:
    values = torch.from_numpy(x)
    lo, hi = ranges.minmax(values)
    bounds = ranges.code_bounds(*grid)
    step, zero = ranges.grid(lo, hi, bounds, grid[1])
    assert (step > 0).all()
    assert (zero >= bounds[0]).all()
    assert (zero <= bounds[1]).all()
    assert torch.equal(zero, zero.round())
    hat = quantized(values, lo, hi, *grid)
    assert ((hat - values).abs() <= step[:, None] * 1.01).all()  # half a step, and half more where the grid was nudged
    again = quantized(hat, lo, hi, *grid)
    assert torch.equal(again, hat)


def test_one_range_for_a_flat_tensor() -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(1))
    for kind in ranges.KINDS:
        lo, hi = ranges.find(kind, x, bits=4, symmetric=False)
        assert lo.shape == hi.shape == ()
