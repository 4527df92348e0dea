"""`qbench sensitivity RUN`: the words checked, then the scan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qbench.cli.overrides import parse, resolve_row
from qbench.config import allowed
from qbench.config.kinds import Kind, number, one_of, whole
from qbench.config.options import OPTIONS as OF_A_RUN
from qbench.errors import UserError, unknown
from qbench.records import CONFIG, read_config

WIDTHS = Kind(
    "whole numbers of bits in 1..16, such as 2,4,8", lambda x: all(isinstance(b, int) and 1 <= b <= 16 for b in x)
)
OPTIONS: dict[str, Kind] = {
    "bits": WIDTHS,
    "sites": one_of("both", "weights", "activations"),
    "images": whole(1),
    "size": number(0, above=True),
    "bops": number(0, above=True),
}
# What goes on to the run, beside options.NAME.
OF_RUN = ("method", "device", "threads", "kernels", "out", "dataset.root", "debug")


def command(args: Sequence[str]) -> int:
    """Run `qbench sensitivity RUN [name=value ...]`."""
    if not args or "=" in args[0]:
        raise UserError("qbench sensitivity takes a run's folder first: qbench sensitivity outputs/float-...")
    folder = Path(args[0])
    if not folder.is_dir():
        raise UserError(f"no such run: {folder}")
    given: dict[str, Any] = {"bits": [2, 4, 8], "sites": "both", "images": 1024, "size": None, "bops": None}
    packages: list[str] = []
    words: list[str] = []
    for override in parse(args[1:], sweep=True):
        key, line = override.key_or_group, str(override.input_line)
        if key == "bits":
            given[key] = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        elif override.is_sweep_override():
            raise UserError(f"{line}: only bits= takes several values here")
        elif key == "allow":
            value = override.value()
            packages = [str(p) for p in value] if isinstance(value, list) else [str(value)]
        elif key in OPTIONS:
            given[key] = override.value()
        elif key in OF_RUN or key.startswith("options."):
            words.append(line)
        else:
            raise unknown("option of qbench sensitivity", key, (*OPTIONS, *OF_RUN, "allow", "options.NAME"))
    for key, kind in OPTIONS.items():
        if given[key] is not None:
            kind.check(key, given[key])
    trained = read_config(folder)
    allowed.check(trained, str(folder / CONFIG), packages)
    method = [] if any(w.startswith("method=") for w in words) else ["method=ptq"]
    config = resolve_row([*method, *words, "protocol=uniform", f"layer_bits={{*:{min(given['bits'])}}}"])
    root = config["dataset"]["root"] if any(w.startswith("dataset.root=") for w in words) else None
    config |= {"model": trained["model"], "seed": trained["seed"], "init": str(folder)}
    config["dataset"] = {**trained["dataset"], **({"root": root} if root else {})}
    OF_A_RUN["init"].check("init", config["init"])

    from qbench.figures.report import digits
    from qbench.screen import Screen
    from qbench.training import sensitivity

    found = sensitivity.scan(config, sorted(set(given["bits"])), given["sites"], given["images"], Screen())
    plan = None
    if given["size"] is not None or given["bops"] is not None:
        plan = sensitivity.choose(found, size=given["size"], bops=given["bops"])
    base = found["float"]
    print(f"\nfloat: {base['accuracy']:.2f} %, loss {base['loss']:.4f} ({base['images']:,} training images)")
    print(f"{'points lost by the layer alone':<32}" + "".join(f"{f'{b} bits':>9}" for b in found["widths"]))
    for name, row in found["layers"].items():
        lost = "".join(f"{base['accuracy'] - row[str(b)]['accuracy']:9.2f}" for b in found["widths"])
        print(f"{name:<32}{lost}" + (f"   {digits(plan[name])} bits" if plan else ""))
    for path in sensitivity.write(found, Path(config["out"]), plan):
        print(path)
    return 0
