"""FleXOR: weights decoded from fewer stored bits by a fixed network of XOR gates. Reference: arXiv 2009.04126"""

import math
import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.methods.shared import xor_spec
from qbench.methods.shared.xor_spec import XorSpec
from qbench.quant import ops
from qbench.quant.grid import Planes, planes
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Hook, State
from qbench.quant.packing import Part
from qbench.quant.quantizer import Quantizer, check_choice

MODES = ("flexor", "ste", "analog")


def wiring_tensor(spec: XorSpec) -> Tensor:
    """M as zeros and ones, float [q, n_out, n_in]."""
    matrix = torch.zeros(spec.q, spec.n_out, spec.n_in)
    for plane in range(spec.q):
        for r, row in enumerate(xor_spec.wiring(spec, plane)):
            matrix[plane, r, list(row)] = 1.0
    return matrix


def _gates(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of x and the outputs y of all gates, both -1 or +1."""
    with torch.autocast(x.device.type, enabled=False):  # the counts of ones must be exact
        signs = ops.sign_value(x)
        taps = matrix.sum(-1).unsqueeze(1)
        halves = torch.baddbmm(0.25 * taps, signs, 0.25 * matrix.mT)  # half the number of ones
    return signs, halves.frac_().mul_(4).sub_(1)


def _gates_backward(g: Tensor, signs: Tensor, y: Tensor, matrix: Tensor, u: Tensor | None) -> Tensor:
    """sum_r g_r (-1)^(n-1) prod_{j != i} sign(x_j), times 1 - tanh^2(u_i) where u = s * x is given."""
    # parity times the product of the other signs is y_r * sign(x_i): every factor is its own inverse
    grad = torch.bmm(g * y, matrix).mul_(signs)
    if u is not None:  # 1 - tanh^2(u) = 4 p (1 - p) with p = sigmoid(2u), which is three times faster than tanh
        grad = torch.ops.aten.sigmoid_backward(grad.mul_(4), torch.sigmoid(2 * u))
    return grad


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, matrix: Tensor, surrogate: bool) -> Tensor:
        signs, y = _gates(u, matrix)
        ctx.save_for_backward(signs, y, matrix, u if surrogate else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gates_backward(grads[0], *ctx.saved_tensors), None, None


class _DecodeAll(torch.autograd.Function):
    """The weights of several layers of one spec; the gates of all their slices are computed together."""

    @staticmethod
    def forward(ctx: Any, quantizers: "Sequence[FleXOR]", *tensors: Tensor) -> tuple[Tensor, ...]:
        latents, alphas = tensors[: len(quantizers)], tensors[len(quantizers) :]
        ctx.quantizers, ctx.slices = quantizers, [x.shape[1] for x in latents]
        x, matrix = torch.cat(latents, 1), quantizers[0].matrix
        signs, y = _gates(x, matrix)
        u = None
        if quantizers[0].mode == "flexor":
            ctx.s = torch.cat([q.s.expand(n) for q, n in zip(quantizers, ctx.slices, strict=True)]).unsqueeze(1)
            u = x.mul_(ctx.s)
        ctx.save_for_backward(signs, y, matrix, u, *alphas)
        parts = zip(quantizers, torch.split(y, ctx.slices, 1), alphas, strict=True)
        return tuple(q.combine(part, alpha) for q, part, alpha in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        signs, y, matrix, u, *alphas = ctx.saved_tensors
        g_y, g_alphas = torch.zeros_like(y), []
        both = zip(torch.split(y, ctx.slices, 1), torch.split(g_y, ctx.slices, 1), strict=True)
        for q, alpha, g, (part, g_part) in zip(ctx.quantizers, alphas, grads, both, strict=True):
            g_alphas.append((g * q.planes(part)).flatten(2).sum(2).view_as(alpha))
            count = g.numel()
            for plane, scale in zip(g_part, alpha, strict=True):
                torch.mul(g, scale, out=plane.view(-1)[:count].view(g.shape))
        g_x = _gates_backward(g_y, signs, y, matrix, u)
        if u is not None:
            g_x.mul_(ctx.s)
        return None, *torch.split(g_x, ctx.slices, 1), *g_alphas


def decode(x: Tensor, s: Tensor | float, matrix: Tensor, mode: str = "flexor") -> Tensor:
    """The weight bits y = M b over GF(2) of the stored bits b = 1[x >= 0], with 1 as +1 and 0 as -1.

    In every mode y_r = (-1)^(n-1) * prod_{j in T_r} sign(x_j) for the n inputs T_r of gate r. The gradient dy_r/dx_i is
      flexor: s * (1 - tanh^2(s * x_i)) * (-1)^(n-1) * prod_{j != i} sign(x_j)      only the input itself is softened
      ste:    (-1)^(n-1) * prod_{j != i} sign(x_j)                                  identity through each sign
      analog: s * (1 - tanh^2(s * x_i)) * (-1)^(n-1) * prod_{j != i} tanh(s * x_j)  all inputs are softened
    The analog scheme is ambiguous in the paper; hard bits forward is the reading that trains.

    x: [q, slices, n_in], matrix: [q, n_out, n_in] -> [q, slices, n_out]. `s` gets no gradient.
    Reference: arXiv 2009.04126, Eq. 2-6 and Fig. 5
    """
    if mode == "ste":
        return _Decode.apply(x, matrix, False)  # type: ignore[no-any-return, no-untyped-call]
    u = x * s
    if mode == "flexor":
        return _Decode.apply(u, matrix, True)  # type: ignore[no-any-return, no-untyped-call]
    factors = torch.where(matrix.bool().unsqueeze(1), u.tanh().unsqueeze(2), 1.0)
    parity = 2 * torch.remainder(matrix.sum(-1), 2) - 1
    soft = factors.prod(-1) * parity.unsqueeze(1)
    return ops.straight_through(soft, _Decode.apply(u.detach(), matrix, True))  # type: ignore[no-untyped-call]


class FleXOR(Quantizer):
    """W = sum_i alpha_i * y_i, where the bits y_i of plane i are decoded from encrypted weights x (the latent).

    The latent [q, slices, n_in], slices = ceil(weights / n_out), is drawn anew from N(0, std^2): the paper trains from
    scratch, and the float weight is not used. Codes of the last slice beyond the weight are dropped. Weights are cut
    into slices in PyTorch's order [out, in, k, k]; the paper's is [k, k, in, out], which changes only which weights
    share a slice. alpha is learned, one per output channel and plane. `s` (S_tanh) is a 0-dim buffer that `Sharpness`
    anneals. The wiring takes q * n_out * n_in bits, once for all layers of an equal spec (`shared_bits`).

    bits: stored bits per weight, q * n_in / n_out. For n_in, n_out, n_tap, q, matrix, stage see `xor_spec.make`.
    alpha: initial value, or `he` for sqrt(2 / fan_in), which nets without batch-norm need.

    Errors: ValueError on any of these arguments.
    Reference: arXiv 2009.04126, Sec. 2-4
    """

    granularity = "per_channel"
    idempotent = False  # the latent is not a weight
    latent_name = "encrypted weight"
    s: Tensor
    matrix: Tensor

    def __init__(
        self,
        layer: QuantLayer,
        site: str,
        *,
        bits: float,
        n_in: int | Sequence[int] | None = None,
        n_out: int = 20,
        n_tap: int | None = 2,
        q: int | None = None,
        matrix: str = "covering",
        matrix_seed: int = 0,
        stage: int | None = None,
        mode: str = "flexor",
        alpha: float | str = 0.2,
        s: float = 10.0,
        std: float = 1e-3,
    ) -> None:
        super().__init__()
        self.spec = xor_spec.make(
            bits, n_in=n_in, n_out=n_out, n_tap=n_tap, q=q, matrix=matrix, seed=matrix_seed, stage=stage
        )
        self.mode = check_choice("mode", mode, MODES)
        if mode == "analog":
            self.eager = "differentiates a product, for which torch counts zeros on the host"
        if not s > 0 or not std > 0:
            raise ValueError(f"s and std must be above 0, got s={s!r}, std={std!r}")
        self.bits, self.std = self.spec.bits, std
        self.shape = tuple(layer.weight.shape)
        if alpha == "he":
            alpha = math.sqrt(2 / math.prod(self.shape[1:]))
        if isinstance(alpha, str) or not alpha > 0:
            raise ValueError(f"alpha must be a number above 0 or 'he', got {alpha!r}")
        ones = torch.ones(self.spec.q, self.shape[0], *[1] * (len(self.shape) - 1))
        self.alpha = torch.nn.Parameter(alpha * ones)
        self.register_buffer("s", torch.tensor(float(s)))
        self.register_buffer("matrix", wiring_tensor(self.spec))

    def latent(self, weight: Tensor) -> Tensor:
        # seeded by the float weight: it differs from layer to layer and follows the run's seed, whatever the order
        generator = torch.Generator().manual_seed(
            zlib.crc32(weight.detach().float().cpu().contiguous().numpy().tobytes())
        )
        slices = math.ceil(math.prod(self.shape) / self.spec.n_out)
        drawn = torch.randn(self.spec.q, slices, self.spec.n_in, generator=generator)
        return (self.std * drawn).to(weight.device)

    def planes(self, decoded: Tensor) -> Tensor:
        """Decoded slices [q, slices, n_out] as planes of the weight's shape [q, *weight]; the surplus is dropped."""
        return decoded.flatten(1)[:, : math.prod(self.shape)].view(self.spec.q, *self.shape)

    def combine(self, decoded: Tensor, alpha: Tensor) -> Tensor:
        """W = sum_i alpha_i * y_i of decoded slices [q, slices, n_out]."""
        scaled = self.planes(decoded) * alpha
        return scaled.sum(0) if len(scaled) > 1 else scaled[0]

    def quantize(self, x: Tensor) -> Tensor:
        return self.combine(decode(x, self.s, self.matrix, self.mode), self.alpha)

    @classmethod
    def quantize_all(cls, weights: Sequence[Tensor], quantizers: Sequence[Quantizer]) -> list[Tensor]:
        """All layers of an equal spec are decoded in one pass over their slices (mode analog: layer by layer)."""
        qs: list[FleXOR] = list(quantizers)  # type: ignore[arg-type]
        hats: list[Tensor] = list(weights)
        for spec, mode in dict.fromkeys((q.spec, q.mode) for q in qs):
            members = [i for i, q in enumerate(qs) if (q.spec, q.mode) == (spec, mode)]
            if mode == "analog":
                decoded = tuple(qs[i](weights[i]) for i in members)
            else:
                tensors = [weights[i].float() for i in members] + [qs[i].alpha for i in members]
                decoded = _DecodeAll.apply([qs[i] for i in members], *tensors)  # type: ignore[no-untyped-call]
            for i, hat in zip(members, decoded, strict=True):
                hats[i] = hat
        return hats

    def grid(self, x: Tensor | None = None) -> Planes:
        return planes(self.alpha)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Of the decoded bits, which values alone would not tell where two sums of alphas are equal."""
        return Planes.join(self.planes(decode(x.float(), self.s, self.matrix)) > 0)

    def stored(self, x: Tensor) -> dict[str, Part]:
        """The encrypted bits [q, slices, n_in]."""
        return {"encrypted": Part((x.detach() >= 0).to(torch.int32), 1)}

    def restored(self, parts: dict[str, Part]) -> Tensor:
        return self.codes(parts["encrypted"].numbers.to(self.alpha.device) - 0.5)

    def coding(self) -> dict[str, str]:
        return {"kind": "xor", "bits": "encrypted", "order": "slices"}

    def shared(self) -> dict[Hashable, Part]:
        """The wiring M [q, n_out, n_in]."""
        return {self.spec: Part(self.matrix.to(torch.int32), 1)}

    def gradient_share(self, x: Tensor) -> Tensor:
        """1 - tanh^2(s * x), for mode=ste 1; 0 for stored bits that reach no gate."""
        share = torch.ones_like(x) if self.mode == "ste" else 1 - torch.tanh(self.s * x).square()
        return share * (self.matrix.sum(1, keepdim=True) > 0)

    def traces(self) -> dict[str, float]:
        return {"alpha": float(self.alpha.detach().mean()), "s_tanh": float(self.s)}

    def describe(self) -> dict[str, Any]:
        return super().describe() | xor_spec.facts(self.spec) | {"mode": self.mode}


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


class Sharpness(Hook):
    """Anneal S_tanh of all FleXOR quantizers; a pure function of the share t of the training done.

    S(t) = s * (1/2 + 1/2 * min(1, t / warmup)) * 2^(number of `doublings` <= t); warmup=0 leaves out the first factor.
    The paper doubles S where the learning rate drops (150 and 175 of 200 epochs are shares 0.75 and 0.875), since
    weight decay keeps shrinking the encrypted weights; schedules without drops get it at the same shares. The word
    `lr` instead of shares means: where the run's own learning rate rises (warmup) or drops (doublings; none unless the
    schedule is `step`). With `clip` the encrypted weights are cut to +-2/S after each step (Fig. 15b).

    Errors: ValueError on a share outside 0..1, doublings that are no list, s not above 0.
    Reference: arXiv 2009.04126, Sec. 4, Fig. 6 and 15
    """

    def __init__(
        self, s: float = 10.0, warmup: float | str = 0.0, doublings: Sequence[float] | str = (), clip: bool = False
    ) -> None:
        super().__init__()
        if not s > 0:
            raise ValueError(f"s must be above 0, got {s!r}")
        if warmup != "lr" and not _is_share(warmup):
            raise ValueError(f"warmup must be a share of the training in 0..1 or 'lr', got {warmup!r}")
        if doublings != "lr" and not (isinstance(doublings, Sequence) and all(map(_is_share, doublings))):
            raise ValueError(
                f"doublings must be a list of shares in 0..1 of the training, as [0.75], or 'lr', got {doublings!r}"
            )
        self.start, self.warmup, self.doublings, self.clip = float(s), warmup, doublings, clip

    def value(self, share: float, lr_warmup: float = 0.0, lr_drops: Sequence[float] = ()) -> float:
        """S after this share of the training; the others are the shares that `lr` stands for."""
        warmup = lr_warmup if isinstance(self.warmup, str) else self.warmup
        doublings = lr_drops if isinstance(self.doublings, str) else self.doublings
        rise = min(1.0, share / warmup) if warmup else 1.0
        return self.start * (0.5 + 0.5 * rise) * float(2 ** sum(share >= d for d in doublings))

    def before_step(self, state: State) -> None:
        value = self.value(state.training_share, state.warmup, state.lr_drops)
        for module in state.model.modules():
            if isinstance(module, FleXOR):
                module.s.fill_(value)

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        if not self.clip:
            return
        for _, layer in quant_layers(state.model):
            if isinstance(layer.weight_quantizer, FleXOR):
                bound = 2 / layer.weight_quantizer.s
                layer.weight.clamp_(-bound, bound)
