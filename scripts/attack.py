"""Damages the files that qbench reads of a run or a study, runs the commands that read them, counts what comes of it.

    python scripts/attack.py [attacks per file] [seed] [FILE ...]

Each attack damages one file of a small finished run, of an unfinished one, or of a study, in a copy of its own: flipped
bits, a cut end, a piece taken out, zeros, for JSON a field changed, dropped or of another type. What is seen:

    refused      the command says so and names the file, or leaves the file out by name
    harmless     the output is the same as with the whole file
    SILENT       another output, and no word about the file
    UNEXPECTED   an error that qbench did not foresee
    TRACEBACK, CRASH, HANG (60 s)

Exit status 1 where any of the last five was seen.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import qbench
from qbench.cli import command
from qbench.cli.overrides import resolve_row
from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.papers import cards, pages
from qbench.papers.study import Ask, Study
from qbench.records import read_notes, read_result
from qbench.training.recorder import Recorder

SECONDS = 60
GOOD, BAD = ("refused", "harmless"), ("SILENT", "UNEXPECTED", "TRACEBACK", "CRASH", "HANG")
WORDS = ("model=tiny", "dataset=synthetic", "budget=smoke", "tensorboard=false", "device=cpu", "threads=1")
FLOAT = (*WORDS, "method=float", "out=o")
PACT = (*WORDS, "method=pact", "bits=4", "out=o")
UNFINISHED = (*WORDS, "method=pact", "bits=2", "init=scratch", "train.steps=8", "checkpoint_seconds=0", "out=u")
CARD = {
    **{"title": "Toy", "paper": "Toy", "arxiv": "0000.00000", "where": "Table 1", "source": "Table 1"},
    **{"metric": "accuracy", "report": "last", "tolerance": 0.5, "protocol": ["none"], "figure": {"kind": "curves"}},
    "cost": {"cpu": "seconds", "gpu": "none"},
    "run": "model=tiny dataset=synthetic",
    "rows": [
        {"id": "float", "run": "method=float", "published": 92.0},
        {"id": "pact", "run": "method=pact bits=4", "published": 91.0, "baseline": "float"},
    ],
}


def main(arguments: Sequence[str]) -> int:
    attacks = int(arguments[0]) if arguments else 60
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    return attack_all(attacks, seed, set(arguments[2:]))


def attack_all(attacks: int, seed: int, only: set[str]) -> int:
    """Attack each file `attacks` times and print the table; returns the exit status."""
    total: Counter[str] = Counter()
    print(f"| file | read by | attacks | {' | '.join((*GOOD, *BAD))} |\n|" + " --- |" * (3 + len(GOOD + BAD)))
    with tempfile.TemporaryDirectory(prefix="qbench-attack-") as folder:
        home = Path(folder)
        os.environ.setdefault("QBENCH_CACHE", str(home / "cache"))
        whole = home / "whole"
        status, said = forked(prepare, whole, 600)
        if status:
            raise SystemExit(f"the runs to attack could not be made:\n{said}")
        for name, (pattern, told, readers) in targets().items():
            if only and name not in only:
                continue
            clean = [forked(reader, fresh(whole, home)) for reader in readers]
            counts: Counter[str] = Counter()
            for number in range(attacks):
                which = number % len(readers)
                chance = random.Random(f"{seed} {name} {number}")
                copy = fresh(whole, home)
                path = next(iter(sorted(copy.glob(pattern))))
                what = damage(path, chance)
                outcome = judged(path, clean[which], forked(readers[which], copy))
                counts[outcome] += 1
                if outcome in BAD:
                    print(f"{outcome}: {name}, seed {seed}, attack {number}: {what}", file=sys.stderr, flush=True)
            total += counts
            print(row_of(name, told, counts), flush=True)
    print(row_of("all", "", total))
    return 1 if any(total[k] for k in BAD) else 0


def row_of(name: str, told: str, counts: Counter[str]) -> str:
    return f"| {name} | {told} | {counts.total()} | {' | '.join(str(counts[k]) for k in (*GOOD, *BAD))} |"


def prepare() -> int:
    """A float run and a run from it in o/, an unfinished run in u/, and a study's files in s/."""
    for words in (FLOAT, PACT):
        if status := command.main(list(words)):
            return status
    Recorder.result = cut_off  # type: ignore[method-assign]
    command.main(list(UNFINISHED))
    shutil.copytree("o", "s/o")
    Path("s/r/toy").mkdir(parents=True)
    Path("s/r/toy/notes.md").write_text("What agrees and what does not.\nAnd why.\n")
    Path("s/toy.yaml").write_text(yaml.safe_dump(CARD, sort_keys=False))
    study()
    return 0


def cut_off(*_: Any) -> Path:
    raise KeyboardInterrupt


def study() -> int:
    """The page of the study in s/, made of what is kept and of the runs beside it; what is kept is written."""
    card = cards.read(Path("s/toy.yaml"))
    asked = Study(card, Ask(budget="smoke", out="s/o", results=Path("s/r"), draw=True, places=WORDS[3:6]), resolve_row)
    asked.collect(card.runs)
    print(pages.page(card, asked.kept, read_notes(asked.folder)))
    atomic_write(asked.folder / "results.json", asked.kept.text())
    return 0


def load() -> int:
    """What `qbench.load` gives, as a sum over its weights."""
    net = qbench.load(next(Path("o").glob("pact-*")))
    print(sum(float(v.double().sum()) for v in net.state_dict().values() if isinstance(v, torch.Tensor)))
    return 0


