"""Tables of what lies in result.json files, and what differs between two runs. No torch here."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qbench.config.bits import told
from qbench.errors import UserError
from qbench.records import read_config, read_result

COLUMNS = (
    "method",
    "bits W/A",
    "model",
    "dataset",
    "budget",
    "float",
    "before",
    "after",
    "best",
    "bits/weight",
    "bytes",
)
LEARNED = ("w_bits_learned", "a_bits_learned", "bits_per_weight", "bytes")  # each seed learns its own
AXES = ("method", "w_bits", "a_bits", "model", "dataset", "budget", "protocol", "init")


def percent(value: float | None) -> str:
    """An accuracy with two digits, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def tell(folder: Path, result: Mapping[str, Any], line: Callable[[str], None]) -> None:
    """The whole story of one run, a few lines."""
    line("")
    line(f"  {result['method']}  W{told(result, 'w')} A{told(result, 'a')}  {result['model']}  {result['dataset']}")
    line(f"  float parent          {percent(result['float_accuracy']):>7} %")
    if result["method"] != "float":
        line(f"  before training       {percent(result['accuracy_before_training']):>7} %   (calibrated only)")
        line(f"  after training        {percent(result['accuracy_last']):>7} %   (last epoch)")
    line(f"  best test epoch       {percent(result['accuracy_best']):>7} %   (epoch {result['epoch_best'] or 0:.4g})")
    for site, what in (("w", "weights"), ("a", "activations")):
        if f"{site}_bits_learned" in result:
            learned, asked = result[f"{site}_bits_learned"], result[f"{site}_bits"]
            line(f"  learned bits          {learned:>7.2f}     (mean of the {what}' codes; asked for: {asked:g})")
    line(
        f"  bits per weight       {result['bits_per_weight']:>7.2f}     (quantized layers, scales and padding counted)"
    )
    line(f"  bytes                 {result['bytes']:>7,}     (whole net, packed)")
    if result["method"] != "float" and (floats := _float_inputs(folder)):
        line(f"  float inputs          {floats}     (convolutions and linear layers; manifest.json says why)")
    line(f"  seconds               {result['seconds']:>7.0f}")
    if str(result.get("device", "cpu")).startswith("cuda") and "images_per_s" in result:
        line(f"  images/s              {result['images_per_s']:>7,}     (evaluations and records included)")
    pictures = [str(folder / n) for n in ("curves.png", "histograms.png", "telemetry.png") if (folder / n).is_file()]
    line(f"  pictures              {'  '.join(pictures) or '-'}")
    line(f"  everything            {folder}")


def _float_inputs(folder: Path) -> str:
    """How many layers of a run compute on float inputs, "19 of 53"; empty where its manifest does not say."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return f"{len(manifest['float_inputs'])} of {manifest['layers']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _spread(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        return "-"
    return f"{mean(numbers):.2f}" + (f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else "")


def rows(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """One row per setting, mean ± sample standard deviation over its seeds; settings in order of appearance.

    Runs that differ in anything but the seed (learning rate, options, data) stand in rows of their own.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        rest = {k: v for k, v in result.get("identity", {}).items() if k not in ("seed", "init", "teacher")}
        groups.setdefault(json.dumps([[result.get(k) for k in AXES], rest], sort_keys=True), []).append(result)
    table = []
    for group in groups.values():
        r = {**group[0], **{k: mean(g[k] for g in group) for k in LEARNED if k in group[0]}}
        method = r["method"] if len(group) == 1 else f"{r['method']} ({len(group)} seeds)"
        cells = [method, f"{told(r, 'w')}/{told(r, 'a')}", r["model"], r["dataset"], r["budget"]]
        for key in ("float_accuracy", "accuracy_before_training", "accuracy_last", "accuracy_best"):
            cells.append(_spread([g.get(key) for g in group]))
        table.append([*cells, f"{r['bits_per_weight']:.2f}", f"{round(r['bytes']):,}"])
    return table


def table(results: Iterable[Mapping[str, Any]], others: Iterable[list[str]] = ()) -> str:
    """The rows as text in columns; `others` are rows of what has no result (failed, n/a)."""
    short = {tuple([*r, *[""] * (len(COLUMNS) - len(r))]): None for r in others}  # seeds of a cell make one row
    lines = [list(COLUMNS), *rows(results), *map(list, short)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    left = {0, 2, 3, 4}
    text = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    notes = ["*: bits that were learned, the mean over the codes"] if any("*" in line[1] for line in lines) else []
    return "\n".join([text[0].rstrip(), "-" * len(text[0]), *(t.rstrip() for t in text[1:]), *notes])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def compare(a: Path, b: Path) -> str:
    """What differs between two runs in configuration and outcome, as text in three columns."""
    lines = [("", a.name, b.name)]
    for folder in (a, b):
        if not (folder / "result.json").is_file():
            raise UserError(f"{folder} is not a finished run: it has no result.json")
    for read in (read_config, lambda folder: read_result(folder / "result.json")):
        pair = [_flat({k: v for k, v in read(f).items() if k not in ("identity", "out")}) for f in (a, b)]
        for key in sorted(pair[0].keys() | pair[1].keys()):
            x, y = (p.get(key, "-") for p in pair)
            if x != y:
                note = f"  ({y - x:+.4g})" if _number(x) and _number(y) else ""
                lines.append((key, _short(x), _short(y) + note))
    if len(lines) == 1:
        return "no difference"
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{k:<{widths[0]}}  {x:<{widths[1]}}  {y}".rstrip() for k, x, y in lines)


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _short(x: Any) -> str:
    text = json.dumps(x) if isinstance(x, (list, dict)) else str(x)
    return text if len(text) <= 60 else text[:57] + "..."
