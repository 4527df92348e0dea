"""What surrounds the steps: data, checkpoints and records, the start of the program, a sweep, bf16's accuracy."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image

from qbench.bench.setting import Setting, stock_step, trainer
from qbench.bench.timing import Act, Entry, alternate, ratio
from qbench.data import Batches, Split, Stream, StreamBatches
from qbench.data.images import decode, decode_all
from qbench.errors import UserError
from qbench.records import read_result
from qbench.training import device
from qbench.training.recorder import Recorder
from qbench.training.trainer import LOGS_PER_EPOCH

CIFAR_STEPS = 390  # full batches of 128 in an epoch of 50,000
DIGITS = (
    "hydra/launcher=joblib",
    "dataset=digits",
    "seed=0,1,2",
    "train.epochs=10",
    "parent.epochs=10",
    "tensorboard=false",
)
# Runs the command line up to the first training step.
FIRST_STEP = """
import os, sys
from qbench.cli import command
import qbench.training.trainer
qbench.training.trainer.Trainer._step = lambda self, x, y: os._exit(0)
command.main(sys.argv[1:])
sys.exit(1)
"""


def augment(s: Setting) -> Iterator[Entry]:
    """Augmented, normalized images/s from the resident tensor; ratio: the share of a bf16 float step."""
    count = 5_000 if s.quick else 50_000
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    three = (0.5, 0.5, 0.5)
    batches = Batches(
        Split(pixels, torch.zeros(count, dtype=torch.long)),
        batch_size=s.batch,
        mean=three,
        std=three,
        augment="crop_flip",
        device=s.place(),
    )

    def epoch() -> float:
        start = time.perf_counter()
        for _ in batches.epoch(0):
            pass
        return (time.perf_counter() - start) / len(batches)

    base = stock_step(s.config("float", s.models[0]), s.place(), "bf16")
    times = alternate({"base": base, "own": epoch}, s.rounds)
    yield _against("data/augment", "resident", times, s, "stock bf16 float step", images=s.batch)


def _against(name: str, mode: str, times: dict[str, list[float]], s: Setting, of: str, images: int = 0) -> Entry:
    own, base = times["own"], times["base"]
    took = median(own)
    speed = images / took if images else None
    return Entry(name, mode, ratio(own, base), of, took, median(base), speed, s.models[0], s.batch, len(own))


def decoding(s: Setting) -> Iterator[Entry]:
    """The first use of a folder of images: decoded by as many processes as there are cores, or by one."""
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        names = _pictures(Path(folder), 8_000, 32)
        acts: dict[str, Act] = {
            "own": lambda: decode_all(Path(folder), names, None, 3),
            "base": lambda: decode(Path(folder), names, None, 3),
        }
        times = alternate(acts, min(3, s.rounds), warm=1)
    yield _against("data/decode", "processes", times, s, "decoding in one process", images=len(names))


def streaming(s: Setting) -> Iterator[Entry]:
    """ImageNet's path: pictures of 500 x 375 pixels decoded, cropped and resized to 224 by worker processes."""
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        names = _pictures(Path(folder), 768, 375)
        stream = Stream(tuple(str(Path(folder) / n) for n in names), torch.zeros(len(names), dtype=torch.long), 224, "")
        three = (0.5, 0.5, 0.5)

        def loader(workers: int | None) -> Act:
            options: dict[str, Any] = {"batch_size": 32, "mean": three, "std": three, "augment": "resized_crop_flip"}
            batches = StreamBatches(stream, **options, workers=workers)
            return lambda: [None for _ in batches.epoch(0)] and None

        times = alternate({"own": loader(None), "base": loader(0)}, min(3, s.rounds), warm=1)
    yield _against("data/stream", "workers", times, s, "decoding in the training process", images=len(names))


def _pictures(folder: Path, count: int, height: int) -> list[str]:
    """Names of `count` JPEG files in `folder`: few different ones, as only their size matters."""
    random = np.random.default_rng(0)
    width = height if height < 100 else height * 4 // 3
    made = []
    for i in range(8):
        coarse = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        made.append((folder / f"{i}.jpg").read_bytes())
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(made[i % 8])
    return names


