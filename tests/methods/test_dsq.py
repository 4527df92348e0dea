"""DSQ against numbers worked out by hand and against plain autograd (arXiv 1908.05033)."""

import math

import pytest
import torch
from torch import Tensor, nn

from qbench.methods.dsq import DSQ, SHARPEST, SMALLEST


def dsq(bits: int = 2, lo: float = 0.0, hi: float = 3.0, site: str = "weight", **options: object) -> DSQ:
    q = DSQ(nn.Linear(4, 1), site, bits=bits, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        q.lo.fill_(lo)
        q.hi.fill_(hi)
    return q


def composed(x: Tensor, lo: Tensor, hi: Tensor, alpha: Tensor, n: int) -> Tensor:
    """The paper's steps in torch's own operations; sgn has gradient 1."""
    step = (hi - lo) / n
    clipped = torch.where(x < lo, lo, torch.where(x > hi, hi, x))
    i = ((clipped - lo) / step).detach().floor().clamp(0, n - 1)
    k = (2 / alpha - 1).log() / step
    phi = (k * (clipped - (lo + (i + 0.5) * step))).tanh() / (1 - alpha)
    sgn = phi + (torch.where(phi >= 0, 1.0, -1.0) - phi).detach()
    hard = lo + step * (i + (sgn + 1) / 2)
    return torch.where((x < lo) | (x > hi), clipped, hard)


def test_two_bits_by_hand() -> None:
    x = torch.tensor([-0.5, 0.0, 0.4, 1.25, 2.9, 3.5], requires_grad=True)
    q = dsq(alpha=0.5)  # K = ln 3, 1 / (1 - alpha) = 2, S = ln 3 (1 - tanh^2(ln 3 f))
    hat = q(x)
    assert hat.tolist() == [0, 0, 0, 1, 3, 3]
    hat.sum().backward()
    assert x.grad is not None
    ln3 = math.log(3)
    # at an edge, f = -1/2, tanh(-ln 3 / 2) = -1/2; in the middle of a step the slope is the largest
    assert x.grad.tolist() == pytest.approx(
        [0, 0.75 * ln3, *(ln3 * (1 - math.tanh(ln3 * f) ** 2) for f in (-0.1, -0.25, 0.4)), 0]
    )


def test_half_a_step_goes_up_and_the_bounds_are_inside() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 0.0, 3.0], requires_grad=True)
    hat = dsq()(x)
    assert hat.tolist() == [1, 2, 3, 0, 3]
    hat.sum().backward()
    assert x.grad is not None
    assert (x.grad > 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8])
def test_values_and_gradients_are_those_of_autograd(bits: int, alpha: float) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(bits), dtype=torch.float32)
    g = torch.randn(500, generator=torch.Generator().manual_seed(9))
    q = dsq(bits, -1.1, 1.4, alpha=alpha)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    wanted = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.1, 1.4, alpha)]
    ours, theirs = q(a), composed(b, *wanted, 2**bits - 1)
    torch.testing.assert_close(ours, theirs.float())
    found = torch.autograd.grad(ours, [a, q.lo, q.hi, q.alpha], g)
    want = torch.autograd.grad(theirs, [b, *wanted], g.double())
    for mine, other in zip(found, want, strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=1e-3, atol=2e-3)


def test_the_curve_comes_close_to_the_steps_as_alpha_falls() -> None:
    x = torch.linspace(0, 1, 2001)[:-1].requires_grad_()
    for alpha in (0.6, 0.2, 0.02):
        (slope,) = torch.autograd.grad(dsq(alpha=alpha)(x).sum(), x)
        assert slope.mean().item() == pytest.approx(1, abs=1e-3)
        near = ((x - 0.5).abs() < 0.2).detach()
        middle = slope[near].sum() / slope.sum()  # of the rise, what lies in the middle 0.4 of the step
        kappa = math.log(2 / alpha - 1)
        assert middle.item() == pytest.approx(math.tanh(0.2 * kappa) / (1 - alpha), abs=3e-3)


def test_what_is_not_learned_stays() -> None:
    q = dsq(learn_alpha=False, learn_range=False)
    assert [p.requires_grad for p in q.parameters()] == [False] * 3
    x = torch.tensor([0.3], requires_grad=True)
    q(x).backward()
    assert x.grad is not None
    assert q.lo.grad is None


def test_weights_start_at_2_6_deviations_and_inputs_at_the_least_error() -> None:
    q = dsq()
    q.calibrate(torch.tensor([[-3.0, -1.0, -1.0, 1.0]]))  # mean -1, std sqrt(8 / 3)
    q.finish_calibration()
    assert (q.lo.item(), q.hi.item()) == pytest.approx((-1 - 2.6 * math.sqrt(8 / 3), -1 + 2.6 * math.sqrt(8 / 3)))
    for x in (torch.tensor([[0.0, 0.5, 1.0, 1.5]]), torch.tensor([[-1.0, 0.0, 1.0, 2.0]])):
        q = dsq(site="input")
        q.calibrate(x)
        q.finish_calibration()
        torch.testing.assert_close(q(x).detach(), x)
    q = dsq(site="input")
    q.calibrate(torch.zeros(1, 4))
    q.finish_calibration()
    assert (q.lo.item(), q.hi.item()) == (0, 3)


def test_bounds_that_meet_and_an_alpha_beyond_its_range_stay_finite() -> None:
    q = dsq(lo=1.0, hi=0.5)
    with torch.no_grad():
        q.alpha.fill_(-1)
    x = torch.tensor([0.7, 1.0, 2.0], requires_grad=True)
    hat = q(x)
    hat.sum().backward()
    assert hat.tolist() == pytest.approx([1, 1, 1], abs=10 * SMALLEST)
    assert all(p.grad is not None and p.grad.isfinite() for p in q.parameters())
    sharp = dsq(alpha=SHARPEST)
    low = dsq()
    with torch.no_grad():
        low.alpha.fill_(0)
    y = torch.tensor([0.45], requires_grad=True)
    assert torch.equal(*(torch.autograd.grad(m(y).sum(), y)[0] for m in (sharp, low)))


def test_it_stores_a_step_and_an_offset() -> None:
    grid = dsq(lo=-0.5, hi=2.5).grid()
    assert {name: part.bits for name, part in grid.tables(encoder=True).items()} == {"step": 32, "offset": 32}
    assert [end.item() for end in grid.ends()] == [-0.5, 2.5]


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_arguments_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        dsq(**options)  # type: ignore[arg-type]
