"""config -> objects -> trainer -> result.json"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn

from qbench import files, kernels
from qbench.config import options
from qbench.config.recipe import Recipe
from qbench.config.resolve import digest, folder_name, identity, parent_of
from qbench.config.source import code_hash
from qbench.data import DataSet, batches, load
from qbench.errors import UserError
from qbench.figures.report import tell
from qbench.quant.hooks import Distill
from qbench.records import read_result
from qbench.screen import Screen
from qbench.training import checkpoint, device, evaluation, precision, trainer
from qbench.training.build import clear_errors, make_method, make_model, place_net, quantize, seed_of
from qbench.training.outcome import summary, write
from qbench.training.recorder import Recorder

# Float parents that travel with the repository, so that every run starts from the same nets.
COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "results" / "parents"


@dataclass
class Run:
    """One run's place and identity, before anything is computed."""

    config: dict[str, Any]
    data: DataSet
    folder: Path
    key: str
    identity: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.config["method"]["name"])

    def result(self) -> dict[str, Any] | None:
        """The result of the finished run, or None."""
        path = self.folder / "result.json"
        return read_result(path) if path.is_file() else None


def prepare(config: dict[str, Any], data: DataSet | None = None) -> Run:
    """Load the data, decide what was left to `auto`, and name the run's folder."""
    data = load(config["dataset"]) if data is None else data
    options.check_size(config, len(data.train))
    shape, plain = (data.channels, data.size, data.classes), config
    config = precision.decided(config, shape, lambda: make_model(plain, data))
    facts = {k: getattr(data, k) for k in ("name", "checksum", "augment", "mean", "std")}
    if data.preprocess != "standard":
        facts["preprocess"] = data.preprocess
    if data.classes != int(data.train.labels.max()) + 1:  # else the labels say it, and the checksum holds them
        facts["classes"] = data.classes
    init = config["init"]
    if init == "float":
        parent = parent_of(config)
        init = "float " + digest(identity(parent, facts, "scratch"))
    elif init != "scratch":
        init = files.sha256_file(_checkpoint_file(init))
    whole = identity(config, facts, init)
    if config["distill"]["weight"] and not init.startswith("float "):
        whole["teacher"] = digest(identity(parent_of(config), facts, "scratch"))
    key = digest(whole)
    return Run(config, data, Path(config["out"]) / folder_name(config, key), key, whole)


def _checkpoint_file(name: str) -> Path:
    path = Path(name)
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"init={name}: neither 'scratch' nor 'float' nor a checkpoint file or run folder")
    return path


def execute(config: dict[str, Any], screen: Screen | None = None) -> dict[str, Any]:
    """Do the run that `config` (resolved) describes, or say what it came to if it is done; returns its result."""
    screen = screen or Screen()
    device.keep_freed_memory()
    if config["workers"] > 1:
        from qbench.training.parallel import in_workers

        return in_workers(config, config["workers"])
    run = prepare(config)
    for line in precision.told(run.config):
        screen.line(line)
    return _execute(run, screen)


def _execute(run: Run, screen: Screen) -> dict[str, Any]:
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
    _distillation(run.config)
    quantize(run.config, make_model(run.config, run.data), make_method(run.config))


def _distillation(config: dict[str, Any]) -> list[Distill]:
    with clear_errors("distill"):
        return [Distill(**config["distill"])] if config["distill"]["weight"] else []


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Choose another folder with out=DIR.") from error


@contextmanager
def _sole_owner(folder: Path, screen: Screen) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    if evaluation.rank() > 0:
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        screen.line(f"waiting: another process is at work in {folder}")
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}. Choose another folder with out=DIR.") from error
    try:
        yield
    finally:
        lock.release()


def parent_places(parent: Run) -> list[Run]:
    """The float parent where it may lie: with the repository, or where it is trained."""
    return [replace(parent, folder=COMMITTED / parent.folder.name), parent]


def float_parent(run: Run, screen: Screen) -> tuple[Path, dict[str, Any]]:
    """(state file, result) of the float parent: a committed one, one trained before, or one trained now."""
    parent = prepare(parent_of(run.config), run.data)
    for done in parent_places(parent):
        found = done.result()
        if found is not None:
            if not (done.folder / "model.pt").is_file():
                raise UserError(f"{done.folder} has lost its model.pt; move the folder away, and it is trained again")
            screen.line(f"float parent: {done.folder} ({found['accuracy_last']:.2f} %)")
            return done.folder / "model.pt", found
    screen.line(f"float parent: training it once, in {parent.folder}")
    found = _execute(parent, screen)
    return parent.folder / "model.pt", found


def start_weights(run: Run, model: nn.Module, screen: Screen) -> float | None:
    """Load what the run starts from into `model`; returns the float accuracy where it is known."""
    init = run.config["init"]
    if init == "scratch":
        return None
    if init == "float":
        path, result = float_parent(run, screen)
        accuracy = float(result["accuracy_last"])
    else:
        path, accuracy = _checkpoint_file(init), None
        _check_data(path, run)
    for line in checkpoint.load_weights(model, path):
        screen.line(f"  {line}")
    return accuracy


def _check_data(path: Path, run: Run) -> None:
    """Refuse a checkpoint of ours that was trained on other data (its test images may have been training images)."""
    beside = path.parent / "result.json"
    if beside.is_file():
        theirs = json.loads(beside.read_text()).get("identity", {}).get("data", {}).get("checksum")
        if theirs not in (None, run.data.checksum):
            raise UserError(f"{path} was trained on other data than dataset={run.data.name} (or another split of it)")


