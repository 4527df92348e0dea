"""What can be done with a run before and after it is computed: plan it, evaluate it again, take its net."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from qbench import kernels
from qbench.config import allowed
from qbench.config.identity import needs_parent, parent_of
from qbench.config.recipe import Recipe
from qbench.data import load
from qbench.errors import UserError, unknown
from qbench.files import atomic_write
from qbench.quant import surgery
from qbench.quant.layers import quantized_weights
from qbench.records import CONFIG, RESULT, read_config, read_result
from qbench.screen import Screen
from qbench.training import checkpoint, device, evaluation, packed, trainer
from qbench.training.build import assemble, make_batches, make_method, make_model, place_net, quantize
from qbench.training.optim import criterion
from qbench.training.run import parent_places, prepare, start_from_file
from qbench.training.stages import parts

PACKED = "packed.safetensors"


def read_trusted(folder: Path, allow: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a finished run that names nothing but what may be built (`allowed.check`)."""
    config = read_config(folder)
    allowed.check(config, str(folder / CONFIG), allow)
    return config


def rebuild(place: Path, allow: Sequence[str] = ()) -> nn.Module:
    """The trained, quantized net of a finished run, or of a packed file, in eval mode.

    allow: packages of which a net may be built, beside qbench's own, torch.nn and torchvision.models.
    """
    if place.is_file():
        return packed.net_of(packed.read(place, allow))
    config = _with_shape(read_trusted(place, allow))
    return _net(place, config, SimpleNamespace(**config["dataset"]))


def _with_shape(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the shape of an image in it; the data are loaded where it lacks that."""
    names = ("channels", "classes", "size")
    if all(config["dataset"].get(name) for name in names):
        return config
    data = load(config["dataset"])
    return {**config, "dataset": {**config["dataset"], **{name: getattr(data, name) for name in names}}}


def export(folder: Path, out: Path | None = None, allow: Sequence[str] = ()) -> Path:
    """Write the packed file of a finished run; returns where.

    out: null is packed.safetensors in the run's folder.
    Errors: UserError where the run is not finished, or its net cannot be packed.
    """
    config = _with_shape(read_trusted(folder, allow))
    result = read_result(folder / RESULT) if (folder / RESULT).is_file() else {}
    model = _net(folder, config, SimpleNamespace(**config["dataset"]))
    return atomic_write(out or folder / PACKED, packed.file_of(model, config, result))


def _net(folder: Path, config: dict[str, Any], data: Any) -> nn.Module:
    model = make_model(config, data)
    quantize(config, model, make_method(config))
    return _trained(model, folder)


def _trained(model: nn.Module, folder: Path) -> nn.Module:
    state = checkpoint.load_net(folder / "model.pt")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise UserError(f"{folder / 'model.pt'} does not fit its config.yaml: {error}") from error
    return model.eval()


def evaluate(
    folder: Path, dataset: Mapping[str, Any] | None = None, where: str | None = None, allow: Sequence[str] = ()
) -> tuple[dict[str, Any], float, float]:
    """Evaluate a finished run again: (its result, loss, accuracy in percent).

    dataset: replaces keys of its data. where: the device, as in `device=`; null: the run's. allow: as in `rebuild`.
    A packed file in place of the folder is evaluated alike.
    """
    if folder.is_file():
        return packed.evaluate(folder, dataset, where, allow)
    config = read_trusted(folder, allow)
    config["device"] = where or config["device"]
    for key, value in (dataset or {}).items():
        if key not in config["dataset"]:
            raise unknown(f"option of dataset={config['dataset']['name']}", key, config["dataset"])
        config["dataset"][key] = value
    if not (folder / RESULT).exists():
        raise UserError(f"{folder} is not a finished run: it has no {RESULT}")
    result = read_result(folder / RESULT)
    net = assemble(config, load(config["dataset"]))
    _trained(net.model, folder)
    with kernels.using(result.get("kernels", "torch")):  # other kernels round otherwise: an image may tip over
        loss, accuracy = evaluation.evaluate(net.model, net.tests["test"], net.place, _precision(result))
    return result, loss, accuracy


def _precision(result: Mapping[str, Any]) -> str:
    """In what the accuracies of a result were computed: older ones as they were trained."""
    return str(result.get("evaluated_in", result.get("precision", trainer.REPORTED)))


def evaluate_checkpoint(config: dict[str, Any], path: Path) -> tuple[float, float]:
    """(loss, accuracy in percent) of a plain float state_dict on the test set that `config` names."""
    data, place = load(config["dataset"]), device.pick(config["device"])
    device.set_threads(config["threads"])
    model = make_model(config, data)
    for line in checkpoint.load_weights(model, path):
        print(f"  {line}")
    place_net(model, place, config["channels_last"])
    return evaluation.evaluate(model, make_batches(config, data, data.test, place, False), place, trainer.REPORTED)


def plan(config: dict[str, Any]) -> dict[str, Any]:
    """What a run would do: resolved configuration, manifest, steps and an estimate of its seconds; nothing is kept."""
    run = prepare(config)
    config = run.config
    net = assemble(config, run.data, lambda model: start_from_file(run, model, Screen()))
    model, place = net.model, net.place
    recipe = Recipe(**config["train"])
    train = make_batches(config, run.data, run.data.train, place, True)
    x, y = next(iter(train.epoch(0)))
    times = []
    for _ in range(3):
        start = time.monotonic()
        with evaluation.autocast(place, recipe.precision), quantized_weights(model.train()):
            loss = criterion(recipe, model(x).float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for a GPU
        times.append(time.monotonic() - start)
    steps, parent_steps = sum(part.steps for part in parts(net.method, recipe, len(train))), 0
    if needs_parent(config):
        parent = prepare(parent_of(config), run.data)
        if not any(found.result() for found in parent_places(parent)):
            per_epoch = len(make_batches(parent.config, run.data, run.data.train, place, True))
            parent_steps = Recipe(**config["parent"]).total_steps(per_epoch)
    return {
        "config": config,
        "manifest": surgery.manifest(model, net.kept),
        "folder": str(run.folder),
        "steps": steps,
        "parent_steps": parent_steps,
        "seconds": (steps + parent_steps) * min(times),
    }
