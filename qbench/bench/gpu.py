"""What a GPU is measured by: steps by precision, op by op and as CUDA graphs, the data path, runs side by side."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from qbench.bench.setting import Setting, forget, stock_step, trainer, trains, use_kernels
from qbench.bench.timing import Act, Entry, alternate, compared
from qbench.data import Batches, Split
from qbench.errors import UserError
from qbench.training import device
from qbench.training.captured import WARM
from qbench.training.trainer import Trainer

METHODS = ("float", "pact", "lsq", "dorefa", "flexor", "qat", "xnor", "twn")
SIDE = (1, 2, 4, 8)  # runs at once


def jobs(s: Setting) -> dict[str, Callable[[], Iterator[Entry]]]:
    """{name: what measures it} of all that is measured with device=cuda."""
    found: dict[str, Callable[[], Iterator[Entry]]] = {f"gpu/step/{m}": partial(steps, s, m) for m in METHODS}
    return found | {"gpu/data": partial(data, s), "gpu/side": partial(side, s)}


def seconds(place: torch.device, act: Callable[[], object], count: int) -> float:
    """Seconds that the device takes for one of `count` acts in a row, by its own clock."""
    if place.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            act()
        return (time.perf_counter() - began) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        act()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def _count(s: Setting) -> int:
    return 2 if s.quick else 50


def taken(loop: Trainer, x: Tensor, y: Tensor) -> Act:
    """A whole step of the trainer, hooks included, as a run takes it; the loss stays on the device."""

    def step() -> None:
        loop._step(x, y)
        loop.losses.clear()

    for _ in range(WARM + 1):
        step()
    return step


def steps(s: Setting, method: str) -> Iterator[Entry]:
    """The step of a method relative to the float step as plain PyTorch takes it, in the same precision."""
    for model in s.models:
        config = s.config(method, model)
        if not trains(config):
            continue
        for precision in s.precisions:
            use_kernels("torch" if "torch" in s.kernels else "compile")
            try:
                yield from _steps(s, method, model, config, precision)
            finally:
                use_kernels("torch")
                forget()


def _steps(s: Setting, method: str, model: str, config: dict[str, Any], precision: str) -> Iterator[Entry]:
    place, count = s.place(), _count(s)
    recorded, x, y = trainer(config, place, precision)
    plain = trainer(config, place, precision)[0]
    plain.captured = None
    acts: dict[str, Act] = {"stock": stock_step(s.config("float", model), place, precision)}
    acts["eager"] = taken(plain, x, y)
    if recorded.captured is not None:
        acts["graph"] = taken(recorded, x, y)
    else:
        s.say(f"  gpu/step/{method}: no graph, {recorded.eager}")
    times = alternate({name: partial(seconds, place, act, count) for name, act in acts.items()}, s.rounds)
    of = "stock float step, op by op, same precision"
    values = {"w_bits": config["w_bits"], "a_bits": config["a_bits"]}
    for mode in list(acts)[1:]:
        yield compared(
            f"gpu/step/{method}",
            f"{precision}/{mode}",
            times,
            mode,
            "stock",
            of,
            model=model,
            batch=s.batch,
            values=values,
        )


def data(s: Setting) -> Iterator[Entry]:
    """An epoch of augmented and normalized batches without training; ratio: the share of a float step."""
    place, three = s.place(), (0.5, 0.5, 0.5)
    random = torch.Generator().manual_seed(0)
    count = 2_000 if s.quick else 50_000
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    split = Split(pixels, torch.zeros(count, dtype=torch.long))
    batches = Batches(split, batch_size=s.batch, mean=three, std=three, augment="crop_flip", device=place)

    def epoch() -> float:
        return seconds(place, lambda: [None for _ in batches.epoch(0)], 1) / len(batches)

    step = taken(*trainer(s.config("float", s.models[0]), place, "bf16"))
    times = alternate({"own": epoch, "step": partial(seconds, place, step, _count(s))}, s.rounds)
    of = "bf16 float step of ours"
    yield compared("gpu/data", "resident", times, "own", "step", of, model=s.models[0], batch=s.batch)


def side(s: Setting) -> Iterator[Entry]:
    """Processes that train a float net each on one device: the seconds of a step of all of them, per run."""
    alone = 0.0
    for runs in SIDE[:2] if s.quick else SIDE:
        took = max(_together(s, runs)) / runs
        alone = alone or took
        rate, of = s.batch / took, "one run alone"
        yield Entry("gpu/side", f"bf16/{runs} runs", took / alone, of, took, alone, rate, s.models[0], s.batch, 1)


def _together(s: Setting, runs: int) -> list[float]:
    """Seconds of a step in each of `runs` processes that compute at the same time."""
    context = multiprocessing.get_context("spawn")
    config, count = s.config("float", s.models[0]), 5 * _count(s)
    pipes, processes = [], []
    for _ in range(runs):
        ours, theirs = context.Pipe()
        arguments = (theirs, config, str(s.place()), count, s.threads or max(1, device.cores() // runs))
        processes.append(context.Process(target=_one, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        for pipe in pipes:
            pipe.recv()  # all are ready
        for pipe in pipes:
            pipe.send(True)
        found = [float(pipe.recv()) for pipe in pipes]
    except EOFError as error:
        raise UserError(f"one of {runs} runs side by side ended, perhaps for want of memory") from error
    for process in processes:
        process.join()
    return found


def _one(pipe: Connection, config: dict[str, Any], place: str, count: int, threads: int) -> None:
    device.set_threads(threads)
    step = taken(*trainer(config, torch.device(place), "bf16"))
    pipe.send(True)
    pipe.recv()
    pipe.send(seconds(torch.device(place), step, count))
