"""The speed of training and evaluation: float by precision and memory format, every method, the peers."""

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from qbench.bench import peers
from qbench.bench.setting import (
    Setting,
    evaluation_pass,
    forget,
    method_step,
    stock_step,
    trains,
    use_kernels,
)
from qbench.bench.timing import Act, Entry, alternate, compared
from qbench.config import catalog
from qbench.config.resolve import NotApplicable
from qbench.errors import UserError
from qbench.training import device

FORMATS = {"nchw": False, "channels_last": True}
QUICK = ("float", "pact", "lsq", "dorefa")
DEPTHWISE = ("mobilenet_v1", "mobilenet_v2")


def float_train(s: Setting) -> Iterator[Entry]:
    """Images/s of float training; 'stock' is plain PyTorch with the C library's allocator as it comes."""
    for model in s.models:
        config, place = s.config("float", model), s.place()
        with Elsewhere(config, s.threads) as stock:
            acts: dict[str, Act] = {"fp32/stock": stock.step}
            acts |= {
                f"{p}/{name}": stock_step(config, place, p, cl) for p in s.precisions for name, cl in FORMATS.items()
            }
            yield from _entries(s, "float/train", model, acts, "stock eager fp32 NCHW step")


def float_eval(s: Setting) -> Iterator[Entry]:
    """Images/s of evaluating the float net."""
    for model in s.models:
        config, place = s.config("float", model), s.place()
        acts: dict[str, Act] = {
            f"{p}/{name}": evaluation_pass(config, place, p, cl) for p in s.precisions for name, cl in FORMATS.items()
        }
        yield from _entries(s, "float/eval", model, acts, "fp32 NCHW evaluation")


def _entries(s: Setting, name: str, model: str, acts: dict[str, Act], of: str) -> Iterator[Entry]:
    times = alternate(acts, s.rounds)
    for mode in times:
        yield compared(name, mode, times, mode, next(iter(times)), of, model=model, batch=s.batch)
    forget()


def methods(s: Setting) -> list[str]:
    """The methods that train, in the order of `qbench list`; float itself: what the kernels make of it."""
    names = [m["name"] for m in catalog.methods()]
    return [n for n in names if not s.quick or n in QUICK]


def steps(s: Setting, method: str) -> Iterator[Entry]:
    """The step of one method relative to the stock float step of the same net, precision and memory format."""
    for model in s.models:
        try:
            config = s.config(method, model)
            if trains(config):
                for numbers in s.precisions:
                    for mode in s.kernels:
                        yield _step(s, method, model, config, numbers, mode)
        except (NotApplicable, UserError) as error:
            s.say(f"  step/{method} on {model}: left out ({error})")


def _step(s: Setting, method: str, model: str, config: dict[str, Any], numbers: str, kernels: str) -> Entry:
    place = s.place()
    base = stock_step(s.config("float", model), place, numbers)
    tier = use_kernels(kernels)
    try:
        times = alternate({"base": base, "own": method_step(config, place, numbers)}, s.rounds, warm=1)
    finally:
        use_kernels("torch")
        forget()
    of = f"stock float step, {numbers} channels_last"
    values = {"w_bits": config["w_bits"], "a_bits": config["a_bits"]}
    mode = f"{numbers}/{tier}"
    return compared(f"step/{method}", mode, times, "own", "base", of, model=model, batch=s.batch, values=values)


def depthwise(s: Setting) -> Iterator[Entry]:
    """bf16 on nets of depthwise convolutions (precision=auto is fp32 there), and the steps of two methods."""
    for model in DEPTHWISE:
        few = replace(s, batch=min(s.batch, 32), rounds=min(s.rounds, 3), known={})
        config, place = few.config("float", model), s.place()
        times = alternate({p: stock_step(config, place, p) for p in ("fp32", "bf16")}, few.rounds)
        of = "the float net in fp32, channels_last"
        yield compared("depthwise/float", "bf16", times, "bf16", "fp32", of, model=model, batch=few.batch)
        for method in ("pact", "lsq"):
            for numbers in s.precisions:
                for mode in s.kernels:
                    entry = _step(few, method, model, few.config(method, model), numbers, mode)
                    yield replace(entry, name=f"depthwise/{method}")


def peer_steps(s: Setting, name: str) -> Iterator[Entry]:
    """The step of another library's 4-bit (where it can) training of the same net, in fp32, channels_last."""
    for model in s.models:
        config, place = s.config("float", model), s.place()
        try:
            step, bits, version = peers.PEERS[name](config, place)
        except ImportError as error:
            s.say(f"  peer/{name}: not installed ({error})")
            return
        times = alternate({"base": stock_step(config, place, "fp32"), "peer": step}, s.rounds, warm=peers.WARM[name])
        of = "stock float step, fp32 channels_last"
        values = {"w_bits": bits, "a_bits": bits, "version": version}
        yield compared(
            f"peer/{name}", "fp32/torch", times, "peer", "base", of, model=model, batch=s.batch, values=values
        )
        forget()


class Elsewhere:
    """A process of its own that takes stock float steps when asked: its allocator is as PyTorch's users have it."""

    def __init__(self, config: dict[str, Any], threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_elsewhere, args=(theirs, config, threads), daemon=True)

    def __enter__(self) -> "Elsewhere":
        self.process.start()
        self.pipe.recv()
        return self

    def step(self) -> float:
        """One step there; its seconds."""
        self.pipe.send(True)
        return float(self.pipe.recv())

    def __exit__(self, *error: object) -> None:
        self.pipe.send(False)
        self.process.join()


def _elsewhere(pipe: Connection, config: dict[str, Any], threads: int | None) -> None:
    device.set_threads(threads)
    step = stock_step(config, device.pick("auto"), "fp32", channels_last=False)
    pipe.send(0.0)
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
