"""What every quantizer is: a map onto a grid that it names, with codes that can be stored."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.grid import Grid
from qbench.quant.packing import Part


def check_bits(bits: float, lo: int = 1, hi: int = 32, name: str = "bits") -> int:
    """`bits` as an integer in lo..hi, or ValueError saying what was got and what is allowed."""
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or bits != int(bits) or not lo <= bits <= hi:
        raise ValueError(f"{name} must be a whole number in {lo}..{hi}, got {bits!r}")
    return int(bits)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`, else ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


fast: Any = None  # the compiled kernels while they are in use: see qbench.kernels.use
formulas = False  # whether formulas (qbench.quant.ops.formula) run compiled


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel must know of a quantizer to do what its `quantize` does, in values and gradients.

    In place of a ReLU:
      'clip':    clip(x, 0, value), then on `steps` equal steps. Gradient 1 for 0 <= x < value (<= where `closed`);
                 `trained` is the bound: 1 above
      'relu':    clip(x, 0, value). Gradient 1 for 0 < x < value
      'bounded': clip(x, -value, value). Gradient 1 for |x| <= value
      'prelu':   max(x - gamma, 0) + beta min(x - gamma, 0) + zeta; `trained` are gamma, beta and zeta, per channel
    Anywhere:
      'learned': value * round(clip(x / value, lo, hi)). Gradient 1 strictly inside; `trained` is the step, its
                 gradient round(x / value) - x / value inside, lo or hi outside, multiplied by `slope`
      'grid':    (clip(round(x / value) + zero, lo, hi) - zero) * value. Gradient 1 where nothing was clipped
      a sign, +1 where u = x - shift >= 0, else -1; `trained` is the shift, per channel (none: 0), its gradient minus
      the sum of that of x:
      'sign':       gradient 1 for |u| < value (<= where `closed`)
      'polynomial': max(0, 2 - 2 |u|)
      'tanh':       max(value, 1) (1 - tanh^2(value u))
      'fourier':    (4 value / pi) sum_{i=0..steps} cos((2i + 1) value u), 0 for |u| >= pi / value
    """

    kind: str
    value: float = 1.0
    trained: tuple[Tensor, ...] = ()
    steps: int = 1
    lo: float = 0.0
    hi: float = 0.0
    zero: float = 0.0
    closed: bool = False
    slope: float = 1.0


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the module is in eval mode: a quantizer draws no random numbers and follows no statistics."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