def _compute(run: Run, screen: Screen) -> dict[str, Any]:
    with ExitStack() as opened:
        return _train(run, screen, opened)


def _train(run: Run, screen: Screen, opened: ExitStack) -> dict[str, Any]:
    config, data, started, code = run.config, run.data, time.monotonic(), code_hash(run.config)
    place = device.pick(config["device"])
    threads = device.set_threads(config["threads"])
    opened.enter_context(kernels.using(_tier(run, place)))
    method, recipe = make_method(config), Recipe(**config["train"])
    model = make_model(config, data)
    accuracy_float = start_weights(run, model, screen)
    place_net(model, place, config["channels_last"])
    tests = {"test": make_batches(run, data.test, place, False)}
    if data.val is not None:
        tests["val"] = make_batches(run, data.val, place, False)
    if config["init"] not in ("scratch", "float"):
        accuracy_float = evaluation.evaluate(model, tests["test"], place, recipe.precision)[1]
    teacher = _teacher(run, screen, place)
    kept = quantize(config, model, method)
    model.to(place)
    writer = evaluation.rank() == 0
    resumed = _resume_step(run.folder)
    recorder = None
    if writer:
        recorder = opened.enter_context(
            closing(Recorder(run.folder, resume_step=resumed, tensorboard=config["tensorboard"]))
        )
    generator = torch.Generator(place).manual_seed(seed_of(config["seed"], f"train {evaluation.rank()}"))
    with clear_errors(f"method={method.name}"):
        loop = trainer.Trainer(
            model,
            method,
            recipe,
            make_batches(run, data.train, place, True),
            tests,
            folder=run.folder,
            recorder=recorder,
            device=place,
            generator=generator,
            screen=screen,
            hooks=_distillation(config),
            teacher=teacher,
            compile=config["compile"],
            graph=config["graph"],
            checkpoint_seconds=config["checkpoint_seconds"],
            phase=f"{method.name} training" if method.name != "float" else "float training",
        )
    if place.type == "cuda" and config["graph"] and loop.eager:
        screen.line(f"graph: off, {loop.eager}")
    before = _calibrated(run, loop, screen)
    earlier = loop.outcome.seconds  # of training, before the run was cut off
    outcome = loop.train() if loop.total else trainer.Outcome(before, before, 0.0)
    if not loop.total:
        loop.take_stock()
    result = summary(run, model, outcome)
    result |= {"float_accuracy": accuracy_float, "accuracy_before_training": before, "threads": threads}
    result |= {"code": code, "device": str(place), "kernels": kernels.tier(), "graph": loop.captured is not None}
    if outcome.seconds > 0:
        result["images_per_s"] = round(loop.total * recipe.batch_size / outcome.seconds)
    result["seconds_total"] = round(earlier + time.monotonic() - started, 1)
    if method.name == "float":
        result["float_accuracy"] = result["accuracy_last"]
    if writer and recorder is not None:
        write(run, model, kept, recorder, result)
        tell(run.folder, result, screen.line)
    if dist.is_initialized():
        dist.barrier()  # the others may want to read what the first worker has just written
    return {**result, "folder": str(run.folder)}


def make_batches(run: Run, split: Any, place: torch.device, train: bool, shared: bool = False) -> Any:
    """Batches of a split; `shared`: every worker sees all of them (calibration)."""
    data, config = run.data, run.config
    recipe = config["train"]
    # evaluation: a GPU is idle for most of a batch of 256 small images; ranges may depend on the calibration's batches
    wide = 2048 if place.type == "cuda" and data.size <= 64 and not shared else 256
    return batches(
        split,
        batch_size=recipe["batch_size"] if train else max(wide, recipe["batch_size"]),
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
        world=1 if shared else evaluation.world(),
    )


def _teacher(run: Run, screen: Screen, place: torch.device) -> nn.Module | None:
    """The float parent in eval mode, where distillation asks for it."""
    if not run.config["distill"]["weight"]:
        return None
    teacher = make_model(run.config, run.data)
    checkpoint.load_weights(teacher, float_parent(run, screen)[0])
    return place_net(teacher, place, run.config["channels_last"]).eval().requires_grad_(False)


def _calibrated(run: Run, loop: trainer.Trainer, screen: Screen) -> float | None:
    """Calibrate, or restore the checkpoint; returns the accuracy before training (None from scratch)."""
    note = run.folder / "before.json"
    scratch = run.config["init"] == "scratch"
    if loop.restore():
        screen.line(f"resumed at step {loop.state.step} of {loop.total}")
        return json.loads(note.read_text())["accuracy_before_training"]  # type: ignore[no-any-return]
    data, recipe, seed = run.data, loop.recipe, run.config["seed"]
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed_of(seed, "calibration")))
    images = make_batches(run, data.train.take(order[: recipe.calibration]), loop.device, False, shared=True)
    checkpoint.seed_all(seed_of(seed, "calibrate"))
    evaluation.calibrate(loop.model, images.epoch(0), loop.device, recipe.precision, scratch)
    for hook in loop.own_hooks():
        hook.after_calibrate(loop.state)
    before = None
    if not scratch:
        before = evaluation.evaluate(loop.model, loop.tests["test"], loop.device, recipe.precision)[1]
        screen.line(f"calibrated only: {before:.2f} %")
    if evaluation.rank() == 0:
        files.atomic_write(note, json.dumps({"accuracy_before_training": before}))
    checkpoint.seed_all(seed_of(seed, f"training {evaluation.rank()}"))
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


def _resume_step(folder: Path) -> int | None:
    path = folder / "checkpoint.pt"
    return int(checkpoint.load(path)["step"]) if path.is_file() else None
