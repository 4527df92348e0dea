"""Do a run: its float parent, calibration, training, and what it leaves."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qbench import files, kernels
from qbench.config.identity import parent_of
from qbench.config.source import code_hash
from qbench.errors import UserError
from qbench.figures.report import tell
from qbench.records import read_before, sealed, trained
from qbench.screen import Screen
from qbench.training import checkpoint, device, evaluation, precision, trainer
from qbench.training.build import (
    Assembly,
    assemble,
    distillation,
    make_batches,
    make_method,
    make_model,
    place_net,
    quantize,
    seed_of,
)
from qbench.training.outcome import summary, write
from qbench.training.parallel import in_workers
from qbench.training.recorder import Recorder
from qbench.training.run import Run, parent_places, prepare, start_from_file


def execute(config: dict[str, Any], screen: Screen | None = None) -> dict[str, Any]:
    """Do the run that `config` (resolved) describes, or say what it came to if it is done; returns its result."""
    screen = screen or Screen()
    device.keep_freed_memory()
    if config["workers"] > 1:
        prepare(config)  # decode and check the data once, before the workers want them
        return in_workers(config, config["workers"], perform)
    run = prepare(config)
    for line in precision.told(run.config):
        screen.line(line)
    return perform(run, screen)


def perform(run: Run, screen: Screen) -> dict[str, Any]:
    """Compute a run, or say that it is done; as one process of `workers` too."""
    found = run.result()
    if found is None:
        _try(run)
        _make_folder(run.folder)
        with _sole_owner(run.folder, screen):
            found = run.result()
            if found is None:
                return _compute(run, screen)
    screen.line(f"done before: {run.folder}")
    if found.get("code") != code_hash(run.config):
        screen.line(
            f"  note: that result was made by other code (qbench {found.get('version')}); "
            "move the folder away to compute it afresh"
        )
    return {**found, "reused": True, "folder": str(run.folder)}


def _try(run: Run) -> None:
    """Build all that has options once: a wrong one shows before there is a folder, and before the parent is trained."""
    device.pick(run.config["device"])
    device.set_threads(run.config["threads"])
    distillation(run.config)
    model = make_model(run.config, run.data)
    start_from_file(run, model, Screen(quiet=True))
    quantize(run.config, model, make_method(run.config))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Choose another folder with out=DIR.") from error


@contextmanager
def _sole_owner(folder: Path, screen: Screen) -> Iterator[None]:
    """Hold the folder's lock."""
    if evaluation.rank() > 0:
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(
                files.locked(folder / ".lock", lambda: screen.line(f"waiting: another process is at work in {folder}"))
            )
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}. Choose another folder with out=DIR.") from error
        yield


def float_parent(run: Run, screen: Screen) -> tuple[Path, dict[str, Any]]:
    """(state file, result) of the float parent: a committed one, one trained before, or one trained now."""
    parent = prepare(parent_of(run.config), run.data)
    for done in parent_places(parent):
        found = done.result()
        if found is not None:
            if not (done.folder / "model.pt").is_file():
                raise UserError(f"{done.folder} has lost its model.pt; move the folder away, and it is trained again")
            screen.line(f"float parent: {done.folder} ({trained(found, done.folder)['accuracy_last']:.2f} %)")
            return done.folder / "model.pt", found
    screen.line(f"float parent: training it once, in {parent.folder}")
    found = trained(perform(parent, screen), parent.folder)
    return parent.folder / "model.pt", found


def start_weights(run: Run, model: nn.Module, place: torch.device, screen: Screen) -> float | None:
    """Load what the run starts from into `model`; returns the float accuracy where there is one."""
    if run.config["init"] == "float":
        path, result = float_parent(run, screen)
        checkpoint.load_weights(model, path)
        return float(result["accuracy_last"])
    if start_from_file(run, model, screen) is None:
        return None
    place_net(model, place, run.config["channels_last"])
    test = make_batches(run.config, run.data, run.data.test, place, False)
    accuracy = evaluation.evaluate(model, test, place, trainer.REPORTED)[1]
    screen.line(f"start: {run.config['init']} ({accuracy:.2f} % in float)")
    return accuracy


def _compute(run: Run, screen: Screen) -> dict[str, Any]:
    with ExitStack() as opened:
        return _train(run, screen, opened)


