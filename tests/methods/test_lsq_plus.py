"""LSQ+ against numbers worked out by hand (arXiv 2004.09576): forward, the three gradients, and where it starts."""

import math

import pytest
import torch
from torch import Tensor, nn

from qbench.methods.lsq_plus import LSQPlusInput, LSQPlusWeight


def made(
    step: float = 0.5, offset: float | None = -0.25, bits: int = 2, signed: bool = False, count: str = "features"
) -> LSQPlusInput:
    quantizer = LSQPlusInput(nn.Linear(5, 1), "input", bits=bits, signed=signed, offset=offset is not None, count=count)
    with torch.no_grad():
        quantizer.step.fill_(step)
        if offset is not None:
            quantizer.offset.fill_(offset)
    return quantizer


def gradients(quantizer: LSQPlusInput, x: list[float]) -> tuple[Tensor, list[list[float]]]:
    """The values, and for each of them the gradients of x, step and offset, without the factor 1 / sqrt(N p)."""
    leaf = torch.tensor([x], requires_grad=True)
    y = quantizer(leaf)
    scale = 1 / math.sqrt(len(x) * quantizer.bounds[1])
    columns = []
    for i in range(len(x)):
        wanted = [leaf, quantizer.step] + ([] if quantizer.offset is None else [quantizer.offset])
        of_x, *others = torch.autograd.grad(y[0, i], wanted, retain_graph=True)
        columns.append([of_x[0, i].item(), *(o.item() / scale for o in others)])
    return y.detach()[0], [list(row) for row in zip(*columns, strict=True)]


def test_worked_numbers_with_an_offset() -> None:
    y, (of_x, of_step, of_offset) = gradients(made(), [-0.35, -0.1, 0.2, 0.9, 2.4])  # z = -.2, .3, .9, 2.3, 5.3
    assert y.tolist() == pytest.approx([-0.25, -0.25, 0.25, 0.75, 1.25])
    assert of_x == [0, 1, 1, 1, 0]
    assert of_step == pytest.approx([0, -0.3, 0.1, -0.3, 3], abs=1e-6)
    assert of_offset == pytest.approx([1, 0, 0, 0, 1])


def test_the_bounds_count_as_outside_and_ties_go_to_even() -> None:
    # z = 0, .5, 1.5, 2.5, 3, all exact
    y, (of_x, of_step, of_offset) = gradients(made(), [-0.25, 0.0, 0.5, 1.0, 1.25])
    assert y.tolist() == [-0.25, -0.25, 0.75, 0.75, 1.25]
    assert of_x == [0, 1, 1, 1, 0]
    assert of_step == pytest.approx([0, -0.5, 0.5, -0.5, 3])
    assert of_offset == pytest.approx([1, 0, 0, 0, 1])


