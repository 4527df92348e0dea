"""Every kind of file that qbench reads, damaged in a copy of a small tree, and the commands that read it."""

import hashlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import qbench
from attacks import damage
from attacks.damage import BYTES, JSON, Way
from attacks.judging import Said, Table, Work, forked, fresh, judged, plain, tell
from attacks.tree import (
    PACT,
    UNFINISHED,
    WORDS,
    bench_entry,
    digest_of,
    ended,
    in_child,
    study,
)
from qbench.bench import command as bench
from qbench.bench import page
from qbench.cli import command, sweep
from qbench.cli.overrides import resolve_row
from qbench.data import sources
from qbench.papers import cards
from qbench.training.run import prepare

KERNELS = ended(*WORDS, "kernels=cpp", "method=pact", "bits=4", "init=scratch", "train.steps=2", "out=k")


RESULT = tuple(way for way in JSON if way is not damage.gone)  # a run without it is one that is not finished


@dataclass(frozen=True)
class Target:
    """A file, and what reads it. excuse: what a differing answer comes to where a changed file is a file of its own,
    as what people write by hand is; it gets (old bytes, new bytes, clean, found)."""

    where: str
    told: str
    readers: list[Work]
    ways: tuple[Way, ...] = BYTES
    excuse: Callable[[bytes, bytes, Said, Said], str] | None = None


def attack(home: Path, whole: Path, attacks: int, seed: int, only: set[str], table: Table) -> None:
    """Attack each file `attacks` times."""
    for name, target in targets(home).items():
        if only and name not in only and "files" not in only:
            continue
        clean = []
        for reader in target.readers:
            first, again = (forked(reader, fresh(whole, home)) for _ in range(2))
            if first.status or plain(first.out) != plain(again.out):
                raise SystemExit(f"{name}: what is read of the whole file is not the same twice:\n{first}\n{again}")
            clean.append(first)
        counts: Counter[str] = Counter()
        for number in range(attacks):
            which = number % len(target.readers)
            chance = random.Random(f"{seed} {name} {number}")
            path = sorted(fresh(whole, home).glob(target.where))[0]
            old = path.read_bytes()
            new, how = chance.choice(target.ways)(old, chance)
            path.unlink()
            if new is not None:
                path.write_bytes(new)
            found = forked(target.readers[which], home / "copy")
            outcome = judged(path, clean[which], found)
            if outcome == "SILENT" and target.excuse and new is not None and found.status == 0:
                outcome = target.excuse(old, new, clean[which], found)
            if outcome == "SILENT" and found.status == 2 and target.excuse is by_hand:
                outcome = "refused"  # by the name of its method or its field: there is one such file
            counts[outcome] += 1
            tell(outcome, name, seed, number, how, found)
        table.row(name, target.told, counts)


