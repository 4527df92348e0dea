"""What the figures of a run share: their style, what they read, how they are written.

Matplotlib is imported inside the functions, so that importing this module costs nothing; figures are drawn without
pyplot, so no window, backend or global state is touched.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.errors import UserError
from qbench.figures.report import width
from qbench.files import atomic_write
from qbench.records import METRICS, RESULT, read_metrics, read_result

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
    "axes.formatter.useoffset": False,  # an offset or a power of ten above the axis would lie on the legend
    "axes.formatter.limits": (-9, 9),
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters when an editor opens the figure
    "svg.fonttype": "none",
    "svg.hashsalt": "qbench",
}
# Okabe and Ito's colours, told apart by the colour-blind; line style and marker tell them apart in grey too.
BLUE, ORANGE, FILL = "#0072B2", "#E69F00", "#9CC9E5"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 3, 1, 3))]

Curve = tuple[list[float], list[float]]


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; errors: UserError when there are none."""
    records = read_metrics(folder)
    if not records:
        raise UserError(f"{Path(folder) / METRICS} holds no records: is '{folder}' the folder of a run that has begun?")
    return records


def result_of(folder: Path) -> dict[str, Any]:
    """What the run came to, or nothing while it is still going."""
    path = Path(folder) / RESULT
    return read_result(path) if path.exists() else {}


def traces_of(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
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


def evenly(names: list[str], most: int) -> list[str]:
    """At most so many of `names`, evenly chosen with the first and the last."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def shortened(names: Sequence[str], most: int = 18) -> dict[str, str]:
    """{name: what fits a title}: of longer names words shrink to a letter from the left, while all stay apart."""
    short = {}
    for name in names:
        words = name.split(".")
        for i in range(len(words) - 1):
            if len(".".join(words)) > most:
                words[i] = re.sub("^([A-Za-z])[A-Za-z_]*", r"\1", words[i])
        short[name] = ".".join(words)
    found = list(short.values())
    return {name: word if found.count(word) == 1 else name for name, word in short.items()}


def title_of(result: Mapping[str, Any]) -> str:
    """`pact W4/A4, resnet20 on cifar10, budget short, seed 0`, as far as it is known."""
    if not result:
        return "run not finished"
    bits = "/".join(f"{s.upper()}{width(result, s)}" for s in ("w", "a") if result.get(f"{s}_bits") is not None)
    subject = " on ".join(str(result[key]) for key in ("model", "dataset") if result.get(key) is not None)
    parts = [f"{result.get('method', '')} {bits}".strip(), subject]
    parts += [f"{key} {result[key]}" for key in ("budget", "seed") if result.get(key) is not None]
    return ", ".join(part for part in parts if part)


def log_scale(axes: "Axes") -> None:
    """A logarithmic axis with plain numbers: formulas (10 to the power of -2) take a parser of TeX and its time."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
            return f"{x:g}"

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())


def latent_name(histogram: Mapping[str, Any]) -> str:
    """What a histogram of latents shows; records of earlier versions do not say."""
    return str(histogram.get("name", "latent weight"))


def label_epochs(axes: Sequence["Axes"]) -> None:
    """Labels the shared axis: whole epochs where there are several, and one tick where there is but one point."""
    lo, hi = min(panel.dataLim.x0 for panel in axes), max(panel.dataLim.x1 for panel in axes)
    if lo == hi:
        axes[-1].set_xticks([lo])
    elif hi - lo > 2:
        axes[-1].locator_params(axis="x", integer=True)
    axes[-1].set_xlabel("epoch")


def widen(axes: "Axes", values: Sequence[float]) -> None:
    """Limits at least 2 % of the values apart: closer ticks would need more digits than the margin has room for."""
    finite = [value for value in values if math.isfinite(value)]
    lo, hi = min(finite, default=0.0), max(finite, default=0.0)
    room = 0.01 * max(abs(lo), abs(hi))
    if hi - lo < 2 * room:
        axes.set_ylim((lo + hi) / 2 - room, (lo + hi) / 2 + room)


def relative(histogram: dict[str, Any]) -> list[float]:
    """The counts of a histogram, its peak as 1."""
    peak = max(histogram["counts"], default=0) or 1
    return [count / peak for count in histogram["counts"]]


def edges(histogram: dict[str, Any]) -> list[float]:
    """The bounds of a histogram's bins, one more than bins."""
    lo, hi, bins = histogram["lo"], histogram["hi"], len(histogram["counts"])
    return [lo + (hi - lo) * i / bins for i in range(bins + 1)]


@contextmanager
def page(
    path: Path, size: tuple[float, float], title: str = "", *, dpi: int, forms: Sequence[str], layout: Any = None
) -> Iterator["Figure"]:
    """A figure in our style of `size` in inches, `title` on top; written when the block ends, by `save`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout=layout)
        if title:
            where = {} if layout else {"y": 1 - 0.05 / size[1], "va": "top"}
            figure.suptitle(title, **where)
        yield figure
        save(figure, path, dpi, forms)


def save(figure: "Figure", path: Path, dpi: int, forms: Sequence[str]) -> None:
    """Write `path` once for each of `forms`, which takes the place of its ending: png (of 256 colours), svg or pdf."""
    for form in forms:
        data = _png(figure, dpi) if form == "png" else _vector(figure, form)
        atomic_write(path.with_suffix(f".{form}"), data)


def _png(figure: "Figure", dpi: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # savefig would draw twice, and encode a PNG that is decoded again here
    width, height = canvas.get_width_height()
    image = Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba()).convert("RGB")
    smaller = io.BytesIO()
    image.quantize(256, Image.Quantize.FASTOCTREE).save(smaller, format="png", dpi=(dpi, dpi))
    return smaller.getvalue()


def _vector(figure: "Figure", form: str) -> bytes:
    out = io.BytesIO()
    date = {"pdf": "CreationDate", "svg": "Date"}[form]
    figure.savefig(out, format=form, metadata={date: None})  # equal records give equal bytes
    return out.getvalue()
