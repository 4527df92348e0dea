"""The figures: drawn from the files of a run alone, of the promised size, for every kind of run."""

import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from qbench.errors import UserError
from qbench.figures import drawing, histograms, pictures, plots
from qbench.methods.flexor import FleXOR
from qbench.quant.layers import QuantLayer
from qbench.training.recorder import Recorder, layer_histogram
from qbench.training.telemetry import Telemetry

RESULT = {"method": "pact", "model": "resnet20", "dataset": "cifar10", "budget": "short", "w_bits": 4, "a_bits": 4}
RESULT |= {"seed": 0, "float_accuracy": 91.7, "accuracy_before_training": 10.0, "key": "0", "protocol": "paper"}
RESULT |= {"init": "float", "bits_per_weight": 4.0, "bytes": 1, "seconds": 1.0}
RESULT |= dict.fromkeys(("accuracy_last", "accuracy_best", "epoch_best"), None)
RESULT |= {"identity": {"data": {"name": "cifar10", "checksum": "0", "augment": "none"}}}


def record(folder: Path, layers: int = 3, epochs: int = 3, *, per_channel: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"block{i}.conv" for i in range(layers)]
    with closing(Recorder(folder, tensorboard=False)) as recorder:
        for epoch in range(1, epochs + 1):
            recorder.scalars(epoch, epoch, "train", loss=2 / epoch, accuracy=50.0, lr=0.1)
            recorder.scalars(epoch, epoch, "test", loss=2 / epoch, accuracy=90 - 3 / epoch)
            recorder.trace(epoch, epoch, {f"{name}.input.alpha": 2 + epoch / 10 for name in names})
        histograms = {}
        for name in names:
            w = torch.randn(40, 20, generator=generator)
            codes = (2 * w).round().clamp(-8, 7)
            step = torch.rand(40, 1, generator=generator) if per_channel else 0.5
            histograms[name] = layer_histogram(w, codes * step, None if per_channel else codes, 16)
        recorder.histograms(epochs, epochs, histograms)
        recorder.result(RESULT)


def pixels(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert len(image.convert("L").getcolors() or []) > 4  # not a blank page
        return image.size


def test_curves(tmp_path: Path) -> None:
    record(tmp_path)
    plots.curves(tmp_path)
    assert pixels(tmp_path / "curves.png") == (750, 975)  # 5 x 6.5 inches: accuracy, loss and alpha
    assert not (tmp_path / "curves.pdf").exists()


def test_histograms_of_many_layers(tmp_path: Path) -> None:
    record(tmp_path, layers=30)
    histograms.weights(tmp_path)
    path = tmp_path / "histograms.png"
    width, _ = pixels(path)
    assert width == 1110
    assert path.stat().st_size < 300_000


def test_dpi_and_formats(tmp_path: Path) -> None:
    record(tmp_path, layers=1)
    plots.curves(tmp_path, dpi=300, forms=("png", "pdf"))
    assert pixels(tmp_path / "curves.png") == (1500, 1950)
    histograms.weights(tmp_path, forms=("pdf", "svg"))
    for name in ("curves.pdf", "histograms.pdf"):
        assert (tmp_path / name).read_bytes().startswith(b"%PDF")
    text = (tmp_path / "histograms.svg").read_text()
    assert "<svg" in text
    assert "quantized weight" in text  # letters, no outlines of them
    assert not (tmp_path / "histograms.png").exists()


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    record(tmp_path)
    drawn = []
    for _ in range(2):
        plots.curves(tmp_path, forms=("png", "svg", "pdf"))
        drawn.append([(tmp_path / f"curves.{form}").read_bytes() for form in ("png", "svg", "pdf")])
    assert drawn[0] == drawn[1]


def test_per_channel_values_without_codes(tmp_path: Path) -> None:
    record(tmp_path, per_channel=True)
    histograms.weights(tmp_path)
    pixels(tmp_path / "histograms.png")


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_codes_are_drawn_as_levels_and_not_taken_for_bits() -> None:
    w = torch.arange(4.0)
    planes = layer_histogram(w, w, torch.tensor([0, 4, 6, 7]), 4)  # ABC-Net: three stored bits, four levels
    axes = Figure().subplots()
    histograms._draw_codes(axes, planes)
    assert histograms._levels(planes) == ", 4 levels"
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2, 3])  # type: ignore[attr-defined]
    assert _texts(axes) == ["entropy 2.00 of 2 bits"]
    axes = Figure().subplots()
    histograms._draw_codes(axes, layer_histogram(w, w, torch.tensor([-1, 0, 1, 1]), 3))
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([-1, 0, 1])  # type: ignore[attr-defined]


