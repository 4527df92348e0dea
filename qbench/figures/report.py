"""Tables of what lies in result.json files, and what differs between two runs. No torch here."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from qbench.errors import UserError
from qbench.records import read_config, read_manifest, read_result

COLUMNS = (
    "method",
    "bits W/A",
    "model",
    "dataset",
    "budget",
    "float",
    "before",
    "after",
    "best",
    "bits/weight",
    "bytes",
)
PICTURES = ("curves", "units", "histograms", "activations", "telemetry")  # of a run, in its folder
SHOWN = ("method", "w_bits", "a_bits", "model", "dataset", "budget")
ACCURACIES = {
    "float": "float_accuracy",
    "before": "accuracy_before_training",
    "after": "accuracy_last",
    "best": "accuracy_best",
}
LEARNED = ("w_bits_learned", "a_bits_learned", "bits_per_weight", "bytes")  # each seed may learn its own
AXES = ("method", "w_bits", "a_bits", "model", "dataset", "budget", "protocol", "init")


def percent(value: float | None) -> str:
    """An accuracy with two digits, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def width(result: Mapping[str, Any], site: str) -> str:
    """The bits of a run's weights ('w') or activations ('a') in a table.

    '4' as asked for, '4+' where single layers have others (`layer_bits`), '4.3*' as learned.
    """
    learned = result.get(f"{site}_bits_learned")
    mixed = "+" if result.get("identity", {}).get("layer_bits") else ""
    return f"{result[f'{site}_bits']:g}{mixed}" if learned is None else f"{learned:.1f}*"


def tell(folder: Path, result: Mapping[str, Any], line: Callable[[str], None]) -> None:
    """The whole story of one run, a few lines."""
    line("")
    widths = f"W{width(result, 'w')} A{width(result, 'a')}"
    line(f"  {result['method']}  {widths}  {result['model']}  {result['dataset']}")
    after = percent(result["accuracy_last"])
    trained = result["epoch_best"] is not None
    if result["method"] == "float":
        line(f"  accuracy              {after:>7} %   (last epoch)")
    else:
        line(f"  float parent          {percent(result['float_accuracy']):>7} %")
        line(f"  before training       {percent(result['accuracy_before_training']):>7} %   (calibrated only)")
        line(
            f"  after training        {after:>7} %   (last epoch)"
            if trained
            else "  after training              -     (none)"
        )
    if trained:
        line(f"  best test epoch       {percent(result['accuracy_best']):>7} %   (epoch {result['epoch_best']:.4g})")
    for site, what in (("w", "weights"), ("a", "activations")):
        if f"{site}_bits_learned" in result:
            learned, asked = result[f"{site}_bits_learned"], result[f"{site}_bits"]
            line(f"  learned bits          {learned:>7.2f}     (mean of the {what}' codes; asked for: {asked:g})")
    line(
        f"  bits per weight       {result['bits_per_weight']:>7.2f}     (quantized layers, scales and padding counted)"
    )
    line(f"  bytes                 {result['bytes']:>7,}     (whole net, packed)")
    if result["method"] != "float" and (floats := _float_inputs(folder)):
        line(f"  float inputs          {floats}     (convolutions and linear layers; manifest.json says why)")
    line(f"  seconds               {result['seconds']:>7.0f}")
    if str(result.get("device", "cpu")).startswith("cuda") and "images_per_s" in result:
        line(f"  images/s              {result['images_per_s']:>7,}     (evaluations and records included)")
    pictures = [str(path) for name in PICTURES for path in sorted(folder.glob(f"{name}.*"))]
    line(f"  pictures              {'  '.join(pictures) or '-'}")
    line(f"  everything            {folder}")


def _float_inputs(folder: Path) -> str:
    """How many layers of a run compute on float inputs, "19 of 53"; empty where its manifest does not say."""
    manifest = read_manifest(folder)
    return f"{len(manifest['float_inputs'])} of {manifest['layers']}" if "layers" in manifest else ""


