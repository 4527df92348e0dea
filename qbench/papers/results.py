"""results.json of a card: what its runs came to, small enough to be committed. No torch here.

A run is known by its key, which names everything that decides its numbers; the same run may be a row of several cards.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from qbench.config.identity import digest, identity, needs_parent, parent_of
from qbench.papers.cards import Card, Row
from qbench.records import (
    COUNTS,
    DATA,
    RESULT,
    leaving_out,
    read_config,
    read_json,
    read_metrics,
    read_result,
    sealed,
)
from qbench.shapes import NUMBER, OPEN, Each

RESULTS = "results.json"
# What of a data set decides its images, beside the name and its augmentation; the last four: of the synthetic one.
DRAWN = ("val", "val_seed", "train_examples", "test_examples", "train_size", "test_size", "seed", "noise")
BUDGETS = ("paper", "short", "demo", "smoke")
# What of a run's result.json is kept: no folder, no host.
KEPT = (
    "accuracy_last",
    "accuracy_best",
    "accuracy_at_best_val",
    "epoch_best",
    "accuracy_before_training",
    "float_accuracy",
    "w_bits",
    "a_bits",
    "w_bits_learned",
    "a_bits_learned",
    "bits_per_weight",
    "bytes",
    "epochs",
    "precision",
    "seconds",
    "threads",
    "device",
    "code",
    "version",
    "torch",
    "weights_sha256",
)
ENTRY: dict[str, Any] = {
    **dict.fromkeys(("row", "budget", "key"), str),
    "seed": int,
    "earlier": bool,
    "data": DATA,
    "split": dict,
    **dict.fromkeys(("w_bits", "a_bits", "bits_per_weight", "bytes", "seconds"), NUMBER),
    **dict.fromkeys(("w_bits_learned?", "a_bits_learned?"), NUMBER),
    **dict.fromkeys((f"{k}?" for k in KEPT if k.startswith(("accuracy", "float", "epoch"))), OPEN),
    **dict.fromkeys(("precision?", "device?", "code?", "version?", "torch?", "weights_sha256?"), str),
    "threads?": int,
    "course?": Each([OPEN]),
    "histogram?": COUNTS,
}
SHAPE = {"runs": [ENTRY], "failed": Each(str)}


@dataclass
class Kept:
    """What a results.json holds: entries, one per run, and the errors of runs that failed, by row, seed and budget."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; it takes the place of one of the same row, seed, budget and key, and of a failure."""
        self.entries = [e for e in self.entries if _run(e) != _run(entry)] + [entry]
        self.note(entry["row"], entry["seed"], entry["budget"], None)

    def merge(self, other: "Kept") -> None:
        """Take over what `other` has and this has not: another study may have written since."""
        here = {_run(e) for e in self.entries}
        self.entries = [e for e in other.entries if _run(e) not in here] + self.entries
        done = {_attempt(e["row"], e["seed"], e["budget"]) for e in self.entries if not e["earlier"]}
        self.failed = {k: v for k, v in {**other.failed, **self.failed}.items() if k not in done}

    def note(self, row: str, seed: int, budget: str, error: str | None) -> None:
        """Note how the last attempt of a run ended."""
        self.failed.pop(_attempt(row, seed, budget), None)
        if error is not None:
            self.failed[_attempt(row, seed, budget)] = error

    def text(self) -> str:
        """The JSON, one line per run, in an order that does not depend on the order of the runs."""
        order = sorted(self.entries, key=lambda e: (e["budget"], e["row"], e["seed"], not e["earlier"]))
        lines = ",\n".join("  " + json.dumps(e, sort_keys=True) for e in order)
        failed = json.dumps(self.failed, sort_keys=True, indent=1)
        checksum = sealed({"runs": order, "failed": self.failed})["checksum"]
        return f'{{"runs": [\n{lines}\n],\n"failed": {failed},\n"checksum": "{checksum}"}}\n'

    def of(self, row: Row, budget: str) -> list[dict[str, Any]]:
        """The newest entry of each seed, by seed; one that fits today's configuration before one that does not."""
        newest: dict[int, dict[str, Any]] = {}
        for e in sorted(self.entries, key=lambda e: not e["earlier"]):
            if (e["row"], e["budget"]) == (row.id, budget):
                newest[e["seed"]] = e
        return [newest[s] for s in sorted(newest)]

    def budgets(self) -> list[str]:
        """The budgets in which anything was tried, the paper's first."""
        tried = {e["budget"] for e in self.entries} | {name.rpartition(" ")[2] for name in self.failed}
        return [b for b in BUDGETS if b in tried]


