"""Do a run: its float parent, calibration, training, and what it leaves."""

import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qbench import files, kernels
from qbench.config.identity import parent_of
from qbench.config.source import code_hash
from qbench.errors import UserError
from qbench.figures import pictures
from qbench.figures.report import tell
from qbench.records import BEFORE, RESULT, read_before, read_result, sealed, trained
from qbench.screen import Screen
from qbench.training import checkpoint, device, evaluation, home, precision, trainer
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
from qbench.training.finished import rebuild
from qbench.training.outcome import summary, write
from qbench.training.parallel import in_workers
from qbench.training.recorder import Recorder
from qbench.training.run import Run, parent_places, prepare, start_from_file
from qbench.training.telemetry import record_activations


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
    """Compute a run, or say that it is done; as one process of `workers` too.

    With `force` a finished run is computed anew, in a folder beside its own whose place it takes when it is finished.
    """
    _tidy(run, screen)
    found, force = run.result(), run.config["force"]
    if found is None or force:
        _try(run)
        home.make(run.folder)
        with home.sole_owner(run.folder, screen):
            now = run.result()
            if now is None:
                return _told(run, _compute(run, screen), screen)
            if force and now == found:  # else another process has just computed it
                return _anew(run, screen)
            found = now
    screen.line(f"done before: {run.folder}")
    for line in _differences(found, run.config):
        screen.line(f"  note: {line}")
    if evaluation.rank() == 0:
        pictures.complete(run.folder, found, run.config["figures"])
    return {**found, "reused": True, "folder": str(run.folder)}


def _tidy(run: Run, screen: Screen) -> None:
    """Finish what a kill has cut short: a result that is not in its place yet, or files left of a finished run."""
    waiting = home.beside(run).result() is not None
    if evaluation.rank() == 0 and (waiting or (home.left_over(run.folder) and run.result() is not None)):
        home.make(run.folder)
        with home.sole_owner(run.folder, screen):
            home.take_place(run, screen)
            if run.result() is not None:
                home.clean(run.folder)
    if dist.is_initialized():
        dist.barrier()  # the others look there next


def _anew(run: Run, screen: Screen) -> dict[str, Any]:
    anew = home.beside(run)
    home.make(anew.folder)
    screen.line(f"computing anew, in {anew.folder}; the finished run stays in its place until then")
    result = _compute(anew, screen)
    if evaluation.rank() == 0:
        home.take_place(run, screen)
    return _told(run, result, screen)


def _told(run: Run, result: dict[str, Any], screen: Screen) -> dict[str, Any]:
    if evaluation.rank() == 0:
        tell(run.folder, result, screen.line)
    return {**result, "folder": str(run.folder)}