def _train(run: Run, screen: Screen, opened: ExitStack) -> dict[str, Any]:
    config, started, code = run.config, time.monotonic(), code_hash(run.config)
    place = device.pick(config["device"])
    opened.enter_context(kernels.using(_tier(run, place)))
    found: list[float | None] = []
    net = assemble(config, run.data, lambda model: found.append(start_weights(run, model, place, screen)), place)
    threads = device.set_threads(config["threads"])
    recorder = _recorder(run, opened) if evaluation.rank() == 0 else None
    loop = net.trainer(run.folder, recorder, screen, teacher=_teacher(run, screen, place))
    if place.type == "cuda" and config["graph"] and loop.eager:
        screen.line(f"graph: off, {loop.eager}")
    before = _calibrated(run, net, loop, screen)
    earlier = loop.outcome.seconds  # of training, before the run was cut off
    outcome = trainer.Outcome(before, before, 0.0) if loop.idle else loop.train()
    if loop.idle:
        loop.take_stock()
    _check_finite(net)
    result = summary(run, net.model, outcome)
    result |= {"float_accuracy": found[0], "accuracy_before_training": before, "threads": threads}
    result |= {"code": code, "device": str(place), "kernels": kernels.tier(), "graph": loop.captured is not None}
    if outcome.seconds > 0 and loop.total:
        result["images_per_s"] = round(loop.total * loop.recipe.batch_size / outcome.seconds)
    result["seconds_total"] = round(earlier + time.monotonic() - started, 1)
    if net.method.name == "float":
        result["float_accuracy"] = result["accuracy_last"]
    if recorder is not None:
        write(run, net.model, net.kept, recorder, result)
        tell(run.folder, result, screen.line)
    if dist.is_initialized():
        dist.barrier()  # the others may want to read what the first worker has just written
    return {**result, "folder": str(run.folder)}


def _recorder(run: Run, opened: ExitStack) -> Recorder:
    path = run.folder / "checkpoint.pt"
    kept = checkpoint.load(path) if path.is_file() else {}
    options = {f"resume_{k}": kept.get(k) for k in ("step", "records")} | {"resume_sha256": kept.get("records_sha256")}
    return opened.enter_context(closing(Recorder(run.folder, tensorboard=run.config["tensorboard"], **options)))


def _check_finite(net: Assembly) -> None:
    """Errors: UserError that names the first tensor of the net that is not finite."""
    for name, value in net.model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            strange = value[~value.isfinite()][0].item()
            raise UserError(
                f"the net of method={net.method.name} is not finite: {name} holds {strange}. "
                "Try a lower train.lr, train.clip_grad=1, or train.precision=fp32."
            )


def _teacher(run: Run, screen: Screen, place: torch.device) -> nn.Module | None:
    """The float parent in eval mode, where distillation asks for it."""
    if not run.config["distill"]["weight"]:
        return None
    teacher = make_model(run.config, run.data)
    checkpoint.load_weights(teacher, float_parent(run, screen)[0])
    return place_net(teacher, place, run.config["channels_last"]).eval().requires_grad_(False)


def _calibrated(run: Run, net: Assembly, loop: trainer.Trainer, screen: Screen) -> float | None:
    """Calibrate, or restore the checkpoint; returns the accuracy before training (None from scratch)."""
    note = run.folder / "before.json"
    if loop.restore():
        screen.line(f"resumed {loop.where()}")
        return read_before(run.folder)
    net.calibrate(loop)
    before = None
    if run.config["init"] != "scratch":
        before = evaluation.evaluate(net.model, net.tests["test"], net.place, trainer.REPORTED)[1]
        screen.line(f"calibrated only: {before:.2f} %")
    if evaluation.rank() == 0:
        files.atomic_write(note, json.dumps(sealed({"accuracy_before_training": before})))
    checkpoint.seed_all(seed_of(run.config["seed"], f"training {evaluation.rank()}"))
    return before


def _tier(run: Run, place: torch.device) -> str:
    """The kernels to use: those the run began with, where it left them open; none where there are none.

    A GPU has those of torch.compile, whatever the CPU's are called for.
    """
    if run.config["compile"]:
        return "torch"
    if place.type != "cpu":
        return "torch" if run.config["kernels"] == "torch" else "compile"
    path = run.folder / "checkpoint.pt"
    if run.config["kernels"] != "auto" or not path.is_file():
        return str(run.config["kernels"])
    return str(checkpoint.load(path).get("kernels", "auto"))