def _spread(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        return "-"
    return f"{mean(numbers):.2f}" + (f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else "")


def once(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results without copies of a run: its key names all that decides its numbers, the seed too."""
    seen: dict[Any, Mapping[str, Any]] = {}
    for i, result in enumerate(results):
        seen.setdefault(result.get("key") or i, result)
    return [*seen.values()]


def settings(results: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The results by setting, in order of appearance: those of one setting differ in nothing but the seed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in once(results):
        groups.setdefault(json.dumps([[result.get(k) for k in AXES], _decides(result)], sort_keys=True), []).append(
            result
        )
    return [*groups.values()]


def _typical(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first result of a setting, but the mean over its seeds of what each may have learned."""
    return {**group[0], **{k: mean(r[k] for r in group) for k in LEARNED if k in group[0]}}


def _decides(result: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.get("identity", {}).items() if k not in ("seed", "init", "teacher")}


def varies(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of each setting what tells it from those that look like it in the other columns: {option: value}.

    What follows from the options, the rules of a method, is named where nothing else differs.
    """
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    leaves = []
    for group in groups:
        found = {k: group[0][k] for k in ("protocol", "init") if k in group[0]}
        found |= {k.replace("recipe.", "train.", 1): v for k, v in flat(_decides(group[0])).items()}
        leaves.append(found)
        alike.setdefault(tuple(group[0].get(k) for k in SHOWN), []).append(found)
    out = []
    for group, mine in zip(groups, leaves, strict=True):
        others = alike[tuple(group[0].get(k) for k in SHOWN)]
        keys = [k for k in mine if any(o.get(k) != mine[k] for o in others)]
        told = [k for k in keys if not k.startswith("method.")] or keys
        out.append({k: mine[k] for k in told})
    return out


def misnamed(result: Mapping[str, Any]) -> str:
    """Where no rule gives weights the bits that the run is named by: what they have instead; else nothing."""
    found = result.get("identity", {}).get("method", {}).get("rules", [])
    rules = [r for r in found if isinstance(r, Mapping)]
    slots = [r[k] for r in rules for k in ("weight", "replace") if isinstance(r.get(k), Mapping)]
    given = [r["weight"].get("bits") for r in rules if isinstance(r.get("weight"), Mapping)]
    widths = {w for w in given if w is None or isinstance(w, (int, float))}
    named = result["w_bits"]
    if not rules or named == 32 or named in widths or None in widths or (slots and not widths):
        return ""  # a slot without bits of its own computes them from what it is told
    told = f"of {' and '.join(map(digits, sorted(w for w in widths if w is not None)))} bits" if widths else "in float"
    return f"weights {told}, not of {named:g}"


def rows(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """One row per setting, mean ± sample standard deviation over its seeds; settings in order of appearance.

    Runs that differ in anything but the seed (learning rate, options, data) stand in rows of their own; the last cell
    says in what.
    """
    groups = settings(results)
    table = []
    for group, differs in zip(groups, varies(groups), strict=True):
        r = _typical(group)
        method = r["method"] if len(group) == 1 else f"{r['method']} ({len(group)} seeds)"
        cells = [method, f"{width(r, 'w')}/{width(r, 'a')}", r["model"], r["dataset"], r["budget"]]
        cells += [_spread([g.get(key) for g in group]) for key in ACCURACIES.values()]
        told = ", ".join([*filter(None, [misnamed(r)]), *(f"{k}={digits(v)}" for k, v in differs.items())])
        table.append([*cells, f"{r['bits_per_weight']:.2f}", f"{round(r['bytes']):,}", told])
    return table


def records(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows for a machine: what varies as a dictionary, accuracies seed by seed."""
    groups = settings(results)
    return [
        {
            **{k: _typical(g).get(k) for k in (*SHOWN, *LEARNED)},
            "varies": differs,
            "seeds": [r.get("seed") for r in g],
            **{key: [r.get(key) for r in g] for key in ACCURACIES.values()},
        }
        for g, differs in zip(groups, varies(groups), strict=True)
    ]


def table(results: Iterable[Mapping[str, Any]], others: Iterable[list[str]] = (), form: str = "text") -> str:
    """The rows in one of `FORMATS`; `others` are rows of what has no result (failed, n/a)."""
    results = list(results)
    if form == "json":
        return json.dumps(records(results), indent=1)
    head = [*COLUMNS, "varies"]
    short = {tuple([*r, *[""] * (len(head) - len(r))]): None for r in others}  # seeds of a cell make one row
    lines = [head, *rows(results), *map(list, short)]
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    return FORMATS[form](lines)


def _text(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = {0, 2, 3, 4, len(COLUMNS)}
    text = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    notes = ["*: learned, the mean over the codes"] if any("*" in line[1] for line in lines) else []
    return "\n".join([text[0].rstrip(), "-" * len(text[0]), *(t.rstrip() for t in text[1:]), *notes])


def _csv(lines: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue().rstrip("\n")


def _markdown(lines: list[list[str]]) -> str:
    said = [[c.replace("|", r"\|") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [said[0], ["---"] * len(said[0]), *said[1:]])


def _latex(lines: list[list[str]]) -> str:
    signs = {**{c: rf"\{c}" for c in "&%$#_{}"}, "±": r"$\pm$", "~": r"\textasciitilde{}", "\\": r"\textbackslash{}"}
    said = [" & ".join("".join(signs.get(c, c) for c in cell) for cell in line) + r" \\" for line in lines]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(lines[0])}}}", said[0], r"\hline", *said[1:], r"\end{tabular}"])


FORMATS = {"text": _text, "csv": _csv, "md": _markdown, "latex": _latex, "json": _text}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: leaf} of dictionaries and lists within each other; a list of plain values is a leaf."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(v, (list, Mapping)) for v in value):
        parts = enumerate(value)
    else:
        return {prefix.rstrip("."): value}
    return {k: v for key, part in parts for k, v in flat(part, f"{prefix}{key}.").items()}


# What is compared, in this order: what was asked for, what came out, where and by what it was computed.
ASKED = ("method", "w_bits", "a_bits", "model", "dataset", "budget", "protocol", "init", "seed", "options", "train")
CAME = (*ACCURACIES.values(), "accuracy_at_best_val", "epoch_best", "val_best", "extra", *LEARNED)
WHERE = (
    "device",
    "threads",
    "workers",
    "precision",
    "kernels",
    "graph",
    "compile",
    "torch",
    "version",
    "code",
    "resumed",
    "seconds",
)
# Neither asked for nor an outcome: what follows from the rest, and what a run keeps for itself.
INNER = (
    "identity",
    "out",
    "force",
    "figures",
    "auto",
    "weights_sha256",
    "key",
    "method.title",
    "method.summary",
    "method.arxiv",
)


def compare(a: Path, b: Path) -> str:
    """What differs between two runs, leaf by leaf, as text in three columns; what matters most stands first."""
    pair = [_leaves(folder) for folder in (a, b)]
    keys = [k for k in dict.fromkeys([*pair[0], *pair[1]]) if pair[0].get(k) != pair[1].get(k)]
    if len({p["method.name"] for p in pair}) > 1:  # then everything of the method's own differs
        keys = [k for k in keys if k == "method.name" or not k.startswith("method.")]
    if not keys:
        return "no difference"
    order = (*ASKED, *CAME, *WHERE)
    rank = {word: i for i, word in enumerate(order)}
    keys.sort(key=lambda k: (rank.get(k, rank.get(k.partition(".")[0], len(order))), k != "method.name", k))
    lines = [("", a.name, b.name)]
    for key in keys:
        x, y = (p.get(key) for p in pair)
        note = f"  ({y - x:+.4g})" if x is not None and y is not None and _number(x) and _number(y) else ""
        lines.append((key, digits(x), digits(y) + note))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return "\n".join(f"{k:<{widths[0]}}  {x:<{widths[1]}}  {y}".rstrip() for k, x, y in lines)


def _leaves(folder: Path) -> dict[str, Any]:
    """What a run was asked and what it came to, leaf by leaf."""
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder} is not a finished run: it has no result.json")
    config, result = read_config(folder), read_result(folder / "result.json")
    whole = flat({**{k: v for k, v in result.items() if k not in config}, **config})
    return {k: v for k, v in whole.items() if not k.startswith(tuple(f"{i}." for i in INNER)) and k not in INNER} | {
        k: result[k] for k in ("threads", "device", "kernels", "graph") if k in result
    }


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def digits(x: Any) -> str:
    """A value with at most six digits; a dash where there is none."""
    if isinstance(x, float):
        return f"{x:.6g}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(digits, x))}]"
    return "-" if x is None else str(x).lower() if isinstance(x, bool) else str(x)
