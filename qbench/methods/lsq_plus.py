"""LSQ+: LSQ with a learned offset of the inputs' grid, started where the squared error is least (arXiv 2004.09576)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qbench.methods.shared.lsq import LSQ, SMALLEST
from qbench.quant import ops, ranges
from qbench.quant.grid import Affine, affine
from qbench.quant.quantizer import Kernel


@ops.formula
def _quantize(x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int) -> Tensor:
    s = step.clamp_min(SMALLEST)
    return (x.float() - offset).div_(s).clamp_(lo, hi).round_().mul_(s).add_(offset).to(x.dtype)


@ops.formula
def _quantize_backward(
    g: Tensor, x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int
) -> tuple[Tensor, Tensor, Tensor]:
    z = ((x.float() - offset) / step.clamp_min(SMALLEST)).clamp_(lo, hi)
    wide = g.float()
    dx = wide * ((z > lo) & (z < hi))
    return dx.to(g.dtype), (z.round() * wide - z * dx).sum(), (wide - dx).sum()


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int, scale: float) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.bounds, ctx.scale = (lo, hi), scale
        return _quantize(x, step, offset, lo, hi)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dstep, doffset = _quantize_backward(grads[0], *ctx.saved_tensors, *ctx.bounds)
        return dx, dstep * ctx.scale, doffset * ctx.scale, None, None, None


class LSQPlusWeight(LSQ):
    """LSQ's weights, whose step starts at max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1).

    Reference: arXiv 2004.09576 Sec. 3 (start); all else 1902.08153 Sec. 2
    """

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x.float(), correction=min(1, x.numel() - 1))
        step = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2 ** (int(self.bits) - 1)
        if step > 0:  # else all weights are 0, and any step does
            self.step.copy_(step)


class LSQPlusInput(LSQ):
    """x_hat = s round(clip((x - o) / s, n, p)) + o: a grid whose step s and offset o are learned, one per tensor.

    With z = (x - o) / s, and a bound itself counting as outside as in LSQ: dx_hat/dx = 1 for n < z < p, else 0;
    dx_hat/ds = round(z) - z there, n below, p above; dx_hat/do = 0 there, else 1. The latter two are summed over the
    tensor and multiplied by LSQ's 1 / sqrt(N p). Any shape, batch first. s is read as at least 1e-6. No value of the
    grid need be 0, that of a conv's padding.

    Start: s and o of a least squared error over a sample of the calibration images. From the range of `ranges.mse` on,
    the codes of a grid and the least squares line through these codes take turns, neither of which can increase the
    error. The paper minimises it too, by gradients over a few batches.

    Args:
        bits: 2..16
        signed: n..p is -2^(bits-1)..2^(bits-1) - 1, otherwise 0..2^bits - 1
        offset: whether o is learned; otherwise it is 0, and what lies below n s is clipped
        count: as LSQ

    Raises:
        ValueError: an argument out of its range

    Reference: arXiv 2004.09576 Sec. 3
    """

    SAMPLE = 2**14  # values of each calibration batch
    TURNS = 20
    casts = True

    def __init__(
        self, layer: nn.Module, site: str, *, bits: int, signed: bool, offset: bool, count: str = "features"
    ) -> None:
        super().__init__(layer, site, bits=bits, count=count)
        for name, value in (("signed", signed), ("offset", offset)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        self.signed = signed
        self.offset = nn.Parameter(torch.zeros(())) if offset else None
        self._sample: list[Tensor] = []

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        x = x.float().flatten()
        if x.numel() > self.SAMPLE:  # drawn with a fixed seed
            drawn = torch.randint(x.numel(), (self.SAMPLE,), generator=torch.Generator().manual_seed(0))
            x = x[drawn.to(x.device)]
        self._sample.append(x)

    @torch.no_grad()
    def finish_calibration(self) -> None:
        if not self._sample:
            return
        x, self._sample = torch.cat(self._sample), []
        symmetric = self.offset is None
        centre = 0.0 if symmetric else x.median()  # ranges hold 0: let it lie among the values
        lo, hi = ranges.find("mse", x - centre, bits=int(self.bits), symmetric=symmetric, signed=self.signed)
        self.step.copy_(ranges.grid(lo, hi, self.bounds, symmetric)[0])
        if self.offset is not None:
            self.offset.copy_(lo + centre - self.bounds[0] * self.step)
        for _ in range(self.TURNS):
            self._refit(x)

    def _refit(self, x: Tensor) -> None:
        """Step and offset of least squares for the codes that x has now; without an offset the line goes through 0."""
        codes = self.codes(x).float()
        centre, middle = (0.0, 0.0) if self.offset is None else (codes.mean(), x.mean())
        square = (codes - centre).square().sum()
        if square > 0:  # else all have one code
            self.step.copy_(((codes - centre) * (x - middle)).sum() / square)
            if self.offset is not None:
                self.offset.copy_(middle - self.step * centre)

    def quantize(self, x: Tensor) -> Tensor:
        if self.offset is None:
            return super().quantize(x)
        return _Quantize.apply(x, self.step, self.offset, *self.bounds, self.slope(x.shape))  # type: ignore[no-any-return, no-untyped-call]

    def kernel(self, shape: torch.Size) -> Kernel | None:  # type: ignore[override]
        return super().kernel(shape) if self.offset is None else None

    def grid(self, x: Tensor | None = None) -> Affine:
        return affine(self.step.detach().clamp_min(SMALLEST), *self.bounds, offset=self.offset)
