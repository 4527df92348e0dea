"""How the values of layers lie before and after quantization: weights and activations, from a run's files alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import UserError
from qbench.figures.drawing import (
    BLUE,
    FILL,
    edges,
    evenly,
    latent_name,
    log_scale,
    page,
    records_of,
    relative,
    result_of,
    shortened,
    title_of,
)
from qbench.records import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LAYERS = 24
MOST_STEMS = 32  # of more levels neighbours are merged, and drawn as an outline
MOST_STEPS = 64
FLOOR = 1e-4  # of a logarithmic axis


@dataclass(frozen=True)
class _Look:
    """What a page of histograms is called, and its words for what was quantized and for what came of it."""

    name: str
    title: str
    before: str
    after: str
    axis: str
    log: bool = False

    @property
    def floor(self) -> float:
        return FLOOR if self.log else 0.0


def weights(
    folder: Path,
    result: Mapping[str, Any] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
    *,
    dpi: int = 150,
    forms: Sequence[str] = ("png",),
) -> None:
    """Draws histograms.png: for each quantized layer its weights, their quantized values and the use of its codes.

    The last record counts. Of more than 24 layers 24 are shown, evenly chosen with the first and the last, and the
    title says so. Both histograms are scaled to a peak of 1. Up to 32 values in use are stems, more of them an outline.

    Errors: UserError when the run has recorded no histogram.
    """
    epoch, layers = _last(folder, records, "histograms")
    latent = latent_name(next(iter(layers.values()))["latent"])  # one method, one kind of latent
    title = f"{title_of(result or result_of(folder))}\nweights after epoch {epoch:g}"
    look = _Look("histograms.png", title, latent, "quantized weight", latent.removeprefix("latent "))
    _draw(folder, layers, look, dpi, forms)


def activations(
    folder: Path,
    result: Mapping[str, Any] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
    *,
    dpi: int = 150,
    forms: Sequence[str] = ("png",),
) -> None:
    """Draws activations.png: the same of what reaches each activation quantizer, on a few training images.

    The frequencies are on a logarithmic axis: most activations behind a ReLU are 0.

    Errors: UserError when the run has recorded none.
    """
    epoch, layers = _last(folder, records, "activations")
    title = f"{title_of(result or result_of(folder))}\nactivations of a few training images after epoch {epoch:g}"
    _draw(folder, layers, _Look("activations.png", title, "activation", "quantized", "activation", True), dpi, forms)


def _last(folder: Path, records: Sequence[dict[str, Any]] | None, kind: str) -> tuple[float, dict[str, Any]]:
    """(epoch, {layer: histogram}) of the last record of this kind."""
    taken = [record for record in records or records_of(folder) if record.get(kind)]
    if not taken:
        raise UserError(f"{Path(folder) / METRICS} holds no histogram to draw: no layer of this run was quantized.")
    return taken[-1]["epoch"], taken[-1][kind]


def _draw(folder: Path, layers: dict[str, Any], look: _Look, dpi: int, forms: Sequence[str]) -> None:
    shown = evenly(list(layers), MOST_LAYERS)
    titles, title = shortened(shown, 16), look.title
    if len(shown) < len(layers):
        title += f"; {len(shown)} of {len(layers)} quantized layers, evenly chosen"
    columns = min(4, math.ceil(math.sqrt(len(shown))))
    rows = math.ceil(len(shown) / columns)
    width, height = max(4.0, 0.4 + 1.75 * columns), 1.05 + 1.75 * rows
    with page(Path(folder) / look.name, (width, height), title, dpi=dpi, forms=forms) as figure:
        # Margins in inches, so that all panels are of one size whatever their labels.
        sides = {
            "left": (0.68 if look.log else 0.6) / width,
            "right": 1 - 0.1 / width,
            "bottom": 0.65 / height,
            "top": 1 - 0.65 / height,
        }
        grid = figure.add_gridspec(rows, columns, **sides, wspace=0.28, hspace=0.36)
        for index, name in enumerate(shown):
            cell = grid[index // columns, index % columns].subgridspec(2, 1, height_ratios=[2, 1], hspace=0.72)
            panels = figure.add_subplot(cell[0]), figure.add_subplot(cell[1])
            panels[0].set_title(f"{titles[name]}{_levels(layers[name])}")
            _draw_values(panels[0], layers[name], look)
            _draw_codes(panels[1], layers[name], look.log)
            if index % columns == 0:
                panels[0].set_ylabel("frequency\n(peak = 1)")
                panels[1].set_ylabel("codes\n(%)")
            if index + columns >= len(shown):  # nothing stands below
                panels[0].set_xlabel(look.axis, labelpad=1)
                panels[1].set_xlabel("code", labelpad=1)
        figure.align_ylabels()
        _name(figure, look, [layers[name]["quantized"] for name in shown])


def _name(figure: "Figure", look: _Look, found: Sequence[dict[str, Any]]) -> None:
    """The legend: what stems and outlines stand for, where there are any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys: dict[str, Any] = {look.before: Patch(facecolor=FILL, edgecolor=BLUE)}
    if any(_few(quantized) for quantized in found):
        keys[look.after] = Line2D([], [], color="black", linewidth=0.9, marker="o", markersize=2.2)
    if not all(_few(quantized) for quantized in found):
        keys[f"{look.after}, outline of many levels"] = Line2D([], [], color="black", linewidth=0.8)
    figure.legend(keys.values(), keys.keys(), loc="lower center", ncols=len(keys))