def targets(home: Path) -> dict[str, Target]:
    evaluate = both(said_by("eval", "o/pact-*"), load)
    from_parent = ended(*WORDS, "method=pact", "bits=3", "out=o")
    compare = said_by("compare", "o/pact-*", "o/float-*")
    found = {
        "result.json": Target(
            "o/pact-*/result.json",
            "table, compare, eval, the same run again",
            [said_by("table", "o"), compare, evaluate, said_by(*PACT)],
            RESULT,
        ),
        "result.json of a parent": Target(
            "o/float-*/result.json", "a run from it, table", [from_parent, said_by("table", "o")], RESULT
        ),
        "config.yaml": Target(
            "o/pact-*/config.yaml",
            "eval, compare, qbench.load",
            [evaluate, compare, load],
            (*BYTES, *(damage.yaml_field,) * 3),
        ),
        "manifest.json": Target("o/pact-*/manifest.json", "the same run again", [said_by(*PACT)], JSON),
        "model.pt": Target(
            "o/pact-*/model.pt",
            "eval, qbench.load",
            [evaluate, load],
            (*BYTES, *(damage.tensor,) * 3),
        ),
        "model.pt of a run to start from": Target(
            "o/pact-*/model.pt", "init=", [said_by(*PACT[:-1], "out=x", "init=o/pact-*", "plan=true")]
        ),
        "model.pt of a parent": Target("o/float-*/model.pt", "a run from it", [from_parent], (*BYTES, damage.tensor)),
        "checkpoint.pt": Target(
            "u/pact-*/checkpoint.pt", "the run going on", [ended(*UNFINISHED)], (*BYTES, *(damage.tensor,) * 6)
        ),
        "before.json": Target("u/pact-*/before.json", "the run going on", [ended(*UNFINISHED)], JSON),
        "metrics.jsonl of an unfinished run": Target(
            "u/pact-*/metrics.jsonl", "the run going on", [ended(*UNFINISHED)], (*BYTES, damage.gone, damage.line_field)
        ),
        "metrics.jsonl": Target("s/o/pact-*/metrics.jsonl", "paper", [study], (*BYTES, damage.gone, damage.line_field)),
        "results.json": Target("s/r/toy/results.json", "paper", [study], JSON),
        "result.json of a study's run": Target("s/o/pact-*/result.json", "paper", [study], JSON),
        "config.yaml of a study's run": Target(
            "s/o/pact-*/config.yaml", "paper", [study], (*BYTES, damage.gone, damage.yaml_field)
        ),
        "notes.md": Target("s/r/toy/notes.md", "paper", [study], BYTES, shown),
        "card": Target("s/toy.yaml", "paper", [card], (*BYTES, *(damage.yaml_field,) * 6), by_hand),
        "a method's YAML": Target(
            "mine/method/own.yaml",
            "a run (--config-dir)",
            [said_by("--config-dir=mine", *WORDS, "method=own", "plan=true")],
            (*BYTES, *(damage.yaml_field,) * 6),
            by_hand,
        ),
        "bench.json": Target("b/bench.json", "bench page, bench out=", [bench_page, bench_write], JSON),
        "notes of a sweep": Target("n/00000.json", "the table of a sweep", [in_child(sweep.table, Path("n"))], JSON),
        "zip of images": Target("d/images.zip", "a run", [images("image_folder", "d/images.zip")], BYTES, other_data),
        "image": Target("d/images/train/*/0.png", "a run", [images("image_folder", "d/images")], BYTES, other_data),
        "streamed image": Target(
            "d/images/train/*/0.png",
            "a run",
            [images("image_stream", "d/images", "dataset.size=8", "dataset.workers=0")],
            (damage.cut, damage.take_out, damage.twice),  # one of equal size is known by its name alone
            other_data,
        ),
        "MNIST's files": Target("d/MNIST/raw/train-*-ubyte", "a run", [images("mnist", "d")], BYTES, other_data),
        "MNIST's packed files": Target("d/p/MNIST/raw/t10k-*.gz", "a run", [images("mnist", "d/p")], BYTES, other_data),
        "parsed images": Target("cache/image_folder-*.tensors", "a run", [images("image_folder", "d/images")]),
        "checkpoint from elsewhere": Target(
            "plain.pt", "init=", [said_by(*PACT[:-1], "out=x", "init=plain.pt", "plan=true")], BYTES, other_start
        ),
        "safetensors from elsewhere": Target(
            "plain.safetensors",
            "init=",
            [said_by(*PACT[:-1], "out=x", "init=plain.safetensors", "plan=true")],
            BYTES,
            other_start,
        ),
    }
    if list((home / "whole").glob("kernels/user-*/*.so")):
        found["library of kernels"] = Target("kernels/user-*/*.so", "a run", [KERNELS], (*BYTES, damage.gone))
    return found


def warm_up() -> int:
    """Let the tree hold parsed images and compiled kernels too."""
    images("image_folder", "d/images")()
    if os.environ.get("CXX", "").endswith("/c++"):
        KERNELS()
        shutil.rmtree("k")
    return 0


