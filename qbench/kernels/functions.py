"""The compiled kernels as differentiable functions: a quantizer alone, and batch-norm with what follows it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.kernels.backend import ACTIVATIONS, KINDS, NUMBERS, ROWS, SUMS, Args, Backend
from qbench.quant.quantizer import Kernel

FORMATS = (torch.channels_last, torch.contiguous_format)
IDENTITY = Kernel("bounded", float("inf"))
NOTHING = Kernel("none")
A, B, MEAN, INVERSE, _, KX, K1, BETA, ZETA, SHIFT = range(len(ROWS))


@dataclass
class Call:
    """What a fused function does, decided when it is called: each part, and which outputs are wanted."""

    backend: Backend
    activation: Kernel
    behind: Kernel
    norm: nn.BatchNorm2d | None = None
    want: tuple[bool, bool] = (True, False)  # what the activation gives, and what the quantizer behind it makes of that

    @cached_property
    def words(self) -> dict[str, float]:
        """Both parts, as the compiled code calls their kinds and numbers."""
        kinds = {"activation": ACTIVATIONS.index(self.activation.kind), "kind": KINDS.index(self.behind.kind)}
        numbers = {
            f"{part}_{name}": getattr(kernel, name)
            for part, kernel in (("first", self.activation), ("second", self.behind))
            for name in NUMBERS
        }
        return {**kinds, **numbers, "norm": self.norm is not None}


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


def _channels(x: Tensor) -> tuple[int, int]:
    """(channels, how many values of one channel lie next to each other)."""
    return x.shape[1], 1 if dense(x) is torch.channels_last else x.shape[2:].numel()


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
    trained = call.activation.kind == "prelu" or (call.behind.trained and call.behind.kind != "learned")
    by_channel = call.norm is not None or trained
    args = call.backend.args(x, *_channels(x) if by_channel else (1, 1))
    for name, value in call.words.items():
        setattr(args, name, value)
    return args


def _coefficients(call: Call, args: Args, sums: Tensor) -> Tensor:
    """All rows that the forward pass reads: those of the batch-norm, and what is trained per channel."""
    rows = torch.zeros(len(ROWS), args.channels)
    _pointers(args, coefficients=rows, sums=sums)
    rows[A] = 1.0
    if call.norm is not None:
        _statistics(call, call.norm, args, rows)
    if call.activation.kind == "prelu":
        gamma, rows[BETA], rows[ZETA] = call.activation.trained
        rows[B] -= gamma
    if call.behind.trained and call.behind.kind != "learned":
        rows[SHIFT] = call.behind.trained[0]
    return rows


def _statistics(call: Call, bn: nn.BatchNorm2d, args: Args, rows: Tensor) -> None:
    """Fill rows a, b, mean, 1/sigma: from the batch, which also moves the running statistics, or from those."""
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None, "batch-norm without running statistics is not fused"
    assert var is not None, "likewise"
    if not bn.training:
        inverse = torch.rsqrt(var + bn.eps)
        rows[A], rows[MEAN], rows[INVERSE] = inverse * bn.weight, mean, inverse
        rows[B] = bn.bias - mean * rows[A]
        return
    args.eps, args.momentum = bn.eps, bn.momentum
    _pointers(args, weight=bn.weight, bias=bn.bias, running_mean=mean, running_var=var)
    call.backend.run("stats_part", args)
    call.backend.run("stats_end", args)
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)


def _of_trained(kernel: Kernel, channels: Tensor, scalars: Tensor) -> tuple[Tensor, ...]:
    """The gradients of what `kernel` trains."""
    if not kernel.trained:
        return ()
    if kernel.kind == "clip":
        return (scalars[0],)
    if kernel.kind == "learned":
        return (scalars[1] * kernel.slope,)
    dz, _, dshift, dbeta, dzeta = channels
    return (-dz, dbeta, dzeta) if kernel.kind == "prelu" else (-dshift,)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, r: Tensor | None, weight: Tensor | None, bias: Tensor | None, *trained: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        args = _args(call, x)
        sums = torch.empty(args.chunks * (len(SUMS) * args.channels + 2), dtype=torch.float64)
        coefficients = _coefficients(call, args, sums)
        y, q = (torch.empty_like(x) if wanted else None for wanted in call.want)
        _pointers(args, r=r, y=y, q=q)
        call.backend.run("forward_part", args)
        ctx.call = call
        ctx.save_for_backward(x, r, coefficients)
        ctx.set_materialize_grads(False)
        return y, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, r, coefficients = ctx.saved_tensors
        call = ctx.call
        gy, gq = (_like(g, x) for g in grads)
        if gy is None and gq is None:
            return (None,) * len(ctx.needs_input_grad)
        args = _args(call, x)
        sums = torch.empty(args.chunks * (len(SUMS) * args.channels + 2), dtype=torch.float64)
        dx = torch.empty_like(x)
        dr = dx if r is None else torch.empty_like(x)
        channels, scalars = torch.empty(len(SUMS), args.channels), torch.empty(2)
        _pointers(args, r=r, gy=gy, gq=gq, dx=dx, dr=dr, coefficients=coefficients, sums=sums)
        _pointers(args, dchannels=channels, dscalars=scalars)
        call.backend.run("reduce_part", args)
        call.backend.run("reduce_end", args)
        dbias, dweight = (None, None) if call.norm is None else channels[:2]
        if call.norm is not None:
            call.backend.run("apply_part", args)
        trained = [g for kernel in (call.activation, call.behind) for g in _of_trained(kernel, channels, scalars)]
        return None, dx, None if r is None else dr, dweight, dbias, *trained


def fused(
    backend: Backend,
    x: Tensor,
    *,
    norm: nn.BatchNorm2d | None = None,
    residual: Tensor | None = None,
    activation: Kernel | None = None,
    quantizer: Kernel | None = None,
    want: tuple[bool, bool] = (True, False),
) -> tuple[Tensor | None, Tensor | None]:
    """y = activation(norm(x) + residual) and q = quantizer(y), each where it is wanted, else None.

    A residual needs a batch-norm.
    """
    call = Call(backend, activation or IDENTITY, quantizer or NOTHING, norm, want)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    trained = *call.activation.trained, *call.behind.trained
    return _Fused.apply(call, x, _like(residual, x), weight, bias, *trained)  # type: ignore[no-any-return]


class _Moments(torch.autograd.Function):
    """Mean and variance of each channel: those that a batch-norm with momentum 1 would keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        args = backend.args(x, *_channels(x))
        sums = torch.empty(args.chunks * (len(SUMS) * args.channels + 2), dtype=torch.float64)
        rows = torch.empty(len(ROWS), args.channels)
        one, zero = torch.ones(args.channels), torch.zeros(args.channels)
        mean, var = torch.zeros(2, args.channels)
        args.momentum = 1.0
        _pointers(args, sums=sums, coefficients=rows, weight=one, bias=zero, running_mean=mean, running_var=var)
        backend.run("stats_part", args)
        backend.run("stats_end", args)
        count = x.numel() // args.channels
        ctx.backend, ctx.count = backend, count
        ctx.save_for_backward(x, mean)
        return mean, var * ((count - 1) / count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, mean), (dmean, dvar) = ctx.saved_tensors, grads
        args, rows = ctx.backend.args(x, *_channels(x)), torch.zeros(len(ROWS), len(mean))
        rows[KX] = 2 / ctx.count * dvar
        rows[K1] = dmean / ctx.count - rows[KX] * mean
        dx = torch.empty_like(x)
        _pointers(args, coefficients=rows, dx=dx, dr=x)
        ctx.backend.run("apply_part", args)
        return dx, None


class Fast:
    """What `quantizer.fast` is while kernels are in use: the quantizers alone."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def takes(self, x: Tensor) -> bool:
        """Whether `x` can be given to `quantize`."""
        return takes(x)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance without correction) of each channel of `x`, [N, C, ...], in float32."""
        return _Moments.apply(x, self.backend)  # type: ignore[no-any-return]

    def quantize(self, x: Tensor, kernel: Kernel) -> Tensor:
        """What the quantizer that `kernel` describes makes of `x`."""
        if kernel.kind in KINDS:
            y = fused(self.backend, x, quantizer=kernel, want=(False, True))[1]
        else:
            y = fused(self.backend, x, activation=kernel)[0]
        assert y is not None, "it was wanted"
        return y