def _run(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[k] for k in ("row", "seed", "budget", "key"))


def _attempt(row: str, seed: int, budget: str) -> str:
    return f"{row}, seed {seed}, budget {budget}"


def read(folder: Path) -> Kept:
    """The results.json in `folder`, or nothing.

    Errors: UserError naming file and field. Two versions that were merged by hand have no checksum in common: without
    its line, entries are checked by their shape alone, and the next study that writes there seals them again.
    """
    path = folder / RESULTS
    if not path.exists():
        return Kept()
    content = read_json(
        path,
        SHAPE,
        "restore it or move it away, and if two versions were merged by hand, delete its line 'checksum'",
    )
    return Kept(content["runs"], content["failed"])


def progress(card: Card, run: Path) -> dict[str, Any]:
    """What is kept of a run's metrics.jsonl: `course`, and the last histogram of the layer that the figure shows.

    The course has a value per evaluation of each of epoch, test_accuracy, test_loss, what the training logged since
    the evaluation before (mean train_accuracy and train_loss, last lr), and the telemetry's means over the layers.
    """
    points: dict[int, dict[str, float | None]] = {}
    logs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for r in read_metrics(run):
        if r.get("phase") == "train":
            logs.append(r)
        elif r.get("phase") == "test":
            told = {"epoch": r.get("epoch"), "test_accuracy": r.get("accuracy"), "test_loss": r.get("loss")}
            told |= {f"train_{k}": average(log.get(k) for log in logs) for k in ("accuracy", "loss")}
            points[r["step"]] = told | {"lr": logs[-1].get("lr") if logs else None}
            logs = []
        elif "telemetry" in r and r["step"] in points:
            layers = r["telemetry"].values()
            points[r["step"]] |= {k: average(m.get(k) for m in layers) for m in layers for k in m}
        elif card.figure.histogram in r.get("histograms", {}):
            found["histogram"] = r["histograms"][card.figure.histogram]["latent"]
    names = dict.fromkeys(k for p in points.values() for k in p)
    course = {k: [_short(p.get(k)) for p in points.values()] for k in names}
    return found | ({"course": course} if course else {})


def average(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among `values`; None where there are none."""
    numbers = [v for v in values if v is not None]
    return mean(numbers) if numbers else None


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def split_of(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Which part of a data set is used, where not the whole of it, and how synthetic images were made."""
    return {k: dataset[k] for k in DRAWN if dataset.get(k)}


def key_of(config: Mapping[str, Any], data: Mapping[str, Any], split: Mapping[str, Any]) -> str | None:
    """The key that the run of `config` has on `data`, as the result.json of another run describes them.

    None where the data are not those of `config`: name, augmentation, mean, std or `split` differ, the images'
    checksum is all that has to be taken from there. It saves loading the data, which `training.run.prepare` does.
    """
    dataset = config["dataset"]
    asked: dict[str, Any] = {k: [*dataset[k]] for k in ("mean", "std") if dataset.get(k) is not None}
    asked |= {k: dataset[k] for k in ("name", "augment")}
    asked["preprocess"] = dataset.get("preprocess") or "standard"
    theirs = {"preprocess": "standard", **data}
    if split != split_of(dataset) or any(theirs[k] != v for k, v in asked.items()):
        return None
    if config["init"] not in ("float", "scratch"):
        return None  # a checkpoint is known by its bytes, not by its name
    if config["distill"].get("teacher"):
        return None  # as a teacher is
    parent = digest(identity(parent_of(config), data, "scratch"))
    whole = identity(config, data, f"float {parent}" if config["init"] == "float" else "scratch")
    if config["init"] == "scratch" and needs_parent(config):
        whole["teacher"] = parent
    return digest(whole)


def entry(card: Card, row: Row, budget: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a finished run: no folder, no host."""
    found = {"row": row.id, "seed": result["seed"], "budget": budget, "key": result["key"], "earlier": False}
    found |= {k: result[k] for k in KEPT if k in result}
    found |= {"data": result["identity"]["data"], "split": split_in(Path(result["folder"]))}
    return found | progress(card, Path(result["folder"]))


def split_in(folder: Path) -> dict[str, Any]:
    """`split_of` the data set of the run in `folder`."""
    return split_of(read_config(folder)["dataset"])


def finished(folders: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Every result.json below the folders, with its folder; one that is corrupt is left out, as its run will say so."""
    for folder in folders:
        for path in sorted(folder.glob(f"**/{RESULT}")):
            found = None
            with leaving_out():
                found = {**read_result(path), "folder": str(path.parent), "split": split_in(path.parent)}
            if found is not None:
                yield found
