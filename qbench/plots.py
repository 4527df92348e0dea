"""Figures of one run, drawn from its metrics.jsonl and result.json alone.

Matplotlib is imported inside the functions, so that importing this module costs nothing; figures are drawn without
pyplot, so no window, backend or global state is touched. Accuracies are recorded in percent.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.recorder import METRICS, RESULT, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 7.5,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters when an editor opens the figure
}
# Okabe and Ito's colours, told apart by the colour-blind; line style and marker tell them apart in grey too.
BLUE, ORANGE, RED, FILL = "#0072B2", "#E69F00", "#D55E00", "#9CC9E5"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 3, 1, 3))]
MOST_LAYERS = 24
MOST_NAMES = 8  # a legend names so many lines; more get a colour scale

Curve = tuple[list[float], list[float]]


def curves(folder: Path, result: Mapping[str, Any] | None = None, *, dpi: int = 150, pdf: bool = False) -> Path:
    """Draws curves.png (5 inches wide): accuracy, loss and the quantizers' scales over the epochs.

    The accuracy is that of each evaluation, between two levels: the float parent and, where there is one, the net that
    was calibrated and not yet trained. With `pdf` curves.pdf is written beside it.

    Errors: UserError when the run has recorded nothing to draw.
    """
    records, result = _records(folder), result or _result(folder)
    accuracy = {phase: _curve(records, phase, "accuracy") for phase in ("test", "val")}
    loss = {phase: _curve(records, phase, "loss") for phase in ("train", "test", "val")}
    traces = _traces(records)
    panels = [bool(accuracy["test"][0] or accuracy["val"][0]), any(x for x, _ in loss.values()), *[True] * len(traces)]
    if not any(panels):
        raise UserError(f"{Path(folder) / METRICS} holds no loss, accuracy or trace to draw.")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 0.5 + 2 * sum(panels)), layout="constrained")
        figure.suptitle(_title(result))
        axes = list(figure.subplots(sum(panels), 1, sharex=True, squeeze=False)[:, 0])
        left = iter(axes)
        if panels[0]:
            _draw_accuracy(next(left), accuracy, result)
        if panels[1]:
            _draw_loss(next(left), loss)
        for (kind, lines), panel in zip(traces.items(), left, strict=True):
            _draw_traces(panel, kind, lines)
        _label_epochs(axes)
        figure.align_ylabels(axes)
        return _save(figure, Path(folder) / "curves.png", dpi, pdf)


def histograms(folder: Path, result: Mapping[str, Any] | None = None, *, dpi: int = 150, pdf: bool = False) -> Path:
    """Draws histograms.png: for each quantized layer its weights, their quantized values and the use of its codes.

    The last record counts. Of more than 24 layers 24 are shown, evenly chosen with the first and the last, and the
    title says so. Both histograms are scaled to a peak of 1. With `pdf` histograms.pdf is written beside it.

    Errors: UserError when the run has recorded no histogram.
    """
    taken = [record for record in _records(folder) if record.get("histograms")]
    if not taken:
        raise UserError(f"{Path(folder) / METRICS} holds no histogram to draw: no layer of this run was quantized.")
    layers, result = taken[-1]["histograms"], result or _result(folder)
    shown = _evenly(list(layers), MOST_LAYERS)
    title = f"{_title(result)}\nweights after epoch {taken[-1]['epoch']:g}"
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
            panels[0].set_title(f"{_short(name)}{_bits(layers[name], result)}")
            _draw_values(panels[0], layers[name])
            _draw_codes(panels[1], layers[name])
            if index % columns == 0:
                panels[0].set_ylabel("frequency\n(peak = 1)")
                panels[1].set_ylabel("codes\n(%)")
            if index + columns >= len(shown):  # nothing stands below
                panels[0].set_xlabel("weight", labelpad=1)
                panels[1].set_xlabel("code", labelpad=1)
        figure.align_ylabels()
        stem = Line2D([], [], color="black", linewidth=0.9, marker="o", markersize=2.2)
        names = ["latent weight", "quantized weight"]
        figure.legend([Patch(facecolor=FILL, edgecolor=BLUE), stem], names, loc="lower center", ncols=2)
        return _save(figure, Path(folder) / "histograms.png", dpi, pdf)


def _records(folder: Path) -> list[dict[str, Any]]:
    records = read(folder)
    if not records:
        raise UserError(f"{Path(folder) / METRICS} holds no records: is '{folder}' the folder of a run that has begun?")
    return records


def _result(folder: Path) -> dict[str, Any]:
    """What the run came to, or nothing while it is still going."""
    path = Path(folder) / RESULT
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def _curve(records: Sequence[dict[str, Any]], phase: str, name: str) -> Curve:
    """Epochs and values of one scalar; a null (NaN when recorded) becomes NaN and leaves a gap."""
    points = [(r["epoch"], r[name]) for r in records if r.get("phase") == phase and name in r]
    return [x for x, _ in points], [math.nan if y is None else y for _, y in points]


def _traces(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    """{kind: {layer: curve}} in layer order; the kind is the last word of a trace's name, with its site if it has one.

    `layer1.conv1.weight_quantizer.step`, or `layer1.conv1.weight.step`, is the `weight step` of layer1.conv1.
    """
    kinds: dict[str, dict[str, Curve]] = {}
    for record in records:
        for name, value in record.get("traces", {}).items():
            words = name.replace("/", ".").replace("_quantizer.", ".").split(".")
            length = 2 if len(words) > 1 and words[-2] in ("weight", "input", "output", "error", "grad") else 1
            layer = ".".join(words[:-length])
            x, y = kinds.setdefault(" ".join(words[-length:]), {}).setdefault(layer, ([], []))
            x.append(record["epoch"])
            y.append(math.nan if value is None else value)
    return kinds


def _evenly(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _title(result: Mapping[str, Any]) -> str:
    """`pact W4/A4, resnet20 on cifar10, budget short, seed 0`, as far as it is known."""
    if not result:
        return "run not finished"
    bits = "/".join(f"{s}{result[k]:g}" for s, k in (("W", "w_bits"), ("A", "a_bits")) if result.get(k) is not None)
    subject = " on ".join(str(result[key]) for key in ("model", "dataset") if result.get(key) is not None)
    parts = [f"{result.get('method', '')} {bits}".strip(), subject]
    parts += [f"{key} {result[key]}" for key in ("budget", "seed") if result.get(key) is not None]
    return ", ".join(part for part in parts if part)


def _short(name: str) -> str:
    """A layer's name, without its middle where the title would run into the next one."""
    return name if len(name) <= 18 else f"{name[:5]}…{name[-12:]}"


