"""Grids in words and back: whatever a grid is, its description gives the same values and the same tables."""

import json

import pytest
import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.lowbit import describe
from qbench.lowbit.artifact import Artifact, _stored
from qbench.lowbit.container import SIZES, opened, seal
from qbench.quant.grid import Affine, Grid, affine, book, multiples, planes, signs
from qbench.quant.groups import Groups
from qbench.quant.packing import Part

CHANNELS = torch.rand(4, 1, 1, 1) + 0.1
WIDE = torch.tensor([[1], [3], [7], [1]])


def groups(bits: Tensor) -> Groups:
    hi, (least, greatest) = 2**bits - 1, torch.tensor([-0.3, 0.9])
    step = (greatest - least) / hi
    return Groups(step=step, zero=torch.zeros(()), lo=0, hi=hi, view=(4, 9), least=least, greatest=greatest, fewest=1)


GRIDS: dict[str, tuple[Grid, bool]] = {  # and whether it is of activations
    "step": (affine(torch.tensor(0.3), -4, 3), False),
    "constant": (affine(1 / 7, 0, 7, zero=3.5), False),
    "channels": (affine(CHANNELS, -4, 3, zero=torch.tensor([-4.0, 0, 1, 3]).view(4, 1, 1, 1)), False),
    "offset": (affine(torch.tensor(0.3), 0, 3, offset=torch.tensor(-1.3)), True),
    "mixed": (Affine(step=CHANNELS.view(4, 1), zero=torch.ones(4, 1), lo=0, hi=WIDE, view=(4, 9)), False),
    "groups": (groups(torch.tensor([[1], [2], [5], [1]])), False),
    "alike": (groups(torch.ones(4, 1, dtype=torch.long)), False),
    "book": (book(torch.tensor([-0.5, 0.0, 0.25]), fixed=(1,)), False),
    "books": (book(torch.randn(4, 1, 1, 1, 6)), False),
    "words": (book(torch.randn(4, 1, 5, 3), shape=(4, 1, 3, 3)), False),
    "multiples": (multiples(CHANNELS, [-1.0, 0.1, 1.0]), False),
    "constants": (multiples(0.7, [-1.0, 0.1, 1.0]), False),
    "signs": (signs(1.0), False),
    "thresholds": (signs(CHANNELS, CHANNELS - 0.2), True),
    "planes": (planes(torch.rand(3, 4, 1, 1, 1)), False),
    "pruned": (planes(torch.rand(2, 4, 1, 1, 1), pruned=True), False),
}


@pytest.mark.parametrize("name", GRIDS)
def test_words_give_the_grid_back(name: str) -> None:
    grid, encoder = GRIDS[name]
    shape = (4, 3) if name == "words" else (4, 1, 3, 3)
    hi = torch.as_tensor(grid.hi)
    top = hi.expand(grid.view).reshape(shape) if isinstance(grid, Affine) and grid.view else hi
    codes = (grid.lo + torch.rand(shape) * (top - grid.lo + 1)).floor().clamp_max(top).int()
    parts = {f"q.{n}": p for n, p in {"codes": grid.pack(codes), **grid.tables(encoder)}.items()}
    told = json.loads(json.dumps(describe.words(grid, "q", encoder)))
    both = {name: _stored(part, "weight", told, name.removeprefix("q.")) for name, part in parts.items()}
    meta = {"parts": {n: entry for n, (entry, _) in both.items()}, "made_by": "", "run": {}}
    meta |= {key: {} for key in ("weights", "activations", "extra_state", "layers")}
    meta["sizes"] = dict.fromkeys(("nominal_bits", *SIZES), 0)
    named, numbers = {key: {"name": "n"} for key in ("method", "model", "dataset")}, ("w_bits", "a_bits", "seed")
    config = {**named, **dict.fromkeys(numbers, 1), "options": {}, "threads": None, "channels_last": True}
    meta["config"] = {**config, "train": {"batch_size": 1}}
    file = Artifact(opened(seal(meta, {n: array for n, (_, array) in both.items()}), "file"))
    found = describe.grid_of(told, file.part)
    assert type(found) is type(grid)
    assert found.unpack(file.part("q.codes")).equal(codes)
    assert found.values(codes).equal(grid.values(codes))
    assert (found.lo, found.levels) == (grid.lo, grid.levels)
    assert torch.as_tensor(found.hi == grid.hi).all()
    assert {n: p.pack() for n, p in found.tables(encoder).items()} == {
        n: p.pack() for n, p in grid.tables(encoder).items()
    }
    assert json.loads(json.dumps(describe.words(found, "q", encoder))) == told


def test_a_grid_without_words_is_refused() -> None:
    class Strange(Grid):
        def values(self, codes: Tensor) -> Tensor:
            return codes.float()

        def codes(self, value: Tensor, source: Tensor) -> Tensor:
            return value.int()

        def tables(self, encoder: bool = False) -> dict[str, Part]:
            return {}

        def ends(self) -> tuple[Tensor, Tensor]:
            return torch.zeros(()), torch.ones(())

    with pytest.raises(UserError, match="no words for a grid of the class Strange"):
        describe.words(Strange(lo=0, hi=1), "conv.weight")
    with pytest.raises(ValueError, match="kind 'new' is unknown"):
        describe.grid_of({"kind": "new", "lo": 0, "width": 1}, lambda name: Part(torch.zeros(1)))
