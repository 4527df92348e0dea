"""What a benchmark is told, and the nets and data that all of it uses."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench import kernels
from qbench.cli.overrides import resolve_row
from qbench.data import DataSet, load
from qbench.models.parts import ShortcutA
from qbench.training import device, evaluation
from qbench.training.build import assemble, make_batches, make_model, place_net
from qbench.training.trainer import Trainer

STEPS = 1_000_000  # of the pretended training: it stands at 90 %, where whatever a method switches on is on
TIERS = {"cpp": "compiler"}  # how the page calls the tiers of qbench.kernels


@dataclass
class Setting:
    """The options of one benchmark; conf of the command line in `qbench.bench.command`."""

    only: tuple[str, ...] = ("*",)
    models: tuple[str, ...] = ("resnet20",)
    batch: int = 128
    rounds: int = 5
    threads: int | None = None
    kernels: tuple[str, ...] = ("auto",)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    peers: bool = False
    quick: bool = False
    device: str = "auto"
    out: Path | None = None
    say: Callable[[str], None] = print
    known: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Whether `name` was asked for."""
        return any(fnmatchcase(name, pattern) for pattern in self.only)

    def config(self, method: str, model: str) -> dict[str, Any]:
        """The resolved configuration of a method, on made-up images of CIFAR's shape."""
        key = (method, model)
        if key not in self.known:
            words = [f"method={method}", f"model={model}", "dataset=synthetic", "dataset.size=32"]
            words += [f"dataset.train_size={2 * self.batch}", f"dataset.test_size={self.batch}"]
            words += [f"train.batch_size={self.batch}", "tensorboard=false"]
            self.known[key] = resolve_row(words)
        return self.known[key]

    def place(self) -> torch.device:
        """Where the benchmark computes."""
        return device.pick(self.device)


def use_kernels(mode: str) -> str:
    """Switch to a tier of kernels; returns its name on the page: compiler, compile or torch."""
    tier = kernels.use(mode)
    return TIERS.get(tier, tier)


def finish(place: torch.device) -> None:
    """Wait for the GPU."""
    if place.type == "cuda":
        torch.cuda.synchronize()


def images(config: dict[str, Any], place: torch.device, channels_last: bool = True) -> tuple[DataSet, Tensor, Tensor]:
    """(data set, one batch of its images, their labels)."""
    data = load(config["dataset"])
    batches = make_batches({**config, "channels_last": channels_last}, data, data.train, place, True)
    x, y = next(iter(batches.epoch(0)))
    return data, x, y


def stock_step(
    config: dict[str, Any], place: torch.device, precision: str, channels_last: bool = True
) -> Callable[[], None]:
    """A training step of the float net as a plain PyTorch loop does it: eager, no kernel of ours.

    Shortcuts without parameters are slices, as the usual code for these nets has them.
    """
    data, x, y = images(config, place, channels_last)
    model = place_net(make_model(config, data), place, channels_last).train()
    for module in model.modules():
        if isinstance(module, ShortcutA):
            module.forward = partial(_sliced, module)  # type: ignore[method-assign]
    return plain_step(model, x, y, place, precision)


def _sliced(shortcut: ShortcutA, x: Tensor) -> Tensor:
    step = shortcut.stride
    return F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, shortcut.front, shortcut.back))


def plain_step(model: nn.Module, x: Tensor, y: Tensor, place: torch.device, precision: str) -> Callable[[], None]:
    """Forward, cross-entropy, backward and SGD with momentum of any net."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with evaluation.autocast(place, precision):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        finish(place)

    return step


def evaluation_pass(
    config: dict[str, Any], place: torch.device, precision: str, channels_last: bool
) -> Callable[[], None]:
    """One evaluated batch of the float net."""
    data, x, _ = images(config, place, channels_last)
    model = place_net(make_model(config, data), place, channels_last).eval()

    def act() -> None:
        with torch.no_grad(), evaluation.autocast(place, precision):
            model(x)
        finish(place)

    return act


def trainer(config: dict[str, Any], place: torch.device, precision: str) -> tuple[Trainer, Tensor, Tensor]:
    """The trainer of a run of `config`, calibrated and far on, with a batch; nothing is written."""
    data, x, y = images(config, place)
    config = {**config, "train": {**config["train"], "precision": precision, "epochs": None, "steps": STEPS}}
    config["init"] = "scratch"  # on batch statistics
    net = assemble(config, data, place=place)
    loop = net.trainer()
    net.calibrate(loop)
    loop.begin()
    loop.state.step = loop.state.stage.step = STEPS * 9 // 10
    return loop, x, y


def method_step(config: dict[str, Any], place: torch.device, precision: str) -> Callable[[], None]:
    """A step of the trainer, with everything that the method's hooks do in it."""
    loop, x, y = trainer(config, place, precision)

    def step() -> None:
        loop._step(x, y)
        loop.losses.clear()
        finish(place)

    return step


def trains(config: dict[str, Any]) -> bool:
    """Whether the method trains at all (calibration alone does not)."""
    return bool(config["train"]["steps"] or config["train"]["epochs"])


def forget() -> None:
    """Free the nets of the last measurement."""
    gc.collect()
