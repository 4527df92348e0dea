"""From the resolved configuration to a net, a method, and all that a run needs; the only caller of instantiate."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from qbench.config.identity import NEUTRAL, digest
from qbench.config.moved import today
from qbench.config.recipe import Recipe
from qbench.data import DataSet, batches, torchvision_loader
from qbench.errors import UserError
from qbench.quant import surgery
from qbench.quant.hooks import Distill
from qbench.quant.method import Method
from qbench.screen import Screen
from qbench.training import checkpoint, device, evaluation
from qbench.training.captured import Graphs
from qbench.training.recorder import Recorder
from qbench.training.trainer import Trainer

WRONG = (ValueError, TypeError, OverflowError)  # what a constructor raises on a value that it cannot take
FACTORIES = ("rules", "hooks", "stages")  # of a Method; what stands below a rule, or inside a hook or act, is a factory


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """What a constructor raises on a wrong value, also through Hydra's wrapping, becomes a UserError."""
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, (*WRONG, UserError, ImportError)):
            raise UserError(f"{what}: {cause or str(error).splitlines()[0]}") from error
        raise
    except WRONG as error:
        raise UserError(f"{what}: {error}") from error


def make_model(config: Mapping[str, Any], data: DataSet) -> nn.Module:
    """The float net for this data set, initialised from the run's seed."""
    options = {k: v for k, v in config["model"].items() if k != "name"}
    shape = {"channels": data.channels, "classes": data.classes, "size": data.size}
    if str(options.get("_target_")).startswith("torchvision."):
        shape = {"num_classes": data.classes}  # what its nets take; they find the rest in the images
    with clear_errors(f"model={config['model']['name']}"):
        checkpoint.seed_all(seed_of(config["seed"], "init"))
        try:
            return instantiate(options, **shape, _convert_="all")  # type: ignore[no-any-return]
        except InstantiationException as error:
            if "torchvision::" not in f"{error} {error.__cause__}":
                raise
        torchvision_loader.torchvision()  # its compiled operators do not fit this PyTorch, and no net needs them
        checkpoint.seed_all(seed_of(config["seed"], "init"))
        return instantiate(options, **shape, _convert_="all")  # type: ignore[no-any-return]


def make_method(config: Mapping[str, Any]) -> Method:
    """The Method that the configuration declares."""
    node = {k: v for k, v in config["method"].items() if v is not None}
    for key in FACTORIES:
        node[key] = [_node(part, key == "rules") for part in node.get(key) or []]
    target = node.pop("_target_", "qbench.quant.method.Method")
    with clear_errors(f"method={node['name']}"):
        made = {"title": "", "family": "float", **node}
        return instantiate({"_target_": today(target), **made}, _convert_="all")  # type: ignore[no-any-return]


def _node(value: Any, factory: bool) -> Any:
    """`value` as Hydra wants it: every class where it lies today, and factories marked as partial."""
    if isinstance(value, Mapping):
        inside = factory or "_target_" in value
        out = {k: _node(v, inside) for k, v in value.items() if k != NEUTRAL}
        if "_target_" in out:
            out["_target_"] = today(str(out["_target_"]))
            if factory:
                out["_partial_"] = True
        return out
    return [_node(v, factory) for v in value] if isinstance(value, list) else value


def quantize(config: Mapping[str, Any], model: nn.Module, method: Method) -> dict[str, str]:
    """Surgery with the method's rules; returns what was kept, and why."""
    checkpoint.seed_all(seed_of(config["seed"], "surgery"))
    with clear_errors(f"method={method.name} on model={config['model']['name']}"):
        return surgery.quantize(model, method.rules, config.get("layer_bits") or ())


def seed_of(seed: int, phase: str) -> int:
    """The seed of one phase of a run, so that phases do not depend on each other's draws."""
    return int(digest([seed, phase]), 16) % 2**31


