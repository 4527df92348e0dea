"""The pages of a card: table.md, table.csv and the index. No torch here.

The pages are made from the card, what its rows are composed to (`setup_of`), results.json and, where there is one,
notes.md (written by hand); nothing else.
"""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.papers import cards, plots
from qbench.papers.cards import Card
from qbench.papers.cells import STATUSES, TRIAL, Cell, accuracy, cells, title, verdict
from qbench.papers.results import Kept, read
from qbench.papers.setups import SetupOf
from qbench.records import read_notes


def _number(card: Card, value: float | None, spread: float | None = None) -> str:
    """An accuracy in the metric of the card."""
    if value is None:
        return ""
    return f"{100 - value if card.metric == 'error' else value:.2f}" + (f" ± {spread:.2f}" if spread else "")


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def grid(card: Card, found: Sequence[Cell]) -> list[list[str]]:
    """The table as text, heading first."""
    unit = "error %" if card.metric == "error" else "%"
    what = {"best": "best test epoch", "val": "best validation epoch"}.get(card.report, "last epoch")
    split = {e.get("accuracy_at_best_val") is not None for c in found for e in c.entries}
    if card.report == "val" and False in split:  # `reported` falls back on the last
        what = "best validation epoch or last" if True in split else "last epoch"
    others = {"last epoch": "last", "best test epoch": "best"}
    others.pop(what, None)
    head = ["", f"published ({unit})", f"ours, {what} ({unit})", *others, "gap", "published - float", "ours - float"]
    lines = [[*head, "bits/weight", "status"]]
    for c in found:
        mark = {"memory": " (unconfirmed)", "secondary": " (quoted)"}.get(c.row.level, "")
        published = "" if c.row.published is None else f"{c.row.published:.2f}{mark}"
        seeds = f" ({len(c.entries)} seeds)" if len(c.entries) > 1 else ""
        earlier = " †" if any(e["earlier"] for e in c.entries) else ""
        ours = "" if c.ours is None else _number(card, c.ours, c.spread) + seeds + earlier
        shown = [c.row.label, published, ours, *(_number(card, getattr(c, o)) for o in others.values()), _points(c.gap)]
        shown += [_points(None if c.drop is None else -c.drop), _points(None if c.own is None else -c.own)]
        lines.append([*shown, "" if c.bits is None else f"{c.bits:.2f}", c.status])
    return lines


