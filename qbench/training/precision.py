"""precision=auto: which of fp32 and bf16 trains this net faster here. Timed once, then kept."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qbench import files
from qbench.config.identity import digest
from qbench.data.cache import cache_folder, locked
from qbench.errors import UserError
from qbench.training import device
from qbench.training.build import place_net
from qbench.training.evaluation import autocast

GAIN = 0.95  # bf16 must take less than this share of fp32's time: it carries 8 bits, and timing is noisy
ROUNDS = 3


def decided(config: dict[str, Any], shape: tuple[int, int, int], make_model: Callable[[], nn.Module]) -> dict[str, Any]:
    """`config` with `auto` replaced by fp32 or bf16 in both recipes, and the times under 'auto'.

    Errors: UserError on tf32 without a GPU.

    The float net of `shape` (channels, size, classes) decides, whatever the method, so that all methods on one net
    train alike. The times are kept in the cache folder per net, batch, threads and machine: the same command finds the
    same answer, and so its folder, again. From there on nothing tells the run from one that named the precision.
    """
    asked = {k: config[k]["precision"] for k in ("train", "parent")}
    if "tf32" in asked.values() and device.pick(config["device"]).type == "cpu":
        raise UserError("precision=tf32 is a number format of GPUs, and this run is on the CPU. Use fp32 or bf16.")
    phases = [k for k, precision in asked.items() if precision == "auto"]
    if not phases:
        return config
    times = {k: _remembered(config, config[k]["batch_size"], shape, make_model) for k in phases}
    taken = {k: {**config[k], "precision": fastest(seconds)} for k, seconds in times.items()}
    return {**config, **taken, "auto": {"precision": times}}


def fastest(seconds: Mapping[str, float]) -> str:
    """bf16 where it is clearly faster, else fp32."""
    return "bf16" if seconds["bf16"] < GAIN * seconds["fp32"] else "fp32"


def told(config: Mapping[str, Any]) -> list[str]:
    """What `auto` came to, for the screen."""
    times = config.get("auto", {}).get("precision", {})
    lines = {
        f"precision=auto: {fastest(s)} (the float net: {1e3 * s['fp32']:.3g} ms in fp32, {1e3 * s['bf16']:.3g} in bf16)"
        for s in times.values()
    }
    return sorted(lines)


def _remembered(
    config: Mapping[str, Any], batch: int, shape: tuple[int, int, int], make_model: Callable[[], nn.Module]
) -> dict[str, float]:
    place, threads = device.pick(config["device"]), device.set_threads(config["threads"])
    machine = [device.cpu(), torch.__version__, torch.cuda.get_device_name() if place.type == "cuda" else "cpu"]
    key = digest([config["model"], list(shape), batch, threads, config["channels_last"], machine])
    path = cache_folder() / f"precision-{key}.json"
    if (found := _kept(path)) is None:
        with locked(path) as writable:  # runs that start together must come to one answer, and not disturb the timing
            if (found := _kept(path)) is None:
                found = time_steps(make_model(), batch, shape, place, config["channels_last"])
                with suppress(UserError):  # a full disk costs a few steps each time
                    if writable:
                        files.atomic_write(path, json.dumps(found))
    return found


def _kept(path: Path) -> dict[str, float] | None:
    """The times in `path`; None where they were not taken yet."""
    try:
        found = json.loads(path.read_text())
        return {"fp32": float(found["fp32"]), "bf16": float(found["bf16"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def time_steps(
    model: nn.Module, batch: int, shape: tuple[int, int, int], place: torch.device, channels_last: bool
) -> dict[str, float]:
    """Median seconds of forward and backward of `model` in fp32 and in bf16, in turn."""
    channels, size, classes = shape
    place_net(model, place, channels_last)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=random).to(place)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(classes, (batch,), generator=random).to(place)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(1 + ROUNDS):
        for precision, times in seconds.items():
            start = time.perf_counter()
            with autocast(place, precision):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            loss.item()  # waits for the device
            times.append(time.perf_counter() - start)
    return {precision: median(times[1:]) for precision, times in seconds.items()}
