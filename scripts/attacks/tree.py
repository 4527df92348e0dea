"""The small tree that is attacked: finished and unfinished runs, a study, a sweep's notes, data, compiled kernels."""

import gzip
import hashlib
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from attacks.judging import Work
from qbench.bench import command as bench
from qbench.bench.timing import Entry
from qbench.cli import command, sweep
from qbench.cli.overrides import resolve_row
from qbench.config import catalog
from qbench.files import atomic_write
from qbench.kernels import build
from qbench.papers import cards, pages
from qbench.papers.study import Ask, Study, composed
from qbench.records import read_notes, read_result
from qbench.training.recorder import Recorder

PLACES = ("tensorboard=false", "device=cpu", "threads=1")
WORDS = ("model=tiny", "dataset=synthetic", "budget=smoke", *PLACES)
FLOAT = (*WORDS, "method=float", "out=o")
PACT = (*WORDS, "method=pact", "bits=4", "out=o")
UNFINISHED = (
    *(*WORDS, "method=pact", "bits=2", "init=scratch", "out=u"),
    *("train.steps=8", "train.evaluate_every=0.25", "checkpoint_seconds=0"),
)
CARD = {
    **{"title": "Toy", "paper": "Toy", "arxiv": "0000.00000", "where": "Table 1", "source": "Table 1"},
    **{"metric": "accuracy", "report": "last", "tolerance": 0.5, "protocol": ["none"], "figure": {"kind": "curves"}},
    "cost": {"cpu": "seconds", "gpu": "none"},
    "run": "model=tiny dataset=synthetic",
    "rows": [
        {"id": "float", "run": "method=float", "published": 92.0},
        {"id": "pact", "run": "method=pact bits=4", "published": 91.0, "baseline": "float"},
    ],
    "claims": [{"text": "float is best", "order": ["float", "pact"]}],
}
NOTES = "What agrees and what does not: Größe.\nAnd why.\n"
# Stands for a compiler: gives what the real one has built before, in no time.
COMPILER = """#!/bin/sh
out="" last=""
for word; do [ "$last" = -o ] && out=$word; last=$word; done
case "$*" in
  *--version*) echo one that has built before;;
  *-shared*) cp {library} "$out";;
  *) : > "$out";;
esac
"""


