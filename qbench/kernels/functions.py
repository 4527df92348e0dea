"""The compiled kernels as differentiable functions: a quantizer alone, and batch-norm with what follows it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.kernels.backend import KINDS, ROWS, Args, Backend
from qbench.quantizer import Kernel

INF = math.inf
TINY = 1e-45  # the smallest float32 above 0
IDENTITY = {"lo": -INF, "hi": INF, "from_": -INF, "below": INF}
FORMATS = (torch.channels_last, torch.contiguous_format)


@dataclass
class Call:
    """What a fused function does, decided when it is called: the scalars of each part, and which outputs are wanted."""

    backend: Backend
    activation: dict[str, float]
    behind: dict[str, float]
    norm: nn.BatchNorm2d | None = None
    want: tuple[bool, bool] = (True, False)  # what the activation gives, and what the quantizer behind it makes of that
    slope: float = 1.0  # of the step's gradient


def relu(cap: float = INF) -> dict[str, float]:
    """The scalars of ReLU (ReLU6 with cap = 6): gradient 1 for 0 < z < cap, as torch has it."""
    return {"lo": 0.0, "hi": cap, "from_": TINY, "below": cap}


def clip(kernel: Kernel) -> dict[str, float]:
    """The scalars of a quantizer in place of a ReLU."""
    a, n = np.float32(kernel.value), np.float32(kernel.steps)
    below = np.nextafter(a, np.float32(INF)) if kernel.closed else a
    scalars = {"hi": a, "below": below, "times": n / a, "step": a / n}
    return {"lo": 0.0, "from_": 0.0, "rounds": 1} | {k: float(v) for k, v in scalars.items()}


def behind(kernel: Kernel) -> dict[str, float]:
    """The scalars of a quantizer at a layer's input."""
    if kernel.kind == "sign":
        return {"kind": KINDS["sign"], "qbelow": float(np.nextafter(np.float32(1), np.float32(1 + kernel.closed)))}
    scalars = {"qstep": kernel.value, "qlo": kernel.lo, "qhi": kernel.hi, "qzero": kernel.zero}
    return {"kind": KINDS[kernel.kind], **scalars}


def dense(x: Tensor) -> torch.memory_format | None:
    """The memory format in which `x` has no gaps, or None."""
    for memory_format in FORMATS:
        if (x.dim() == 4 or memory_format is torch.contiguous_format) and x.is_contiguous(memory_format=memory_format):
            return memory_format
    return None


def takes(x: Tensor) -> bool:
    """Whether the kernels know this kind of tensor."""
    if torch.compiler.is_compiling():
        return False
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    return known and dense(x) is not None


def _like(g: Tensor | None, x: Tensor) -> Tensor | None:
    """A gradient laid out as `x` is."""
    if g is None:
        return None
    memory_format = dense(x)
    assert memory_format is not None, "the forward pass was given a dense tensor"
    return g.to(x.dtype).contiguous(memory_format=memory_format)


def _pointers(args: Args, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())


def _args(call: Call, x: Tensor) -> Args:
    channels, inner = 1, 1
    if call.norm is not None:
        channels = x.shape[1]
        inner = 1 if dense(x) is torch.channels_last else x.shape[2] * x.shape[3]
    args = call.backend.args(x, channels, inner)
    for name, value in (call.activation | call.behind).items():
        setattr(args, name, value)
    return args