def test_signed_codes_with_an_offset() -> None:
    # n = -2, p = 1; z = (x + .25) / .5 = -3, -1.6, -.4, .6, 2
    y, (of_x, of_step, of_offset) = gradients(made(signed=True), [-1.75, -1.05, -0.45, 0.05, 0.75])
    assert y.tolist() == pytest.approx([-1.25, -1.25, -0.25, 0.25, 0.25])
    assert of_x == [0, 1, 1, 1, 0]
    assert of_step == pytest.approx([-2, -0.4, 0.4, 0.4, 1], abs=1e-6)
    assert of_offset == pytest.approx([1, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("signed", "values", "of_step"),
    [
        (True, [-0.4, -0.2, 0.2, 0.2, 0.2], [-2, 0.4, 0.4, 1, 1]),  # z = -4.5, -1.4, .6, 1.3, 4
        (False, [0, 0, 0.2, 0.2, 0.6], [0, 0, 0.4, -0.3, 3]),
    ],
)
def test_without_an_offset_it_is_lsq(signed: bool, values: list[float], of_step: list[float]) -> None:
    quantizer = made(step=0.2, offset=None, signed=signed)
    y, (_, found) = gradients(quantizer, [-0.9, -0.28, 0.12, 0.26, 0.8])
    assert y.tolist() == pytest.approx(values)
    assert found == pytest.approx(of_step, abs=1e-5)
    assert [name for name, _ in quantizer.named_parameters()] == ["step"]


@pytest.mark.parametrize(("count", "n"), [("features", 12), ("numel", 48)])
def test_step_and_offset_have_the_gradient_scale_of_lsq(count: str, n: int) -> None:
    quantizer = made(count=count)
    quantizer(torch.full((4, 3, 2, 2), 100.0)).sum().backward()  # all above: dstep = p = 3 and doffset = 1 each
    assert quantizer.step.grad.item() == pytest.approx(48 * 3 / math.sqrt(n * 3))
    assert quantizer.offset.grad.item() == pytest.approx(48 / math.sqrt(n * 3))


def test_a_weight_starts_at_three_standard_deviations() -> None:
    quantizer = LSQPlusWeight(nn.Linear(4, 1), "weight", bits=4)
    quantizer.calibrate(torch.tensor([[-3.0, -1.0, -1.0, 1.0]]))  # mean -1, std sqrt(8 / 3)
    quantizer.finish_calibration()
    assert quantizer.step.item() == pytest.approx((1 + 3 * math.sqrt(8 / 3)) / 8)
    quantizer.calibrate(torch.zeros(1, 4))
    quantizer.finish_calibration()
    assert quantizer.step.item() > 0


@pytest.mark.parametrize("weight", [[[0.01] * 4], [[-0.01]]])
def test_equal_weights_start_at_their_mean(weight: list[list[float]]) -> None:
    """std 0: the step is |mean| / 2^3, and w_hat 8 steps below 0 or, where these end, 7 above."""
    w = torch.tensor(weight)
    quantizer = LSQPlusWeight(nn.Linear(w.numel(), 1), "weight", bits=4)
    quantizer.calibrate(w)
    quantizer.finish_calibration()
    assert quantizer.step.item() == pytest.approx(0.01 / 8)
    hat = 0.01 * 7 / 8 if weight[0][0] > 0 else -0.01
    assert quantizer(w).flatten().tolist() == pytest.approx([hat] * w.numel())


@pytest.mark.parametrize("signed", [True, False])
def test_an_input_that_lies_on_a_grid_starts_on_it(signed: bool) -> None:
    quantizer = made(signed=signed)
    x = torch.tensor([[0.3, 0.7, 1.1, 1.5]])  # no 0 among them: only an offset can hold all four
    quantizer.calibrate(x)
    quantizer.finish_calibration()
    assert quantizer.step.item() == pytest.approx(0.4)
    assert quantizer.offset.item() == pytest.approx(1.1 if signed else 0.3)
    assert quantizer(x).flatten().tolist() == pytest.approx(x.flatten().tolist())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("offset", [None, 0.0])
def test_an_input_starts_where_no_neighbour_has_a_smaller_error(signed: bool, offset: float | None) -> None:
    x = nn.functional.silu(torch.randn(4, 2000, generator=torch.Generator().manual_seed(1)))
    quantizer = made(bits=3, signed=signed, offset=offset)
    for batch in x.split(2):
        quantizer.calibrate(batch)
    quantizer.finish_calibration()
    with torch.no_grad():
        least = (quantizer(x) - x).square().mean().item()
        for parameter in quantizer.parameters():
            value = parameter.clone()
            for factor in (0.9, 1.1):
                parameter.copy_(value * factor)
                assert (quantizer(x) - x).square().mean().item() > least
            parameter.copy_(value)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_an_input_of_one_value_is_held(value: float) -> None:
    quantizer = made()
    quantizer.calibrate(torch.full((2, 5), value))
    quantizer.finish_calibration()
    assert quantizer(torch.full((2, 5), value)).flatten().tolist() == pytest.approx([value] * 10)


def test_a_sample_of_a_large_batch_finds_the_same_grid() -> None:
    x, quantizer = torch.arange(4.0).repeat(100_000)[None], made()
    quantizer.calibrate(x)
    assert sum(s.numel() for s in quantizer._sample) == quantizer.SAMPLE
    quantizer.finish_calibration()
    assert (quantizer.step.item(), quantizer.offset.item()) == pytest.approx((1, 0), abs=1e-5)
    assert not quantizer._sample


def test_a_step_below_zero_is_read_as_the_smallest() -> None:
    quantizer = made(step=-1.0)
    assert quantizer(torch.tensor([[-1.0, 0.9]])).flatten().tolist() == pytest.approx([-0.25, -0.25], abs=1e-5)


def test_options_that_are_no_switch_are_refused() -> None:
    with pytest.raises(ValueError, match="signed must be true or false, got 'no'"):
        LSQPlusInput(nn.Linear(5, 1), "input", bits=2, signed="no", offset=True)  # type: ignore[arg-type]


def test_it_stores_one_step_and_one_offset() -> None:
    grid = made().grid()
    assert {name: part.bits for name, part in grid.tables(encoder=True).items()} == {"step": 32, "offset": 32}
    assert [end.item() for end in grid.ends()] == [-0.25, 1.25]
