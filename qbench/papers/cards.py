"""The cards of conf/paper: a paper's table or figure as data. No torch or Hydra here, so that listing them is quick.

A card holds its rows (what is run, and the number that was published), the notes on the paper's protocol, the claims
about the order of rows, what to plot, and what it costs. CONTRIBUTING.md describes the fields.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qbench.config import catalog
from qbench.errors import UserError, unknown

METRICS = ("accuracy", "error")
REPORTS = ("last", "best", "val", "unknown")
LEVELS = ("primary", "secondary", "memory")
KINDS = ("points", "dots", "drops", "curves")
# In what the runs of a claim may differ beside their methods; see `qbench.papers.setups`.
PARTS = (
    "start",
    "optimizer",
    "learning rate",
    "schedule",
    "epochs",
    "batch size",
    "weight decay",
    "loss",
    "net",
    "data",
)


@dataclass(frozen=True)
class Row:
    """One line of a table: what is run, and what was published.

    words: overrides of the run; None where the number stands for comparison only. paper: more of them with
    budget=paper. published: in the card's metric; None where no number was published. published_float: of its source's
    own float net, where the baseline's is of another source. differs: what sets our run apart from the paper's even
    with budget=paper. x, group: where the row stands in the figure.
    """

    id: str
    label: str
    words: tuple[str, ...] | None
    paper: tuple[str, ...] = ()
    published: float | None = None
    published_float: float | None = None
    source: str = ""
    level: str = "primary"
    baseline: str | None = None
    differs: str = ""
    x: float | None = None
    group: str = ""
    note: str = ""

    @property
    def method(self) -> str:
        """The method that is run; empty where nothing is."""
        return next((w.removeprefix("method=") for w in self.words or () if w.startswith("method=")), "")


@dataclass(frozen=True)
class Claim:
    """The paper's rows from best to worst, where `text` says so in words. about: which of `PARTS` it is about."""

    text: str
    order: tuple[str, ...]
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """points: accuracy over the number `x`, one line per group; dots: one line of the page per row; curves: accuracy
    over the epochs; drops: dots of what is lost against float, for rows of another net or data set than the paper's.
    log: of the x axis. histogram: the layer whose weights are drawn below, one panel per row.
    """

    kind: str = "dots"
    xlabel: str = ""
    log: bool = False
    histogram: str = ""

    def __post_init__(self) -> None:
        for name in ("kind", "xlabel", "histogram"):
            _text(f"figure.{name}", getattr(self, name))
        if self.kind not in KINDS:
            raise unknown("figure kind", self.kind, KINDS)
        if self.kind == "points" and not self.xlabel:
            raise UserError("a figure of kind 'points' needs an xlabel, with its unit")


@dataclass(frozen=True)
class Card:
    """A table or figure of a paper. noise: points that decide nothing, where more than the test images say."""

    name: str
    title: str
    paper: str
    arxiv: str
    where: str
    metric: str
    report: str
    tolerance: float
    protocol: tuple[str, ...]
    cost: Mapping[str, str]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    figure: Figure = field(default_factory=Figure)
    noise: float = 0.0

    def row(self, row_id: str) -> Row:
        return next(r for r in self.rows if r.id == row_id)

    @property
    def runs(self) -> tuple[Row, ...]:
        """The rows that are run."""
        return tuple(r for r in self.rows if r.words is not None)


TEXTS = ("label", "run", "paper", "source", "level", "baseline", "differs", "group", "note")
ROW_KEYS = (*(f.name for f in fields(Row) if f.name != "words"), "run", "over")
CARD_KEYS = (*(f.name for f in fields(Card) if f.name != "name"), "published", "run", "paper_run", "source", "level")


def names() -> list[str]:
    """The cards of conf/paper."""
    return sorted(path.stem for path in (catalog.conf_folder() / "paper").glob("*.yaml"))


@cache
def load(name: str) -> Card:
    """The card `name`, dashes or underscores, checked.

    Errors: UserError naming card, row and field.
    """
    name = name.replace("-", "_")
    if name not in names():
        raise unknown("card", name, names())
    return read(catalog.conf_folder() / "paper" / f"{name}.yaml")


def read(path: Path) -> Card:
    """The card in the file `path`, checked; see `load`."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _card(path.stem, yaml.load(path.read_text(encoding="utf-8"), loader))
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.name}: {type(error).__name__}: {error}; see CONTRIBUTING.md") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is not YAML: {error}") from error


def _card(name: str, content: Any) -> Card:
    if not isinstance(content, dict):
        raise UserError("a card is a mapping of fields")
    _known("field of a card", content, CARD_KEYS)
    needed = {f.name for f in fields(Card)} - {"name", "claims", "figure", "noise"}
    missing = sorted(needed - content.keys())
    if missing:
        raise UserError(f"the field '{missing[0]}' is missing")
    rows = tuple(_row(content, row) for row in _expanded(content["rows"]))
    _known("figure field", content.get("figure", {}), [f.name for f in fields(Figure)])
    card = Card(
        name=name,
        rows=rows,
        protocol=_texts("protocol", content["protocol"]),
        claims=tuple(map(_claim, content.get("claims", []))),
        figure=Figure(**content.get("figure", {})),
        cost={k: _text(f"cost.{k}", v) for k, v in content["cost"].items()},
        **{k: _text(k, content[k]) for k in ("title", "paper", "where", "metric", "report", "arxiv")},
        tolerance=_number("tolerance", content["tolerance"]),
        noise=_number("noise", content.get("noise", 0.0)),
    )
    _check(card, content.get("published"))
    return card


def _text(name: str, value: Any) -> str:
    """The text of a field; a number is taken as it is written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{name} must be text, got {value!r}; in YAML a text with ': ' in it needs quotes")
    return str(value)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise UserError(f"{name} must be a list of texts, got {values!r}")
    return tuple(_text(f"{name}, entry {i}", v) for i, v in enumerate(values, 1))


