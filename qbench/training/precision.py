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
DEPTHWISE = "the net has depthwise convolutions, which are slower in bf16 on a CPU"


def decided(config: dict[str, Any], make_model: Callable[[], nn.Module]) -> dict[str, Any]:
    """`config` with the precision of all its recipes decided; what was not taken as asked is said under 'auto'.

    Errors: UserError on tf32 without a GPU.

    `auto` is fp32 where the float net has depthwise convolutions (it decides for all methods on that net) or a phase
    trains numbers of more than 8 and less than 32 bits, else bf16. A format that was named gives way to fp32 where it
    carries fewer significant bits than are asked for: it would drop levels. The float parent has none.
    """
    asked = {phase: config[phase]["precision"] for phase in ("train", "parent")}
    if "tf32" in asked.values() and device.pick(config["device"]).type == "cpu":
        raise UserError("precision=tf32 is a number format of GPUs, and this run is on the CPU. Use fp32 or bf16.")
    slow = "auto" in asked.values() and depthwise(make_model())
    bits = {"train": max(_widths(config), default=0), "parent": 0}

    def taken(recipe: dict[str, Any], phase: str) -> dict[str, Any]:
        return {**recipe, "precision": _taken(recipe["precision"], bits[phase], slow)[0]}

    out = {k: v for k, v in config.items() if k != "auto"}  # that was said of the run whose parent this is
    out |= {phase: taken(config[phase], phase) for phase in asked}
    if stages := config["method"].get("stages"):
        out["method"] = {
            **config["method"],
            "stages": [{**stage, "recipe": taken(stage["recipe"], "train")} for stage in stages],
        }
    why = {phase: _taken(precision, bits[phase], slow)[1] for phase, precision in asked.items()}
    why = {phase: text for phase, text in why.items() if text}
    return {**out, "auto": {"precision": why}} if why else out


def _taken(precision: str, bits: float, slow: bool) -> tuple[str, str]:
    """(the format that is taken, what there is to say of it)."""
    carrier = "bf16" if precision == "auto" else precision
    if bits > SIGNIFICANT.get(carrier, FLOAT):
        reason = f"{bits:g} bits are asked for, and {carrier} carries {SIGNIFICANT[carrier]}"
        return "fp32", f"precision={precision}: fp32 ({reason})"
    if precision != "auto":
        return precision, ""
    return ("fp32", f"precision=auto: fp32 ({DEPTHWISE})") if slow else ("bf16", "precision=auto: bf16")


def depthwise(model: nn.Module) -> bool:
    """Whether a convolution of `model` sees only some of its input channels at a time."""
    return any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())


def _widths(config: Mapping[str, Any]) -> Iterator[float]:
    """The bits asked for, of weights, activations and whatever else a rule quantizes; without those left in float."""
    sites = [rule.get(site) for rule in config["method"].get("rules") or [] for site in SITES]
    bits = [config["w_bits"], config["a_bits"], *(s["bits"] for s in sites if isinstance(s, Mapping) and "bits" in s)]
    bits += [entry[site] for entry in config.get("layer_bits") or [] for site in ("w", "a")]
    return (b for b in bits if isinstance(b, (int, float)) and b < FLOAT)


def told(config: Mapping[str, Any]) -> list[str]:
    """What is not as it was asked for, for the screen."""
    why = config.get("auto", {}).get("precision", {})
    train, parent = why.get("train"), why.get("parent")
    lines = [train] if train else []
    if parent and parent != train and config["init"] == "float":
        lines.append(f"float parent: {parent}")
    return lines
