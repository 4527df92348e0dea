"""Which pictures a run has; all are drawn from its files alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbench.figures import histograms, plots, telemetry_plots
from qbench.figures.report import PICTURES
from qbench.records import METRICS, read_metrics


def draw(folder: Path, result: Mapping[str, Any], form: str = "png") -> None:
    """Draw all that the run in `folder` has recorded, in one of the formats png, svg and pdf."""
    records = read_metrics(folder)
    if result["epoch_best"]:  # else nothing was trained, and there is no curve
        plots.curves(folder, result, records, forms=(form,))
    if any(record.get("histograms") for record in records):
        histograms.weights(folder, result, records, forms=(form,))
        telemetry_plots.telemetry(folder, result, records, forms=(form,))
    if any(record.get("activations") for record in records):
        histograms.activations(folder, result, records, forms=(form,))
    plots.units(folder, result, records, forms=(form,))


def complete(folder: Path, result: Mapping[str, Any], form: str) -> None:
    """Draw the pictures of a finished run that has none in this format."""
    if (folder / METRICS).is_file() and not any((folder / f"{name}.{form}").is_file() for name in PICTURES):
        draw(folder, result, form)
