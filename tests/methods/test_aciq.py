"""ACIQ: allocation and correction by hand, clips of samples, and what each part is worth on Laplace data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.methods.aciq import Activation, Weight, allocate, bins, correction
from qbench.quant.clipping import best
from qbench.quant.layers import QuantLayer
from qbench.quant.uniform import Uniform

torch.set_num_threads(1)


def laplace(*shape: int, seed: int = 0) -> Tensor:
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).clamp(1e-6, 1 - 1e-6) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).log()


def conv(channels: int, outputs: int = 2) -> QuantLayer:
    return QuantLayer(nn.Conv2d(channels, outputs, 1))


def activation(x: Tensor, layer: QuantLayer | None = None, **options: object) -> Activation:
    q = Activation(layer or conv(x.shape[1]), "input", **options)  # type: ignore[arg-type]
    q.calibrate(x)
    q.finish_calibration()
    return q


# --- bit allocation


def test_allocation_by_hand() -> None:
    """a = [4, 2, 1, .25] at 4 bits: 29.30, 18.46, 11.63, 4.61 bins, hence 5, 4, 4, 2 bits, of mean 3.75: one more."""
    sizes = torch.tensor([4, 2, 1, 0.25])
    assert bins(sizes, 4).tolist() == pytest.approx([29.30, 18.46, 11.63, 4.61], abs=5e-3)
    assert bins(sizes, 4).log2().round().tolist() == [5, 4, 4, 2]
    assert allocate(sizes, 4).tolist() == [5, 5, 4, 2]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=40),
    bits=st.integers(2, 8),
)
def test_the_mean_is_what_was_asked_for_and_no_exchange_of_a_bit_is_better(sizes: list[float], bits: int) -> None:
    """The error of a uniform channel is size^2 / (3 4^M): a whole allocation is best where its greedy choice is."""
    x = torch.tensor(sizes).double()
    found = allocate(x, bits)
    assert found.sum() == bits * len(sizes)
    assert found.min() >= 1
    assert found.max() <= 8
    if x.max() > 0:
        lack = bins(x.clamp_min(x.max() * 2**-30), bits).log2() - found
        less, more = found > 1, found < 8
        for i in range(len(x)):
            if less[i]:  # to take a bit from i and give it to another does not bring both nearer
                assert (lack[more & (torch.arange(len(x)) != i)] <= lack[i] + 1 + 1e-9).all()


def test_a_channel_of_zeros_has_the_fewest_bits() -> None:
    assert allocate(torch.tensor([1.0, 0.0, 1.0, 1.0]), 4).tolist() == [5, 1, 5, 5]
    assert allocate(torch.zeros(4), 3).tolist() == [3, 3, 3, 3]


# --- weights


def test_correction_by_hand() -> None:
    """W = [.11, .42, -.27, .95], step .3: Wq = [0, .3, -.3, .9], xi = 1.006566; the mean stays .3025."""
    w, hat = torch.tensor([[0.11, 0.42, -0.27, 0.95]]), torch.tensor([[0.0, 0.3, -0.3, 0.9]])
    xi, offset = correction(w, hat)
    assert xi.item() == pytest.approx(1.006566, abs=1e-6)
    assert (xi * hat + offset).mean().item() == pytest.approx(0.3025)
    printed = xi * (hat + (w - hat).mean())  # the form of the text
    assert printed.mean().item() == pytest.approx(0.304486, abs=1e-6)


def test_a_row_without_spread_is_moved_alone() -> None:
    xi, offset = correction(torch.tensor([[0.2, 0.2], [0.1, 0.3]]), torch.tensor([[0.0, 0.0], [0.25, 0.25]]))
    assert xi.flatten().tolist() == [1, 1]
    assert offset.flatten().tolist() == pytest.approx([0.2, -0.05])


@pytest.mark.parametrize("split", [False, True])
def test_mean_and_spread_are_those_of_the_float_channels(split: bool) -> None:
    layer = QuantLayer(nn.Conv2d(6, 8, 3, groups=2))
    w = laplace(8, 3, 3, 3) * torch.logspace(-2, 0, 8).reshape(8, 1, 1, 1) + 0.01
    q, plain = (Weight(layer, "weight", bits=3, allocate=split, correct=c) for c in (True, False))
    for each in (q, plain):
        each.calibrate(w)
    hat, rows = q(w).flatten(1), w.flatten(1)
    torch.testing.assert_close(hat.mean(1), rows.mean(1))
    torch.testing.assert_close(hat.std(1), rows.std(1))
    assert not plain(w).flatten(1).mean(1).allclose(rows.mean(1), rtol=1e-3)
    assert q.bits == 3
    assert (len(q.widths.unique()) > 1) == split
    torch.testing.assert_close(q.grid().values(q.codes(w)), q(w))
    for row, width in zip(plain(w).flatten(1), q.widths.flatten().tolist(), strict=True):
        assert len(row.unique()) <= 2**width


def test_weights_of_equal_bits_without_correction_are_the_usual_ones() -> None:
    w = laplace(5, 12)
    q = Weight(QuantLayer(nn.Linear(12, 5)), "weight", bits=4, allocate=False, correct=False)
    usual = Uniform(nn.Linear(12, 5), "weight", bits=4, per_channel=True)
    for each in (q, usual):
        each.calibrate(w)
        each.finish_calibration()
    torch.testing.assert_close(q(w), usual(w))
    assert q.stored_bits(w) == usual.stored_bits(w)


def test_the_gradient_is_xi_where_no_code_was_clipped() -> None:
    q = Weight(QuantLayer(nn.Linear(4, 1)), "weight", bits=2)
    q.calibrate(torch.tensor([[0.1, 0.9, 1.7, 3.0]]))
    x = torch.tensor([[0.1, 9.0, -0.9, 3.4]], requires_grad=True)
    q(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([q.gain.item(), 0, 0, q.gain.item()])


def test_what_is_stored() -> None:
    """Codes of each channel's bits; step, offset, zero and bits (5) of each channel."""
    w = laplace(4, 10) * torch.tensor([[4.0], [2.0], [1.0], [0.25]])
    q = Weight(QuantLayer(nn.Linear(10, 4)), "weight", bits=4)
    q.calibrate(w)
    assert q.widths.sum() == 16
    assert q.stored_bits(w) == (160, 4 * (32 + 32 + 5) + 16)