def _statistics(call: Call, args: Args, coefficients: Tensor, sums: Tensor) -> None:
    """Fill rows a, b, mean, 1/sigma: from the batch, which also moves the running statistics, or from those."""
    bn = call.norm
    if bn is None:
        coefficients[0], coefficients[1], coefficients[2] = 1.0, 0.0, 0.0
        return
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None, "batch-norm without running statistics is not fused"
    assert var is not None, "likewise"
    if not bn.training:
        inverse = torch.rsqrt(var + bn.eps)
        a = inverse * bn.weight
        coefficients[0], coefficients[1], coefficients[2], coefficients[3] = a, bn.bias - mean * a, mean, inverse
        return
    args.eps, args.momentum = bn.eps, bn.momentum
    _pointers(args, weight=bn.weight, bias=bn.bias, running_mean=mean, running_var=var)
    call.backend.run("stats_part", args)
    call.backend.run("stats_end", args)
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        r: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        bound: Tensor | None,
        step: Tensor | None,
        call: Call,
    ) -> tuple[Tensor | None, Tensor | None]:
        args = _args(call, x)
        coefficients = torch.empty(ROWS, args.channels)
        sums = torch.empty(args.chunks * 2 * (args.channels + 1), dtype=torch.float64)
        y, q = (torch.empty_like(x) if wanted else None for wanted in call.want)
        _pointers(args, r=r, y=y, q=q, coefficients=coefficients, sums=sums)
        _statistics(call, args, coefficients, sums)
        call.backend.run("forward_part", args)
        ctx.call = call
        ctx.save_for_backward(x, r, coefficients)
        ctx.set_materialize_grads(False)
        return y, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, r, coefficients = ctx.saved_tensors
        call, none = ctx.call, (None,) * 7
        gy, gq = (_like(g, x) for g in grads)
        if gy is None and gq is None:
            return none
        args = _args(call, x)
        sums = torch.empty(args.chunks * 2 * (args.channels + 1), dtype=torch.float64)
        dx = torch.empty_like(x)
        dr = dx if call.norm is None else torch.empty_like(x) if r is not None else None
        dscalars = torch.empty(2)
        dweight, dbias = (None, None) if call.norm is None else torch.empty(2, args.channels)
        _pointers(args, r=r, gy=gy, gq=gq, dx=dx, dr=dr, coefficients=coefficients, sums=sums)
        _pointers(args, dweight=dweight, dbias=dbias, dscalars=dscalars)
        call.backend.run("reduce_part", args)
        call.backend.run("reduce_end", args)
        if call.norm is not None:
            call.backend.run("apply_part", args)
        need = ctx.needs_input_grad
        dbound = dscalars[0] if need[4] else None
        dstep = dscalars[1] * call.slope if need[5] else None
        return dx, dr if need[1] else None, dweight, dbias, dbound, dstep, None


def fused(
    backend: Backend,
    x: Tensor,
    *,
    norm: nn.BatchNorm2d | None = None,
    residual: Tensor | None = None,
    activation: Kernel | dict[str, float] | None = None,
    quantizer: Kernel | None = None,
    want: tuple[bool, bool] = (True, False),
) -> tuple[Tensor | None, Tensor | None]:
    """y = activation(norm(x) + residual) and q = quantizer(y), each where it is wanted, else None.

    `activation`: a quantizer in place of a ReLU, or the scalars of a plain one.
    """
    known = isinstance(activation, Kernel)
    scalars = clip(activation) if isinstance(activation, Kernel) else (activation or IDENTITY)
    call = Call(backend, scalars, {} if quantizer is None else behind(quantizer), norm, want)
    if quantizer is not None:
        call.slope = quantizer.slope
    if residual is not None:
        residual = _like(residual, x)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    bound = activation.trained if known else None  # type: ignore[union-attr]
    step = None if quantizer is None else quantizer.trained
    return _Fused.apply(x, residual, weight, bias, bound, step, call)  # type: ignore[no-any-return]


class Fast:
    """What `quantizer.fast` is while kernels are in use: the quantizers alone."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def takes(self, x: Tensor) -> bool:
        """Whether `x` can be given to `quantize`."""
        return takes(x)

    def quantize(self, x: Tensor, kernel: Kernel) -> Tensor:
        """What the quantizer that `kernel` describes makes of `x`."""
        if kernel.kind == "clip":
            y = fused(self.backend, x, activation=kernel)[0]
        else:
            y = fused(self.backend, x, quantizer=kernel, want=(False, True))[1]
        assert y is not None, "it was wanted"
        return y
