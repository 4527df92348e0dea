"""What stands in a packed file, for people. No torch."""

import math
from collections.abc import Iterable
from typing import Any

from qbench.lowbit.container import Container


def text(file: Container) -> str:
    """The table of `qbench inspect`: layers with their bits and bytes, what else there is, sizes."""
    meta, config = file.meta, file.meta["config"]
    names = [config.get(group, {}).get("name", "?") for group in ("method", "model", "dataset")]
    accuracy = meta["run"].get("accuracy_last")
    lines = [
        f"{file.source}: {meta['format']} {meta['version']}, made by {meta['made_by']}",
        f"{names[0]} on {names[1]}, {names[2]}" + (f"; accuracy {accuracy:.2f} %" if accuracy is not None else ""),
        f"checksums: {len(meta['parts'])} parts and the whole agree",
        "",
        f"{'layer':<28}{'weights':>11}{'bits':>7}{'stored':>8}  {'grid':<10}{'codes':>11}{'tables':>9}"
        f"{'macs':>14}{'bit operations':>18}",
    ]
    rest = {name: array.nbytes for name, array in file.arrays.items()}
    for name, cost in meta["layers"].items():
        lines.append(_layer(file, name, cost, rest))
    lines += ["", *_others(file, rest), ""]
    sizes = meta["sizes"]
    lines += [
        f"nominal bits per weight     {sizes['nominal_bits']:>14.2f}",
        f"bytes of the codes          {sizes['code_bytes']:>14,}   at their entropy {sizes['entropy_bytes']:,}",
        f"bytes that inference reads  {sizes['bytes']:>14,}   with folded batch-norms {sizes['folded_bytes']:,}",
        f"bytes on disk               {file.size:>14,}",
    ]
    return "\n".join(lines)


def _layer(file: Container, name: str, cost: dict[str, Any], rest: dict[str, int]) -> str:
    """One line; what it counts is taken out of `rest`."""
    meta, entry = file.meta, file.meta["weights"].get(name)
    counts = f"{cost['macs']:>14,}{cost['bit_operations']:>18,}"
    if entry is None:
        numel = math.prod(meta["parts"].get(f"{name}.weight", {"shape": [0]})["shape"])
        size = rest.pop(f"{name}.weight", 0)
        return f"{name:<28}{numel:>11,}{32:>7}{32:>8}  {'float':<10}{size:>11,}{0:>9,}{counts}"
    numel = math.prod(entry["shape"])
    own = {part for part in rest if part.startswith(f"{name}.weight.")}
    codes = own & set(entry["coding"]["parts"].values())
    stored, tables = (_take(rest, parts) for parts in (codes, own - codes))
    grid = entry["grid"]["kind"] if entry["coding"]["kind"] == "codes" else entry["coding"]["kind"]
    share = 8 * stored / numel if numel else 0.0
    return f"{name:<28}{numel:>11,}{entry['bits']:>7.4g}{share:>8.2f}  {grid:<10}{stored:>11,}{tables:>9,}{counts}"


def _others(file: Container, rest: dict[str, int]) -> list[str]:
    """What is no layer's weight, by its role."""
    what = {
        "shared": "wiring that layers share",
        "float": "biases, batch-norm and other floats",
        "encoder": "grids of activations",
        "state": "state of activation quantizers, which qbench alone reads",
    }
    roles = {name: entry["role"] for name, entry in file.meta["parts"].items()}
    return [
        f"{text:<58}{_take(rest, found):>11,} bytes in {len(found)} parts"
        for role, text in what.items()
        if (found := [name for name in rest if roles[name] == role])
    ]


def _take(rest: dict[str, int], names: Iterable[str]) -> int:
    return sum(rest.pop(name) for name in list(names))
