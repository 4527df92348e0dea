"""The computing of a training step recorded once as a CUDA graph, and launched as one from then on."""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.training.optim import CAPTURABLE, recordable

WARM = 3  # steps of each kind that run op by op first: they create the optimizer's state and choose the algorithms
Step = Callable[[], Tensor]


class NotRecorded(Exception):
    """A step could not be recorded, and says why; nothing of it was computed."""


class Graphs(Protocol):
    """What records steps: `CudaGraphs`, or a test's imitation of it."""

    def eager(self, step: Step) -> Tensor:
        """Run `step` op by op, where a recording would run it."""
        ...

    def record(self, step: Step) -> tuple[Callable[[], None], Tensor]:
        """(what replays `step`, the tensor that holds its result after each replay); nothing is computed yet."""
        ...


class CudaGraphs:
    """Records with torch.cuda.CUDAGraph, on a side stream on which the steps before the recording run as well.

    The random numbers of `generator` and of the global generator go on from replay to replay as they do op by op.
    """

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self.stream, self.generator = torch.cuda.Stream(device), generator

    def eager(self, step: Step) -> Tensor:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            result = step()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, step: Step) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():  # later versions of torch find the generator by themselves, and say so
            warnings.simplefilter("ignore")
            graph.register_generator_state(self.generator)
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                result = step()
        except RuntimeError:
            torch.cuda.set_stream(before)  # where a recording fails, torch stays on the recording's stream
            raise
        return graph.replay, result


class Captured:
    """A step of (images, labels) that is run `WARM` times op by op, then recorded, and replayed from then on.

    Those first steps are steps of the training like all others, and recording computes nothing, so that a run with
    graphs takes the steps that a run without takes. A recording holds what Python decided while it was made: each
    `kind` of step has its own. A batch of another shape than the first one's runs op by op.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], graphs: Graphs) -> None:
        self.step, self.graphs = step, graphs
        self.batch: tuple[Tensor, Tensor] | None = None
        self.met: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, x: Tensor, y: Tensor, kind: Hashable) -> Tensor:
        """Take the step; returns its loss.

        Errors: NotRecorded where torch cannot record it.
        """
        if self.batch is None:
            self.batch = torch.empty_like(x), torch.empty_like(y)
        if (x.shape, y.shape) != (self.batch[0].shape, self.batch[1].shape):
            return self.graphs.eager(partial(self.step, x, y))
        for held, new in zip(self.batch, (x, y), strict=True):
            held.copy_(new)
        step = partial(self.step, *self.batch)
        if kind not in self.recorded:
            self.met[kind] += 1
            if self.met[kind] <= WARM:
                return self.graphs.eager(step)
            try:
                self.recorded[kind] = self.graphs.record(step)
            except RuntimeError as error:
                raise NotRecorded(str(error).partition("\n")[0]) from error
        replay, result = self.recorded[kind]
        replay()
        return result.clone()  # the next replay writes over it


def asked(graph: bool | str, why_not: str) -> bool:
    """Whether to record steps: what `graph=auto|true|false` comes to where `why_not` speaks against it.

    Errors: UserError when graphs were asked for and there are none.
    """
    if graph is True and why_not:
        raise UserError(f"graph=true, but a step of this run cannot be a CUDA graph: {why_not}. Use graph=auto.")
    return bool(graph) and not why_not


def why_not(modules: Sequence[nn.Module], optimizers: Sequence[str], gpu: bool, compile: bool = False) -> str:
    """Why the steps of a run cannot be recorded; empty where they can.

    modules: the net and the hooks, inside which each module may say in `eager` why it has to run op by op.
    optimizers: the names of all update rules.
    """
    if not gpu:
        return "the run is not on a GPU"
    if dist.is_initialized():
        return "its workers exchange gradients (workers)"
    if compile:
        return "the net is compiled as a whole (compile=true)"
    if strange := [name for name in optimizers if not recordable(name)]:
        return f"its optimizer {strange[0]} is none of {', '.join(CAPTURABLE)}"
    inside = [m for module in modules for m in module.modules()]
    return next((f"{type(m).__name__} {m.eager}" for m in inside if getattr(m, "eager", "")), "")
