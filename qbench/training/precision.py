"""The number format of each phase: what precision=auto means, and where bits that were asked for need more than bf16.

Nothing is timed: one command means one format, and so one folder, on every machine.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from qbench.config.bits import FLOAT
from qbench.config.resolve import SITES
from qbench.errors import UserError
from qbench.training import device

SIGNIFICANT = {"bf16": 8, "tf32": 11}  # bits that a number carries: of 1024 equal steps bf16 leaves about half
WIDEST = SIGNIFICANT["bf16"]
DEPTHWISE = "the net has depthwise convolutions, which are slower in bf16 on a CPU"


def decided(config: dict[str, Any], make_model: Callable[[], nn.Module]) -> dict[str, Any]:
    """`config` with the precision of both recipes decided; what was not taken as asked is said under 'auto'.

    Errors: UserError on tf32 without a GPU.

    `auto` is fp32 where the float net has depthwise convolutions (it decides for all methods on that net) or a phase
    trains numbers of more than 8 and less than 32 bits, else bf16. A format that was named gives way to fp32 where it
    carries fewer significant bits than are asked for: it would drop levels. The float parent has none.
    """
    asked = {phase: config[phase]["precision"] for phase in ("train", "parent")}
    if "tf32" in asked.values() and device.pick(config["device"]).type == "cpu":
        raise UserError("precision=tf32 is a number format of GPUs, and this run is on the CPU. Use fp32 or bf16.")
    slow = "auto" in asked.values() and depthwise(make_model())
    widest = {"train": max(_widths(config), default=0), "parent": 0}
    taken, why = {}, {}
    for phase, precision in asked.items():
        if precision == "auto":
            taken[phase] = "fp32" if slow or widest[phase] > WIDEST else "bf16"
        else:
            taken[phase] = "fp32" if widest[phase] > SIGNIFICANT.get(precision, FLOAT) else precision
        if widest[phase] > SIGNIFICANT.get(precision, WIDEST) and precision != "fp32":
            carrier = "bf16" if precision == "auto" else precision
            reason = f"{widest[phase]:g} bits are asked for, and {carrier} carries {SIGNIFICANT[carrier]}"
        else:
            reason = DEPTHWISE if slow else ""
        if taken[phase] != precision:
            why[phase] = f"precision={precision}: {taken[phase]}" + (f" ({reason})" if reason else "")
    plain = {k: v for k, v in config.items() if k != "auto"}  # what was said of the run whose parent this is
    both = {phase: {**config[phase], "precision": precision} for phase, precision in taken.items()}
    return {**plain, **both, **({"auto": {"precision": why}} if why else {})}


def depthwise(model: nn.Module) -> bool:
    """Whether a convolution of `model` sees only some of its input channels at a time."""
    return any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())


def _widths(config: Mapping[str, Any]) -> Iterator[float]:
    """The bits asked for, of weights, activations and whatever else a rule quantizes; without those left in float."""
    sites = [rule.get(site) for rule in config["method"].get("rules") or [] for site in SITES]
    bits = [config["w_bits"], config["a_bits"], *(s["bits"] for s in sites if isinstance(s, Mapping) and "bits" in s)]
    return (b for b in bits if isinstance(b, (int, float)) and b < FLOAT)


def told(config: Mapping[str, Any]) -> list[str]:
    """What is not as it was asked for, for the screen."""
    why = config.get("auto", {}).get("precision", {})
    train, parent = why.get("train"), why.get("parent")
    lines = [train] if train else []
    if parent and parent != train and config["init"] == "float":
        lines.append(f"float parent: {parent}")
    return lines
