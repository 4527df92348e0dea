"""ABC-Net: M binary bases for weights, N shifted binary activations for inputs. Reference: arXiv 1711.11294"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from qbench.methods.shared.binary import Slope
from qbench.quant import ops, quantizer
from qbench.quant.grid import Planes, planes
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer, check_bits

# Table S4, for ResNet-18, by (M, N), where it is not even from -1 to 1 (u, Eq. 4) or from -1.5 to 1.5 (v). The paper is
# silent on other pairs.
U = {(5, 1): (-2.0, -1.0, 0.0, 1.0, 2.0)}
V = {(5, 3): (-0.9, 0.0, 0.9), (3, 5): (-3.5, -2.5, -1.5, 0.0, 2.5), (5, 5): (-3.5, -2.5, -1.5, 0.0, 2.5)}


def spread(count: int, bound: float) -> list[float]:
    """`count` numbers from -bound to bound; 0 for one. Reference: arXiv 1711.11294, Eq. 4 with bound 1"""
    return [0.0] if count == 1 else [bound * (2 * i / (count - 1) - 1) for i in range(count)]


def _listed(shifts: Sequence[float] | None, among: Sequence[float]) -> list[float]:
    if shifts is not None and not isinstance(shifts, Sequence):
        raise ValueError(f"the shifts (u of weights, v of inputs) must be a list of numbers or null, got {shifts!r}")
    return list(shifts or among)


class BinaryBases(Quantizer):
    """w_hat = sum_m alpha_m B_m, B_m = sign(w - mean(w) + u_m std(w)), one set per layer; sign(0) = +1.

    alpha solves min |w - sum_m alpha_m B_m|^2 in each forward pass; where bases coincide it is the solution of least
    norm. The standard deviation has n in its denominator. The gradient is g * sum_m alpha_m slope_m, alpha a constant
    and slope_m that of `Slope` at w - mean + u_m std, by default 1.

    M + 1 different values come out, as the thresholds are ordered; a conv with it is M binary convs, and M bits per
    weight are stored.

    Args:
        bits: M, 1..8
        shifts: u_1..u_M; None is the paper's table for (M, `inputs`), else evenly over -1..1
        inputs: N of the layer's inputs, which the table asks for

    Errors: ValueError on bits out of range or a wrong number of shifts.
    Reference: arXiv 1711.11294, Eq. 2-6 and Table S4
    """

    idempotent = False  # the bases of a quantized weight have other thresholds
    eager = "finds its scales by an eigendecomposition, whose success torch checks on the host"
    u: Tensor

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float,
        gradient: str = "identity",
        shifts: Sequence[float] | None = None,
        inputs: int = 0,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 8)
        u = _listed(shifts, U.get((self.bits, inputs)) or spread(self.bits, 1.0))
        if len(u) != self.bits:
            raise ValueError(f"w_bits={self.bits} needs {self.bits} shifts of weights, got {u}")
        self.slope = Slope(gradient)
        self.register_buffer("u", torch.tensor(u))

    def thresholds(self, w: Tensor) -> Tensor:
        """mean - u_m std, [M, 1, ...]."""
        return w.mean() - self.u.view(-1, *[1] * w.dim()) * w.std(unbiased=False)

    def coefficients(self, w: Tensor, bases: Tensor) -> Tensor:
        """alpha, [M, 1, ...], from the normal equations in float64."""
        b = bases.flatten(1).double()
        gram, right = b @ b.T / b.shape[1], b @ w.flatten().double() / b.shape[1]
        alpha: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ right
        return alpha.to(w.dtype).view(-1, *[1] * w.dim())

    def quantize(self, x: Tensor) -> Tensor:
        shifted = x.detach() - self.thresholds(x.detach())
        with torch.autocast(x.device.type, enabled=False):
            bases = ops.sign_value(shifted)
            alpha = self.coefficients(x.detach(), bases)
        slope = (alpha * self.slope(shifted)).sum(0)
        return ops.straight_through(x * slope, reduce(torch.add, alpha * bases))  # in the grid's order

    @torch.no_grad()
    def grid(self, x: Tensor | None = None) -> Planes:
        """The M bases; their thresholds are of the weight too, and none has to be stored."""
        if x is None:
            return planes(None, thresholds=-self.u, q=int(self.bits))
        thresholds = self.thresholds(x)
        return planes(self.coefficients(x, ops.sign_value(x - thresholds)), thresholds)


class BinaryActivations(Quantizer):
    """x_hat = sum_n beta_n A_n, A_n = +1 where clip(x + v_n, 0, 1) >= 1/2, else -1; beta_n and v_n are learned.

    With slope_n = 1[0 <= x + v_n <= 1] the gradients are dL/dx = g sum_n beta_n slope_n, dL/dv_n = sum(g beta_n
    slope_n), dL/dbeta_n = sum(g A_n). Another of the slopes of `Slope` is taken at x + v_n - 1/2. beta is 1 at first.

    Args:
        bits: N, 1..8
        shifts: v_1..v_N at first; None is the paper's table for (`bases`, N), else evenly over -1.5..1.5
        bases: M of the layer's weights, which the table asks for

    Errors: ValueError on bits out of range or a wrong number of shifts.
    Reference: arXiv 1711.11294, Eq. 7-11 and Table S4
    """

    idempotent = False

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float,
        gradient: str = "clipped",
        shifts: Sequence[float] | None = None,
        bases: int = 0,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits, 1, 8)
        v = _listed(shifts, V.get((bases, self.bits)) or spread(self.bits, 1.5))
        if len(v) != self.bits:
            raise ValueError(f"a_bits={self.bits} needs {self.bits} shifts of inputs, got {v}")
        self.slope = Slope(gradient, clip=0.5)
        self.v, self.beta = nn.Parameter(torch.tensor(v)), nn.Parameter(torch.ones(self.bits))

    def grid(self, x: Tensor | None = None) -> Planes:
        return planes(self.beta, thresholds=0.5 - self.v.detach())

    def quantize(self, x: Tensor) -> Tensor:
        parts = [b * self._sign(x, v) for b, v in zip(self.beta, self.v, strict=True)]
        total: Tensor = reduce(torch.add, parts)
        return total

    def _sign(self, x: Tensor, v: Tensor) -> Tensor:
        """A_n, by the kernel of signs with a threshold where there is one."""
        if quantizer.fast is not None and x.dim() > 1 and quantizer.fast.takes(x):
            shift = (0.5 - v).expand(x.shape[1])
            return quantizer.fast.quantize(x, self.slope.kernel(shift))  # type: ignore[no-any-return]
        return self.slope.sign(x - (0.5 - v))

    def traces(self) -> dict[str, float]:
        named = {"v": self.v, "beta": self.beta}
        return {f"{k}{i}": value for k, p in named.items() for i, value in enumerate(p.detach().tolist())}
