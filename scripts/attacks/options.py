"""Wrong options, drawn from those that are declared: values, names and quoting, in runs, sweeps and other commands.

What is wrong is decided here, by the words in which an option says what it may be ("a whole number of at least 1") and
by its default, never by the check that is under attack. A value that may be right must be followed: the plan of the run
shows it.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attacks.judging import Said, Table, broken, forked, fresh, tell
from attacks.tree import WORDS
from qbench.bench.command import OPTIONS as BENCH
from qbench.cli import command
from qbench.config import catalog
from qbench.config.data import OPTIONS as DATA
from qbench.config.data import OWN
from qbench.config.kinds import Kind
from qbench.config.options import HYDRA, MODEL, OPTIONS
from qbench.papers.study import OPTIONS as PAPER

TEXTS = ("abc", "'4'", "4x", "[1]", "{a: 1}", "[]", "true", "0x10", "1,5", "-", "None", "${seed}", "größe", "[1,[2]]")
NONFINITE = ("nan", "inf", "-inf", "1e400", ".nan")
HUGE = (str(10**30), str(-(10**30)), "9" * 400, "9" * 5000, "1e308", "x" * 3000)
QUOTING = (
    "'",
    '"',
    "'4",
    '4"',
    "[1",
    "1]",
    "{a",
    "(",
    "4)",
    "${",
    "${}",
    "\\",
    "a b'",
    "[,]",
    "{:}",
    "$(",
    "`",
    "\t",
    "'a'b",
)
SEARCH = ("interval(1,2)", "range(4,2)", "choice()", "choice(", "glob(zz*)", "range(1,3", "shuffle(1", "sort()", "1,,2")
RUNS = (*WORDS, "method=pact", "init=scratch", "plan=true")


@dataclass(frozen=True)
class Wrong:
    """Words of a command line. name, value: of the option that is attacked. sure: whether it cannot be right."""

    words: tuple[str, ...]
    name: str
    value: str
    sure: bool


def attack(home: Path, whole: Path, attacks: int, seed: int, only: set[str], table: Table) -> None:
    """Try `attacks` wrong options, shared among the kinds of commands."""
    ways = {
        "options of a run": (0.44, run),
        "options of a sweep": (0.24, swept),
        "names of options": (0.12, misspelt),
        "options of paper": (0.06, paper),
        "options of eval": (0.05, evaluation),
        "options of bench": (0.05, bench),
        "words of list, table, compare": (0.04, others),
    }
    copy = fresh(whole, home)
    for what, (share, drawn) in ways.items():
        if only and what not in only and "options" not in only:
            continue
        counts: Counter[str] = Counter()
        for number in range(max(1, round(share * attacks))):
            wrong = drawn(random.Random(f"{seed} {what} {number}"), copy)
            found = forked(lambda words=wrong.words: command.main(list(words)), copy)
            outcome = judged(wrong, found)
            counts[outcome] += 1
            tell(
                outcome, what, seed, number, f"{wrong.name}={wrong.value[:60]!r} ({' '.join(wrong.words)[:150]})", found
            )
        table.row(what, "wrong values, names, quoting", counts)


def judged(wrong: Wrong, found: Said) -> str:
    """Refused: status 2, one message that names the option, its value or the word as it was typed.

    In a sweep what the class of a net or a quantizer refuses, or what does not fit the data, is a run that failed.
    """
    if failure := broken(found):
        return failure
    last = wrong.name.rpartition(".")[2]
    if found.status == 0 and "-m" in wrong.words and re.search(rf"^  n/a: .*\b{re.escape(last)}\b", found.out, re.M):
        return "refused"  # a width that a method does not have is a row of its own in a sweep
    if found.status == 0:
        return "as asked" if not wrong.sure and followed(wrong, found.out) else "SILENT"
    named = wrong.name in found.err or last in found.err or (wrong.value != "" and wrong.value[:20] in found.err)
    named = named or (wrong.value == "null" and "got None" in found.err)
    ran = (
        "-m" in wrong.words
        and (not wrong.sure or wrong.name.startswith(("model.", "options.")))
        and "\nfailed: " in f"\n{found.err}"
    )
    system = "qbench: File name too long: "  # said by the system, of the name as it was typed
    told = found.status == 2 and found.err.startswith("qbench: ")
    told = told or (found.status == 1 and (ran or found.err.startswith(system)))
    return "refused" if told and named else "UNEXPECTED"


def followed(wrong: Wrong, out: str) -> bool:
    """Whether the plan that was printed has the value where it was asked for."""
    if wrong.name.startswith(("hydra", "allow")) or wrong.value == "null":  # null: as the budget and the method say
        return True
    for text in re.findall(r"^(?:w_bits|name):.*?(?=\n\n|\nweights )", out, re.MULTILINE | re.DOTALL):
        plan = yaml.safe_load(text)
        node: Any = plan
        for part in wrong.name.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if wrong.name == "bits":
            node = [plan.get("w_bits"), plan.get("a_bits")]
        if any(same(node, value) for value in readings(wrong.value.replace("${seed}", str(plan.get("seed"))))):
            return True
    return False


def readings(text: str) -> Iterator[Any]:
    """What a value may have been meant for, in the grammar of the command line; each value of a sweep."""
    for part in (text, *text.split(",")):
        yield part
        yield part.strip("'\"")
        with suppress(yaml.YAMLError):
            yield yaml.safe_load(part)
        with suppress(ValueError):
            yield float(part)


def same(found: Any, asked: Any) -> bool:
    if isinstance(found, list) and not isinstance(asked, list):
        return any(same(f, asked) for f in found)
    if isinstance(found, bool) or isinstance(asked, bool):
        return found is asked or str(found).lower() == str(asked).lower()
    if isinstance(found, int | float) and isinstance(asked, int | float):
        return math.isclose(found, asked)
    return found == asked or str(found) == str(asked) or (found is None and asked == "null")


# What is drawn.


def run(chance: random.Random, copy: Path) -> Wrong:
    """A wrong value of an option of a run."""
    name, allowed, default, words = chance.choice(declared(chance))
    value, sure = value_of(chance, name, allowed, default)
    words = tuple(w for w in (*RUNS, *words) if w.partition("=")[0] != name)
    return Wrong((*words, f"{name}={value}"), name, value, sure)


def swept(chance: random.Random, copy: Path) -> Wrong:
    """The same among right values, in a sweep."""
    if chance.random() < 0.3:
        name = chance.choice(("bits", "seed", "train.lr", "train.epochs", "method", "options.alpha", "train.schedule"))
        value = chance.choice(SEARCH)
        words = tuple(w for w in RUNS if w.partition("=")[0] != name)
        return Wrong(("-m", *words, f"{name}={value}"), name, value, False)
    name, allowed, default, words = chance.choice(declared(chance))
    value, sure = value_of(chance, name, allowed, default)
    right = {"bits": "4", "seed": "0", "train.lr": "0.1", "w_bits": "4", "a_bits": "4", "threads": "1"}.get(name)
    both = value if right is None else ",".join(chance.sample([right, value], 2))
    words = tuple(w for w in (*RUNS, *words) if w.partition("=")[0] != name)
    return Wrong(("-m", *words, f"{name}={both}"), name, value, sure)


def misspelt(chance: random.Random, copy: Path) -> Wrong:
    """A name that no option has, with or without + or ++, in a run or a sweep."""
    name, _, default, words = chance.choice(declared(chance))
    wrong = typing_error(chance, name, {n for n, *_ in declared(chance)})
    words = (*RUNS, *words, f"{chance.choice(('', '', '+', '++', '~'))}{wrong}={default if default else 1}")
    return Wrong((*chance.choice(((), ("-m",))), *words), wrong, "", True)


def paper(chance: random.Random, copy: Path) -> Wrong:
    """Of `qbench paper`: what is a plan, so that a right one costs nothing."""
    card = chance.choice(("flexor_table2", "pact_table1"))
    if chance.random() < 0.3:
        wrong = typing_error(chance, chance.choice(PAPER), {*PAPER})
        return Wrong(("paper", card, f"{wrong}=1", "plan=true", "budget=smoke"), wrong, "", True)
    name = chance.choice(
        [o for o in PAPER if o not in ("out", "results", "only", "dataset.root", "tensorboard", "debug")]
    )
    huge = HUGE[:2] if name not in ("checkpoint_seconds", "time_limit") else HUGE[1:2]  # seconds may be many
    value = chance.choice((*TEXTS[:5], *NONFINITE, *huge, *QUOTING, "", "-1"))
    words = [w for w in ("plan=true", "budget=smoke") if w.partition("=")[0] != name]
    sure = not (name == "threads" and value in ("[1]",)) and not (name == "seeds" and value.isdigit())
    sure = sure and name != "allow"
    return Wrong(("paper", card, *words, f"{name}={value}"), name, value, sure)


def evaluation(chance: random.Random, copy: Path) -> Wrong:
    folder = str(sorted(copy.glob("o/pact-*"))[0].relative_to(copy))
    if chance.random() < 0.3:
        wrong = typing_error(chance, chance.choice(("device", "allow", "dataset.root", "dataset.size")), set())
        return Wrong(("eval", folder, f"{wrong}=1"), wrong, "", True)
    name = chance.choice(("device", *(f"dataset.{o}" for o in OWN["synthetic"]), "dataset.val", "dataset.std"))
    value = chance.choice((*TEXTS[:3], *NONFINITE, *HUGE[1:2], *QUOTING[:8]))
    return Wrong(("eval", folder, f"{name}={value}"), name, value, True)


def bench(chance: random.Random, copy: Path) -> Wrong:
    name = chance.choice([o for o in BENCH if o not in ("out", "debug", "against", "peers")])
    if chance.random() < 0.3:
        wrong = typing_error(chance, name, {*BENCH})
        return Wrong(("bench", f"{wrong}=1", "quick=true", "only=step/pact"), wrong, "", True)
    value = chance.choice((*TEXTS[:5], *NONFINITE, *QUOTING, "", "-1", str(-(10**30)), str(10**30)))
    words = [w for w in ("quick=true", "only=memory/pact", "rounds=1") if w.partition("=")[0] != name]
    verb = ("check", "against=b/bench.json") if name == "margin" or chance.random() < 0.3 else ()
    return Wrong(("bench", *verb, *words, f"{name}={value}"), name, value, True)


def others(chance: random.Random, copy: Path) -> Wrong:
    value = chance.choice((*TEXTS, *QUOTING, "", "x" * 300, "a\0b"[:1], "/proc/self/mem", "s/toy.yaml", "/dev/null"))
    words, name = chance.choice(
        (
            (("list", value), "list"),
            (("list", f"format={value}"), "format"),
            (("table", value), "folder"),
            (("table", "o", f"format={value}"), "format"),
            (("compare", value, value), "run"),
            (("compare", value), "run"),
            (("eval", value), "run"),
            ((value,), "command"),
            (("paper", value), "card"),
            (("bench", value), "bench"),
            ((f"--{value}",), "flag"),
        )
    )
    sure = not (value == "" and words[0] in ("list", "table", "paper", "bench", ""))
    return Wrong(words, name, value, sure)


def declared(chance: random.Random) -> list[tuple[str, str, Any, tuple[str, ...]]]:
    """(name, what it may be in words, its default, words that belong to it) of every option."""
    whole = yaml.safe_load((catalog.conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    found: list[tuple[str, str, Any, tuple[str, ...]]] = []
    for name, kind in {**OPTIONS, **HYDRA}.items():
        if name == "plan":
            continue  # what is followed is seen by the plan
        group, _, key = name.rpartition(".")
        allowed = in_words(kind)
        found.append((name, allowed, (whole.get(group) or {}).get(key) if group else whole.get(key), ()))
    for name, (_, told) in DATA.items():
        found.append((f"dataset.{name}", told, None, ()))
    for name, (_, told) in OWN["synthetic"].items():
        found.append((f"dataset.{name}", told, None, ()))
    method = chance.choice([m["name"] for m in catalog.methods() if m["name"] != "float"])
    for name, default in catalog.options(method).items():
        found.append((f"options.{name}", by_default(default), default, (f"method={method}",)))
    model = chance.choice(("tiny", "resnet20", "lenet5", "mlp", "vgg_small"))
    text = yaml.safe_load((catalog.conf_folder() / "model" / f"{model}.yaml").read_text(encoding="utf-8"))
    for name, default in text.items():
        if name not in ("name", "_target_", "defaults"):
            found.append((f"model.{name}", in_words(MODEL[name]), default, (f"model={model}",)))
    return [*found, *((group, "a name", None, ()) for group in catalog.GROUPS)]


def in_words(kind: Kind) -> str:
    words = [w if isinstance(w, str) else str(w).lower() for w in kind.words]
    return " or ".join([*([kind.allowed] if kind.allowed else []), *words, *(["null"] if kind.null else [])])


def by_default(default: Any) -> str:
    """What an option may be whose default alone is declared; empty where that says nothing."""
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int | float):
        return "a number"
    return ""


def value_of(chance: random.Random, name: str, allowed: str, default: Any) -> tuple[str, bool]:
    """(a value, whether it cannot be right) for an option that may be what `allowed` says."""
    kind = chance.choice(("text", "text", "number", "number", "nonfinite", "huge", "quoting", "empty", "truth", "null"))
    path = "path" in allowed or "folder" in allowed or name in ("name", "init", "out", "dataset.root")
    if kind == "quoting":
        value = chance.choice(QUOTING)
        return value, not path and "name or null" not in allowed and bool(re.search(r"number|true or false", allowed))
    if kind == "null":
        return "null", "null" not in allowed and bool(allowed) and not path and "a name" not in allowed
    if kind == "empty":
        return "", False
    if kind == "truth":
        return chance.choice(("true", "false")), "number" in allowed and "true" not in allowed
    if kind == "nonfinite":
        return chance.choice(NONFINITE), bool(re.search(r"number|true or false", allowed))
    if kind == "huge":
        return chance.choice(HUGE), "true or false" in allowed
    if kind == "number":
        return number_of(chance, allowed)
    value = chance.choice(TEXTS)
    plain = value in ("abc", "4x", "{a: 1}", "-", "größe")
    return value, plain and bool(re.search(r"number|true or false", allowed)) and not path and "name" not in allowed


def number_of(chance: random.Random, allowed: str) -> tuple[str, bool]:
    """A number beyond what the words allow, or one of which they say nothing."""
    floor = re.search(r"(?:of at least|above|from|in) (-?\d+(?:\.\d+)?)", allowed)
    if "positive" in allowed:
        return chance.choice(("0", "-1", "-0.5")), True
    if floor and "list" not in allowed and "fraction" not in allowed:
        low = float(floor[1])
        wrong = [f"{low - 1:g}", f"{low - 1e9:g}"] + ([f"{low:g}"] if f"above {floor[1]}" in allowed else [])
        top = re.search(r"\.\.(\d+(?:\.\d+)?)", allowed)
        if top:
            wrong += [f"{float(top[1]) + 1:g}"] + ([top[1]] if "excluded" in allowed else [])
        return chance.choice(wrong), True
    if "whole number" in allowed and chance.random() < 0.5:
        return "1.5", "list" not in allowed and "fraction" not in allowed
    return chance.choice(("-1", "0", "1e-9", "3.7", "12345")), "true or false" in allowed and "number" not in allowed


def typing_error(chance: random.Random, name: str, right: set[str]) -> str:
    """The name with a letter dropped, doubled, swapped or changed."""
    while True:
        at = chance.randrange(len(name))
        wrong = chance.choice(
            (
                name[:at] + name[at + 1 :],
                name[: at + 1] + name[at:],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
                name[:at] + chance.choice("abcxyz_.") + name[at + 1 :],
            )
        )
        if wrong not in right and wrong != name and wrong.strip("."):
            return wrong