def test_the_latents_of_flexor_are_called_encrypted_weights(tmp_path: Path) -> None:
    layer = QuantLayer(torch.nn.Conv2d(4, 8, 3))
    layer.set_weight_quantizer(FleXOR(layer, "weight", bits=0.8))
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        Telemetry().record(torch.nn.Sequential(layer), recorder, 0, 0.0)
    latent = drawing.records_of(tmp_path)[0]["histograms"]["0"]["latent"]
    assert drawing.latent_name(latent) == "encrypted weight"
    assert drawing.latent_name({}) == "latent weight"  # a record of an earlier version
    histograms.weights(tmp_path)
    pixels(tmp_path / "histograms.png")


def test_a_run_that_only_calibrates(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        recorder.scalars(0, 0.0, "test", loss=1.0, accuracy=71.0)
        recorder.histograms(0, 0.0, {"fc": layer_histogram(torch.zeros(0), torch.full((3,), 1.0), None, None)})
    plots.curves(tmp_path)
    assert pixels(tmp_path / "curves.png") == (750, 675)
    histograms.weights(tmp_path)
    pixels(tmp_path / "histograms.png")


def test_a_diverged_run_can_be_drawn(tmp_path: Path) -> None:
    nan = float("nan")
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        for epoch in range(3):
            recorder.scalars(epoch, epoch, "train", loss=nan)
            recorder.scalars(epoch, epoch, "test", loss=nan, accuracy=nan)
            recorder.trace(epoch, epoch, {"S_tanh": nan})
    plots.curves(tmp_path)
    pixels(tmp_path / "curves.png")


def test_traces_are_grouped_by_kind(tmp_path: Path) -> None:
    names = ["conv1.weight.step", "conv1.input.step", "conv2.weight_quantizer.step", "fc/S_tanh"]
    records = [{"epoch": 1.0, "traces": dict.fromkeys(names, 0.5)}]
    assert {kind: list(lines) for kind, lines in drawing.traces_of(records).items()} == {
        "weight step": ["conv1", "conv2"],
        "input step": ["conv1"],
        "S_tanh": ["fc"],
    }


@pytest.mark.parametrize("values", [[0.2, 0.20001, 0.200012], [0.2] * 3, [2e-5, 2.00001e-5]])
def test_values_that_barely_move_are_labelled_in_full(values: list[float]) -> None:
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure()
        axes = figure.subplots()
        axes.plot(values)
        plots._scale(axes, values)
        figure.draw_without_rendering()
        lo, hi = axes.get_ylim()
        assert hi - lo == pytest.approx(0.02 * values[-1])
        assert lo < min(values) <= max(values) < hi
        assert axes.yaxis.get_offset_text().get_text() == ""
        assert {float(text.get_text()) for text in axes.get_yticklabels()} == {*axes.get_yticks().round(9)}


def test_evenly_chosen_layers_hold_first_and_last() -> None:
    names = [str(i) for i in range(53)]
    chosen = drawing.evenly(names, 24)
    assert len(set(chosen)) == 24
    assert (chosen[0], chosen[-1]) == ("0", "52")


def test_titles_stay_apart_when_long_names_are_shortened() -> None:
    names = [f"blocks.{i}.body.conv2" for i in range(17)]
    short = drawing.shortened([*names, "conv1"])
    assert short["conv1"] == "conv1"
    assert (short[names[0]], short[names[10]]) == ("b.0.body.conv2", "b.10.body.conv2")
    assert len(set(short.values())) == 18
    twins = ["features.first_of_all.conv", "features.first_at_end.conv"]  # alike when shortened: left as they are
    assert list(drawing.shortened(twins).values()) == twins


def test_many_levels_are_an_outline_of_at_most_64_steps() -> None:
    w = torch.linspace(-1, 1, 2561)[:-1]
    codes = (128 * w).floor()
    layer = layer_histogram(w, codes / 128, codes, 256)
    heights, limits = histograms._outline(layer)
    assert len(heights) == 64
    assert limits == pytest.approx([i / 32 - 1 - 0.5 / 128 for i in range(65)])
    assert heights == pytest.approx([1.0] * 64, rel=0.03)  # uniform, and on the scale of what was quantized
    axes = Figure().subplots()
    histograms._draw_values(axes, layer, histograms._Look("", "", "", "", ""))
    assert not axes.containers  # of stems
    few = layer_histogram(w, (2 * w).floor() / 2, (2 * w).floor(), 4)
    histograms._draw_values(axes, few, histograms._Look("", "", "", "", ""))
    assert len(axes.containers) == 1


def test_the_pictures_of_a_finished_run_are_drawn_from_its_files(tmp_path: Path) -> None:
    record(tmp_path)
    with (tmp_path / "metrics.jsonl").open() as file:
        assert "activations" not in file.read()
    pictures.complete(tmp_path, {**RESULT, "epoch_best": 1.0}, "svg")
    assert {path.name for path in tmp_path.glob("*.svg")} == {"curves.svg", "histograms.svg"}
    (tmp_path / "curves.svg").write_text("mine")
    pictures.complete(tmp_path, {**RESULT, "epoch_best": 1.0}, "svg")
    assert (tmp_path / "curves.svg").read_text() == "mine"


def test_activations(tmp_path: Path) -> None:
    x = torch.cat([torch.zeros(500), torch.rand(500, generator=torch.Generator().manual_seed(0))])
    with closing(Recorder(tmp_path)) as recorder:
        recorder.histograms(
            3, 1.0, {"conv": layer_histogram(x, (x * 3).round() / 3, (x * 3).round(), 4)}, "activations"
        )
    histograms.activations(tmp_path)
    pixels(tmp_path / "activations.png")
    with pytest.raises(UserError, match="no histogram"):
        histograms.weights(tmp_path)


@pytest.mark.parametrize("draw", [plots.curves, histograms.weights])
def test_nothing_recorded(tmp_path: Path, draw: object) -> None:
    assert callable(draw)
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no records"):
        draw(tmp_path)


def test_nothing_of_this_kind_recorded(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        recorder.scalars(1, 1.0, "train", lr=0.1)
    with pytest.raises(UserError, match="no loss, accuracy or trace"):
        plots.curves(tmp_path)
    with pytest.raises(UserError, match="no histogram"):
        histograms.weights(tmp_path)


def test_importing_plots_does_not_import_matplotlib() -> None:
    code = "import sys, qbench.figures.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_latents_that_are_all_equal_can_be_drawn_beside_many_levels() -> None:
    """Steps of no width: a layer that has not moved from a constant start."""
    w = torch.linspace(-1, 1, 2561)[:-1]
    codes = (128 * w).floor()
    layer = layer_histogram(torch.full_like(w, 0.25), codes / 128, codes, 256)
    layer["latent"] = {"counts": [2560], "lo": 0.25, "hi": 0.25}
    heights, _ = histograms._outline(layer)
    assert all(math.isfinite(h) for h in heights)
    assert histograms._density([3, 4], [0.0, 0.0, 2.0]) == [3, 2]
