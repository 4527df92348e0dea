"""ACIQ's clipping: its printed constants, scipy's minimum, and samples that are really clipped and rounded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from qbench.quant import ranges
from qbench.quant.clipping import best, error, slope

# As printed in the authors' code (submission2019/cnn-quantization, int_quantizer.py), for 2 to 8 bits.
PRINTED = {
    ("gauss", False): [1.71063519, 2.15159277, 2.55913646, 2.93620062, 3.28691474, 3.6151146, 3.92403714],
    ("laplace", False): [2.83068299, 3.89722946, 5.02864014, 6.20476633, 7.41312622, 8.64561995, 9.89675982],
    ("laplace", True): [3.89722946, 5.02864014, 6.20476633, 7.41312622, 8.64561995, 9.89675982, 11.16268502],
}


@pytest.mark.parametrize(("distribution", "half"), PRINTED)
def test_the_constants_are_those_that_the_authors_print(distribution: str, half: bool) -> None:
    found = [best(distribution, bits, half) for bits in range(2, 9)]
    assert found == pytest.approx(PRINTED[distribution, half], abs=3e-6)  # they minimised to six digits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
def test_the_constants_minimise_the_error(distribution: str, bits: int) -> None:
    """Of the formula, and of the formula's integral: the distance beyond a, and a bin's variance."""
    found = optimize.minimize_scalar(lambda a: error(distribution, a, bits), bounds=(0.1, 20), method="bounded")
    assert best(distribution, bits) == pytest.approx(found.x, rel=1e-4)
    density = {"gauss": stats.norm, "laplace": stats.laplace}[distribution].pdf
    for a in (0.5, 2.0, best(distribution, bits)):
        beyond = 2 * integrate.quad(lambda x: (x - a) ** 2 * density(x), a, 60)[0]  # noqa: B023
        assert error(distribution, a, bits) == pytest.approx(beyond + (2 * a / 2**bits) ** 2 / 12, rel=1e-6)
    h = 1e-5
    for a in (0.5, 2.0, 4.0):
        numeric = (error(distribution, a + h, bits) - error(distribution, a - h, bits)) / (2 * h)
        assert slope(distribution, a, bits) == pytest.approx(numeric, abs=1e-6)


def test_laplace_is_lambert_w() -> None:
    for bits in (2, 4, 8):
        assert best("laplace", bits) == pytest.approx(special.lambertw(3 * 4**bits).real, rel=1e-9)


def test_half_a_range_by_its_own_formula() -> None:
    """One side of Laplace, clipped to 0..a: exp(-a) + a^2 / (24 4^bits) is what the authors' code minimises."""
    for bits in (2, 4, 6):
        found = optimize.minimize_scalar(lambda a: 2.718281828459045**-a + a**2 / (24 * 4**bits), bracket=(2, 8))  # noqa: B023
        assert best("laplace", bits, half=True) == pytest.approx(found.x, rel=1e-5)


# --- ranges of values


def sample(kind: str, n: int = 100_000) -> torch.Tensor:
    """Exact quantiles: a sample without noise."""
    q = (torch.arange(n, dtype=torch.double) + 0.5) / n
    x = {"gauss": stats.norm, "laplace": stats.laplace}[kind].ppf(q.numpy())
    return torch.from_numpy(x).float()


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_the_range_of_a_sample(kind: str, bits: int) -> None:
    """mean +- a times the scale: 0.3 and 2 here; the sample's own distribution is chosen of the two."""
    x = 2 * sample(kind) + 0.3
    lo, hi = ranges.find("aciq", x, bits=bits, symmetric=False)
    a = 2 * best(kind, bits)
    assert (lo.item(), hi.item()) == pytest.approx((0.3 - a, 0.3 + a), rel=2e-3)
    assert ranges.find(f"aciq_{kind}", x, bits=bits, symmetric=False) == (lo, hi)


@pytest.mark.parametrize("middle", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_behind_a_relu_half_the_range(kind: str, middle: float) -> None:
    """0..middle + a: where the ReLU's input was, and how wide, is seen by what it left alone."""
    x = (sample(kind) * 2 + middle).clamp_min(0)
    lo, hi = ranges.find(f"aciq_{kind}", x, bits=4, symmetric=False)
    assert lo.item() == 0
    assert hi.item() == pytest.approx(middle + 2 * best(kind, 4, half=True), rel=2e-3)
    assert ranges.find("aciq", x, bits=4, symmetric=False) == (lo, hi)


def test_the_upper_half_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 1.0, 3.0], [1.0, 2.0, 3.0, 5.0, 6.0], [4.0, 4.0, 4.0, 4.0, 4.0]])
    middle, spread, deviation = ranges.upper_half(x)
    assert middle.tolist() == [0, 3, 4]
    assert spread.tolist() == [2, 2.5, 0]
    assert deviation.tolist() == pytest.approx([5**0.5, 6.5**0.5, 0])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    bits=st.integers(2, 8),
    kind=st.sampled_from(["aciq", "aciq_gauss", "aciq_laplace"]),
    positive=st.booleans(),
)
def test_never_beyond_the_values_and_no_error_above_both_distributions(
    seed: int, bits: int, kind: str, positive: bool
) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x.abs() if positive else x
    lo, hi = ranges.find(kind, x, bits=bits, symmetric=False)
    assert (lo <= x.amin(1).clamp_min(0)).all() if positive else (lo >= x.amin(1)).all()
    assert (hi <= x.amax(1)).all()
    if kind == "aciq":
        errors = ranges._squared_error(x, ranges.code_bounds(bits, False, False), False, None)
        both = [errors(*ranges.aciq(x, bits, distribution=d)) for d in ("gauss", "laplace")]
        assert errors(lo, hi).allclose(torch.minimum(*both))


def test_values_that_stand_for_several_count_for_as_many() -> None:
    x, times = torch.tensor([-1.0, 0.5, 2.0, 9.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    whole = x.repeat_interleave(times.long())
    for kind in ("aciq_gauss", "aciq_laplace", "aciq"):
        got = ranges.find(kind, x, bits=3, symmetric=False, weights=times)
        torch.testing.assert_close(got, ranges.find(kind, whole, bits=3, symmetric=False))
    for of in (ranges.moments, ranges.upper_half):
        torch.testing.assert_close(of(x, times), of(whole))


def test_a_row_of_zeros_keeps_its_range() -> None:
    lo, hi = ranges.find("aciq", torch.zeros(2, 8), bits=4, symmetric=False)
    assert lo.tolist() == hi.tolist() == [0, 0]
