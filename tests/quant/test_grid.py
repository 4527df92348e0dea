"""Grids by hand: values, codes, their number, what is stored, what is a constant."""

import pytest
import torch
from torch import Tensor

from qbench.quant.grid import Grid, affine, book, multiples, planes, signs


def stored(grid: Grid, encoder: bool = False) -> dict[str, int]:
    return {name: part.bits for name, part in grid.tables(encoder).items()}


def back(grid: Grid, codes: Tensor) -> Tensor:
    value = grid.values(codes)
    return grid.codes(value, value)


def test_affine() -> None:
    step, zero = torch.tensor([[0.5], [2.0]]), torch.tensor([[3.0], [0.0]])
    grid, codes = affine(step, 0, 15, zero), torch.tensor([[0, 3, 15], [0, 1, 15]])
    assert grid.values(codes).tolist() == [[-1.5, 0, 6], [0, 2, 30]]
    assert back(grid, codes).tolist() == codes.tolist()
    assert (grid.levels, grid.width) == (16, 4)
    assert [end.flatten().tolist() for end in grid.ends()] == [[-1.5, 0], [6, 30]]
    assert stored(grid) == {"step": 64, "zero": 8}
    assert affine(0.25, -4, 3).tables() == {}
    assert (affine(1.0, -1, 1).levels, affine(1.0, -1, 1).width) == (3, 2)
    assert affine(1.0, 1, 255).width == 8


def test_an_affine_grid_moved_by_an_offset() -> None:
    grid, codes = affine(torch.tensor(0.5), -2, 1, offset=torch.tensor(-0.3)), torch.tensor([-2, -1, 0, 1])
    assert grid.values(codes).tolist() == pytest.approx([-1.3, -0.8, -0.3, 0.2])
    assert back(grid, codes).tolist() == codes.tolist()
    assert [end.item() for end in grid.ends()] == pytest.approx([-1.3, 0.2])
    assert stored(grid) == {"step": 32, "offset": 32}


def test_widths_per_group() -> None:
    """Six weights in groups of two, of 2, 3 and 1 bits: each group with a step of its own."""
    zero, hi = torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([[3], [7], [1]])
    grid = affine(torch.tensor([[1.0], [0.5], [4.0]]), 0, hi, zero, view=(3, 2))
    codes = torch.tensor([[0, 3, 0], [7, 1, 0]])
    assert grid.values(codes).tolist() == [[-2, 1, 0], [3.5, 4, 0]]
    assert stored(grid) == {"step": 96, "zero": 2 + 3 + 1, "widths_less_1": 15}
    assert back(grid, codes).tolist() == codes.tolist()
    assert grid.codes(torch.full((2, 3), 9.0), torch.empty(0)).tolist() == [[3, 3, 7], [7, 1, 1]]
    assert torch.as_tensor(grid.width).flatten().tolist() == [2, 3, 1]
    assert grid.levels == 8
    part = grid.pack(codes)
    assert part.bits == 2 * (2 + 3 + 1)
    assert grid.unpack(part.unpack(part.pack())).tolist() == codes.tolist()


def test_a_zero_step_has_codes_worth_0() -> None:
    grid = affine(torch.tensor([0.0, 1.0]), -2, 1)
    assert back(grid, torch.tensor([1, 1])).tolist() == [0, 1]


def test_a_scale_of_the_tensors_own_is_not_known_without_it() -> None:
    for grid in (affine(None, -1, 1), signs(None), planes(None, q=3)):
        assert grid.dynamic
        assert stored(grid)
    assert not any(g.dynamic for g in (affine(1.0, 0, 1), signs(1.0), signs(torch.ones(3, 1))))


def test_a_sign_has_one_code_whatever_stands_beside_it() -> None:
    grid = signs(1.0, thresholds=0.0)
    for x, code in ((torch.ones(4), 1), (-torch.ones(4), 0), (torch.tensor([0.0]), 1), (torch.tensor([-0.0]), 1)):
        assert set(grid.codes(x, x).tolist()) == {code}
    assert grid.values(torch.tensor([0, 1])).tolist() == [-1, 1]
    assert (stored(grid, encoder=True), grid.width, grid.levels) == ({}, 1, 2)


def test_scaled_signs_per_channel() -> None:
    grid, codes = signs(torch.tensor([[0.5], [0.0]])), torch.tensor([[0, 1], [1, 1]])
    assert grid.values(codes).tolist() == [[-0.5, 0.5], [0, 0]]
    assert back(grid, codes).tolist() == codes.tolist()  # with a scale of 0 the sign is +1
    assert stored(grid) == {"coefficients": 64}


