"""`qbench paper`: run the rows of a card, keep what they came to, and draw it beside the published numbers.

Finished runs are kept as small JSON (results.json of the card), so that they count where `outputs/` is gone. A run is
known by its key, which names everything that decides its numbers; the same run may be a row of several cards.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from qbench.config import allowed, catalog
from qbench.config.kinds import TIME, seconds
from qbench.config.source import code_hash
from qbench.errors import UserError, unknown
from qbench.files import atomic_write, locked
from qbench.papers import cards, pages
from qbench.papers.cards import Card, Row
from qbench.papers.results import RESULTS, entry, finished, key_of, read
from qbench.papers.setups import SetupOf, setup
from qbench.records import leaving_out
from qbench.training import interrupt

Compose = Callable[[Sequence[str]], dict[str, Any]]
PLACES = ("device", "threads", "dataset.root", "tensorboard", "checkpoint_seconds", "debug")
OPTIONS = ("budget", "seeds", "only", "out", "results", "plan", "draw", "time_limit", "allow", *PLACES)
# How a net is made small for budget=smoke.
NARROW = {
    "resnet18": ("model.width=0.1",),
    "resnet": ("model.depth=8", "model.width=0.25"),
    "vgg": ("model.width=0.05",),
    "alexnet": ("model.width=0.05",),
    "lenet": ("model.width=0.1",),
    "mlp": ("model.width=0.02",),
}


def default_results() -> Path:
    """docs/results of a checkout, else ./results."""
    home = catalog.conf_folder().parent
    return home / "docs" / "results" if (home / "pyproject.toml").is_file() else Path("results")


@dataclass(frozen=True)
class Ask:
    """What the command line asked for."""

    budget: str = "short"
    seeds: tuple[int, ...] = (0,)
    only: str = "*"
    out: str = "outputs"
    results: Path = field(default_factory=default_results)
    plan: bool = False
    draw: bool = False
    places: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()  # packages that the words of a card may name
    limit: float | None = None  # seconds

    @property
    def trial(self) -> bool:
        """budget=smoke tries the machinery: narrow nets, generated data, numbers that mean nothing."""
        return self.budget == "smoke"


def command(words: Sequence[str], compose: Compose) -> int:
    """`qbench paper list | CARD ... | all  [option=value ...]`; returns the exit status.

    compose: from overrides to the resolved configuration of a run.
    """
    named = [w for w in words if "=" not in w]
    if not named or named == ["list"]:
        print(pages.listing())
        return 0
    ask = _ask([w for w in words if "=" in w])
    chosen = cards.names() if named == ["all"] else named
    loaded = [cards.load(name) for name in chosen]
    wanted = ask.only.split(",")
    fitting = [(card, [r for r in card.runs if any(fnmatchcase(r.id, w) for w in wanted)]) for card in loaded]
    found = [(card, rows) for card, rows in fitting if rows]
    if not found:
        of = "any card" if named == ["all"] else " or ".join(card.name for card in loaded)
        ids = dict.fromkeys(r.id for card in loaded for r in card.runs)
        raise UserError(f"only={ask.only} fits no row of {of}: {', '.join(ids)}")
    status = 0
    with interrupt.time_limit(ask.limit):
        for card, rows in found:
            status = max(status, Study(card, ask, compose).do(rows))
            if status in (interrupt.STOPPED, interrupt.OUT_OF_TIME):
                break
    if not ask.plan:
        pages.write_index(ask.results, composed(compose))
    return status


def _ask(words: Sequence[str]) -> Ask:
    given = dict(w.split("=", 1) for w in words)
    for key in given:
        if key not in OPTIONS:
            raise unknown("option of qbench paper", key, OPTIONS)
    budget = given.get("budget", "short")
    if budget not in catalog.names("budget"):
        raise unknown("budget", budget, catalog.names("budget"))
    TIME.check("time_limit", given.get("time_limit"))
    out = given.get("out", "outputs")
    # numbers that mean nothing stay away from those that do
    results = Path(out, "papers") if budget == "smoke" else default_results()
    return Ask(
        budget=budget,
        seeds=_seeds(given.get("seeds", "1")),
        only=given.get("only", "*"),
        out=out,
        results=Path(given["results"]) if "results" in given else results,
        places=tuple(f"{k}={v}" for k, v in given.items() if k in PLACES),
        allow=allowed.packages(given.get("allow", "")),
        limit=seconds(given.get("time_limit")),
        **{k: _flag(k, given[k]) for k in ("plan", "draw") if k in given},
    )


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise UserError(f"{name} must be true or false, got '{text}'")
    return text.lower() == "true"


def _seeds(text: str) -> tuple[int, ...]:
    """'3' is the seeds 0, 1, 2; '0,4' these two; '4,' this one."""
    parts = [p for p in text.split(",") if p]
    if not parts or not all(p.isdigit() for p in parts) or text == "0":
        raise UserError(f"seeds must be how many (seeds=3: 0, 1, 2) or which (seeds=0,4 or seeds=4,), got '{text}'")
    return tuple(map(int, parts)) if "," in text else tuple(range(int(text)))


def words_of(row: Row, budget: str) -> list[str]:
    """The overrides of a row in a budget; with budget=paper its `paper` words win."""
    assert row.words is not None
    words = {w.partition("=")[0]: w for w in (*row.words, *(row.paper if budget == "paper" else ()))}
    return [*words.values(), f"budget={budget}"]


def trial_words(row: Row) -> list[str]:
    """The overrides of a row on a narrow net and generated data."""
    kept = [w for w in words_of(row, "smoke") if not w.startswith(("dataset", "model.width=", "model.depth="))]
    model = next((w.removeprefix("model=") for w in kept if w.startswith("model=")), "resnet20")
    narrow = next((v for k, v in NARROW.items() if model.startswith(k)), ())
    return [*kept, *narrow, "dataset=synthetic"]


def run_words(row: Row, budget: str) -> list[str]:
    """The overrides that are run: those of a trial with budget=smoke."""
    return trial_words(row) if budget == "smoke" else words_of(row, budget)


@cache
def composed(compose: Compose) -> SetupOf:
    """What decides a comparison, of a row in a budget, composed when it is first asked for."""
    return cache(lambda row, budget: setup(compose(words_of(row, budget))))


class Study:
    """One card on the way: its results.json, the runs that lie in `out`, and what is still to do."""

    def __init__(self, card: Card, ask: Ask, compose: Compose) -> None:
        self.card, self.ask, self.compose = card, ask, compose
        self.folder = ask.results / card.name
        self.kept = read(self.folder)
        # what is committed counts, but for what was run here again
        self.runs = {r["key"]: r for r in finished((ask.results, Path(ask.out))) if "key" in r}
        facts = {json.dumps([r["identity"]["data"], r["split"]]): r for r in self.runs.values()}
        self.examples = list(facts.values())  # one run for each data set
        self.configs: dict[tuple[str, str], dict[str, Any]] = {}

    def do(self, rows: Sequence[Row]) -> int:
        """Collect, run what is missing (not with draw or plan), draw; returns the exit status."""
        if self.ask.trial:
            for row in self.card.runs:
                self.config(row, "paper")  # every row must compose
            rows = _two(rows) if self.ask.only == "*" else rows
        self.collect(rows)
        if self.ask.plan:
            return self.plan(rows)
        status = 0 if self.ask.draw else self.run(rows)
        setup_of = composed(self.compose)
        print(f"\n{pages.screen(self.card, self.kept, self.ask.budget, setup_of)}\n")
        if self.kept.entries or self.kept.failed:
            self.save()
            print(pages.write(self.card, self.folder, setup_of))
        return status

    def config(self, row: Row, budget: str, seed: int = 0) -> dict[str, Any]:
        """The resolved configuration of a row; composed once, as no option but the seed depends on the seed."""
        if (row.id, budget) not in self.configs:
            try:
                words = [*run_words(row, budget), f"out={self.ask.out}", *self.ask.places]
                allowed.check_words(run_words(row, budget), "a card's words", self.ask.allow)
                self.configs[row.id, budget] = self.compose(words)
            except UserError as error:
                raise UserError(f"{self.card.name}, row '{row.id}': {error}") from error
        return {**self.configs[row.id, budget], "seed": seed}

    def collect(self, rows: Sequence[Row]) -> None:
        """Take over what lies finished in `out`, for all seeds and budgets known; mark what no longer fits."""
        known = {r["budget"] for r in (*self.runs.values(), *self.kept.entries)}
        budgets = {self.ask.budget} | known & {*catalog.names("budget")} - {"smoke"}
        for row in rows:
            for budget in sorted(budgets if not self.ask.trial else {"smoke"}):
                for e in self.kept.entries:
                    if (e["row"], e["budget"]) == (row.id, budget):
                        e["earlier"] = e["key"] != key_of(self.config(row, budget, e["seed"]), e["data"], e["split"])
                for seed in {r["seed"] for r in self.runs.values()}:
                    found = self.find(self.config(row, budget, seed))
                    with leaving_out():
                        if found is not None:
                            self.add(row, budget, found)

    def find(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished run of `config` among those in `out`."""
        keys = (key_of(config, r["identity"]["data"], r["split"]) for r in self.examples)
        return next((self.runs[k] for k in keys if k in self.runs), None)

    def done(self, row: Row, seed: int) -> str:
        """How the run is in results.json, made with the configuration of today; empty where it is not."""
        for e in self.kept.entries:
            if (e["row"], e["seed"], e["budget"]) == (row.id, seed, self.ask.budget) and not e["earlier"]:
                same = e.get("code") == code_hash(self.config(row, self.ask.budget, seed))
                return "done before" if same else "done before, by other code (results=DIR out=DIR: afresh, there)"
        return ""

    def add(self, row: Row, budget: str, result: Mapping[str, Any]) -> None:
        """Keep a result; one of the same row, seed, budget and key is replaced, none is ever dropped."""
        self.kept.add(entry(self.card, row, budget, result))

    def run(self, rows: Sequence[Row]) -> int:
        """Run what is missing, seed by seed; what fails is noted and stops nothing else."""
        todo = [(row, seed) for seed in self.ask.seeds for row in rows]
        failed = 0
        for i, (row, seed) in enumerate(todo, 1):
            title = f"[{i}/{len(todo)}] {self.card.name} {row.id} seed {seed}"
            if done := self.done(row, seed):
                print(f"{title}: {done}", flush=True)
                continue
            print(f"\n{title}: {' '.join(run_words(row, self.ask.budget))}", flush=True)
            try:
                if interrupt.out_of_time():
                    raise KeyboardInterrupt
                error = self.one(row, seed)
            except KeyboardInterrupt:
                why = "out of time" if interrupt.out_of_time() else "stopped"
                print(f"qbench: {why}; what is done is kept, see {self.folder}", file=sys.stderr)
                return interrupt.status()
            failed += error is not None
            self.kept.note(row.id, seed, self.ask.budget, error)
            self.save()
        return 1 if failed else 0

    def one(self, row: Row, seed: int) -> str | None:
        """Execute one run, or resume it; returns the error, if any, without folders."""
        from qbench.training.execute import execute

        try:
            self.add(row, self.ask.budget, execute(self.config(row, self.ask.budget, seed)))
        except interrupt.Interrupted as error:
            raise KeyboardInterrupt from error
        except Exception as error:
            if "debug=true" in self.ask.places:
                traceback.print_exc()
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(f"  failed: {text}", flush=True)
            return re.sub(r"(?:[\w.~-]*/)+(?=[\w.-])", "", text.splitlines()[0] if text else type(error).__name__)
        return None

    def plan(self, rows: Sequence[Row]) -> int:
        """Say what would be done."""
        print(f"{self.card.name}: {self.card.title}, budget={self.ask.budget}")
        for row in rows:
            for seed in self.ask.seeds:
                state = "done" if self.done(row, seed) else "to do"
                command = " ".join(run_words(row, self.ask.budget))
                print(f"  {state:<6} {row.id:<24} qbench {command} seed={seed}")
        print(f"  two cores: {self.card.cost['cpu']}\n  GPU: {self.card.cost['gpu']}")
        return 0

    def save(self) -> None:
        """Write results.json; what another study wrote there meanwhile stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".lock"):
            self.kept.merge(read(self.folder))
            atomic_write(self.folder / RESULTS, self.kept.text())


def _two(rows: Sequence[Row]) -> list[Row]:
    """Two rows of different methods where there are any, the float net last."""

    order = sorted(rows, key=lambda r: r.method == "float")
    other = next((r for r in order[1:] if r.method != order[0].method), None)
    return [*order[:1], *([other] if other else order[1:2])]
