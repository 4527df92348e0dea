"""How a run went, from its metrics.jsonl and result.json alone: accuracy, loss and scales over the epochs or units.

Accuracies are recorded in percent.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import UserError
from qbench.figures.drawing import (
    BLUE,
    DASHES,
    ORANGE,
    Curve,
    label_epochs,
    log_scale,
    page,
    records_of,
    result_of,
    shortened,
    title_of,
    traces_of,
    widen,
)
from qbench.records import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 8  # a legend names so many lines; more get a colour scale


def curves(
    folder: Path,
    result: Mapping[str, Any] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
    *,
    dpi: int = 150,
    forms: Sequence[str] = ("png",),
) -> None:
    """Draws curves.png, 5 inches wide: accuracy, loss and the quantizers' scales over the epochs.

    The accuracy is that of each evaluation, and of the training, between two levels: the float parent and, where there
    is one, the net that was calibrated and not yet trained. Upright lines stand between the stages of a method.
    `result` and `records` are what the run's files hold, for a caller that has them at hand; `forms`: see `save`.

    Errors: UserError when the run has recorded nothing to draw.
    """
    records, result = records or records_of(folder), result or result_of(folder)
    accuracy = {phase: _curve(records, phase, "accuracy") for phase in ("train", "test", "val")}
    loss = {phase: _curve(records, phase, "loss") for phase in ("train", "test", "val")}
    traces = traces_of(records)
    panels = [bool(accuracy["test"][0] or accuracy["val"][0]), any(x for x, _ in loss.values()), *[True] * len(traces)]
    if not any(panels):
        raise UserError(f"{Path(folder) / METRICS} holds no loss, accuracy or trace to draw.")
    size = (5, 0.5 + 2 * sum(panels))
    with page(Path(folder) / "curves.png", size, title_of(result), dpi=dpi, forms=forms) as figure:
        axes = list(figure.subplots(sum(panels), 1, sharex=True, squeeze=False)[:, 0])
        left = iter(axes)
        if panels[0]:
            _draw_accuracy(next(left), accuracy, result)
        if panels[1]:
            _draw_loss(next(left), loss)
        for (kind, lines), panel in zip(traces.items(), left, strict=True):
            _draw_traces(panel, kind, lines)
        for epoch in stage_ends(records):
            for panel in axes:
                panel.axvline(epoch, color="0.7", linewidth=0.8, zorder=0)
        label_epochs(axes)
        _stack(figure, axes, 0.65 if any(len(lines) > MOST_NAMES for lines in traces.values()) else 0.1)


def stage_ends(records: Sequence[dict[str, Any]]) -> list[float]:
    """The epochs at which one stage of a method ended and another began."""
    last: dict[str, float] = {}
    for record in records:
        if "stage" in record:
            last[record["stage"]] = record["epoch"]
    return sorted({*list(last.values())[:-1]} - {0.0})


def units(
    folder: Path,
    result: Mapping[str, Any],
    records: Sequence[dict[str, Any]],
    *,
    dpi: int = 150,
    forms: Sequence[str] = ("png",),
) -> None:
    """Draws units.png where a stage acted layer by layer: what it recorded of each, in order; else nothing."""
    found = [record["unit"] for record in records if "unit" in record]
    kinds = list(dict.fromkeys(k for unit in found for k in unit["values"]))
    if not kinds:
        return
    names = shortened([unit["name"] for unit in found])
    title = title_of(result)
    with page(Path(folder) / "units.png", (5, 3), title, dpi=dpi, forms=forms, layout="constrained") as figure:
        axes = figure.subplots()
        for kind, dash in zip(kinds, DASHES * len(kinds), strict=False):
            values = [unit["values"].get(kind, math.nan) for unit in found]
            axes.plot(range(len(found)), values, linestyle=dash, marker="o", markersize=3, label=kind)
        axes.set_xticks(range(len(found)), [names[unit["name"]] for unit in found], rotation=90)
        _scale(axes, [v for unit in found for v in unit["values"].values() if v is not None])
        axes.legend()


def _curve(records: Sequence[dict[str, Any]], phase: str, name: str) -> Curve:
    """Epochs and values of one scalar; a null (NaN when recorded) becomes NaN and leaves a gap."""
    points = [(r["epoch"], r[name]) for r in records if r.get("phase") == phase and name in r]
    return [x for x, _ in points], [math.nan if y is None else y for _, y in points]


def _draw_accuracy(axes: "Axes", accuracy: dict[str, Curve], result: Mapping[str, Any]) -> None:
    styles = {"train": ("0.45", "-", ""), "test": (BLUE, "-", "o"), "val": (ORANGE, "--", "s")}
    heights = []
    for phase, (x, y) in accuracy.items():
        if x:
            colour, dash, marker = styles[phase]
            width = 0.8 if phase == "train" else 1.2
            axes.plot(x, y, color=colour, linestyle=dash, marker=marker, linewidth=width, label=phase)
            # What was evaluated before training does not set the scale, unless there is nothing else.
            heights += [v for e, v in zip(x, y, strict=True) if math.isfinite(v) and (e > 0 or max(x) == 0)]
    before, parent = result.get("accuracy_before_training"), result.get("float_accuracy")
    if parent is not None:
        heights.append(parent)
        axes.axhline(parent, color="0.3", linestyle="--", linewidth=1, label=f"float parent {parent:.2f} %")
    lo, hi = min(heights, default=0.0), max(heights, default=100.0)
    span = (hi - lo) or 1.0
    if before is not None:
        visible = before >= lo - 2 * span  # further down it would flatten the curve
        lo = min(lo, before) if visible else lo
        note = "" if visible else " (off scale)"
        label = f"before training {before:.2f} %{note}"
        axes.axhline(before, color="0.3", linestyle=":", linewidth=1, label=label)
    axes.set_ylim(lo - 0.07 * span, max(hi, before or hi) + 0.07 * span)
    axes.set_ylabel("accuracy (%)")
    _legend(axes)


def _draw_loss(axes: "Axes", loss: dict[str, Curve]) -> None:
    styles = {"train": ("0.45", "-", ""), "test": (BLUE, "-", "o"), "val": (ORANGE, "--", "s")}
    for phase, (x, y) in loss.items():
        if x:
            colour, dash, marker = styles[phase]
            width = 0.8 if phase == "train" else 1.2
            axes.plot(x, y, color=colour, linestyle=dash, marker=marker, linewidth=width, label=phase)
    _scale(axes, [value for _, y in loss.values() for value in y])
    axes.set_ylabel("loss")
    _legend(axes)


def _draw_traces(axes: "Axes", kind: str, lines: dict[str, Curve]) -> None:
    """One thin line a layer, dark to light in layer order, with a legend while that is short, else a colour scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ListedColormap(colormaps["viridis"]([0.85 * i / 255 for i in range(256)]))  # its palest is lost on white
    few = len(lines) <= MOST_NAMES
    for index, (layer, (x, y)) in enumerate(lines.items()):
        shade = shades(index / max(len(lines) - 1, 1))
        dash = DASHES[index] if few else "-"
        axes.plot(x, y, color=shade, linestyle=dash, linewidth=1 if few else 0.7, label=layer)
    _scale(axes, [value for _, y in lines.values() for value in y])
    axes.set_ylabel(kind)
    if not few:
        scale = ScalarMappable(Normalize(1, len(lines)), shades)
        bar = axes.inset_axes((1.02, 0, 0.025, 1))
        axes.figure.colorbar(scale, cax=bar, label="layer, in order", ticks=[1, len(lines)])
    elif any(lines):
        _legend(axes)


