"""telemetry.png: what `telemetry` recorded of a run, as small multiples, from metrics.jsonl and result.json alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.figures.drawing import (
    DASHES,
    Curve,
    edges,
    evenly,
    latent_name,
    log_scale,
    page,
    records_of,
    relative,
    result_of,
    title_of,
    traces_of,
    widen,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERCENT = {
    "flips": "codes changed since\nlast record (% of weights)",
    "used": "codes in use (% of levels)",
    "saturated": "gradient below 1 % of the\nlargest (% of latents)",
    "clipped": "latents at a bound\n(% of latents)",
}
LABELS = {
    **PERCENT,
    "entropy": "entropy of codes\n(bits per weight)",
    "scale": "mean |quantized weight|\n(zeros left out)",
}
ORDER = ("flips", "entropy", "used", "saturated", "clipped")
NAMED = 6  # the legend names so many layers; more get a colour scale
SHADES = ("0.7", "0.4", "0.0")  # first, middle and last record of a histogram


def telemetry(
    folder: Path,
    result: Mapping[str, Any] | None = None,
    records: Sequence[dict[str, Any]] | None = None,
    *,
    dpi: int = 150,
    forms: Sequence[str] = ("png",),
) -> bool:
    """Draws telemetry.png: flips, entropy and use of codes, dead gradients, scales, and three layers' latents.

    A line per layer, dark to light from the first to the last; a measure that is 0 throughout has no panel. Below, the
    histograms of the latents of the first, the middle and the last quantized layer at three times. False, and no file,
    where fewer than two records were taken: nothing has moved.
    """
    records, result = records or records_of(folder), result or result_of(folder)
    panels = _measures(records)
    taken = [r for r in records if r.get("histograms")]
    if not panels or len(taken) < 2:
        return False
    rows = math.ceil(len(panels) / 3)
    width, height = 7.2, 0.9 + 1.75 * (rows + 1)
    with page(Path(folder) / "telemetry.png", (width, height), title_of(result), dpi=dpi, forms=forms) as figure:
        layers = list(next(iter(panels.values())))
        few = len(layers) <= NAMED
        # Margins in inches, as a layout engine would take as long as all of the drawing.
        left, right, bottom, top = 0.72, 0.1 if few else 0.55, 2.75 if few else 2.4, 0.3
        grid = _grid(figure, rows, (left, width - right, bottom, height - top), gaps=(0.8, 0.17))
        axes = list(grid.subplots(sharex=True, squeeze=False).flat)
        for panel, (label, lines) in zip(axes, panels.items(), strict=False):
            _draw_lines(panel, label, lines)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        for panel in axes[max(0, len(panels) - 3) : len(panels)]:
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("epoch")
        if few:
            _name(figure, layers, bottom - 0.55)
        else:
            box = (1 - 0.45 / width, bottom / height, 0.1 / width, 1 - (bottom + top) / height)
            _scale(figure, figure.add_axes(box), layers)
        _draw_latents(figure, taken)
    return True


def _measures(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    """{label: {layer: curve}} of each measure that is not 0 throughout, then of each kind of weight scale."""
    found: dict[str, dict[str, Curve]] = {name: {} for name in ORDER}
    for record in records:
        for layer, values in record.get("telemetry", {}).items():
            for name, value in values.items():
                x, y = found.setdefault(name, {}).setdefault(layer, ([], []))
                x.append(record["epoch"])
                y.append(value * (100 if name in PERCENT else 1))
    panels = {LABELS.get(n, n): lines for n, lines in found.items() if any(any(y) for _, y in lines.values())}
    layers = set(next(iter(panels.values()), {}))
    for kind, lines in traces_of(records).items():
        mine = {layer.removesuffix(".weight_quantizer"): curve for layer, curve in lines.items()}
        if panels and set(mine) <= layers:
            panels[f"{kind}\n(mean of layer)"] = mine
    return panels


def _shade(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * index / max(count - 1, 1))  # its palest is lost on white


def _draw_lines(axes: "Axes", label: str, lines: dict[str, Curve]) -> None:
    few = len(lines) <= NAMED
    for index, (x, y) in enumerate(lines.values()):
        dash = DASHES[index] if few else "-"
        marker = "." if len(x) <= 25 else None
        axes.plot(x, y, color=_shade(index, len(lines)), linestyle=dash, linewidth=0.9, marker=marker, markersize=2.5)
    axes.set_ylabel(label)
    values = [v for _, y in lines.values() for v in y if math.isfinite(v)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        log_scale(axes)
    elif label in LABELS.values():
        axes.set_ylim(0, 1.05 * max(values, default=1))
    else:
        widen(axes, values)


def _grid(figure: "Figure", rows: int, box: tuple[float, float, float, float], gaps: tuple[float, float]) -> Any:
    """A grid of three columns in `box` (left, right, bottom, top; inches), with gaps between columns and rows."""
    width, height = figure.get_size_inches()
    left, right, bottom, top = box
    wide, tall = (right - left - 2 * gaps[0]) / 3, (top - bottom - (rows - 1) * gaps[1]) / rows
    sides = {"left": left / width, "right": right / width, "bottom": bottom / height, "top": top / height}
    return figure.add_gridspec(rows, 3, **sides, wspace=gaps[0] / wide, hspace=gaps[1] / tall)


def _name(figure: "Figure", layers: list[str], top: float) -> None:
    """A legend of the layers, its upper edge `top` inches above the lower one of the figure."""
    from matplotlib.lines import Line2D

    shades = [_shade(i, len(layers)) for i in range(len(layers))]
    lines = [
        Line2D([], [], color=c, linestyle=d)  # type: ignore[arg-type]
        for c, d in zip(shades, DASHES, strict=False)
    ]
    at = (0.5, top / figure.get_figheight())
    figure.legend(lines, layers, loc="upper center", bbox_to_anchor=at, ncols=min(len(layers), 4), borderaxespad=0)


def _scale(figure: "Figure", axes: "Axes", layers: list[str]) -> None:
    """A colour scale in `axes`, where a legend of the layers would be too long."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(1, len(layers)), ListedColormap([_shade(i, 256) for i in range(256)]))
    bar = figure.colorbar(scale, cax=axes, ticks=[1, len(layers)])
    bar.set_label(f"layer ({layers[0]} to {layers[-1]})", labelpad=-4)