# --- inputs


@pytest.mark.parametrize(("clip", "scale"), [("laplace", 1.0), ("gauss", 2**0.5)])
def test_a_clip_is_the_best_of_its_distribution(clip: str, scale: float) -> None:
    """Of Laplace with b = 1: E|x| = 1, deviation sqrt 2. Behind a ReLU that of one more bit, from its middle."""
    x = laplace(4, 3, 100, 100)
    q = activation(x, bits=4, clip=clip, per_channel=False, allocate=False)
    lo, hi = q.grid().ends()
    assert (hi - lo).item() == pytest.approx(2 * scale * best(clip, 4), rel=0.03)
    for middle in (0.0, 1.0):
        q = activation((x + middle).clamp_min(0), bits=4, clip=clip, per_channel=False, allocate=False)
        assert q.grid().ends()[0].item() == 0
        assert q.grid().ends()[1].item() == pytest.approx(middle + scale * best(clip, 5), rel=0.05)


def test_statistics_are_means_over_batches() -> None:
    q = Activation(conv(1), "input", bits=8, clip="none", allocate=False)
    for hi in (1.0, 3.0):
        q.calibrate(torch.tensor([0.0, hi]).reshape(2, 1, 1, 1))
    q.finish_calibration()
    assert q.grid().ends()[1].item() == pytest.approx(2)


@pytest.mark.parametrize("bits", [3, 4])
def test_each_part_lowers_the_error(bits: int) -> None:
    """Channels of different spread: whole range > clipped > clipped with allocated bits; per tensor is worst."""
    x = laplace(16, 8, 20, 20) * torch.logspace(-1.5, 0, 8).reshape(1, 8, 1, 1)
    cases = [("none", False, False), ("none", True, False), ("laplace", True, False), ("laplace", True, True)]
    errors = []
    for clip, per_channel, split in cases:
        q = activation(x, bits=bits, clip=clip, per_channel=per_channel, allocate=split)
        errors.append((q(x) - x).square().mean().item())
        assert q.bits == bits
    assert errors == sorted(errors, reverse=True), errors
    assert errors[3] < errors[1] / 2


def test_a_linear_layer_has_one_range() -> None:
    q = Activation(QuantLayer(nn.Linear(6, 2)), "input", bits=4)
    assert (q.granularity, q.widths.shape) == ("per_tensor", ())
    x = laplace(50, 6)
    q.calibrate(x)
    q.finish_calibration()
    assert len(q(x).unique()) <= 16


def test_the_gradient_of_an_input_is_one_within() -> None:
    q = activation(torch.linspace(0, 1, 40).reshape(4, 2, 5, 1), bits=2, clip="none")
    x = torch.tensor([[-1.0, 0.4], [0.9, 5.0]]).reshape(2, 2, 1, 1).requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 1, 1, 0]


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"bits must be a whole number in 2\.\.8, got 9"):
        Weight(conv(2), "weight", bits=9)
    with pytest.raises(ValueError, match="clip must be one of gauss, laplace, none, got 'best'"):
        Activation(conv(2), "input", bits=4, clip="best")
    with pytest.raises(ValueError, match="a_allocate=true needs a_per_channel=true"):
        Activation(conv(2), "input", bits=4, per_channel=False)