# What reads.


def said_by(*words: str) -> Work:
    """The command line; `*` in a word is filled in."""

    def run() -> int:
        filled = []
        for word in words:
            key, equals, pattern = word.rpartition("=")
            filled.append(f"{key}{equals}{sorted(Path().glob(pattern))[0]}" if "*" in pattern else word)
        return command.main(filled)

    return run


def both(*works: Work) -> Work:
    return lambda: max(work() for work in works)


def load() -> int:
    """What `qbench.load` gives, by every bit of it."""
    print(digest_of(qbench.load(sorted(Path("o").glob("pact-*"))[0]).state_dict()))
    return 0


def card() -> int:
    """The card, and the page of it."""
    print(cards.read(Path("s/toy.yaml")))
    return study()


def bench_page() -> int:
    print(page.page(bench.read(Path("b/bench.json"))))
    return 0


def bench_write() -> int:
    bench.write(Path("b"), [bench_entry("step/lsq", 1.25)])
    print(Path("b/bench.json").read_text(encoding="utf-8"))
    return 0


def images(name: str, root: str, *more: str) -> Work:
    """The key of a run on these images, and every bit of those."""

    def run() -> int:
        os.environ["QBENCH_CACHE"] = str(Path("cache").absolute())
        sources.PUBLISHED.pop("mnist", None)  # of 60,000 images
        made = prepare(resolve_row(["method=float", *WORDS, f"dataset={name}", f"dataset.root={root}", *more]))
        sha = hashlib.sha256()
        for split in (made.data.train, made.data.test):
            sha.update(split.labels.numpy().tobytes())
            pixels = split.images.contiguous().numpy() if hasattr(split, "images") else _streamed(split)
            sha.update(pixels.tobytes())
        print(made.key, sha.hexdigest())
        return 0

    return run


def _streamed(split: Any) -> Any:
    from qbench.data.images import decode

    source = Path(split.paths[0]).parents[2]
    return decode(source, [str(Path(p).relative_to(source)) for p in split.paths], 8, 3)[0]


# What a differing answer comes to, where nothing vouches for a file but whoever wrote it.


def other_data(old: bytes, new: bytes, clean: Said, found: Said) -> str:
    """Other images are another run: the key must say so."""
    (key, pixels), (other, others) = clean.out.split(), found.out.split()
    if key != other:
        return "as asked"
    return "harmless" if pixels == others else "SILENT"


def other_start(old: bytes, new: bytes, clean: Said, found: Said) -> str:
    """Another file is another start: the key in the folder's name must say so."""
    keys = [
        next(line for line in said.out.splitlines() if line.startswith("folder: "))[-10:] for said in (clean, found)
    ]
    return "as asked" if keys[0] != keys[1] else "SILENT"


def shown(old: bytes, new: bytes, clean: Said, found: Said) -> str:
    """A text is shown as it stands there."""
    return "as asked" if new.decode(errors="replace").strip() in found.out else "SILENT"


def by_hand(old: bytes, new: bytes, clean: Said, found: Said) -> str:
    """Every word of a YAML that is taken must show in what comes of it."""
    before, after = (dict(leaves(yaml.safe_load(data))) for data in (old, new))
    changed = {k: v for k, v in after.items() if k not in before or before[k] != v or type(before[k]) is not type(v)}
    if not changed and before.keys() == after.keys():
        return "harmless"
    text = " ".join(found.out.replace("'", "").split())
    lost = [v for k, v in changed.items() if v is not None and not any(w in text for w in words_for(v))]
    return "as asked" if found.out != clean.out and not lost else "SILENT"


def words_for(value: Any) -> tuple[str, ...]:
    text = " ".join(str(value).replace("'", "").split())
    return text, text.lower(), f"{value:g}" if isinstance(value, float) else text, f"{value}.0"


def leaves(node: Any, place: str = "") -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value, f"{place}.{key}")
        else:
            yield f"{place}.{key}", value
