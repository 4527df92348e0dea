"""`qbench bench`: what is measured, what is asked for, and what becomes of it."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qbench.bench import busy, gpu, memory, page, peers, speed, whole
from qbench.bench.setting import Setting, use_kernels
from qbench.bench.timing import Entry
from qbench.cli.usage import HELP
from qbench.config import catalog, kinds
from qbench.config.options import MOST
from qbench.config.recipe import KERNELS
from qbench.errors import UserError, nearest, unknown
from qbench.files import atomic_write
from qbench.records import named, read_json, sealed
from qbench.shapes import NUMBER, check
from qbench.training import device

SHORT = (
    "float/*", "step/pact", "step/lsq", "step/dorefa", "step/flexor", "memory/*", "data/augment", "start/help",
    "start/list",
)  # fmt: skip
COMMITTED = "docs/benchmarks.json"
NUMBERS = {
    "batch": kinds.whole(1, 1 << 16),
    "rounds": kinds.whole(1, 1000),
    "threads": kinds.whole(1, MOST),
    "margin": kinds.number(0),
}
MEND = "restore it or move it away, and if it was edited by hand, delete its line 'checksum'"
ENTRY = {
    **dict.fromkeys(("name", "mode", "of"), str),
    "ratio": NUMBER,
    **dict.fromkeys(("seconds?", "base_seconds?", "images_per_s?"), NUMBER),
    **{"model?": str, "batch?": int, "rounds?": int, "note?": str},
    "values?": {
        **dict.fromkeys(("mean?", "std?", "base_mean?", "base_std?", "w_bits?", "a_bits?", "bytes?"), NUMBER),
        "version?": str,
    },
    "machine": {"cpu": str, "cores": int, "threads": int, "torch": str, "python?": str, "gpu?": str},
}
# What the page needs of some, by the first part of their names.
STEP = {"model": str, "images_per_s": NUMBER, "values": {"w_bits": NUMBER, "a_bits": NUMBER}}
NEEDED = {
    "step": STEP,
    "peer": {**STEP, "values": {**STEP["values"], "version": str}},  # type: ignore[dict-item]
    "accuracy": {"values": dict.fromkeys(("mean", "std", "base_mean", "base_std"), NUMBER)},
}
OPTIONS = (
    "only", "device", "rounds", "model", "batch", "threads", "kernels", "precision", "peers", "quick", "out", "against",
    "margin", "debug",
)  # fmt: skip


def main(args: Sequence[str]) -> int:
    """`qbench bench ARGS`; returns the exit status."""
    verb = args[0] if args and "=" not in args[0] else "run"
    if verb not in ("run", "check", "page"):
        raise unknown("bench command", verb, ("check", "page"))
    words = _words(args[verb != "run" :])
    if verb == "page":
        source = Path(words.get("against", COMMITTED))
        atomic_write(source.with_suffix(".md"), page.page(read(source)))
        print(f"wrote {source.with_suffix('.md')}")
        return 0
    setting = _setting(words, SHORT if verb == "check" else ("*",))
    if verb == "check":
        return _check(setting, Path(words.get("against", COMMITTED)), _number("margin", words.get("margin", "0.25")))
    measure(setting)
    return 0


def _words(args: Sequence[str]) -> dict[str, str]:
    words = {}
    for text in args:
        name, equals, value = text.partition("=")
        if name not in OPTIONS or not equals:
            hint = nearest(name, OPTIONS)
            raise UserError(
                f"unknown bench option '{text}'." + (f" Did you mean '{hint}='?" if hint else f"\n\n{HELP['bench']}")
            )
        words[name] = value
    return words


def _number(name: str, text: str) -> Any:
    """The number that an option of NUMBERS says."""
    value: Any = text
    for kind in (int, float):
        with suppress(ValueError):
            value = kind(text)
            break
    NUMBERS[name].check(name, value)
    return value


def _truth(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise UserError(f"{name} must be true or false, got '{text}'")
    return text.lower() == "true"


def _setting(words: dict[str, str], only: tuple[str, ...]) -> Setting:
    quick = _truth("quick", words.get("quick", "false"))
    on_gpu = words.get("device") == "cuda"
    setting = Setting(
        only=tuple(words["only"].split(",")) if "only" in words else only,
        models=tuple(words.get("model", "tiny" if quick else "resnet20").split(",")),
        batch=_number("batch", words.get("batch", "16" if quick else "128")),
        rounds=_number("rounds", words.get("rounds", "2" if quick else "5")),
        threads=_number("threads", words["threads"]) if "threads" in words else None,
        kernels=tuple(words.get("kernels", "auto").split(",")),
        precisions=tuple(words.get("precision", "fp32,tf32,bf16" if on_gpu else "fp32,bf16").split(",")),
        peers=_truth("peers", words.get("peers", "false")),
        quick=quick,
        device=words.get("device", "auto"),
        out=Path(words["out"]) if "out" in words else None,
    )
    for name, values, allowed in (
        ("model", setting.models, catalog.names("model")),
        ("kernels", setting.kernels, KERNELS),
        ("precision", setting.precisions, ("fp32", "tf32", "bf16") if on_gpu else ("fp32", "bf16")),
    ):
        for value in values:
            if value not in allowed:
                raise unknown(name, value, allowed)
    return setting


def jobs(s: Setting) -> dict[str, Callable[[], Iterator[Entry]]]:
    """{name: what measures it} of all that can be measured with this setting, in the order of the page."""
    if s.device == "cuda":
        return gpu.jobs(s)
    found: dict[str, Callable[[], Iterator[Entry]]] = {
        "float/train": partial(speed.float_train, s),
        "float/eval": partial(speed.float_eval, s),
    }
    found |= {f"step/{m}": partial(speed.steps, s, m) for m in speed.methods(s)}
    if s.peers:
        found |= {f"peer/{p}": partial(speed.peer_steps, s, p) for p in peers.PEERS}
    if not s.quick:
        found["depthwise/*"] = partial(speed.depthwise, s)
    found |= {f"memory/{m}": partial(memory.steps, s, m) for m in memory.METHODS}
    found["data/augment"] = partial(whole.augment, s)
    if not s.quick:
        found |= {"data/decode": partial(whole.decoding, s), "data/stream": partial(whole.streaming, s)}
    found |= {"cost/*": partial(whole.records, s), "start/*": partial(whole.start, s)}
    if not s.quick:
        found["sweep/12"] = partial(whole.sweep, s)
        found["busy"] = partial(busy.steps, s)
        found |= {"accuracy/digits": partial(whole.bf16, s), "accuracy/kernels": partial(whole.kernels, s)}
    return found


def measure(s: Setting) -> list[dict[str, Any]]:
    """Measure what is asked for, print it as it comes, and write it where `out` says.

    Errors: UserError when no name matches.
    """
    s.place()  # a device that is not here is named at once
    device.keep_freed_memory()
    threads = device.set_threads(s.threads)
    facts = {**machine(), "threads": threads}
    chosen = {n: job for n, job in jobs(s).items() if s.wants(n) or (n.endswith("*") and _inside(n, s.only))}
    if not chosen:
        raise UserError(f"nothing is called {','.join(s.only)}; there is: {', '.join(jobs(s))}")
    use_kernels("torch")  # a method's own measurement switches them on
    s.say(f"{facts['cpu']}, {facts['cores']} cores, {threads} threads, torch {facts['torch']}\n")
    s.say(f"{'':<27}{'mode':<22}{'ratio':>7}{'ms':>10}{'images/s':>10}   relative to")
    began, entries = time.monotonic(), []
    for number, (name, job) in enumerate(chosen.items(), 1):
        s.say(f"[{number}/{len(chosen)}] {name}, after {time.monotonic() - began:.0f} s")
        for entry in job():
            if s.wants(entry.name):
                entries.append({**entry.plain(), "machine": facts})
                s.say(line(entry))
                write(s.out, entries)
    s.say(f"\n{len(entries)} entries in {time.monotonic() - began:.0f} s")
    return entries


def _inside(group: str, only: Sequence[str]) -> bool:
    return any(pattern.startswith(group[:-1]) for pattern in only)


def line(entry: Entry) -> str:
    """One entry on the screen."""
    took = f"{entry.seconds * 1e3:>10.2f}" if entry.seconds is not None else " " * 10
    speed = f"{entry.images_per_s:>10,.0f}" if entry.images_per_s else " " * 10
    name = entry.name if entry.model in (None, "resnet20") else f"{entry.name} {entry.model}"
    return f"{name:<27}{entry.mode:<22}{entry.ratio:>7.3f}{took}{speed}   {entry.of}"


def machine() -> dict[str, Any]:
    """What a ratio may depend on: processor, cores, versions; never whose machine it is."""
    facts = {"cpu": device.cpu(), "cores": device.cores(), "torch": torch.__version__}
    facts["python"] = platform.python_version()
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What two measurements of the same thing have in common."""
    return tuple(entry.get(k) for k in ("name", "mode", "model", "batch"))


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a bench.json; a plain list of them, as it once was, is checked by its shape alone.

    Errors: UserError naming file and field when it is missing or corrupt.
    """
    if not path.exists():
        raise UserError(f"no {path}; qbench bench out=DIR writes DIR/bench.json")
    content = read_json(path, (dict, list), MEND)  # a mapping with a checksum, or a list
    with named(path, MEND):
        check(content, {"entries": [ENTRY]} if isinstance(content, dict) else [ENTRY])
        entries = content["entries"] if isinstance(content, dict) else content
        for entry in entries:
            check(entry, NEEDED.get(entry["name"].partition("/")[0], {}), entry["name"])
            if entry["ratio"] <= 0:
                raise ValueError(f"the ratio of {entry['name']} must be above 0, got {entry['ratio']}")
    return list(entries)


def write(out: Path | None, entries: list[dict[str, Any]]) -> None:
    """Put `entries` into out/bench.json, one a line, in place of earlier ones of the same things."""
    if out is None:
        return
    path = out / "bench.json"
    new = {key(e) for e in entries}
    kept = [e for e in read(path) if key(e) not in new] if path.exists() else []
    whole = sorted([*kept, *entries], key=json.dumps)
    lines = ",\n".join(map(json.dumps, whole))
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f'{{"entries": [\n{lines}\n],\n"checksum": "{sealed({"entries": whole})["checksum"]}"}}\n')


def worse(new: list[dict[str, Any]], old: list[dict[str, Any]], margin: float) -> list[str]:
    """The things whose ratio grew (of accuracies: fell) by more than `margin` (0.25: a quarter), with both ratios.

    Errors: UserError when the two have nothing in common.
    """
    before = {key(e): e for e in old}
    common = [(e, before[key(e)]) for e in new if key(e) in before]
    if not common:
        raise UserError("nothing that was measured now stands in the committed file")
    return [
        f"{e['name']} {e['mode']}: {b['ratio']} -> {e['ratio']}"
        for e, b in common
        if (b["ratio"] / e["ratio"] if e["name"].startswith("accuracy/") else e["ratio"] / b["ratio"]) > 1 + margin
    ]


def _check(s: Setting, path: Path, margin: float) -> int:
    old = read(path)
    s.rounds = min(s.rounds, 3)
    found = worse(measure(s), old, margin)
    if found:  # a neighbour on the machine can do that: only what is slow twice is slower
        s.only = tuple({f.split()[0] for f in found})
        s.say("\nonce more, what seems slower:")
        found = worse(measure(s), old, margin)
    then = ", ".join(sorted({e["machine"]["cpu"] for e in old}))
    if found:
        print(f"\nslower than in {path} ({then}) by more than {margin:.0%}:", *found, sep="\n  ")
        return 1
    print(f"\nno ratio is worse than in {path} ({then}) by more than {margin:.0%}")
    return 0
