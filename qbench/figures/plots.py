"""Figures of one run, drawn from its metrics.jsonl and result.json alone.

Matplotlib is imported inside the functions, so that importing this module costs nothing; figures are drawn without
pyplot, so no window, backend or global state is touched. Accuracies are recorded in percent.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import UserError
from qbench.figures.drawing import (
    BLUE,
    DASHES,
    FILL,
    ORANGE,
    STYLE,
    Curve,
    edges,
    evenly,
    label_epochs,
    latent_name,
    log_scale,
    records_of,
    relative,
    result_of,
    save,
    title_of,
    traces_of,
    widen,
)
from qbench.records import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LAYERS = 24
MOST_NAMES = 8  # a legend names so many lines; more get a colour scale


def curves(
    folder: Path,
    result: Mapping[str, Any] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
    *,
    dpi: int = 150,
    pdf: bool = False,
) -> Path:
    """Draws curves.png (5 inches wide): accuracy, loss and the quantizers' scales over the epochs.

    The accuracy is that of each evaluation, and of the training, between two levels: the float parent and, where there
    is one, the net that was calibrated and not yet trained. Upright lines stand between the stages of a method. With
    `pdf` curves.pdf is written beside it. `result` and `records` are what the run's files hold, for a caller that has
    them at hand.

    Errors: UserError when the run has recorded nothing to draw.
    """
    records, result = records or records_of(folder), result or result_of(folder)
    accuracy = {phase: _curve(records, phase, "accuracy") for phase in ("train", "test", "val")}
    loss = {phase: _curve(records, phase, "loss") for phase in ("train", "test", "val")}
    traces = traces_of(records)
    panels = [bool(accuracy["test"][0] or accuracy["val"][0]), any(x for x, _ in loss.values()), *[True] * len(traces)]
    if not any(panels):
        raise UserError(f"{Path(folder) / METRICS} holds no loss, accuracy or trace to draw.")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 0.5 + 2 * sum(panels)))
        figure.suptitle(title_of(result), y=1 - 0.04 / figure.get_figheight(), va="top")
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
        return save(figure, Path(folder) / "curves.png", dpi, pdf)


def stage_ends(records: Sequence[dict[str, Any]]) -> list[float]:
    """The epochs at which one stage of a method ended and another began."""
    last: dict[str, float] = {}
    for record in records:
        if "stage" in record:
            last[record["stage"]] = record["epoch"]
    return sorted({*list(last.values())[:-1]} - {0.0})


def units(folder: Path, result: Mapping[str, Any], records: Sequence[dict[str, Any]], *, dpi: int = 150) -> Path | None:
    """Draws units.png where a stage acted layer by layer: what it recorded of each, in order; None where none did."""
    found = [record["unit"] for record in records if "unit" in record]
    kinds = list(dict.fromkeys(k for unit in found for k in unit["values"]))
    if not kinds:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title_of(result))
        for kind, dash in zip(kinds, DASHES * len(kinds), strict=False):
            values = [unit["values"].get(kind, math.nan) for unit in found]
            axes.plot(range(len(found)), values, linestyle=dash, marker="o", markersize=3, label=kind)
        axes.set_xticks(range(len(found)), [_short(unit["name"]) for unit in found], rotation=90)
        _scale(axes, [v for unit in found for v in unit["values"].values() if v is not None])
        axes.legend()
        return save(figure, Path(folder) / "units.png", dpi, False)


def histograms(
    folder: Path,
    result: Mapping[str, Any] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
    *,
    dpi: int = 150,
    pdf: bool = False,
) -> Path:
    """Draws histograms.png: for each quantized layer its weights, their quantized values and the use of its codes.

    The last record counts. Of more than 24 layers 24 are shown, evenly chosen with the first and the last, and the
    title says so. Both histograms are scaled to a peak of 1. With `pdf` histograms.pdf is written beside it.

    Errors: UserError when the run has recorded no histogram.
    """
    taken = [record for record in records or records_of(folder) if record.get("histograms")]
    if not taken:
        raise UserError(f"{Path(folder) / METRICS} holds no histogram to draw: no layer of this run was quantized.")
    layers, result = taken[-1]["histograms"], result or result_of(folder)
    shown = evenly(list(layers), MOST_LAYERS)
    latent = latent_name(layers[shown[0]]["latent"])  # one method, one kind of latent
    title = f"{title_of(result)}\nweights after epoch {taken[-1]['epoch']:g}"
    if len(shown) < len(layers):
        title += f"; {len(shown)} of {len(layers)} quantized layers, evenly chosen"
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(4, math.ceil(math.sqrt(len(shown))))
    rows = math.ceil(len(shown) / columns)
    width, height = max(4.0, 0.4 + 1.75 * columns), 1.05 + 1.75 * rows
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        figure.suptitle(title, y=1 - 0.08 / height, va="top")
        # Margins in inches, so that all panels are of one size whatever their labels.
        sides = {"left": 0.6 / width, "right": 1 - 0.1 / width, "bottom": 0.65 / height, "top": 1 - 0.65 / height}
        grid = figure.add_gridspec(rows, columns, **sides, wspace=0.28, hspace=0.36)
        for index, name in enumerate(shown):
            cell = grid[index // columns, index % columns].subgridspec(2, 1, height_ratios=[2, 1], hspace=0.72)
            panels = figure.add_subplot(cell[0]), figure.add_subplot(cell[1])
            panels[0].set_title(f"{_short(name)}{_levels(layers[name])}")
            _draw_values(panels[0], layers[name])
            _draw_codes(panels[1], layers[name])
            if index % columns == 0:
                panels[0].set_ylabel("frequency\n(peak = 1)")
                panels[1].set_ylabel("codes\n(%)")
            if index + columns >= len(shown):  # nothing stands below
                panels[0].set_xlabel(latent.removeprefix("latent "), labelpad=1)
                panels[1].set_xlabel("code", labelpad=1)
        figure.align_ylabels()
        stem = Line2D([], [], color="black", linewidth=0.9, marker="o", markersize=2.2)
        names = [latent, "quantized weight"]
        figure.legend([Patch(facecolor=FILL, edgecolor=BLUE), stem], names, loc="lower center", ncols=2)
        return save(figure, Path(folder) / "histograms.png", dpi, pdf)


def _curve(records: Sequence[dict[str, Any]], phase: str, name: str) -> Curve:
    """Epochs and values of one scalar; a null (NaN when recorded) becomes NaN and leaves a gap."""
    points = [(r["epoch"], r[name]) for r in records if r.get("phase") == phase and name in r]
    return [x for x, _ in points], [math.nan if y is None else y for _, y in points]


def _short(name: str) -> str:
    """A layer's name, without its middle where the title would run into the next one."""
    return name if len(name) <= 18 else f"{name[:5]}…{name[-12:]}"


