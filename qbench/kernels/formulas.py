"""The quantizers' formulas under torch.compile, each once for all shapes: through Triton on a GPU, else through C++."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbench.kernels.functions import dense

Function = Callable[..., Any]
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


class Formulas:
    """Calls formulas (`ops.formula`) compiled: what `ops.compiled` is while kernels=compile is in use.

    Tensors of the shape of the first one are seen as one row of numbers in the order in which that one lies in memory,
    so that neither shape nor memory format makes torch compile anew. A formula with other tensors than those and single
    numbers, or with fewer than two numbers, runs as it is, and so does all once something cannot be compiled: `say` is
    told why.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.broken = say, False
        self.compiled: dict[Function, Function] = {}

    def __call__(self, function: Function, x: Tensor, *rest: Any) -> Any:
        given = [t.detach() if isinstance(t, Tensor) else t for t in (x, *rest)]  # one graph, whatever is trained
        known = all(t.shape == x.shape or t.dim() == 0 for t in given if isinstance(t, Tensor))
        if self.broken or not known or x.numel() < 2 or x.dim() == 0:
            return function(*given)
        to, back = (NHWC, NCHW) if dense(x) is torch.channels_last else (range(x.dim()),) * 2
        shape = x.permute(*to).shape
        flat = [_row(t.permute(*to) if t.dim() else t) if isinstance(t, Tensor) else t for t in given]
        if function not in self.compiled:
            self.compiled[function] = torch.compile(function, dynamic=True, fullgraph=True)
        try:
            with torch.autocast(x.device.type, enabled=False):  # whether it is on would make torch compile anew
                found = self.compiled[function](*flat)
        except Exception as error:  # no compiler, no Triton, or a version of torch that cannot do it
            self.broken = True
            self.say(f"kernels=compile is not used: {(str(error).splitlines() or [type(error).__name__])[0]}")
            return function(*given)
        several = found if isinstance(found, tuple) else (found,)
        shaped = tuple(t.view(shape).permute(*back) if t.dim() else t for t in several)
        return shaped if isinstance(found, tuple) else shaped[0]


def _row(t: Tensor) -> Tensor:
    """The numbers of `t` in one row, without torch's knowing of what they are a view: it would compile anew for it."""
    t = t.contiguous()
    size, stride = ((t.numel(),), (1,)) if t.dim() else ((), ())
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage(), t.storage_offset(), size, stride)