def said_by(*words: str) -> Callable[[], int]:
    """The command line; `*` in a word is filled in."""

    def run() -> int:
        return command.main([str(next(iter(sorted(Path().glob(w))))) if "*" in w else w for w in words])

    return run


def ended(*words: str) -> Callable[[], int]:
    """The run that `words` name, and the weights it ends with."""

    def run() -> int:
        status = command.main(list(words))
        out = next(w for w in words if w.startswith("out=")).removeprefix("out=")
        for path in sorted(Path(out).glob("pact-*/result.json")) if status == 0 else ():
            print(read_result(path)["weights_sha256"])
        return status

    return run


def targets() -> dict[str, tuple[str, str, list[Callable[[], int]]]]:
    """{file: (where, what reads it in words, the readers)}"""
    evaluate = said_by("eval", "o/pact-*")
    return {
        "result.json": (
            "o/pact-*/result.json",
            "table, compare, eval, the same run again",
            [said_by("table", "o"), said_by("compare", "o/pact-*", "o/float-*"), evaluate, said_by(*PACT)],
        ),
        "result.json of a parent": (
            "o/float-*/result.json",
            "a run from it, table",
            [ended(*WORDS, "method=pact", "bits=3", "out=o"), said_by("table", "o")],
        ),
        "config.yaml": (
            "o/pact-*/config.yaml",
            "eval, compare, qbench.load",
            [evaluate, said_by("compare", "o/pact-*", "o/float-*"), load],
        ),
        "model.pt": ("o/pact-*/model.pt", "eval, qbench.load", [evaluate, load]),
        "model.pt of a parent": (
            "o/float-*/model.pt",
            "a run from it",
            [ended(*WORDS, "method=pact", "bits=3", "out=o")],
        ),
        "checkpoint.pt": ("u/pact-*/checkpoint.pt", "the run going on", [ended(*UNFINISHED)]),
        "before.json": ("u/pact-*/before.json", "the run going on", [ended(*UNFINISHED)]),
        "metrics.jsonl": ("s/o/pact-*/metrics.jsonl", "paper", [study]),
        "results.json": ("s/r/toy/results.json", "paper", [study]),
        "result.json of a study's run": ("s/o/pact-*/result.json", "paper", [study]),
    }


def fresh(whole: Path, home: Path) -> Path:
    """A copy of the whole tree, in place of the last one."""
    copy = home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    return copy


def forked(work: Callable[[], int], folder: Path, seconds: int = SECONDS) -> tuple[int, str]:
    """(status, output) of `work` in a process of its own; a signal's number is negative."""
    folder.mkdir(exist_ok=True)
    output = folder / "output.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.chdir(folder)
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            signal.alarm(seconds)
            status = work()
        except UserError as error:
            print(f"qbench: {error}")
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, how = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(how), output.read_text(errors="replace")


def judged(path: Path, clean: tuple[int, str], found: tuple[int, str]) -> str:
    """What came of an attack on `path`, by (status, output) with the whole file and with the damaged one."""
    status, said = found
    if status == -signal.SIGALRM:
        return "HANG"
    if status < 0:
        return "CRASH"
    if "Traceback" in said or status == 99:
        return "TRACEBACK"
    if "unexpected" in said:
        return "UNEXPECTED"
    if plain(said) == plain(clean[1]) and status == clean[0]:
        return "harmless"
    return "refused" if path.name in said else "SILENT"


def plain(text: str) -> str:
    """Output without what differs from run to run: times."""
    return re.sub(r"\d+(\.\d+)? ?(s|ms|seconds|img/s|images/s)\b|seconds +[\d.]+|images/s +[\d,]+", "", text)


def damage(path: Path, chance: random.Random) -> str:
    """Damage the file; returns how, in words."""
    data = path.read_bytes()
    ways: list[Callable[[bytes, random.Random], tuple[bytes, str]]] = [flip, flip, cut, take_out, zeros]
    if path.suffix == ".json":
        ways += [change_field] * 5
    new, how = chance.choice(ways)(data, chance)
    path.write_bytes(new)
    return how


def flip(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    new, places = bytearray(data), [chance.randrange(len(data)) for _ in range(chance.choice((1, 1, 3)))]
    for place in places:
        new[place] ^= 1 << chance.randrange(8)
    return bytes(new), f"bits flipped at {places}"


def cut(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    end = chance.choice((0, len(data) - 1, chance.randrange(len(data)), max(data[:-1].rfind(b"\n"), 0) + 1))
    return data[:end], f"cut at {end} of {len(data)}"


def take_out(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 8, 100)))
    return data[:start] + data[end:], f"bytes {start} to {end} taken out"


def zeros(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((1, 16, 512)))
    return data[:start] + bytes(end - start) + data[end:], f"zeros from {start} to {end}"


def change_field(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    content = json.loads(data)
    nodes = [content]
    for node in nodes:  # grows while it is read
        nodes += [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, dict | list) and v]
    node = chance.choice(nodes)
    key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
    values = (None, True, -1, 0, 1.5, 10**400, "x", [], {}, [[]], {"name": 5}, float("nan"))
    if chance.random() < 0.25:
        del node[key]
        return json.dumps(content).encode(), f"field {key} dropped"
    node[key] = chance.choice(values)
    return json.dumps(content).encode(), f"field {key} is {str(node[key])[:20]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