def _draw_latents(figure: "Figure", taken: Sequence[dict[str, Any]]) -> None:
    """Outlines of the histograms of three layers' latents at the first, the middle and the last record."""
    from matplotlib.lines import Line2D

    times = list(dict.fromkeys([0, len(taken) // 2, len(taken) - 1]))
    styles = list(
        zip(SHADES[-len(times) :], ("-", "--", "-")[-len(times) :], (0.9, 0.9, 1.3)[-len(times) :], strict=True)
    )
    names = evenly(list(taken[-1]["histograms"]), 3)
    box = (0.55, figure.get_figwidth() - 0.1, 0.65, 1.8)
    axes = list(_grid(figure, 1, box, gaps=(0.15, 0)).subplots(sharey=True, squeeze=False)[0])
    for panel in axes[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(axes, names, strict=False):
        panel.set_title(name)
        panel.set_xlabel(latent_name(taken[-1]["histograms"][name]["latent"]))
        panel.locator_params(axis="x", nbins=4)
        for time, (shade, dash, width) in zip(times, styles, strict=True):
            latent = taken[time]["histograms"][name]["latent"]
            if latent["counts"]:
                panel.stairs(relative(latent), edges(latent), color=shade, linestyle=dash, linewidth=width)
    axes[0].set_ylabel("frequency (peak = 1)")
    keys = [Line2D([], [], color=c, linestyle=d, linewidth=w) for c, d, w in styles]  # type: ignore[arg-type]
    epochs = [f"epoch {taken[time]['epoch']:.3g}" for time in times]
    figure.legend(keys, epochs, loc="lower center", ncols=len(keys), borderaxespad=0.3)