def screen(card: Card, kept: Kept, budget: str, setup_of: SetupOf) -> str:
    """The title, the table and the claims of one budget for the terminal."""
    found = cells(card, kept, budget)
    lines = grid(card, found)
    used = [i for i in range(len(lines[0])) if i == 0 or any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in used}
    text = ["  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in lines]
    text += [f"{verdict(card, c, found, setup_of)}: {c.text}" for c in card.claims]
    return "\n".join([title(card, [budget]), *text, *(f"failed: {k}: {v}" for k, v in sorted(kept.failed.items()))])


def write(card: Card, folder: Path, setup_of: SetupOf) -> Path:
    """Write table.md, table.csv and the figure; returns the page."""
    kept = read(folder)
    atomic_write(folder / "table.csv", table(card, kept))
    if drawable(card, kept):
        plots.draw(card, {b: cells(card, kept, b) for b in kept.budgets() or ["paper"]}, folder)
    return atomic_write(folder / "table.md", page(card, kept, setup_of, read_notes(folder)))


def drawable(card: Card, kept: Kept) -> bool:
    """Whether the figure would show anything."""
    return bool(kept.entries) or (card.figure.kind != "curves" and any(r.published is not None for r in card.rows))


def table(card: Card, kept: Kept) -> str:
    """Every row in every budget as CSV; numbers are accuracies in percent, gaps and drops points."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    names = ("ours", "spread", "last", "best", "gap", "drop", "own", "bits")
    lines.writerow(["card", "budget", "row", "published", "level", "source", "seeds", *names, "status"])
    for budget in kept.budgets() or ["paper"]:
        for c in cells(card, kept, budget):
            numbers = [getattr(c, n) for n in names]
            known = ["" if v is None else f"{v:.4f}" for v in (accuracy(card, c.row.published), *numbers)]
            facts = [c.row.level, c.row.source] if c.row.published is not None else ["", ""]
            lines.writerow([card.name, budget, c.row.id, known[0], *facts, len(c.entries), *known[1:], c.status])
    return out.getvalue()


def page(card: Card, kept: Kept, setup_of: SetupOf, notes: str = "") -> str:
    """table.md."""
    where = f"arXiv [{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv[:1].isdigit() else card.arxiv
    heading = title(card, kept.budgets()).replace("\n", " ")
    lines = [f"# {heading}", "", "<!-- generated by `qbench paper`; write notes.md instead -->", ""]
    lines += [
        f"{card.paper}, {where}, {card.where}. `qbench paper {card.name} budget=short` runs it, `budget=paper` as"
    ]
    lines += ["the paper says.", "", *([notes.strip(), ""] if notes.strip() else [])]
    if drawable(card, kept):
        lines += [f"![{heading}](figure.png)", ""]
    for budget in kept.budgets() or ["paper"]:
        lines += [*_section(card, kept, budget, setup_of), ""]
    lines += ["## Protocol", "", f"- The paper reports {_reported(card)}.", *(f"- {p}" for p in card.protocol)]
    lines += [f"- {r.label}: {text}." for r in card.rows for text in (r.differs, r.note) if text]
    lines += [f"- Tolerance of a match: {card.tolerance:g} points.", "", "## Cost", ""]
    lines += [f"- two cores: {card.cost['cpu']}", f"- GPU: {card.cost['gpu']}", "", "## Sources", ""]
    cited = dict.fromkeys((r.source, r.level) for r in card.rows if r.published is not None)
    lines += [f"- {source} ({level})" for source, level in cited] or ["- no number was published"]
    return "\n".join(lines) + "\n"


def _reported(card: Card) -> str:
    said = {"last": "the last epoch", "best": "the best test epoch", "val": "the best epoch on a validation split"}
    return said.get(card.report, "an epoch that it does not name; ours is the last")


def _section(card: Card, kept: Kept, budget: str, setup_of: SetupOf) -> list[str]:
    found = cells(card, kept, budget)
    head, *body = grid(card, found)
    lines = [
        f"## budget={budget}" + (f": {TRIAL}" if budget == "smoke" else ""),
        "",
        "| " + " | ".join(head) + " |",
        "| --- " + "| ---: " * (len(head) - 2) + "| --- |",
    ]
    lines += ["| " + " | ".join(line) + " |" for line in body]
    shown = [s for s in STATUSES if s in {c.status for c in found}]
    lines += ["", "; ".join(f"*{s}*: {STATUSES[s]}" for s in shown) + ". Differences are points of accuracy."]
    lines += _versions(found)
    failed = {k: v for k, v in sorted(kept.failed.items()) if k.endswith(f" {budget}")}
    lines += ["", *(f"- failed: {k}: {v}" for k, v in failed.items())] if failed else []
    claims = [f"- {c.text}: **{verdict(card, c, found, setup_of)}**" for c in card.claims]
    return [*lines, "", *claims] if claims else lines


def _versions(found: Sequence[Cell]) -> list[str]:
    """Which rows of a method were computed by other code than its rest: its own file, or the core, changed between."""
    lines = []
    for method in sorted({c.row.method for c in found}):
        by_code: dict[str, list[str]] = {}
        for c in found:
            for e in c.entries if c.row.method == method else ():
                seed = f", seed {e['seed']}" if len(c.entries) > 1 else ""
                by_code.setdefault(e.get("code", "unknown"), []).append(f"{c.row.label}{seed}")
        if len(by_code) > 1:
            rows = "; ".join(f"`{code}` {' and '.join(names)}" for code, names in by_code.items())
            lines += ["", f"`method={method}`, computed by {len(by_code)} versions of the code: {rows}."]
    return lines


def write_index(results: Path, setup_of: SetupOf) -> Path:
    """Write README.md of the results folder."""
    return atomic_write(results / "README.md", index(results, setup_of))


def index(results: Path, setup_of: SetupOf) -> str:
    """README.md: every card and how far it is, from the results.json in `results`."""
    lines = ["# Papers redrawn", "", "<!-- generated by `qbench paper` from the results.json of each card -->", ""]
    lines += ["| card | what | budget | done | match | gap | protocol differs | claims that hold |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    tried = False
    for card in _readable():
        kept = read(results / card.name)
        name = f"[{card.name}]({card.name}/table.md)" if kept.budgets() else card.name
        for budget in kept.budgets() or ["-"]:
            found = cells(card, kept, budget)
            states = [c.status for c in found]
            tried |= "trial" in states
            done = f"{sum(bool(c.entries) for c in found)} of {len(card.runs)}"
            held = sum(verdict(card, c, found, setup_of).startswith("holds") for c in card.claims)
            counts = [str(states.count(s)) for s in ("match", "gap", "protocol differs")]
            claims = f"{held} of {len(card.claims)}" if card.claims else ""
            lines.append(f"| {' | '.join([name, card.title, budget, done, *counts, claims])} |")
    # no trial is committed
    lines += ["", *(f"- *{name}*: {text}" for name, text in STATUSES.items() if name != "trial" or tried)]
    return "\n".join(lines) + "\n"


def _readable() -> Iterator[Card]:
    """Every card; one that is not whole is named and left out, so that it stands in the way of itself alone."""
    for name in cards.names():
        try:
            yield cards.load(name)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)


def listing() -> str:
    """What `qbench paper list` prints."""
    lines = ["CARDS (qbench paper NAME budget=short|paper seeds=N only=ROWS out=DIR results=DIR plan=true draw=true)"]
    for card in _readable():
        lines.append(f"  {card.name:<24} {card.title}  [{len(card.runs)} runs]")
        lines.append(f"  {'':<24} two cores: {card.cost['cpu']}")
        lines.append(f"  {'':<24} GPU: {card.cost['gpu']}")
    return "\n".join(lines)
