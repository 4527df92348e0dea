"""Grids and codings as plain words that a stranger can decode by, and back.

Wherever a value may be stored or be a constant of the method, a text names the part that holds it and a number is the
constant. docs/format.md says what each kind means.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.quant.grid import Affine, Book, Grid, Planes
from qbench.quant.groups import Groups
from qbench.quant.packing import Part

Parts = Callable[[str], Part]


def words(grid: Grid, prefix: str, encoder: bool = False) -> dict[str, Any]:
    """What a reader must know of a grid whose tables are stored as `prefix`.NAME.

    encoder: with what makes codes of values, too.
    Errors: UserError on a kind of grid that the format does not have.
    """
    tables = grid.tables(encoder)

    def told(name: str, value: Tensor) -> Any:
        return f"{prefix}.{name}" if name in tables else value.tolist()

    common = {"lo": grid.lo, "width": width_of(grid, prefix)}
    if isinstance(grid, Groups):
        return {"kind": "ends", **common, "ends": f"{prefix}.ends", "view": list(grid.view)}
    if isinstance(grid, Affine):
        offset = 0.0 if grid.offset is None else told("offset", grid.offset)
        steps = {"step": told("step", grid.step), "zero": told("zero", grid.zero), "offset": offset}
        return {"kind": "affine", **common, **_top(grid), **steps, "view": list(grid.view)}
    if isinstance(grid, Book) and grid.scale is not None:
        factors = torch.tensor(grid.factors).tolist()  # as float32 has them
        return {"kind": "multiples", **common, **_top(grid), "scale": told("scale", grid.scale), "factors": factors}
    if isinstance(grid, Book):
        fixed = {str(code): grid.table.reshape(-1, grid.table.shape[-1])[0, code].item() for code in grid.fixed}
        whole = {"kind": "book", **common, **_top(grid), "table": f"{prefix}.table", "fixed": fixed}
        return whole | {"shape": list(grid.shape)}
    if isinstance(grid, Planes):
        found = {"kind": "planes", **common, **_top(grid), "planes": len(grid.coefficients), "pruned": grid.pruned}
        found["coefficients"] = told("coefficients", grid.coefficients)
        if encoder and grid.thresholds is not None:
            found["thresholds"] = told("thresholds", grid.thresholds)
        return found
    raise UserError(f"{prefix}: the packed format has no words for a grid of the class {type(grid).__name__}")


def width_of(grid: Grid, prefix: str) -> Any:
    """Bits of a code: a number, or {"part": where the bits of each group lie, "plus": what is added to these}."""
    if not isinstance(grid.width, Tensor):
        return grid.width
    if not isinstance(grid, Groups):
        return {"part": f"{prefix}.widths_less_1", "plus": 1}
    return {"part": f"{prefix}.bits", "plus": grid.fewest} if "bits" in grid.tables() else grid.fewest


def _top(grid: Grid) -> dict[str, int]:
    return {} if isinstance(grid.hi, Tensor) else {"hi": grid.hi}


def grid_of(told: Mapping[str, Any], part: Parts) -> Grid:
    """The grid that `words` has described; `part` gives the parts that are named.

    Errors: ValueError on a kind that is unknown; KeyError, TypeError and others where the description is damaged.
    """

    def value(given: Any) -> Tensor:
        return part(given).numbers if isinstance(given, str) else torch.tensor(given, dtype=torch.float32)

    lo, width = int(told["lo"]), told["width"]
    more = isinstance(width, Mapping)
    hi = lo + 2 ** (part(width["part"]).numbers + width["plus"]) - 1 if more else told.get("hi", lo + 2**width - 1)
    constants = tuple(name for name, given in told.items() if not isinstance(given, str))
    if told["kind"] == "ends":
        least, greatest = value(told["ends"])
        groups = torch.as_tensor(hi).expand(told["view"][0], 1)
        return Groups(
            lo=lo,
            hi=groups,
            step=(greatest - least) / groups,
            zero=torch.zeros(()),
            view=tuple(told["view"]),
            least=least,
            greatest=greatest,
            fewest=width["plus"] if more else width,
        )
    if told["kind"] == "affine":
        zero = value(told["zero"])
        if isinstance(told["zero"], str):
            zero = (zero + lo).to(torch.float32)
        offset = value(told["offset"]) if told["offset"] != 0 else None
        step = value(told["step"])
        return Affine(lo=lo, hi=hi, step=step, zero=zero, offset=offset, view=tuple(told["view"]), constants=constants)
    if told["kind"] == "multiples":
        scale, factors = value(told["scale"]), tuple(told["factors"])
        table = scale.unsqueeze(-1) * torch.tensor(factors)
        return Book(lo=lo, hi=hi, table=table, scale=scale, factors=factors, constants=constants)
    if told["kind"] == "book":
        return _book(told, value(told["table"]), lo, hi)
    if told["kind"] == "planes":
        thresholds = value(told["thresholds"]) if "thresholds" in told else None
        coefficients, pruned = value(told["coefficients"]), bool(told["pruned"])
        return Planes(
            lo=lo, hi=hi, coefficients=coefficients, thresholds=thresholds, pruned=pruned, constants=constants
        )
    raise ValueError(f"a grid of the kind {told['kind']!r} is unknown to this version")


def _book(told: Mapping[str, Any], stored: Tensor, lo: int, hi: int) -> Book:
    """A table of values, those that the method fixes put back in their places."""
    shape, fixed = tuple(told["shape"]), {int(code): value for code, value in told["fixed"].items()}
    axis = -2 if shape else -1
    rows = list(stored.unbind(axis))
    for code in sorted(fixed):
        like = rows[0] if rows else torch.zeros(())
        rows.insert(code, torch.full_like(like, fixed[code]))
    return Book(lo=lo, hi=hi, table=torch.stack(rows, axis), shape=shape, fixed=tuple(fixed))