def _bits(layer: dict[str, Any], result: Mapping[str, Any]) -> str:
    bits = math.ceil(math.log2(layer["levels"])) if layer["levels"] else result.get("w_bits")
    return "" if bits is None else f", {bits:g} bit{'s' * (bits != 1)}"


def _draw_accuracy(axes: "Axes", accuracy: dict[str, Curve], result: Mapping[str, Any]) -> None:
    styles = {"test": (BLUE, "-", "o"), "val": (ORANGE, "--", "s")}
    heights = []
    for phase, (x, y) in accuracy.items():
        if x:
            colour, dash, marker = styles[phase]
            axes.plot(x, y, color=colour, linestyle=dash, marker=marker, label=phase)
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
        axes.figure.colorbar(scale, ax=axes, label="layer, in order", ticks=[1, len(lines)], pad=0.02)
    elif any(lines):
        _legend(axes)


def _legend(axes: "Axes") -> None:
    """A legend above the panel, where it hides nothing, of as many columns as fit its width."""
    from numpy import array_split  # splits a list into columns as matplotlib does

    lengths = [len(str(label)) + 7 for label in axes.get_legend_handles_labels()[1]]
    tried = range(len(lengths), 1, -1)
    columns = next((n for n in tried if sum(max(part) for part in array_split(lengths, n)) <= 80), 1)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def _label_epochs(axes: Sequence["Axes"]) -> None:
    """Labels the shared axis: whole epochs where there are several, and one tick where there is but one point."""
    lo, hi = min(panel.dataLim.x0 for panel in axes), max(panel.dataLim.x1 for panel in axes)
    if lo == hi:
        axes[-1].set_xticks([lo])
    elif hi - lo > 2:
        axes[-1].locator_params(axis="x", integer=True)
    axes[-1].set_xlabel("epoch")


def _scale(axes: "Axes", values: list[float]) -> None:
    """A logarithmic axis where all values are positive and span more than a factor of 20."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 20:
        axes.set_yscale("log")


def _draw_values(axes: "Axes", layer: dict[str, Any]) -> None:
    latent, quantized = layer["latent"], layer["quantized"]
    if latent["counts"]:
        edges = _edges(latent)
        axes.stairs(_relative(latent), edges, fill=True, color=FILL)
        axes.stairs(_relative(latent), edges, color=BLUE, linewidth=0.6)
    if quantized.get("values"):
        many = len(quantized["values"]) > 32
        stems = axes.stem(
            quantized["values"],
            _relative(quantized),
            linefmt="k-",
            markerfmt="k," if many else "ko",
            basefmt=" ",
        )
        stems.stemlines.set_linewidth(0.4 if many else 0.9)
        stems.markerline.set_markersize(2.2)
    elif quantized["counts"]:
        axes.stairs(_relative(quantized), _edges(quantized), color="black", linewidth=0.7)
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
        axes.bar(codes["values"], shares, width=0.8 if len(shares) <= 32 else 1, color="0.45")
    else:
        axes.stairs(shares, _edges(codes), fill=True, color="0.45")
    most = f" of {math.log2(layer['levels']):.3g}" if layer["levels"] else ""
    axes.set_ylim(0, 1.6 * max(shares))  # room for the entropy
    axes.text(0.98, 0.98, f"{codes['entropy']:.2f}{most} bits", transform=axes.transAxes, ha="right", va="top", size=7)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.locator_params(axis="y", nbins=2)


def _relative(histogram: dict[str, Any]) -> list[float]:
    peak = max(histogram["counts"], default=0) or 1
    return [count / peak for count in histogram["counts"]]


def _edges(histogram: dict[str, Any]) -> list[float]:
    lo, hi, bins = histogram["lo"], histogram["hi"], len(histogram["counts"])
    return [lo + (hi - lo) * i / bins for i in range(bins + 1)]


def _save(figure: "Figure", path: Path, dpi: int, pdf: bool) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # savefig would draw twice, and encode a PNG that is decoded again here
    width, height = canvas.get_width_height()
    image = Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba()).convert("RGB")
    smaller = io.BytesIO()
    image.quantize(256).save(smaller, format="png", dpi=(dpi, dpi))
    atomic_write(path, smaller.getvalue())
    if pdf:
        page = io.BytesIO()
        figure.savefig(page, format="pdf", metadata={"CreationDate": None})  # equal records give equal bytes
        atomic_write(path.with_suffix(".pdf"), page.getvalue())
    return path