def prepare() -> int:
    """Make the tree in the current folder."""
    for words in (FLOAT, PACT):
        if status := command.main(list(words)):
            return status
    _unfinished()
    shutil.copytree("o", "s/o")
    Path("s/r/toy").mkdir(parents=True)
    Path("s/r/toy/notes.md").write_text(NOTES, encoding="utf-8")
    Path("s/toy.yaml").write_text(yaml.safe_dump(CARD, sort_keys=False), encoding="utf-8")
    study()
    own = (catalog.conf_folder() / "method" / "pact.yaml").read_text(encoding="utf-8")
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/own.yaml").write_text(own.replace("name: pact", "name: own"), encoding="utf-8")
    bench.write(Path("b"), [bench_entry("step/pact", 1.5), bench_entry("data/augment", 0.5)])
    _sweep_notes()
    _images()
    state = torch.load(sorted(Path("o").glob("float-*/model.pt"))[0], weights_only=True)
    torch.save(state, "plain.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, "plain.safetensors")
    return 0


def compiled(home: Path) -> bool:
    """Build the kernels once, and let what follows find a compiler that gives them; false where there is none."""
    try:
        library = build.library()._name
    except build.CannotBuild:
        return False
    script = home / "c++"
    script.write_text(COMPILER.format(library=library), encoding="utf-8")
    script.chmod(0o755)
    os.environ["CXX"] = str(script)
    return True


def _unfinished() -> None:
    """A run that was cut off at its sixth step, after the checkpoint of the fifth."""
    whole = Recorder.scalars

    def cut_off(self: Recorder, step: int, *rest: Any, **values: Any) -> None:
        if step >= 6:
            raise KeyboardInterrupt
        whole(self, step, *rest, **values)

    Recorder.scalars = cut_off  # type: ignore[method-assign]
    command.main(list(UNFINISHED))
    Recorder.scalars = whole  # type: ignore[method-assign]


def study() -> int:
    """The page of the study in s/, made of what is kept and of the runs beside it; what is kept is written."""
    card = cards.read(Path("s/toy.yaml"))
    asked = Study(card, Ask(budget="smoke", out="s/o", results=Path("s/r"), draw=True, places=PLACES), resolve_row)
    asked.collect(card.runs)
    print(pages.page(card, asked.kept, composed(resolve_row), read_notes(asked.folder)))
    atomic_write(asked.folder / "results.json", asked.kept.text())
    return 0


def study_run() -> int:
    """The same card run from the start, into s/n and s/q."""
    card = cards.read(Path("s/toy.yaml"))
    places = (*PLACES, "checkpoint_seconds=0")
    return Study(card, Ask(budget="smoke", out="s/n", results=Path("s/q"), places=places), resolve_row).do(card.runs)


def bench_entry(name: str, ratio: float) -> dict[str, Any]:
    facts = {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2", "python": "3"}
    made = Entry(name, "fp32/torch", ratio, "the base", ratio / 10, 0.1, 99.0, "tiny", 8, 5, {"w_bits": 4, "a_bits": 4})
    return {**made.plain(), "machine": facts}


def _sweep_notes() -> None:
    """n/: the folder of a sweep, as its runs have left it."""
    table = sweep.table

    def kept(folder: Path) -> int:
        shutil.copytree(folder, "n")
        return table(folder)

    sweep.table = kept
    command.main(["-m", *WORDS, "method=pact", "bits=4,8", "init=scratch", "out=o2"])
    sweep.table = table


def _images() -> None:
    """d/: a folder and a zip of images in class folders, MNIST's files plain and packed."""
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = Path("d/images") / split / name
            folder.mkdir(parents=True)
            for number in range(16):
                Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    with zipfile.ZipFile("d/images.zip", "w") as archive:
        for path in sorted(Path("d/images").rglob("*.png")):
            archive.write(path, path.relative_to("d/images"))
    for place, packed in (("d/MNIST/raw", False), ("d/p/MNIST/raw", True)):
        Path(place).mkdir(parents=True)
        for part, count in (("train", 40), ("t10k", 20)):
            pixels = chance.integers(0, 256, (count, 28, 28), np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
                sizes = struct.pack(f">{array.ndim}I", *array.shape)
                data = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
                name = f"{place}/{part}-{kind}-ubyte"
                Path(name + ".gz" * packed).write_bytes(gzip.compress(data, mtime=0) if packed else data)


def ended(*words: str) -> Work:
    """The run that `words` name, and what it ends with: its weights, and all that was recorded."""

    def run() -> int:
        os.environ["QBENCH_KERNELS"] = str(Path("kernels").absolute())
        status = command.main(list(words))
        out = next(w for w in words if w.startswith("out=")).removeprefix("out=")
        print(end_of(Path(out)) if status == 0 else "")
        return status

    return run


def end_of(out: Path) -> str:
    """What the runs below `out` came to, bit for bit."""
    told = []
    for path in sorted(out.rglob("result.json")):
        result = read_result(path)
        metrics = hashlib.sha256((path.parent / "metrics.jsonl").read_bytes()).hexdigest()
        told.append(f"{path.parent.name} {result['accuracy_last']} {result['weights_sha256']} {metrics}")
    return "\n".join(told)


def digest_of(state: Mapping[str, Any]) -> str:
    """Over names, values and whatever else is in a state_dict."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} ".encode())
        sha.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return sha.hexdigest()


def in_child(work: Callable[..., int], *arguments: Any) -> Work:
    return lambda: work(*arguments)