def _few(quantized: dict[str, Any]) -> bool:
    return 0 < len(quantized.get("values") or ()) <= MOST_STEMS


def _levels(layer: dict[str, Any]) -> str:
    """Levels, not bits: what is stored of a weight may be less than its level (FleXOR) or more (ABC-Net)."""
    return f", {layer['levels']} levels" if layer["levels"] else ""


def _outline(layer: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(heights, edges) of an outline of many levels: a density, 1 where it is the highest of what was quantized.

    So many single values make a step that at most `MOST_STEPS` are left; it reaches halfway to the next value.
    """
    found, counts = layer["quantized"], layer["quantized"]["counts"]
    if "values" in found:
        values, each = found["values"], math.ceil(len(counts) / MOST_STEPS)
        middles = [(a + b) / 2 for a, b in pairwise(values)]
        ends = [2 * values[0] - middles[0], *middles, 2 * values[-1] - middles[-1]]
        limits = [*ends[:-1:each], ends[-1]]
        counts = [sum(counts[i : i + each]) for i in range(0, len(counts), each)]
    else:
        limits = edges(found)
    heights = _density(counts, limits)
    latent = layer["latent"]
    top = max(_density(latent["counts"], edges(latent)) if latent["counts"] else heights)
    return [height / (top or 1.0) for height in heights], limits


def _density(counts: Sequence[int], limits: Sequence[float]) -> list[float]:
    """Counts by the width of their steps; equal values, or values too near for a float, make steps of no width."""
    return [count / ((b - a) or 1.0) for count, (a, b) in zip(counts, pairwise(limits), strict=True)]


def _draw_values(axes: "Axes", layer: dict[str, Any], look: _Look) -> None:
    latent, quantized, top = layer["latent"], layer["quantized"], 1.0
    if latent["counts"]:
        bounds = edges(latent)
        axes.stairs(relative(latent), bounds, baseline=look.floor, fill=True, color=FILL)
        axes.stairs(relative(latent), bounds, baseline=look.floor, color=BLUE, linewidth=0.6)
    if _few(quantized):
        heights = relative(quantized)
        stems = axes.stem(quantized["values"], heights, linefmt="k-", markerfmt="ko", basefmt=" ", bottom=look.floor)
        stems.stemlines.set_linewidth(0.9)
        stems.markerline.set_markersize(2.2)
    elif quantized["counts"]:
        heights, limits = _outline(layer)
        axes.stairs(heights, limits, baseline=None, color="black", linewidth=0.8)
        top = min(max(*heights, 1), 1.6)  # where a clip gathers many values they would flatten the rest
    axes.locator_params(axis="x", nbins=4)
    if look.log:
        log_scale(axes)
        axes.set_ylim(look.floor, 2)
        axes.set_yticks([1e-4, 1e-2, 1], ["1e-4", "1e-2", "1"])
        axes.minorticks_off()
    else:
        axes.set_ylim(0, 1.1 * top)
        axes.set_yticks([0, 0.5, 1])


def _draw_codes(axes: "Axes", layer: dict[str, Any], log: bool = False) -> None:
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
        if len(shares) <= MOST_STEMS:
            axes.bar(places, shares, width=0.8, color="0.45")
        else:  # one patch in place of hundreds; a code without a share is a gap of zeros
            heights, limits = [], [places[0] - 0.5]
            for place, share in zip(places, shares, strict=True):
                if place - 0.5 > limits[-1]:
                    heights.append(0.0)
                    limits.append(place - 0.5)
                heights.append(share)
                limits.append(place + 0.5)
            axes.stairs(heights, limits, baseline=1e-2 if log else 0, fill=True, color="0.45")
    else:
        axes.stairs(shares, edges(codes), fill=True, color="0.45")
    most = f" of {math.log2(layer['levels']):.3g}" if layer["levels"] else ""
    if log:
        log_scale(axes)
        axes.set_ylim(1e-2, 1e4)
        axes.set_yticks([0.01, 1, 100], ["0.01", "1", "100"])
        axes.minorticks_off()
    else:
        axes.set_ylim(0, 1.6 * max(shares))  # room for the entropy
        axes.locator_params(axis="y", nbins=2)
    entropy = f"entropy {codes['entropy']:.2f}{most} bits"
    axes.text(0.98, 0.98, entropy, transform=axes.transAxes, ha="right", va="top", size=7)
    axes.locator_params(axis="x", integer=True, nbins=5)