def _differences(found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """In what this process is not the one that made a result."""
    lines = []
    if found.get("code") != code_hash(config):
        lines.append(f"that result was made by other code (qbench {found.get('version')}); force=true computes it anew")
    here: dict[str, Any] = {"torch": torch.__version__}
    if found.get("device") == "cpu":
        here["threads"] = device.threads(config["threads"])
    made = [f"{k} {found[k]} (here {v})" for k, v in here.items() if found.get(k, v) != v]
    if made:
        lines.append(f"that result was made with {' and '.join(made)}: here the last digits may be others")
    return lines


def _try(run: Run) -> None:
    """Build all that has options once: a wrong one shows before there is a folder, and before the parent is trained."""
    device.pick(run.config["device"])
    distillation(run.config)
    model = make_model(run.config, run.data)
    start_from_file(run, model, Screen(quiet=True))
    quantize(run.config, model, make_method(run.config))


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
    path = run.folder / home.CHECKPOINT
    kept = checkpoint.load_unfinished(path) if path.is_file() else None
    with ExitStack() as opened:
        return _train(run, kept, screen, opened)


def _train(run: Run, kept: Any, screen: Screen, opened: ExitStack) -> dict[str, Any]:
    """kept: the checkpoint of a run that was cut off."""
    config, started, code = run.config, time.monotonic(), code_hash(run.config)
    place = device.pick(config["device"])
    opened.enter_context(kernels.using(_tier(run, kept, place)))
    found: list[float | None] = []
    net = assemble(config, run.data, lambda model: found.append(start_weights(run, model, place, screen)), place)
    made = {"code": code, "torch": str(torch.__version__), "threads": torch.get_num_threads(), "device": str(place)}
    recorder = _recorder(run, kept, opened) if evaluation.rank() == 0 else None
    loop = net.trainer(run.folder, recorder, screen, teacher=_teacher(run, screen, place))
    if place.type == "cuda" and config["graph"] and loop.eager:
        screen.line(f"graph: off, {loop.eager}")
    before = _calibrated(run, net, loop, kept, screen)
    for line in checkpoint.made_by(loop.makers, loop.state.step, made):
        screen.line(f"  note: {line}")
    earlier = loop.outcome.seconds  # of training, before the run was cut off
    outcome = trainer.Outcome(before, before, 0.0) if loop.idle else loop.train()
    if loop.idle:
        loop.take_stock()
    _check_finite(net)
    result = summary(run, net.model, outcome)
    result |= {"float_accuracy": found[0], "accuracy_before_training": before, **made}
    result |= {"kernels": kernels.tier(), "graph": loop.captured is not None}
    if len(loop.makers) > 1:
        result["resumed"] = loop.makers
    if outcome.seconds > 0 and loop.total:
        result["images_per_s"] = round(loop.total * loop.recipe.batch_size / outcome.seconds)
    result["seconds_total"] = round(earlier + time.monotonic() - started, 1)
    if net.method.name == "float":
        result["float_accuracy"] = result["accuracy_last"]
    if recorder is not None:
        record_activations(net.model, loop.state, recorder)
        write(run, net.model, net.kept, recorder, result)
    if dist.is_initialized():
        dist.barrier()  # the others may want to read what the first worker has just written
    return result


def _recorder(run: Run, kept: Any, opened: ExitStack) -> Recorder:
    options: dict[str, Any] = {}
    if isinstance(kept, dict):
        options = {f"resume_{k}": kept.get(k) for k in ("step", "records")}
        options["resume_sha256"] = kept.get("records_sha256")
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
    """The teacher where distillation asks for one: frozen and in eval mode, or to be trained beside the student.

    Errors: UserError where it was trained on other data, or gives other classes.
    """
    given = run.config["distill"]
    if not given["weight"]:
        return None
    path = Path(given["teacher"]).expanduser() if given.get("teacher") else None
    if path is not None and path.is_dir():
        theirs, ours = read_result(path / RESULT)["identity"]["data"], run.identity["data"]
        for key in (
            "checksum",
            "mean",
            "std",
            "preprocess",
        ):  # of another split it may know our test images
            if list(theirs.get(key) or ()) != list(ours.get(key) or ()):
                raise UserError(f"distill.teacher={path} was trained on other data than this run has ({key} differs)")
        teacher = rebuild(path)
    else:
        teacher = make_model({**run.config, "model": given.get("model") or run.config["model"]}, run.data)
        if path is not None:
            for line in checkpoint.load_weights(teacher, path):
                screen.line(f"  {line}")
        elif not given.get("joint"):
            checkpoint.load_weights(teacher, float_parent(run, screen)[0])
    place_net(teacher, place, run.config["channels_last"])
    return teacher if given.get("joint") else teacher.eval().requires_grad_(False)


def _calibrated(run: Run, net: Assembly, loop: trainer.Trainer, kept: Any, screen: Screen) -> float | None:
    """Calibrate, or restore the checkpoint; returns the accuracy before training (None from scratch)."""
    if kept is not None:
        loop.restore(kept)
        screen.line(f"resumed {loop.where()}")
        return read_before(run.folder)
    net.calibrate(loop)
    before = None
    if run.config["init"] != "scratch":
        before = evaluation.evaluate(net.model, net.tests["test"], net.place, trainer.REPORTED)[1]
        screen.line(f"calibrated only: {before:.2f} %")
    if evaluation.rank() == 0:
        files.atomic_write(run.folder / BEFORE, json.dumps(sealed({"accuracy_before_training": before})))
    checkpoint.seed_all(seed_of(run.config["seed"], f"training {evaluation.rank()}"))
    return before


def _tier(run: Run, kept: Any, place: torch.device) -> str:
    """The kernels to use: those the run began with, where it left them open; none where there are none.

    A GPU has those of torch.compile, whatever the CPU's are called for.
    """
    if run.config["compile"]:
        return "torch"
    if place.type != "cpu":
        return "torch" if run.config["kernels"] == "torch" else "compile"
    begun = kept.get("kernels", "auto") if isinstance(kept, dict) else "auto"
    return str(begun if run.config["kernels"] == "auto" else run.config["kernels"])