def test_planes() -> None:
    grid = planes(torch.tensor([1.0, 0.25]))
    assert grid.values(torch.arange(4)).tolist() == [-1.25, 0.75, -0.75, 1.25]
    assert back(grid, torch.arange(4)).tolist() == [0, 1, 2, 3]
    assert grid.split(torch.arange(4)).tolist() == [[-1, 1, -1, 1], [-1, -1, 1, 1]]
    assert grid.join(grid.split(torch.arange(4)) > 0).tolist() == [0, 1, 2, 3]
    assert (grid.levels, grid.width) == (4, 2)


def test_thresholds_leave_one_code_more_than_planes() -> None:
    grid = planes(torch.tensor([1.0, 1.0, 0.5]), thresholds=torch.tensor([0.5, -0.5, 0.0]))
    x = torch.tensor([-1.0, -0.5, 0.0, 0.4, 0.5])
    assert grid.codes(x, x).tolist() == [0b000, 0b010, 0b110, 0b110, 0b111]
    assert (grid.levels, grid.width) == (4, 3)
    assert [float(end) for end in grid.ends()] == [-2.5, 2.5]
    assert (stored(grid), stored(grid, encoder=True)) == (
        {"coefficients": 96},
        {"coefficients": 96, "thresholds": 96},
    )
    falling = planes(torch.tensor([1.0, -2.0]), thresholds=torch.tensor([0.0, 1.0]))  # 1, then 3, then -1
    assert [float(end) for end in falling.ends()] == [-1, 3]


def test_pruned_weights_have_a_code_of_their_own() -> None:
    grid = planes(torch.tensor([2.0]), pruned=True)
    assert grid.values(torch.tensor([0, 1, 2])).tolist() == [-2, 2, 0]
    assert back(grid, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert grid.split(torch.tensor([0, 1, 2])).tolist() == [[-1, 1, 0]]
    assert (grid.levels, grid.width) == (3, 2)


def test_multiples_of_a_scale() -> None:
    grid, codes = multiples(torch.tensor([[0.5], [2.0]]), [-1.0, 0.0, 0.25, 1.0]), torch.tensor([[0, 3], [2, 1]])
    assert grid.values(codes).tolist() == [[-0.5, 0.5], [0.5, 0.0]]
    assert back(grid, codes).tolist() == codes.tolist()
    assert (grid.levels, grid.width) == (4, 2)
    assert [end.flatten().tolist() for end in grid.ends()] == [[-0.5, -2], [0.5, 2]]
    assert stored(grid) == {"scale": 64}
    assert multiples(0.5, [0.0, 1.0]).tables() == {}
    assert multiples(None, [0.0, 1.0]).dynamic


def test_book() -> None:
    grid = book(torch.tensor([-1.0, 0.0, 3.0]), fixed=(1,))
    assert grid.values(torch.tensor([2, 0, 1])).tolist() == [3, -1, 0]
    assert back(grid, torch.tensor([2, 0, 1])).tolist() == [2, 0, 1]
    assert (grid.levels, grid.width, stored(grid)) == (3, 2, {"table": 64})
    assert [float(end) for end in grid.ends()] == [-1, 3]


def test_a_book_per_channel() -> None:
    grid = book(torch.tensor([[[-1.0, 1.0]], [[0.0, 5.0]]]))  # [channels, 1, values]
    codes = torch.tensor([[0, 1, 1], [0, 1, 0]])
    assert grid.values(codes).tolist() == [[-1, 1, 1], [0, 5, 0]]
    assert back(grid, codes).tolist() == codes.tolist()
    assert stored(grid) == {"table": 4 * 32}


@pytest.mark.parametrize("lead", [(), (2, 1), (1, 3)])
def test_a_codeword_may_be_a_block_of_weights(lead: tuple[int, ...]) -> None:
    """[out 2, in 3, 2 x 1] in blocks of two: codes [2, 3]; one table, one per channel, one per place."""
    table = torch.randn(*lead, 4, 2, generator=torch.Generator().manual_seed(0))
    grid, codes = book(table, shape=(2, 3, 2, 1)), torch.tensor([[0, 1, 2], [3, 3, 0]])
    values = grid.values(codes)
    for o in range(2):
        for i in range(3):
            words = table[(o, 0) if lead == (2, 1) else (0, i)] if lead else table
            assert values[o, i].flatten().tolist() == words[codes[o, i]].tolist()
    assert back(grid, codes).tolist() == codes.tolist()
    assert (grid.levels, grid.width, stored(grid)) == (4, 2, {"table": 32 * table.numel()})
    with pytest.raises(ValueError, match="a channel of 5 weights is no whole number of blocks of 2"):
        book(table, shape=(2, 5))
