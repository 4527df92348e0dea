"""The page of a benchmark file: tables in Markdown, nothing that is not in the entries."""

from collections.abc import Iterable, Mapping
from typing import Any

from qbench.config import catalog

Entry = Mapping[str, Any]
HEAD = """\
# Benchmarks

Made from `benchmarks.json` by `make bench-page`; measured with `make bench`. A ratio of times is the median over rounds
in which both sides had their turn in one process, so that a slow minute of the machine hits both; one of accuracies is
that of their means. The stock step is that of a plain PyTorch loop over the same net, with its shortcuts written as
slices, as the usual code has them. `make bench-check` holds a later version to these ratios.
"""
SECTIONS = {
    "float": "Float nets: what precision and memory format do",
    "step": "The training step of every method, relative to the stock float step of the same net and precision",
    "peer": "The same net in other libraries, relative to the same step",
    "depthwise": "Nets of depthwise convolutions, batch 32",
    "memory": "Peak memory of a training step, beside parameters, optimizer state and the batch",
    "data": "Data",
    "cost": "Checkpoints and records, as a share of the training that they interrupt",
    "start": "The start of the program",
    "sweep": "A sweep of twelve runs",
    "busy": "A plain float step beside other programs, by how OpenMP's threads wait",
    "accuracy": "What bf16 and the kernels cost in accuracy",
    "gpu": "On a GPU",
}


def page(entries: Iterable[Entry]) -> str:
    """The whole page, ending in a newline."""
    entries = list(entries)
    parts = [HEAD, _machines(entries)]
    for prefix, title in SECTIONS.items():
        own = [e for e in entries if e["name"].partition("/")[0] == prefix]
        if own:
            table = _steps(own) if prefix in ("step", "peer") else _plain(own)
            parts += [f"## {title}\n", table, *_notes(own)]
    return "\n".join(parts)


def _machines(entries: list[Entry]) -> str:
    seen = []
    for e in entries:
        m = e["machine"]
        text = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}"
        text += f", {m['gpu']}" if "gpu" in m else ""
        if text not in seen:
            seen.append(text)
    return "Machine: " + "; ".join(seen) + ". Batch 128 and channels_last where nothing else is said.\n"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _plain(entries: list[Entry]) -> str:
    """One row per entry."""
    head = ["what", "mode", "ratio", "time", "images/s", "memory", "accuracy", "against"]
    rows = [
        [
            e["name"],
            _mode(e),
            f"{e['ratio']:.3g}",
            _seconds(e["seconds"]) if "seconds" in e else "",
            _speed(e),
            _memory(e),
            _accuracy(e, ""),
            _accuracy(e, "base_"),
        ]
        for e in entries
    ]
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return _rows([head[i] for i in used], [[row[i] for i in used] for row in rows])


def _mode(e: Entry) -> str:
    return e["mode"] if e.get("model") in (None, "resnet20") else f"{e['mode']} {e['model']}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _speed(e: Entry) -> str:
    return f"{e['images_per_s']:,.0f}" if "images_per_s" in e else ""


def _memory(e: Entry) -> str:
    values = e.get("values") or {}
    return f"{values['bytes'] / 2**20:.0f} MiB" if "bytes" in values else ""


def _accuracy(e: Entry, which: str) -> str:
    values = e.get("values") or {}
    return f"{values[f'{which}mean']:.2f} ± {values[f'{which}std']:.2f} %" if f"{which}std" in values else ""


def _steps(entries: list[Entry]) -> str:
    """One row per method and net, one column per mode."""
    modes = sorted({e["mode"] for e in entries}, key=lambda m: (m.startswith("bf16"), m))
    cells: dict[tuple[str, str], dict[str, Entry]] = {}
    for e in entries:
        cells.setdefault((e["name"].partition("/")[2], e["model"]), {})[e["mode"]] = e
    rows = []
    for (name, model), by in sorted(cells.items(), key=lambda item: (item[0][1] != "resnet20", *item[0][::-1])):
        first = next(iter(by.values()))
        bits = f"{first['values']['w_bits']:g}/{first['values']['a_bits']:g}"
        best = max(by.values(), key=lambda e: e["images_per_s"])
        ratios = [f"{by[m]['ratio']:.2f}" if m in by else "" for m in modes]
        rows.append([f"{name} {bits}", model, *ratios, _speed(best)])
    return _rows(["method, bits W/A", "net", *modes, "images/s at best"], rows)


def _notes(entries: list[Entry]) -> list[str]:
    """What the ratios are relative to, and why a method costs more by nature."""
    prefix = entries[0]["name"].partition("/")[0]
    if prefix == "peer":
        versions = {e["name"].partition("/")[2]: e["values"]["version"] for e in entries}
        return ["Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + ".\n"]
    if prefix != "step":
        of: dict[str, list[str]] = {}
        for e in entries:
            if e["name"] not in of.setdefault(e["of"], []):
                of[e["of"]].append(e["name"])
        return ["Relative to: " + "; ".join(f"{', '.join(names)}: {text}" for text, names in of.items()) + ".\n"]
    names = sorted({e["name"].partition("/")[2] for e in entries})
    known = set(catalog.names("method"))
    why = {n: catalog.remark("method", n, "cost") for n in names if n in known}
    return (
        ["More by nature:\n", *(f"- {n}: {text}" for n, text in why.items() if text), ""] if any(why.values()) else []
    )
