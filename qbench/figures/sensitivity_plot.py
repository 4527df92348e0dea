"""The picture of a sensitivity scan: what each layer alone loses, a row per layer, a mark per width."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbench.figures.drawing import page

MARKS = "ovsD^P*X"


def sensitivity(path: Path, found: Mapping[str, Any], plan: Mapping[str, int] | None = None, *, dpi: int = 150) -> Path:
    """Draws `path` from what `qbench.training.sensitivity.scan` gives; the bits of `plan` stand beside the rows."""
    layers, widths = found["layers"], found["widths"]
    base = found["float"]["accuracy"]
    with page(path, (5.2, 1.3 + 0.17 * len(layers)), dpi=dpi, forms=("png",)) as figure:
        axes = figure.subplots()
        for i, width in enumerate(widths):
            lost = [base - row[str(width)]["accuracy"] for row in layers.values()]
            axes.plot(lost, range(len(layers)), MARKS[i % len(MARKS)], label=f"{width} bits", alpha=0.8)
        axes.set_yticks(range(len(layers)), [f"{n}  [{plan[n]}]" if plan else n for n in layers])
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axvline(0, color="0.6", linewidth=0.6)
        axes.set_xlabel(
            f"accuracy lost by this layer alone (points of {base:.2f} %, {found['float']['images']:,} training images)"
        )
        what = {"both": "weights and input", "weights": "weights", "activations": "input"}[found["sites"]]
        axes.set_title(
            f"{found['method']}, {found['model']} on {found['dataset']}, {what}" + ("; [bits chosen]" if plan else "")
        )
        axes.legend(loc="best")
        figure.tight_layout()
    return path