def _levels(layer: dict[str, Any]) -> str:
    """Levels, not bits: what is stored of a weight may be less than its level (FleXOR) or more (ABC-Net)."""
    return f", {layer['levels']} levels" if layer["levels"] else ""


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


def _draw_values(axes: "Axes", layer: dict[str, Any]) -> None:
    latent, quantized = layer["latent"], layer["quantized"]
    if latent["counts"]:
        bounds = edges(latent)
        axes.stairs(relative(latent), bounds, fill=True, color=FILL)
        axes.stairs(relative(latent), bounds, color=BLUE, linewidth=0.6)
    if quantized.get("values"):
        many = len(quantized["values"]) > 32
        stems = axes.stem(
            quantized["values"],
            relative(quantized),
            linefmt="k-",
            markerfmt="k," if many else "ko",
            basefmt=" ",
        )
        stems.stemlines.set_linewidth(0.4 if many else 0.9)
        stems.markerline.set_markersize(2.2)
    elif quantized["counts"]:
        axes.stairs(relative(quantized), edges(quantized), color="black", linewidth=0.7)
    axes.set_ylim(0, 1.1)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks([0, 0.5, 1])


def _draw_codes(axes: "Axes", layer: dict[str, Any]) -> None:
    codes = layer["codes"]
    if not codes or not sum(codes["counts"]):
        axes.text(0.5, 0.5, "no codes recorded", transform=axes.transAxes, ha="center", va="center", color="0.4")
        axes.set_axis_off()
        return
    total = sum(codes["counts"])
    shares = [100 * count / total for count in codes["counts"]]
    if "values" in codes:
        places = codes["values"]
        if layer["levels"] and places[-1] >= layer["levels"]:  # ABC-Net: few of the planes' codes are levels
            places = range(len(places))
        axes.bar(places, shares, width=0.8 if len(shares) <= 32 else 1, color="0.45")
    else:
        axes.stairs(shares, edges(codes), fill=True, color="0.45")
    most = f" of {math.log2(layer['levels']):.3g}" if layer["levels"] else ""
    axes.set_ylim(0, 1.6 * max(shares))  # room for the entropy
    entropy = f"entropy {codes['entropy']:.2f}{most} bits"
    axes.text(0.98, 0.98, entropy, transform=axes.transAxes, ha="right", va="top", size=7)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.locator_params(axis="y", nbins=2)