def _legend(axes: "Axes") -> None:
    """A legend above the panel, where it hides nothing, of as many columns as fit its width."""
    from numpy import array_split  # splits a list into columns as matplotlib does

    lengths = [len(str(label)) + 7 for label in axes.get_legend_handles_labels()[1]]
    tried = range(len(lengths), 1, -1)
    columns = next((n for n in tried if sum(max(part) for part in array_split(lengths, n)) <= 80), 1)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def _stack(figure: "Figure", axes: Sequence["Axes"], right: float) -> None:
    """Places panels one above the other, each below its legend, `right` inches from the edge.

    Margins are in inches: a layout engine measures every text twice, half of the time that a figure takes.
    """
    width, height = figure.get_size_inches()
    slot, inner = (height - 0.7) / len(axes), width - 0.7 - right
    for index, panel in enumerate(reversed(axes)):
        legend = panel.get_legend()
        rows = math.ceil(len(legend.get_texts()) / legend._ncols) if legend else 0  # type: ignore[attr-defined]
        tall = slot - 0.14 - 0.14 * rows
        panel.set_position((0.7 / width, (0.43 + slot * index) / height, inner / width, tall / height))
        panel.yaxis.set_label_coords(-0.53 / inner, 0.5)


def _scale(axes: "Axes", values: list[float]) -> None:
    """A logarithmic axis where all values are positive and span more than a factor of 20, else one not too narrow."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 20:
        log_scale(axes)
    else:
        widen(axes, finite)
