"""Give committed results the names that today's code gives their runs: `scripts/rekey.py OLD [write=true]`.

OLD is a checkout in which the results still have their names. A result is renamed where both checkouts compose the same
run: bits, options, net, data, start and all recipes. Where they differ it keeps its name, and the difference is told:
the run has to be done again. Without write=true nothing is written.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qbench.cli.overrides import resolve_row
from qbench.config.identity import FLOAT_METHOD, digest, folder_name, identity, parent_of
from qbench.config.recipe import Recipe
from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.papers import cards, results
from qbench.papers.study import words_of
from qbench.records import read_config, read_result

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# What both checkouts can be asked, whatever their modules are called: the configuration and key of each kept entry.
ASK = """
import importlib, json, sys
def first(*names):
    for name in names:
        try: return importlib.import_module(name)
        except ImportError: pass
    raise SystemExit("none of " + ", ".join(names))
overrides = first("qbench.cli.overrides", "qbench.overrides")
results = first("qbench.papers.results", "qbench.study_results")
cards = first("qbench.papers.cards", "qbench.cards")
study = first("qbench.papers.study", "qbench.study")
from pathlib import Path
for folder in sorted(Path("docs/results").iterdir()):
    kept = results.read(folder)
    for e in kept.entries:
        row = next((r for r in cards.load(folder.name).runs if r.id == e["row"]), None)
        if row is None: continue
        config = {**overrides.resolve_row(study.words_of(row, e["budget"])), "seed": e["seed"]}
        key = results.key_of(config, e["data"], e["split"])
        words = study.words_of(row, e["budget"])
        print(json.dumps([folder.name, *(e[k] for k in ("row", "budget", "seed", "key")), key, config, words]))
"""
# Options that were no choice of a user's: what they said stands in rules and recipes today.
GONE = ("options.kept.", "options.by_bits.")
EQUAL = {"dataset.preprocess": "standard"}  # what a key meant before there was one
COMPARED = ("w_bits", "a_bits", "options", "model", "dataset", "init", "distill", "parent", "train", "protocol")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two resolved configurations say differently, as 'key: old -> new'; what is null or a default is equal."""
    defaults = {f.name: f.default for f in fields(Recipe)}

    def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for k, v in value.items():
                yield from flat(v, f"{name}.{k}" if name else str(k))
        elif value not in (None, EQUAL.get(name)) and not name.startswith(GONE):
            plain = tuple(value) if isinstance(value, list) else value
            if plain != defaults.get(name.rpartition(".")[2], object()):
                yield name, re.sub(r"^qbench\..*\.(?=\w+$)", "", plain) if isinstance(plain, str) else plain

    a, b = (dict(flat({k: c.get(k) for k in COMPARED})) for c in (old, new))
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def asked(old: Path) -> Iterator[list[Any]]:
    """[card, row, budget, seed, key, key as OLD composes it, configuration, words] of every entry in OLD's results."""
    done = subprocess.run([sys.executable, "-c", ASK], cwd=old, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise UserError(f"{old} does not answer: {done.stderr.strip().splitlines()[-1:]}")
    return map(json.loads, done.stdout.splitlines())


def _words(card: str, row: str, budget: str) -> list[str]:
    """The words of a row as its card has them today, where it still has the row."""
    return next((words_of(r, budget) for r in cards.load(card).runs if r.id == row), [])


def rekey_cards(old: Path, write: bool) -> int:
    """Rename the entries of every results.json; returns how many keep their name because their run has changed."""
    left = 0
    for card, row, budget, seed, key, theirs, config, words in asked(old):
        label = f"{card} {row}, budget {budget}, seed {seed}"
        if key != theirs:
            print(f"{label}: of earlier code already")
            continue
        try:
            new = {**resolve_row(_words(card, row, budget) or words), "seed": seed}
            wrong = difference(config, json.loads(json.dumps(new)))
        except UserError as error:
            wrong = [str(error)]
        if wrong:
            left += 1
            print(f"{label}: another run today; {'; '.join(wrong)}")
            continue
        kept = results.read(RESULTS / card)
        for e in kept.entries:
            if (e["row"], e["budget"], e["seed"], e["key"]) == (row, budget, seed, key):
                e["key"] = results.key_of(new, e["data"], e["split"])
        if write:
            atomic_write(RESULTS / card / results.RESULTS, kept.text())
    return left


def rekey_runs(write: bool) -> int:
    """Rename the run folders below docs/results."""
    left = 0
    for path in sorted(RESULTS.rglob("result.json")):
        folder, result = path.parent, read_result(path)
        config = read_config(folder)
        data = result["identity"]["data"]
        new = today(config)
        wrong = difference(config, new)
        if wrong:
            left += 1
            print(f"{folder.name}: another run today; {'; '.join(wrong)}")
            continue
        parent = digest(identity(parent_of(new), data, "scratch"))
        whole = identity(new, data, f"float {parent}" if config["init"] == "float" else "scratch")
        name = folder_name(new, digest(whole))
        print(f"{folder.name} -> {name}")
        if write:
            atomic_write(path, json.dumps({**result, "key": digest(whole), "identity": whole}, indent=1) + "\n")
            folder.rename(folder.with_name(name))
    return left


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an old run as today's code composes it from the same words."""
    method = config["method"]["name"]
    if method == "float":
        return {"kernels": "auto", **config, "method": FLOAT_METHOD}  # as runs ask for their parent
    words = [f"{k}={config[k]}" for k in ("w_bits", "a_bits", "init", "budget", "seed", "protocol")]
    words += [f"method={method}", f"model={config['model']['name']}", f"dataset={config['dataset']['name']}"]
    words += [f"train.precision={config['train']['precision']}", f"parent.precision={config['parent']['precision']}"]
    found = resolve_row(words)
    plain = {k: v for k, v in config["options"].items() if not isinstance(v, (dict, list))}
    words += [f"options.{k}={'null' if v is None else v}" for k, v in plain.items() if found["options"].get(k) != v]
    places = {k: v for k, v in config["dataset"].items() if k in found["dataset"]}
    return {**resolve_row(words), "name": config["name"], "dataset": places}


def main(words: list[str]) -> int:
    """Exit status 1 where a result could not be renamed."""
    write = "write=true" in words
    places = [w for w in words if "=" not in w]
    if len(places) != 1 or not (Path(places[0]) / "docs" / "results").is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    left = rekey_cards(Path(places[0]).resolve(), write) + rekey_runs(write)
    print(f"{left} left as they are" + ("" if write else "; nothing written (write=true)"))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