def _claim(content: Any) -> Claim:
    _known("field of a claim", content, [f.name for f in fields(Claim)])
    text = _text("text of a claim", content["text"])
    about = _texts(f"about of the claim '{text}'", content.get("about", []))
    for part in about:
        if part not in PARTS:
            raise unknown(f"part in about of the claim '{text}'", part, PARTS)
    return Claim(text, _texts(f"order of the claim '{text}'", content["order"]), about)


def _known(what: str, content: Any, keys: Any) -> None:
    strange = [k for k in content if k not in keys]
    if strange:
        raise unknown(what, str(strange[0]), keys)


def _expanded(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, with each that has `over: {name: values}` as one row per combination, {name} filled in.

    Where `published` of such a row is a mapping, it holds the numbers by row id.
    """
    for row in rows:
        if not isinstance(row, dict) or "id" not in row:
            raise UserError(f"a row needs an id, got {row!r}")
        over = row.get("over", {})
        for values in itertools.product(*over.values()):
            names = dict(zip(over, values, strict=True))

            def fill(value: Any, names: dict[str, Any] = names) -> Any:
                return value.format(**names) if isinstance(value, str) and names else value

            one = {k: fill(v) for k, v in row.items() if k != "over"}
            if isinstance(one.get("published"), dict):
                one["published"] = one["published"].get(one["id"])
            yield one


def _row(card: Mapping[str, Any], row: Mapping[str, Any]) -> Row:
    name = _text("id of a row", row["id"])
    _known(f"field of row '{name}'", row, ROW_KEYS)
    told = {k: _text(f"{k} of row '{name}'", row[k]) for k in TEXTS if row.get(k) is not None}
    common = {k: _text(k, card[k]) for k in ("run", "paper_run", "source", "level") if card.get(k) is not None}
    runs = "run" in told
    try:
        return Row(
            id=name,
            label=told.get("label", name),
            words=_merged(common.get("run"), told["run"]) if runs else None,
            paper=_merged(common.get("paper_run"), told.get("paper")) if runs else (),
            published=_float(row, "published"),
            published_float=_float(row, "published_float"),
            x=_float(row, "x"),
            source=told.get("source", common.get("source", "")),
            level=told.get("level", common.get("level", "primary")),
            **{k: told[k] for k in ("baseline", "differs", "group", "note") if k in told},
        )
    except ValueError as error:
        raise UserError(f"row '{name}': {error}") from error


def _float(row: Mapping[str, Any], name: str) -> float | None:
    return None if row.get(name) is None else _number(name, row[name])


def _number(name: str, value: Any) -> float:
    """A finite number, also where YAML takes it for a text (1e-3). Errors: ValueError."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number, got {value!r:.40}")
    return number


def _merged(common: str | None, own: str | None) -> tuple[str, ...]:
    """Words of the card and of the row, in which the row's win."""
    words = {w.partition("=")[0]: w for text in (common, own) for w in (text or "").split()}
    return tuple(words.values())


def _check(card: Card, published: Any) -> None:
    for name, value, allowed in (("metric", card.metric, METRICS), ("report", card.report, REPORTS)):
        if value not in allowed:
            raise unknown(name, value, allowed)
    ids = [r.id for r in card.rows]
    if not ids:
        raise UserError("a card needs rows")
    double = sorted({i for i in ids if ids.count(i) > 1})
    if double:
        raise UserError(f"the row id '{double[0]}' stands twice")
    if set(card.cost) != {"cpu", "gpu"}:
        raise UserError("cost needs 'cpu' (two cores) and 'gpu', in words that say estimate or measured")
    for row in card.rows:
        if row.published is not None and not row.source:
            raise UserError(f"row '{row.id}' has a published number and no source")
        if row.level not in LEVELS:
            raise unknown(f"level of row '{row.id}'", row.level, LEVELS)
        if row.baseline is not None and row.baseline not in ids:
            raise unknown(f"baseline of row '{row.id}'", row.baseline, ids)
        if row.published_float is not None and row.baseline is None:
            raise UserError(f"row '{row.id}' has a published_float and no baseline")
        if row.words is None and row.published is None:
            raise UserError(f"row '{row.id}' has neither a run nor a published number")
        if card.figure.kind == "points" and row.x is None and row.baseline is not None:
            raise UserError(f"row '{row.id}' has no x for the figure")
    for claim in card.claims:
        for name in claim.order:
            if name not in ids:
                raise unknown("row in a claim", name, ids)
    without = all(r.published is None for r in card.rows)
    if without != (published == "none"):
        raise UserError("say 'published: none' where, and only where, no row has a published number")
    if without and not card.claims:
        raise UserError("without published numbers a card needs claims: the shape is what is compared")
