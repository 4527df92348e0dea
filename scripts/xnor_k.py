"""What of XNOR-Net's K costs accuracy in a ResNet-20 (docs/results/first_runs/README.md).

python scripts/xnor_k.py train VARIANT [option=value ...]  as `qbench method=xnor ...`, K replaced; out=outputs/VARIANT
python scripts/xnor_k.py spread RUN DATA_ROOT              how the inputs' strength varies from image to image
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import qbench
from qbench.cli import command
from qbench.data import load
from qbench.methods.xnor import XnorLayer
from qbench.quant.layers import quant_layers
from qbench.records import read_config
from qbench.training.build import make_batches

paper = XnorLayer.input_scale  # K [N, 1, H, W]


def unpadded(layer: XnorLayer, x: Tensor) -> Tensor:
    """The mean over the pixels that are there: the zeros of the padding are not counted."""
    ones = torch.ones_like(x[:1])
    return paper(layer, x) / paper(layer, ones)


def image(layer: XnorLayer, x: Tensor) -> Tensor:
    """K's mean over the image: what it says of the image's strength alone."""
    return paper(layer, x).mean((1, 2, 3), keepdim=True)


def pattern(layer: XnorLayer, x: Tensor) -> Tensor:
    """K over its mean over the image, times its mean over the batch: what it says of the places alone."""
    k = paper(layer, x)
    return k / k.mean((1, 2, 3), keepdim=True).clamp(min=1e-8) * k.mean()


def batch(layer: XnorLayer, x: Tensor) -> Tensor:
    """K's mean over the batch: one number, neither image nor place."""
    return paper(layer, x).mean().expand(1, 1, 1, 1)


VARIANTS: dict[str, Callable[[XnorLayer, Tensor], Tensor]] = {f.__name__: f for f in (unpadded, image, pattern, batch)}


def train(variant: str, words: list[str]) -> int:
    """Train as the command line does; a folder of its own, since the configuration does not tell the variants apart."""
    XnorLayer.input_scale = VARIANTS[variant]  # type: ignore[method-assign,assignment]
    return command.main(["method=xnor", *words, f"out=outputs/{variant}"])


@torch.no_grad()
def spread(folder: Path, root: str) -> None:
    """Standard deviation over mean of mean |input| over the test images, at each binary conv."""
    config = read_config(folder)
    config["dataset"]["root"] = root
    data = load(config["dataset"])
    model = qbench.load(folder)
    strengths: dict[str, list[Tensor]] = {}
    for name, layer in quant_layers(model):
        taken = strengths.setdefault(name, [])
        layer.register_forward_pre_hook(lambda _, inputs, taken=taken: taken.append(inputs[0].abs().flatten(1).mean(1)))
    for x, _ in make_batches(config, data, data.test, torch.device("cpu"), False).epoch(0):
        model(x)
    for name, parts in strengths.items():
        strength = torch.cat(parts)
        print(f"{name:24} {100 * strength.std() / strength.mean():5.1f} %")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", variant, *words] if variant in VARIANTS:
            sys.exit(train(variant, words))
        case ["spread", run, root]:
            spread(Path(run), root)
        case _:
            sys.exit(f"{__doc__}\nVARIANT: {', '.join(VARIANTS)}")