def place_net(model: nn.Module, place: torch.device, channels_last: bool) -> nn.Module:
    """`model` on its device; with `channels_last` its four-dimensional parameters in that order (others have none)."""
    model.to(place)
    for p in model.parameters() if channels_last else ():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def make_batches(
    config: Mapping[str, Any], data: DataSet, split: Any, place: torch.device, train: bool, shared: bool = False
) -> Any:
    """Batches of a split; `shared`: every worker sees all of them (calibration)."""
    recipe = config["train"]
    # evaluation: a GPU is idle for most of a batch of 256 small images; ranges may depend on the calibration's batches
    wide = max(2048 if place.type == "cuda" and data.size <= 64 and not shared else 256, recipe["batch_size"])
    world = 1 if shared else evaluation.world()
    return batches(
        split,
        batch_size=recipe["batch_size"] if train else -(-wide // world) * world,
        mean=data.mean,
        std=data.std,
        whitening=data.whitening,
        augment=data.augment if train else "none",
        shuffle=train,
        drop_last=train,
        seed=seed_of(config["seed"], "order"),
        device=place,
        channels_last=config["channels_last"],
        rank=0 if shared else evaluation.rank(),
        world=world,
    )


def distillation(config: Mapping[str, Any], teacher: nn.Module | None = None) -> list[Distill]:
    """The hook that adds the teacher's term to the loss, where one is asked for; it owns a teacher that learns."""
    given = config["distill"]
    with clear_errors("distill"):
        options = {k: given[k] for k in ("weight", "temperature", "labels") if given.get(k) is not None}
        return [Distill(**options, teacher=teacher if given.get("joint") else None)] if given["weight"] else []


@dataclass
class Assembly:
    """A quantized net with all that trains and evaluates it, before anything is calibrated."""

    config: Mapping[str, Any]
    data: DataSet
    place: torch.device
    model: nn.Module
    method: Method
    kept: dict[str, str]
    tests: dict[str, Any] = field(default_factory=dict)

    def trainer(
        self,
        folder: Path = Path(),
        recorder: Recorder | None = None,
        screen: Screen | None = None,
        teacher: nn.Module | None = None,
        graphs: Graphs | None = None,
        generator: torch.Generator | None = None,
    ) -> Trainer:
        """Its trainer: the loop over the stages of the method."""
        config, data = self.config, self.data
        generator = generator or torch.Generator(self.place)
        generator.manual_seed(seed_of(config["seed"], f"train {evaluation.rank()}"))
        with clear_errors(f"method={self.method.name}"):
            return Trainer(
                self.model,
                self.method,
                Recipe(**config["train"]),
                make_batches(config, data, data.train, self.place, True),
                self.tests,
                folder=folder,
                recorder=recorder,
                device=self.place,
                generator=generator,
                screen=screen or Screen(quiet=True),
                hooks=distillation(config, teacher),
                teacher=teacher,
                calibration=self.calibration_images(),
                compile=config["compile"],
                graph=config["graph"],
                graphs=graphs,
                checkpoint_seconds=config["checkpoint_seconds"],
                phase="float training" if self.method.name == "float" else f"{self.method.name} training",
            )

    def calibration_images(self) -> Any:
        """Batches of the training images that set the first ranges: `calibration` of them, drawn from the seed."""
        data, seed = self.data, self.config["seed"]
        random = torch.Generator().manual_seed(seed_of(seed, "calibration"))
        chosen = torch.randperm(len(data.train), generator=random)[: self.config["train"]["calibration"]]
        return make_batches(self.config, data, data.train.take(chosen), self.place, False, shared=True)

    def calibrate(self, loop: Trainer) -> None:
        """Set the ranges from the calibration images, then let the hooks do what follows."""
        config = self.config
        checkpoint.seed_all(seed_of(config["seed"], "calibrate"))
        precision = config["train"]["precision"]
        scratch = config["init"] == "scratch"
        evaluation.calibrate(self.model, loop.state.calibration.epoch(0), self.place, precision, scratch)
        for hook in loop.own_hooks():
            hook.after_calibrate(loop.state)


def assemble(
    config: Mapping[str, Any],
    data: DataSet,
    start: Callable[[nn.Module], object] = lambda model: None,
    place: torch.device | None = None,
) -> Assembly:
    """The net of `config` on its device: built, given its weights by `start`, then quantized by the method's rules.

    With its batches of test (and validation) images. Sets the number of threads.
    """
    place = device.pick(config["device"]) if place is None else place
    device.set_threads(config["threads"])
    method, model = make_method(config), make_model(config, data)
    start(model)
    place_net(model, place, config["channels_last"])
    kept = quantize(config, model, method)
    model.to(place)
    splits = {"test": data.test, "val": data.val}
    tests = {k: make_batches(config, data, s, place, False) for k, s in splits.items() if s is not None}
    return Assembly(config, data, place, model, method, kept, tests)
