"""A CUDA graph imitated on the CPU: the ops of a step are written down with their tensors, and run again in order.

What Python computed stays as it was when the step was recorded, exactly as in a CUDA graph. Recording computes nothing:
what it wrote is put back. Only ops that would be legal while a GPU records are let through.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
SYNC = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.linalg_eigh.default, aten._linalg_eigh.default, aten.equal.default,
}  # fmt: skip
HOST = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}


def tensors(*parts: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class OnDevice(TorchFunctionMode):
    """Refuses what would bring a tensor to the host, or make one there (a constructor that names no device)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in HOST:
            raise RuntimeError(f"{function.__name__} waits for the device")
        if function in _device_constructors() and kwargs.get("device") is None:
            raise RuntimeError(f"{function.__name__} without a device makes its tensor on the host")
        return function(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Runs ops, writes them down, and can undo what they wrote into tensors that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[tuple[Tensor, bool]]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        bools = [i for i in tensors(args[1:2]) if i.dtype in (torch.bool, torch.uint8)]
        if function in SYNC or (function is aten.index.Tensor and bools):
            raise RuntimeError(f"{function} waits for the device")
        given = tensors(args, kwargs)
        for t in given:
            if storage(t) not in self.made and storage(t) not in self.before:
                whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                self.before[storage(t)] = whole, whole.clone()
        out = function(*args, **kwargs)
        inside = {storage(t) for t in given}
        results = [(t, storage(t) not in inside) for t in tensors(out)]
        self.made |= {storage(t) for t, fresh in results if fresh}
        self.ops.append((function, args, kwargs, results))
        return out

    def undo(self) -> None:
        for whole, copy in self.before.values():
            whole.copy_(copy)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.ops:
                new = function(*args, **kwargs)
                for t, (held, fresh) in zip(tensors(new), results, strict=True):
                    if fresh and held.numel():
                        held.copy_(t)


class Imitation:
    """In place of `captured.CudaGraphs`; counts what it did."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.eagers = self.records = self.replays = 0

    def eager(self, step: Callable[[], Tensor]) -> Tensor:
        self.eagers += 1
        return step()

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.records += 1
        states = self.generator.get_state(), torch.get_rng_state()
        recorder = Recorder()
        try:
            with OnDevice(), recorder:
                result = step()
        finally:
            recorder.undo()
            self.generator.set_state(states[0])
            torch.set_rng_state(states[1])

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay, result


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
