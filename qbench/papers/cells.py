"""What the rows of a card came to, beside the published numbers: statuses and claims. No torch here."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from qbench.papers.cards import Card, Claim, Row
from qbench.papers.results import Kept, average
from qbench.papers.setups import SetupOf, differences

TRIAL = "trial on narrow nets and synthetic data"
TEST_IMAGES = {"imagenet": 50_000, "svhn": 26_032}  # 10,000 in all other data sets that cards use
# The status of a cell, and what it means.
STATUSES = {
    "match": "the paper's protocol, within the card's tolerance of the published number",
    "gap": "the paper's protocol, further away than that",
    "protocol differs": "trained shorter or otherwise than in the paper: compare what is lost against float",
    "earlier": "run with an earlier configuration of this row (†), to be run again: neither a match nor a gap",
    "unconfirmed": "the published number could not be checked against its source; it is no target",
    "no number": "the paper prints no number here; the claims below are what is compared",
    "comparison": "a published number of a method or net that is not run here",
    "trial": f"{TRIAL}: the numbers mean nothing",
    "failed": "the last attempt failed; the error stands below the table",
    "not run": "not run yet",
}


@dataclass(frozen=True)
class Cell:
    """One row in one budget: ours beside the published number. Accuracies in percent, gaps and drops in points.

    ours: what the paper reports (last or best epoch), mean over the seeds. gap: ours minus published, positive where
    ours is better. drop: what was lost against the float net of the same table; own: against our own float net.
    """

    row: Row
    entries: list[dict[str, Any]]
    ours: float | None = None
    last: float | None = None
    best: float | None = None
    spread: float | None = None
    gap: float | None = None
    drop: float | None = None
    own: float | None = None
    bits: float | None = None
    status: str = "not run"


def reported(card: Card, entry: Mapping[str, Any]) -> float | None:
    """The accuracy of a run at the epoch that the paper reports; the last where that one is not known."""
    name = {"best": "accuracy_best", "val": "accuracy_at_best_val"}.get(card.report, "accuracy_last")
    found: float | None = entry.get(name)
    return entry.get("accuracy_last") if found is None else found


def _mean(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return average(e.get(name) for e in entries)


def cells(card: Card, kept: Kept, budget: str) -> list[Cell]:
    """Every row of the card in a budget."""
    return [_cell(card, kept, row, budget) for row in card.rows]


def _cell(card: Card, kept: Kept, row: Row, budget: str) -> Cell:
    entries, base = kept.of(row, budget), card.row(row.baseline) if row.baseline else None
    values = [v for e in entries if (v := reported(card, e)) is not None]
    ours = average(values)
    published = accuracy(card, row.published)
    # where net or data are others than the paper's, only what is lost is comparable
    other = card.figure.kind == "drops" or budget == "smoke"
    gap = None if None in (ours, published) or other else ours - published  # type: ignore[operator]
    floats = _mean(entries, "float_accuracy") if base else None  # of its own parent, else of the float net of the card
    if floats is None and base:
        floats = average(reported(card, e) for e in kept.of(base, budget))
    above = accuracy(card, base.published if row.published_float is None else row.published_float) if base else None
    return Cell(
        row,
        entries,
        ours=ours,
        last=_mean(entries, "accuracy_last"),
        best=_mean(entries, "accuracy_best"),
        spread=stdev(values) if len(values) > 1 else None,
        gap=gap,
        drop=None if above is None or published is None else above - published,
        own=None if floats is None or ours is None else floats - ours,
        bits=_mean(entries, "bits_per_weight"),
        status=_status(card, kept, row, budget, gap),
    )


def accuracy(card: Card, value: float | None) -> float | None:
    """A published number as an accuracy in percent."""
    return 100 - value if value is not None and card.metric == "error" else value


def _status(card: Card, kept: Kept, row: Row, budget: str, gap: float | None) -> str:
    if row.words is None:
        return "comparison"
    entries = kept.of(row, budget)
    if not entries:
        failed = any(name.startswith(f"{row.id}, ") and name.endswith(f" {budget}") for name in kept.failed)
        return "failed" if failed else "not run"
    if budget == "smoke":
        return "trial"
    if any(e["earlier"] for e in entries):
        return "earlier"
    if row.published is None:
        return "no number"
    if row.level == "memory":
        return "unconfirmed"
    if budget != "paper" or row.differs:
        return "protocol differs"
    return "match" if gap is not None and abs(gap) <= card.tolerance + 1e-9 else "gap"


def verdict(card: Card, claim: Claim, found: Sequence[Cell], setup_of: SetupOf) -> str:
    """Whether the rows come out in the order claimed: holds | not run yet | undecided | does not hold, and where.

    Where the runs differ in more than their methods and what the claim is about, that may have decided the order: it is
    `confounded`, and by what. setup_of: `setups.setup` of a row in a budget, asked for where all rows have run.
    """
    if any(c.status == "trial" for c in found):
        return "a trial decides nothing"
    by_id = {c.row.id: c for c in found}
    rows = [by_id[name] for name in claim.order]
    if any(c.ours is None for c in rows):
        return "not run yet"
    if any(c.status == "earlier" for c in rows):
        return "not run yet with the configuration of today"
    budget = rows[0].entries[0]["budget"]
    beside = differences([setup_of(c.row, budget) for c in rows], claim.about)
    order = _order(card, rows) + _versions(rows)
    return f"confounded: {beside}; as run: {order}" if beside else order


def _order(card: Card, rows: Sequence[Cell]) -> str:
    """Which of the rows, from best to worst as claimed, are clearly in that order, and which are not."""
    wrong, close = [], []
    for a, b in itertools.pairwise(rows):
        assert a.ours is not None
        assert b.ours is not None
        d, least = a.ours - b.ours, noise(card, a, b)
        if d < -least:
            wrong.append(f"{b.row.id} is {-d:.2f} points above {a.row.id}")
        elif d <= least:
            close.append(f"{a.row.id} and {b.row.id} are {abs(d):.2f} points apart, noise is taken as {least:.2f}")
    if wrong:
        return "does not hold: " + "; ".join(wrong)
    return "undecided: " + "; ".join(close) if close else "holds"


def noise(card: Card, a: Cell, b: Cell) -> float:
    """The points within which a difference decides nothing: two standard errors of a difference of two accuracies, each
    measured on the test images, or what the card says where that is more. More seeds do not lower it: the images stay.
    """
    total = 0.0
    for c in (a, b):
        name = next((e["data"]["name"] for e in c.entries if "data" in e), "")
        total += (c.ours or 0.0) * (100 - (c.ours or 0.0)) / TEST_IMAGES.get(name, 10_000)
    return max(card.noise, 2 * math.sqrt(total))


def _versions(rows: Sequence[Cell]) -> str:
    """By how many versions of the code the rows of one method were computed, where it is more than one."""
    codes: dict[str, set[str]] = {}
    for c in rows:
        codes.setdefault(c.row.method, set()).update(e.get("code", "unknown") for e in c.entries)
    most = max(map(len, codes.values()))
    return f" (computed by {most} versions of the code)" if most > 1 else ""


def title(card: Card, budgets: Sequence[str]) -> str:
    """The title of the card; with budget=smoke alone neither nets nor data are those that it names."""
    return f"{TRIAL.capitalize()} for\n{card.title}" if [*budgets] == ["smoke"] else card.title
