"""The figure of a card: ours filled, the published hollow and dashed, so that they are told apart in grey too."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.figures.drawing import DASHES, STYLE, edges, label_epochs, latent_name, page, relative
from qbench.papers.cards import Card
from qbench.papers.cells import TRIAL, Cell, accuracy, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Dark enough on white, apart in lightness: Okabe and Ito's blue, vermilion, green, purple, and two greys.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "0.25", "#E69F00", "0.55", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.1}


def draw(card: Card, budgets: Mapping[str, Sequence[Cell]], folder: Path) -> Path:
    """Write figure.png and figure.pdf: a panel per budget, and below, where the card asks for it, histograms."""
    kind = {"points": _points, "dots": _dots, "drops": _dots, "curves": _curves}[card.figure.kind]
    shown = {b: cells for b, cells in budgets.items() if _ran(card, cells)} or dict(budgets)
    height = max(3.0, 1.3 + 0.19 * len(card.rows)) if card.figure.kind in ("dots", "drops") else 3.2
    with_histograms = [c for cells in shown.values() for c in cells if _histogram(c)]
    below = 1.9 if with_histograms else 0
    path, size = folder / "figure.png", (1.6 + 3.7 * len(shown), height + below)
    heading = title(card, list(shown))
    with page(path, size, heading, dpi=150, forms=("png", "pdf"), layout="constrained") as figure:
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, below]) if below else [figure]
        axes = list(parts[0].subplots(1, len(shown), sharey=True, squeeze=False)[0])
        for panel, (budget, cells) in zip(axes, shown.items(), strict=True):
            kind(panel, card, cells)
            panel.set_title(_heading(budget, [c for c in cells if c.entries] if _ran(card, cells) else []))
        handles: dict[str, Any] = {}
        for panel in axes:
            handles |= {str(t): h for h, t in zip(*panel.get_legend_handles_labels(), strict=True) if t not in handles}
        if card.figure.kind == "points":
            handles = _keys(handles)
        each = next(n for most, n in ((3, 3), (8, 2), (math.inf, 3)) if len(handles) <= most)  # columns below a panel
        columns = max(1, min(len(handles), each * len(shown)))
        parts[0].legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
        if below:
            _histograms(parts[1], card, with_histograms)
    return path


def _keys(handles: Mapping[str, Any]) -> dict[str, Any]:
    """A legend of lines called "GROUP, KIND": each group once, by colour and mark, then what the kinds look like.

    Where there is but one group or one kind the lines keep their names.
    """
    from matplotlib.lines import Line2D

    parts = {label: label.rpartition(", ")[::2] for label in handles}
    if min(len({part[i] for part in parts.values()}) for i in (0, 1)) < 2:
        return dict(handles)
    keys: dict[str, Any] = {}
    for label, (group, _) in parts.items():
        line = next(iter(getattr(handles[label], "lines", [handles[label]])))  # of error bars, or of a plain plot
        mark = {
            "marker": line.get_marker(),
            "linestyle": line.get_linestyle() if line.get_marker() == "None" else "none",
        }
        keys.setdefault(group, Line2D([], [], color=line.get_color(), markersize=5, linewidth=0.9, **mark))
    looks = {"published": {**HOLLOW, "linestyle": "--"}, "unconfirmed": {**HOLLOW, "linestyle": ":"}}
    looks["ours"] = {"linestyle": "-"}
    used = {kind for _, kind in parts.values()}
    for kind, look in looks.items():
        if kind in used:
            keys[kind] = Line2D([], [], color="black", marker="o", markersize=5, linewidth=0.9, **look)
    return keys


def _ran(card: Card, cells: Sequence[Cell]) -> list[Cell]:
    """The cells with a number of ours in the figure; where drops are drawn, the float net has none."""
    return [c for c in cells if (c.own if card.figure.kind == "drops" else c.ours) is not None]


def _heading(budget: str, cells: Sequence[Cell]) -> str:
    seeds = {len(c.entries) for c in cells}
    if not seeds:
        return "published; not run yet"
    epochs = sorted({e["epochs"] for c in cells for e in c.entries if e.get("epochs")})
    length = f", {'/'.join(f'{e:g}' for e in epochs)} epochs" if epochs else ""
    trial = f" ({TRIAL})" if budget == "smoke" else ""
    count = "-".join(map(str, sorted({min(seeds), max(seeds)})))
    return f"budget {budget}{trial}{length}, {count} seed{'s' * (max(seeds) > 1)}"


def _groups(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(c.row.group for c in cells))


def _unit(card: Card) -> str:
    return f"test accuracy ({'100 - error, ' if card.metric == 'error' else ''}%)"


def _points(axes: "Axes", card: Card, cells: Sequence[Cell]) -> None:
    """Accuracy over x, one line per group; rows without x, the float nets, as level lines."""
    for i, group in enumerate(_groups([c for c in cells if c.row.x is not None])):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        own = sorted(((c.row.x, c) for c in cells if c.row.group == group and c.row.x is not None), key=itemgetter(0))
        for sure, dash, word in ((True, "--", "published"), (False, ":", "unconfirmed")):
            told = [(x, accuracy(card, c.row.published), c) for x, c in own]
            told = [p for p in told if p[1] is not None and (p[2].row.level != "memory") == sure]
            if told:
                style = {**HOLLOW, "color": colour, "marker": marker, "linestyle": dash, "linewidth": 0.9}
                label = f"{group}, {word}".lstrip(", ")
                axes.plot([p[0] for p in told], [p[1] or 0 for p in told], label=label, markersize=5, **style)
        ran = [(x, c.ours, c.spread or 0) for x, c in own if c.ours is not None]
        if ran:
            style = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2}
            x, y, error = ([p[k] for p in ran] for k in range(3))
            axes.errorbar(x, y, error if any(error) else None, label=f"{group}, ours".lstrip(", "), **style)
    for i, cell in enumerate(c for c in cells if c.row.x is None and c.row.group):
        values = (accuracy(card, cell.row.published), "--", "published"), (cell.ours, "-", "ours")
        for value, dash, word in values:
            if value is not None:
                style = {"color": str(0.25 + 0.3 * (i % 2)), "linestyle": dash, "linewidth": 0.9, "zorder": 1}
                axes.axhline(value, label=f"{cell.row.label}, {word}", **style)
    places = sorted({c.row.x for c in cells if c.row.x is not None})
    if card.figure.log:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(places) <= 8:
        axes.set_xticks(places, [f"{x:g}" for x in places])
    axes.set_xlabel(card.figure.xlabel)
    axes.set_ylabel(_unit(card))


def _dots(axes: "Axes", card: Card, cells: Sequence[Cell]) -> None:
    """One line of the page per row: published hollow, ours filled, joined where both are there."""
    drops = card.figure.kind == "drops"
    cells = [c for c in cells if c.row.baseline or not drops]
    for y, cell in enumerate(reversed(cells)):
        published, ours = accuracy(card, cell.row.published), cell.ours
        if drops:
            published, ours = (None if v is None else -v for v in (cell.drop, cell.own))
        if published is not None and ours is not None:
            axes.plot([published, ours], [y, y], color="0.7", linewidth=0.8, zorder=1)
        if published is not None:
            sure = cell.row.level != "memory"
            style = {**HOLLOW, "color": "black", "linestyle": "none", "markersize": 6}
            label = "published" if sure else "published, unconfirmed"
            axes.plot(published, y, marker="o" if sure else "D", label=label, **style)
        if ours is not None:
            style = {"color": COLOURS[0], "marker": "s", "markersize": 4.5, "linestyle": "none", "capsize": 2}
            axes.errorbar(ours, y, xerr=cell.spread or None, label="ours", **style)
    axes.set_yticks(range(len(cells)), [c.row.label for c in reversed(cells)])
    axes.set_ylim(-0.6, len(cells) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy less that of the float net (points)" if drops else _unit(card))


def _curves(axes: "Axes", card: Card, cells: Sequence[Cell]) -> None:
    """Test accuracy over the epochs, the first seed of each row; published final numbers as hollow marks at the end."""
    nothing: dict[str, list[float]] = {"epoch": [], "test_accuracy": []}
    courses = [next((e["course"] for e in c.entries if e.get("course")), nothing) for c in cells]
    top = max((x for course in courses for x in course["epoch"]), default=1)
    seen: list[float] = []
    early: list[float] = []  # they would flatten the rest
    for i, (cell, course) in enumerate(zip(cells, courses, strict=True)):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        epochs, scores = course["epoch"], course["test_accuracy"]
        if epochs:
            marker = "o" if len(epochs) == 1 else None  # one evaluation alone makes no line
            axes.plot(epochs, scores, color=colour, linestyle=dash, marker=marker, label=cell.row.label)  # type: ignore[arg-type]
        for x, y in zip(epochs, scores, strict=True):
            (seen if x >= 0.25 * top else early).append(y)
        if (published := accuracy(card, cell.row.published)) is not None:
            axes.plot(top, published, color=colour, marker="o", **HOLLOW)
            seen.append(published)
    label_epochs([axes])
    if early or len(seen) > 1:
        span = max(seen) - min(seen) or 1.0
        axes.set_ylim(min(seen) - 0.08 * span, max(seen) + 0.08 * span)
        if min(early, default=100.0) < axes.get_ylim()[0]:
            axes.set_xlabel("epoch (of the first, some lie below)")
    axes.set_ylabel(_unit(card))


def _histogram(cell: Cell) -> dict[str, Any] | None:
    return next((e["histogram"] for e in cell.entries if e.get("histogram")), None)


def _histograms(figure: Any, card: Card, cells: Sequence[Cell]) -> None:
    """The latent weights of one layer at the end of training, a panel per row, on a common axis."""
    panels = figure.subplots(1, len(cells), sharex=True, squeeze=False)[0]
    latent = latent_name({k: v for c in cells for k, v in (_histogram(c) or {}).items()})  # one method, one name
    for i, (panel, cell) in enumerate(zip(panels, cells, strict=True)):
        found = _histogram(cell) or {}
        panel.stairs(relative(found), edges(found), fill=True, color="0.45")
        panel.set_title(cell.row.label)
        panel.set_yticks([0, 1])
        if i == 0:
            panel.set_ylabel("frequency\n(peak = 1)")
        panel.locator_params(axis="x", nbins=4)
    figure.supxlabel(f"{latent} of {card.figure.histogram}", fontsize=STYLE["axes.labelsize"])