def records(s: Setting) -> Iterator[Entry]:
    """A checkpoint, a log line and the histograms of PACT's net, as shares of the training that they interrupt."""
    config, place = s.config("pact", s.models[0]), s.place()
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        loop, x, y = trainer(config, place, "bf16")
        loop.folder = Path(folder)
        loop.recorder = Recorder(Path(folder), tensorboard=True)
        losses = [torch.zeros(()) for _ in range(CIFAR_STEPS // LOGS_PER_EPOCH)]

        def log() -> None:
            loop.losses = list(losses)
            loop._log()

        def step() -> None:
            loop._step(x, y)
            loop.losses.clear()

        acts: dict[str, Act] = {"step": step, "checkpoint": loop.save, "log": log, "histograms": loop.take_stock}
        times = alternate(acts, s.rounds)
        loop.recorder.close()
    epoch = [t * CIFAR_STEPS for t in times["step"]]
    minute = [float(config["checkpoint_seconds"])] * s.rounds
    logs = [t * LOGS_PER_EPOCH for t in times["log"]]
    shares = {
        "cost/checkpoint": (times["checkpoint"], minute, "the time between two checkpoints (checkpoint_seconds)"),
        "cost/log": (logs, epoch, "an epoch of CIFAR-10: its ten log lines"),
        "cost/histograms": (times["histograms"], epoch, "an epoch of CIFAR-10: its histograms"),
    }
    for name, (own, base, of) in shares.items():
        yield _against(name, "bf16", {"own": own, "base": base}, s, of)


def start(s: Setting) -> Iterator[Entry]:
    """How long the program takes to answer, and a run to take its first step, as processes of their own."""
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        first = ["-c", FIRST_STEP, "method=pact", "bits=4", "init=scratch", f"out={folder}/o"]
        words = {"base": ["-c", "import torch"], "help": ["-m", "qbench", "--help"], "list": ["-m", "qbench", "list"]}
        if not s.quick:
            words["run"] = first
        acts: dict[str, Act] = {name: _process(line) for name, line in words.items()}
        times = alternate(acts, 3, warm=1)
    for name in words:
        if name != "base":
            pair = {"own": times[name], "base": times["base"]}
            yield _against(f"start/{name}", "process", pair, s, "a process that imports torch")


def _process(words: list[str]) -> Act:
    """An act that runs Python with `words`; errors: UserError with what it said."""

    def act() -> None:
        done = subprocess.run([sys.executable, *words], capture_output=True, encoding="utf-8", env=_environment())
        if done.returncode:
            raise UserError(f"{' '.join(words[-4:])} ended with {done.returncode}: {done.stderr[-500:]}")

    return act


def _environment() -> dict[str, str]:
    """The environment of a child: this package is found, and nothing of this process's threads is handed on."""
    root = str(Path(__file__).resolve().parents[2])
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def _results(words: list[str], out: str) -> tuple[float, list[dict[str, Any]]]:
    """(seconds, results) of a sweep that writes to `out`."""
    began = time.perf_counter()
    _process(["-m", "qbench", "-m", *words, f"out={out}"])()
    took = time.perf_counter() - began
    return took, [read_result(path) for path in sorted(Path(out).rglob("result.json"))]


def sweep(s: Setting) -> Iterator[Entry]:
    """Twelve runs and their two float parents side by side, against what their training alone takes.

    A run's own seconds are those of its training loop (steps, evaluations, records) while others run beside it, so that
    what the processes cost each other is in them: over the workers they are the seconds of the runs one by one, divided
    by what running them in parallel gains. Start, parents' hand-over, calibration, pictures and idle ends are not.
    """
    words = ["hydra/launcher=joblib", "method=pact,lsq,dorefa", "bits=2,4", "seed=0,1"]
    words += ["model=tiny", "dataset=digits", "train.epochs=150"]
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        wall, found = _results(words, f"{folder}/o")
    workers = device.cores()
    training = sum(r["seconds"] for r in found) / workers
    yield Entry(
        "sweep/12",
        "joblib",
        wall / training,
        "the sum of the runs' own training seconds over the workers",
        wall,
        training,
        values={"runs": len(found), "workers": workers, "threads": max(r["threads"] for r in found)},
    )


def bf16(s: Setting) -> Iterator[Entry]:
    """The accuracy of float ResNet-20 on the digits, trained in fp32 and in bf16, three seeds each."""
    words = [*DIGITS, "method=float", "precision=fp32,bf16", "model=resnet20"]
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        found = _results(words, f"{folder}/o")[1]
    of = {p: [r for r in found if r["precision"] == p] for p in ("fp32", "bf16")}
    for p, runs in of.items():
        yield _accuracy("accuracy/digits", p, runs, of["fp32"], "the mean accuracy in fp32", "resnet20")


def kernels(s: Setting) -> Iterator[Entry]:
    """The accuracy of ResNet-8 on the digits, trained through the kernels and through the reference, three seeds."""
    both = [*DIGITS, "kernels=auto,torch", "model=resnet20", "model.depth=8"]
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        for words in (["method=pact,bireal"], ["method=lsq", "bits=2"]):
            found = _results([*both, *words], f"{folder}/o")[1]
    found = [r for r in found if r["method"] != "float"]
    for method in sorted({r["method"] for r in found}):
        own = [r for r in found if r["method"] == method]
        reference = [r for r in own if r["kernels"] == "torch"]
        compiled = [r for r in own if r["kernels"] != "torch"]
        if compiled:  # else there are no kernels here
            mode = f"{method} {own[0]['w_bits']:g}/{own[0]['a_bits']:g}"
            yield _accuracy(
                "accuracy/kernels", mode, compiled, reference, "the mean accuracy with kernels=torch", "resnet8"
            )


def _accuracy(
    name: str, mode: str, own: list[dict[str, Any]], base: list[dict[str, Any]], of: str, model: str
) -> Entry:
    """The runs `own` against the runs `base`: means, and standard deviations over the seeds."""
    found, expected = ([float(r["accuracy_last"]) for r in runs] for runs in (own, base))
    values = {"mean": mean(found), "std": stdev(found), "accuracies": found}
    values |= {"base_mean": mean(expected), "base_std": stdev(expected), "base_accuracies": expected}
    seconds, base_seconds = (median(r["seconds"] for r in runs) for runs in (own, base))
    share = mean(found) / mean(expected)
    return Entry(name, mode, share, of, seconds, base_seconds, model=model, rounds=len(found), values=values)
