"""How much each layer alone loses at low bits, and which bits to give to which layer within a budget."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qbench import kernels
from qbench.config import bits, layer_bits
from qbench.config.identity import digest
from qbench.errors import UserError
from qbench.figures import sensitivity_plot
from qbench.files import atomic_write
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.passes import as_float, at_site, macs
from qbench.screen import Screen
from qbench.training import evaluation
from qbench.training.build import Assembly, assemble, make_batches, seed_of
from qbench.training.run import prepare, start_from_file

SITES = {"both": ("w", "a"), "weights": ("w",), "activations": ("a",)}


def scan(config: dict[str, Any], widths: Sequence[int], sites: str, images: int, screen: Screen) -> dict[str, Any]:
    """Loss and accuracy with each layer alone quantized, calibrated only; the rest of the net is float.

    config: that of a run of some method, started from the net in question, with protocol=uniform and some `layer_bits`,
    so that each layer has its own quantizers. sites: a layer's weights and input, or one
    of them. images: so many training images, drawn from the seed, without augmentation: the test set chooses nothing.
    Gives {"float": {loss, accuracy}, "layers": {name: {weights, macs, BITS: {loss, accuracy}}}, and how it was made}.

    Errors: UserError where the method cannot quantize these sites.
    """
    layers: dict[str, dict[str, Any]] = {}
    whole: dict[str, float] = {}
    for width in widths:
        w, a = (width if site in SITES[sites] else bits.FLOAT for site in "wa")
        run = prepare({**config, "layer_bits": layer_bits.read({"*": f"{w}/{a}"}, config["method"])})
        net = assemble(run.config, run.data, lambda model, run=run: start_from_file(run, model, Screen(quiet=True)))  # type: ignore[misc]
        with as_float(net.model, ("weight",)):  # what reaches a layer comes from a net that is float before it
            net.calibrate(net.trainer())
        batches = _images(net, images)
        if not layers:
            whole = {"images": min(images, len(run.data.train))}
            layers = {name: {"weights": math.prod(q.weight_shape)} for name, q in quant_layers(net.model)}
            data = net.data
            image = torch.zeros(1, data.channels, data.size, data.size, device=net.place)
            with as_float(net.model):
                counts = macs(net.model, image)
            for name, row in layers.items():
                row["macs"] = counts.get(name, 0)
        with kernels.using(config["kernels"]), as_float(net.model), screen.phase(f"{width} bits", len(layers)) as view:
            if "loss" not in whole:
                whole |= _measured(net, batches)
            for step, (name, layer) in enumerate(quant_layers(net.model), 1):
                with _on(layer):
                    layers[name][str(width)] = _measured(net, batches)
                view.advance(step, name)
    return {
        "method": config["method"]["name"],
        "model": config["model"]["name"],
        "dataset": run.data.name,
        "seed": config["seed"],
        "sites": sites,
        "widths": list(widths),
        "float": whole,
        "layers": layers,
    }


@contextmanager
def _on(layer: QuantLayer) -> Iterator[None]:
    """Within the block the quantizers of `layer` are on, those of its weights and its input."""
    quantizers = [*at_site(layer, "weight"), *at_site(layer, "input")]
    try:
        for q in quantizers:
            q.enabled = True
        yield
    finally:
        for q in quantizers:
            q.enabled = False


def _images(net: Assembly, count: int) -> Any:
    data, seed = net.data, net.config["seed"]
    random = torch.Generator().manual_seed(seed_of(seed, "sensitivity"))
    chosen = torch.randperm(len(data.train), generator=random)[:count]
    return make_batches(net.config, data, data.train.take(chosen), net.place, False, shared=True)


def _measured(net: Assembly, batches: Any) -> dict[str, float]:
    loss, accuracy = evaluation.evaluate(net.model, batches, net.place, "fp32")
    return {"loss": loss, "accuracy": accuracy}


def choose(found: Mapping[str, Any], *, size: float | None = None, bops: float | None = None) -> dict[str, int]:
    """{layer: bits} of the least sum of losses within a budget.

    size: bits per weight, the mean over all weights. bops: bits of weights times bits of inputs, the mean over all
    multiplications (16: as many bit operations as with 4/4 everywhere). What several layers lose is taken to add up.
    Each of the widths of the scan is open to each layer; an integer program, solved exactly.

    Errors: UserError where even the fewest bits are too many.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, widths = found["layers"], found["widths"]
    cost = np.array([[row[str(b)]["loss"] - found["float"]["loss"] for b in widths] for row in layers.values()])
    of = [b if "w" in SITES[found["sites"]] else bits.FLOAT for b in widths]
    to = [b if "a" in SITES[found["sites"]] else bits.FLOAT for b in widths]
    limits = []
    for budget, share, price in (
        (size, "weights", np.array(of, float)),
        (bops, "macs", np.array([w * a for w, a in zip(of, to, strict=True)], float)),
    ):
        if budget is not None:
            count = np.array([row[share] for row in layers.values()], float)
            if price.min() > budget:
                what = "size" if share == "weights" else "bops"
                raise UserError(f"{what}={budget:g} is less than the fewest bits of this scan need ({price.min():g})")
            limits.append(LinearConstraint(np.outer(count / count.sum(), price).ravel(), -np.inf, budget))
    one = np.kron(np.eye(len(layers)), np.ones(len(widths)))
    solved = milp(
        cost.ravel(),
        constraints=[LinearConstraint(one, 1, 1), *limits],
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
    )
    if solved.x is None:
        raise UserError(f"no choice of {widths} bits keeps within size={size}, bops={bops}")
    chosen = solved.x.reshape(cost.shape).argmax(1)
    return {name: widths[i] for name, i in zip(layers, chosen, strict=True)}


def write(found: dict[str, Any], place: Path, plan: Mapping[str, int] | None) -> list[Path]:
    """Leave the scan, its picture and the chosen bits in a folder of their own below `place`; returns the files.

    The bits are a file for `layer_bits=`.
    """
    settings = {k: v for k, v in found.items() if k not in ("layers", "float")}
    folder = place / f"sensitivity-{found['method']}-{found['model']}-{found['dataset']}-{digest(settings)}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [atomic_write(folder / "sensitivity.json", json.dumps(found, indent=1))]
    files.append(sensitivity_plot.sensitivity(folder / "sensitivity.png", found, plan))
    if plan is not None:
        other = {"both": "{0}/{0}", "weights": "{0}/32", "activations": "32/{0}"}[found["sites"]]
        lines = yaml.safe_dump({name: other.format(b) for name, b in plan.items()}, sort_keys=False)
        files.append(atomic_write(folder / "layer_bits.yaml", lines))
    return files
