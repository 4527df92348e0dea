"""The peak memory of a training step: what it takes while it runs, beside parameters, optimizer state and the batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from qbench.bench.setting import Setting, forget, method_step, stock_step, use_kernels
from qbench.bench.timing import Act, Entry

METHODS = ("pact", "lsq")


def steps(s: Setting, method: str) -> Iterator[Entry]:
    """The peak of a method's step relative to that of the stock float step; counted, so that load changes nothing."""
    for model in s.models:
        config, place = s.config(method, model), s.place()
        for precision in s.precisions:
            base = peak(stock_step(s.config("float", model), place, precision), place)
            for mode in s.kernels:
                tier = use_kernels(mode)
                try:
                    own = peak(method_step(config, place, precision), place)
                finally:
                    use_kernels("torch")
                    forget()
                yield Entry(
                    f"memory/{method}",
                    f"{precision}/{tier}",
                    own / base,
                    f"stock float step, {precision} channels_last",
                    model=model,
                    batch=s.batch,
                    values={"w_bits": config["w_bits"], "a_bits": config["a_bits"], "bytes": own, "base_bytes": base},
                )


def peak(act: Act, place: torch.device) -> int:
    """The most bytes that `act` holds at once of those that it takes from PyTorch's allocator."""
    act()  # the first one also makes the optimizer's state
    if place.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        act()
        return torch.cuda.max_memory_allocated() - held
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        act()
    held = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block nothing reaches stderr: the profiler writes there past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
