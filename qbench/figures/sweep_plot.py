"""The picture of a sweep: accuracy over bits, a line of points per method, error bars over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qbench.figures.drawing import DASHES, page
from qbench.figures.report import digits, settings, varies


def sweep(path: Path, results: Iterable[Mapping[str, Any]], *, dpi: int = 150, forms: Sequence[str] = ("png",)) -> bool:
    """Draws `path` from results of runs; False, and nothing is drawn, where no run has an accuracy.

    Settings that share method, net and what varies make a line; widths (weights/activations) stand in ascending order,
    as they were asked for where bits are learned.
    """
    groups = settings(results)
    lines: dict[str, dict[tuple[float, float], list[float]]] = {}
    for group, differs in zip(groups, varies(groups), strict=True):
        found = [r["accuracy_last"] for r in group if r.get("accuracy_last") is not None]
        learned = any(f"{site}_bits_learned" in group[0] for site in "wa")
        method = group[0]["method"] + learned * " (learned, from these bits)"
        names = [method, *(f"{k}={digits(v)}" for k, v in differs.items())]
        if len({(g[0]["model"], g[0]["dataset"]) for g in groups}) > 1:
            names.insert(1, f"{group[0]['model']} on {group[0]['dataset']}")
        if found:
            lines.setdefault(", ".join(names), {})[group[0]["w_bits"], group[0]["a_bits"]] = found
    widths = sorted({width for line in lines.values() for width in line})
    if not widths:
        return False
    with page(path, (5, 3 + 0.15 * len(lines)), dpi=dpi, forms=forms) as figure:
        axes = figure.subplots()
        for i, (name, line) in enumerate(lines.items()):
            at = [widths.index(w) + 0.06 * (i - (len(lines) - 1) / 2) / max(1, len(lines) / 4) for w in sorted(line)]
            values = [line[w] for w in sorted(line)]
            errors = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            style = DASHES[i % len(DASHES)]
            axes.errorbar(
                at, list(map(mean, values)), errors, fmt="o", linestyle=style, linewidth=0.8, capsize=2, label=name
            )
        axes.set_xticks(range(len(widths)), [f"{w:g}/{a:g}" for w, a in widths])
        axes.set_xlim(-0.5, len(widths) - 0.5)
        axes.set_xlabel("bits of weights / activations")
        axes.set_ylabel("test accuracy, last epoch (%)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16 * 3 / figure.get_figheight() * 1.2))
        share = (0.6 + 0.16 * len(lines)) / figure.get_figheight()
        figure.subplots_adjust(left=0.12, right=0.97, top=0.96, bottom=min(0.7, share + 0.1))
    return True
