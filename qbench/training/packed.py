"""The packed file of a run: what of its configuration goes in, and the net that comes out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench import kernels
from qbench.config import allowed
from qbench.data import load
from qbench.errors import unknown
from qbench.lowbit import artifact, container
from qbench.lowbit.artifact import Artifact
from qbench.training import device, evaluation, trainer
from qbench.training.build import make_batches, make_method, make_model, place_net, quantize

# What builds the net again and evaluates it; nothing of its training, and no place on the disk of who trained it.
KEPT = ("name", "seed", "w_bits", "a_bits", "protocol", "init", "layer_bits", "options", "model", "dataset")
EVALUATES = ("threads", "channels_last")
OF_METHOD = ("_target_", "name", "title", "family", "arxiv", "rules")
OF_RUN = ("key", "budget", "accuracy_last", "kernels", "evaluated_in", "weights_sha256", "version", "torch")


def net_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's configuration what a packed file holds."""
    found = {name: config[name] for name in (*KEPT, *EVALUATES) if name in config}
    found["method"] = {name: config["method"][name] for name in OF_METHOD if name in config["method"]}
    found["dataset"] = {name: value for name, value in config["dataset"].items() if name != "root"}
    found["train"] = {"batch_size": config["train"]["batch_size"]}
    return found


def file_of(model: nn.Module, config: Mapping[str, Any], result: Mapping[str, Any]) -> bytes:
    """The packed file of a trained net; the `dataset` of `config` has the shape of an image.

    Errors: UserError where it cannot be packed.
    """
    data = config["dataset"]
    place = next(model.parameters()).device
    image = torch.zeros(1, data["channels"], data["size"], data["size"], device=place)
    with kernels.using("torch"):  # the reference
        run = {name: result[name] for name in OF_RUN if name in result}
        return artifact.pack(model, net_config(config), run, image)


def read(path: Path, allow: Sequence[str] = ()) -> Artifact:
    """A packed file whose checksums agree, and whose configuration names nothing but what may be built.

    Errors: UserError naming file and part.
    """
    found = Artifact(container.read(path))
    allowed.check(found.meta["config"], str(path), allow)
    return found


def net_of(found: Artifact) -> nn.Module:
    """The net of a packed file, in eval mode."""
    config = found.meta["config"]
    images = _Images(*(config["dataset"].get(name) for name in ("channels", "classes", "size")))
    model = make_model(config, images)  # type: ignore[arg-type]
    quantize(config, model, make_method(config))
    return artifact.install(model, found)


class _Images:
    """The shape of images, in place of a data set."""

    def __init__(self, channels: int, classes: int, size: int) -> None:
        self.channels, self.classes, self.size = channels, classes, size


def evaluate(
    path: Path, dataset: Mapping[str, Any] | None = None, where: str | None = None, allow: Sequence[str] = ()
) -> tuple[dict[str, Any], float, float]:
    """Evaluate a packed file: (what it tells of its run, loss, accuracy in percent).

    dataset: replaces keys of its data. where: the device, as in `device=`; null: auto.
    """
    found = read(path, allow)
    config, run = found.meta["config"], found.meta["run"]
    data = {**config["dataset"], "root": os.environ.get("QBENCH_DATA", "data")}
    for key, value in (dataset or {}).items():
        if key not in data:
            raise unknown(f"option of dataset={data['name']}", key, data)
        data[key] = value
    images, place = load(data), device.pick(where or "auto")
    device.set_threads(config["threads"])
    model = place_net(net_of(found), place, config["channels_last"])
    batches = make_batches(config, images, images.test, place, False)
    with kernels.using(run.get("kernels", "torch")):  # other kernels round otherwise: an image may tip over
        precision = str(run.get("evaluated_in", trainer.REPORTED))
        loss, accuracy = evaluation.evaluate(model, batches, place, precision)
    return run, loss, accuracy