class Quantizer(nn.Module, ABC):
    """Maps a tensor onto a grid: `forward(x) -> x_hat`, same shape and dtype, computed in float32 under autocast too.

    One class serves weights, inputs and errors. `enabled` lets a hook delay quantization and
    lets calibration run with float inputs; the checkpoint stores it with the module. `generator` is set by the trainer,
    for quantizers that draw random numbers; in eval mode they draw none unless their paper evaluates stochastically.
    """

    bits: float
    signed: bool = True
    granularity: str = "per_tensor"
    latent_name: str = "latent weight"  # what `latent` gives, in the words of a figure
    watches: bool = False  # its range follows what it is given: it must be called, and nothing may take its place
    casts: bool = False  # whether `quantize` takes and gives bf16 too, computing in float32 inside its formula
    idempotent: bool = True  # quantizing a quantized tensor changes nothing; a paper whose map is not says so
    pieces: tuple[int, int] = (1, 1)  # into how many micro-batches, and workers, the trainer divides a step's batch
    told: tuple[str, ...] = ()  # attributes that a manifest tells too, where they are not None
    eager: str = ""  # why a step with it cannot be a CUDA graph ("reads a value on the host"); empty: it can

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.generator: torch.Generator | None = None

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Return x (float32) on the grid."""

    def alike(self) -> Any:
        """What must be equal for two weights to be quantized as one whose output channels are those of both.

        None where a channel does not stand alone, as its layer's other channels count.
        """
        return None

    def bypass(self, x: Tensor) -> Tensor:
        """What happens while not `enabled`: the identity; ReLU where the quantizer stands in place of a ReLU."""
        return x

    def kernel(self, shape: torch.Size) -> Kernel | None:
        """What `quantize` does to a tensor of this shape, where a compiled kernel does the same; None: nothing does.

        A subclass with a `quantize` of its own has none, unless it says so.
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "quantize" in vars(cls):
            cls.casts = vars(cls).get("casts", False)
            if "kernel" not in vars(cls):
                cls.kernel = Quantizer.kernel  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.bypass(x)
        if fast is not None and fast.takes(x) and (kernel := self.kernel(x.shape)) is not None:
            return fast.quantize(x, kernel)  # type: ignore[no-any-return]
        if formulas and self.casts:
            return self.quantize(x)
        return self.quantize(x.float()).to(x.dtype)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set ranges from `x`: the weight, or one batch of calibration inputs (called once per batch)."""

    @torch.no_grad()
    def finish_calibration(self) -> None:
        """Turn what `calibrate` collected over all batches into a range."""

    def latent(self, weight: Tensor) -> Tensor:
        """What is trained instead of `weight`; the default is the weight itself."""
        return weight

    @abstractmethod
    def grid(self, x: Tensor | None = None) -> Grid:
        """Where the values of `quantize` lie; `x` is the tensor that is quantized (the latent, for weights).

        Without `x` it is what is known without data: all there is to an activation whose range was calibrated or
        learned. What takes a scale from the tensor itself needs `x` for that; without it the grid is `dynamic`. It is
        that of evaluation: no random numbers, no average that moves. Nothing in it has a gradient.
        """

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The code of each value of `quantize(x)`, in evaluation, on `grid(x)`: int32, of the shape of x_hat."""
        x = x.detach().float()
        with evaluating(self):
            return self.grid(x).codes(self.quantize(x), x)

    @property
    def levels(self) -> int:
        """The most distinct codes per scale."""
        return self.grid().levels

    def stored(self, x: Tensor) -> dict[str, Part]:
        """What a packed file holds for the codes of `x`: by default the codes themselves, counted from the lowest.

        One whose codes are computed from fewer stored bits gives these instead, and `restored` computes the codes.
        """
        return {"codes": self.grid().pack(self.codes(x))}

    def restored(self, parts: dict[str, Part]) -> Tensor:
        """The codes that the parts of `stored` stand for."""
        return self.grid().unpack(parts["codes"])

    def coding(self) -> dict[str, str]:
        """How the parts of `stored` stand for the codes, in words that need no class: see `qbench.quant.coding`."""
        return {"kind": "codes"}

    def shared(self) -> dict[Hashable, Part]:
        """Tables that all quantizers of an equal key share: a packed file holds them once."""
        return {}

    def stored_bits(self, x: Tensor) -> tuple[int, int]:
        """(bits of the codes, bits of scales and tables) in a packed file, before each part is filled up to bytes."""
        tables = self.grid(x.detach().float()).tables().values()
        return sum(p.bits for p in self.stored(x).values()), sum(p.bits for p in tables)

    def traces(self) -> dict[str, float]:
        """Named scalars worth plotting over training: learned scales by default (their mean when per channel)."""
        return {name: float(p.detach().float().mean()) for name, p in self.named_parameters(recurse=False)}

    def gradient_share(self, x: Tensor) -> Tensor:
        """How much of a gradient reaches each latent, as a share of the most that reaches one. Shape of x.

        Measured: |d/dx sum_i r_i x_hat_i| with fixed random signs r. A quantizer whose latents reach several weights
        (a mean that is subtracted, gates) may say it itself, lest their contributions mix.
        """
        with torch.enable_grad():
            leaf = x.detach().float().requires_grad_()
            hat = self(leaf)
        if not hat.requires_grad:
            return torch.zeros_like(leaf)
        signs = torch.rand(hat.shape, generator=torch.Generator().manual_seed(0)).sub_(0.5).sign_().to(hat.device)
        found = torch.autograd.grad(hat, leaf, signs, allow_unused=True, materialize_grads=True)[0].abs()
        return found / found.max().clamp(min=torch.finfo(found.dtype).tiny)

    @classmethod
    def quantize_all(cls, weights: Sequence[Tensor], quantizers: Sequence["Quantizer"]) -> list[Tensor]:
        """Quantize all weights of a net that share this class; override where one pass serves all layers.

        Those that are `alike` and of one shape but for their output channels are stacked along these, and one call
        serves them.
        """
        groups: dict[Any, list[int]] = {}
        for i, (w, q) in enumerate(zip(weights, quantizers, strict=True)):
            key = q.alike() if q.enabled else None
            groups.setdefault(i if key is None else (key, w.shape[1:], w.dtype), []).append(i)
        hats: dict[int, Tensor] = {}
        for first, *others in groups.values():
            members = [weights[i] for i in (first, *others)]
            if others:
                parts = quantizers[first](torch.cat(members)).split([len(w) for w in members])
            else:
                parts = (quantizers[first](members[0]),)
            hats.update(zip((first, *others), parts, strict=True))
        return [hats[i] for i in range(len(weights))]

    def get_extra_state(self) -> dict[str, Any]:
        return {"enabled": self.enabled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, own in self.get_extra_state().items():
            value = state.get(name, own)
            truth = isinstance(own, bool)
            fits = (
                isinstance(value, bool) if truth else type(value) in (int, float) if type(own) in (int, float) else True
            )
            if not fits:
                raise ValueError(f"{name} is {value!r:.40}, which no quantizer has kept so")
        self.enabled = state["enabled"]

    def describe(self) -> dict[str, Any]:
        """One manifest entry: class, bits, levels, granularity, signedness, the grid, and the options in `told`.

        A grid that no tensor decides has a range: its least and greatest value, of all channels.
        """
        grid = self.grid()
        known: dict[str, Any] = {"grid": type(grid).__name__.lower()}
        if not grid.dynamic:
            known["range"] = [grid.ends()[0].min().item(), grid.ends()[1].max().item()]
        return {
            "quantizer": type(self).__name__,
            "bits": self.bits,
            "levels": grid.levels,
            "granularity": self.granularity,
            "signed": self.signed,
            **known,
            **{name: value for name in self.told if (value := getattr(self, name)) is not None},
        }


class Rectifier(Quantizer):
    """Quantizes what a ReLU gives: in place of the ReLU, or, at the site 'input', what reaches a layer.

    A layer's input has no sign of its own: where the calibration images show it below 0 (behind a linear bottleneck,
    say) the quantizer is `signed`, and its grid lies on both sides of 0.
    """

    def __init__(self, layer: nn.Module, site: str) -> None:
        super().__init__()
        self.signed = False
        self.at_input = site == "input"

    def bypass(self, x: Tensor) -> Tensor:
        return x if self.at_input else x.relu()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.signed = self.signed or (self.at_input and bool((x < 0).any()))

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "signed": self.signed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.signed = state.get("signed", False)
