"""Which way each weight is rounded, learned from a few images: AdaRound, and with its options BRECQ and QDrop.

Reference: 2004.10568 (AdaRound); 2102.05426 (BRECQ: whole blocks, Fisher weights); 2203.05740 (QDrop: activations
that are quantized at random, with learned steps)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qbench.methods.shared.reconstruction import KINDS, PIECE, activation_of, fisher, minimise, units, whole
from qbench.quant import ops
from qbench.quant.layers import quant_layers
from qbench.quant.method import Done, State
from qbench.quant.passes import ACTIVATIONS, as_float, calibrating, layer_io
from qbench.quant.quantizer import Kernel, check_choice, evaluating
from qbench.quant.surgery import activation_quantizers
from qbench.quant.uniform import Uniform, UniformGrid

ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1). Reference: 2004.10568 Eq. 23"""
    return ops.clip(v.sigmoid() * (ZETA - GAMMA) + GAMMA, 0, 1)


def regulariser(h: Tensor, beta: float) -> Tensor:
    """sum 1 - |2 h - 1|^beta, which is 0 where all h are 0 or 1. Reference: 2004.10568 Eq. 24"""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


class Rounding(Uniform):
    """A grid for weights on which each weight may be rounded down or up: code = floor(w / step) + (0 or 1), clipped.

    The float weight stays; `shift` is what the choice adds to the nearest code (-1, 0 or 1), at first 0. While the
    choice is learned, between `soften` and `harden`, the code is floor(w / step) + h(V), which begins at w / step, and
    the gradient goes to V alone. A weight that has no room to move, as floor or floor + 1 lies off the grid, keeps its
    nearest code. Afterwards the gradient is that of `Uniform`.

    Reference: 2004.10568 Eq. 22
    """

    idempotent = False  # what lies on the grid is moved again
    shift: Tensor
    v: nn.Parameter | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, site: str, **options: Any) -> None:
        super().__init__(layer, site, **options)
        self.register_buffer("shift", torch.zeros(layer.weight.shape, dtype=torch.int8))
        self.register_parameter("v", None)

    def free(self, weight: Tensor) -> Tensor:
        """Where both neighbours are on the grid."""
        below = (weight / self.step).floor() + self.zero
        return (below >= self.bounds[0]) & (below < self.bounds[1])

    @torch.no_grad()
    def soften(self, weight: Tensor) -> nn.Parameter:
        """Begin to learn; returns V, of the weight's shape, with h(V) = w / step - floor(w / step)."""
        share = (weight / self.step).frac().remainder(1)
        self.v = nn.Parameter(((share - GAMMA) / (ZETA - GAMMA)).logit())
        return self.v

    @torch.no_grad()
    def harden(self, weight: Tensor) -> None:
        """End to learn: up where h(V) >= 1/2, else down."""
        assert self.v is not None
        scaled = weight / self.step
        chosen = scaled.floor() + (rectified_sigmoid(self.v) >= 0.5)
        self.shift.copy_((chosen - scaled.round()) * self.free(weight))
        self.v = None

    def quantize(self, x: Tensor) -> Tensor:
        scaled = x / self.step
        if self.v is None:
            moved = (scaled.round() + self.shift) * self.step
            return super().quantize(x + (moved - x).detach())
        soft = (scaled.floor().detach() + rectified_sigmoid(self.v)) * self.step
        return torch.where(self.free(x), soft, super().quantize(x).detach())


class Activation(Uniform):
    """A grid for activations that, while a unit is learned, may learn its step and let values pass.

    With `drop` above 0 each value is left in float with that probability. Where the step is learned its gradient is
    round(x / step) - x / step where the code needs no clipping, so up to half a step beyond either end, as in QDrop's
    code, and the lowest or highest code (less zero) farther out.

    Reference: 2203.05740; 1902.08153 Sec. 2, where the ends themselves are the bounds
    """

    drop = 0.0

    @torch.no_grad()
    def settle(self, step: Tensor) -> None:
        """Nothing is dropped or learned any more, and `step` is the step."""
        self.drop, (lo, hi) = 0.0, self.bounds
        self.step.requires_grad_(False).copy_(step)
        self.lo.copy_((lo - self.zero) * step)
        self.hi.copy_((hi - self.zero) * step)

    def kernel(self, shape: torch.Size) -> Kernel | None:
        return None if self.drop or self.step.requires_grad else UniformGrid.kernel(self, shape)

    def quantize(self, x: Tensor) -> Tensor:
        if not self.drop and not self.step.requires_grad:
            return super().quantize(x)
        codes = ops.clip(ops.round(x / self.step) + self.zero, *self.bounds)
        return mixed((codes - self.zero) * self.step, x, self.drop, self.generator)


def mixed(quantized: Tensor, x: Tensor, drop: float, generator: torch.Generator | None) -> Tensor:
    """Each value that of `x` with probability `drop`, else that of `quantized`. Reference: 2203.05740"""
    if not drop:
        return quantized
    return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < drop, x, quantized)


class Reconstruct:
    """Acts unit by unit: learns the rounding of its weights so that it gives what the float net's unit gives.

    Adam minimises mean (f(unit(x)) - f(float unit(float x)))^2 + regularise * the regulariser. The mean is over images
    and places, of sums over channels (as in BRECQ's code); x comes from the net whose units before this one are done; f
    is the ReLU that follows. Ours: where what was learned is worse on all calibration images than the nearest rounding,
    the nearest stays; and the ranges of the unit's inputs are those of x, with its weights in float.

    Args:
        unit: layer, or block (BRECQ, QDrop)
        iterations: for each unit, on `batch_size` images each
        lr: of V; None is 1e-3, Adam's default, as in the papers, and with fewer than 10,000 iterations 10 / iterations,
            so that V gets equally far
        regularise: lambda
        beta: first and last exponent of the regulariser, falling linearly after the `warmup` share without it
        asymmetric: false takes x from the float net (2004.10568 Eq. 21)
        activations: quantize activations while the rounding is learned; false: only when all is done
        fisher: weigh each value by its squared gradient; f is the identity then, as the gradient knows what follows
        drop: share of the activations, and of x, that are the float net's in an iteration (QDrop: 0.5)
        step_lr: rate at which the steps of activations are learned; 0: they are not (QDrop: 4e-5; in its code the rate
            falls to 0 along a cosine, here it stays)

    Raises:
        ValueError: an argument out of range, or `drop` or `step_lr` without `activations`

    Reference: 2004.10568 Eq. 25
    """

    def __init__(
        self,
        *,
        unit: str = "layer",
        iterations: int = 10_000,
        batch_size: int = 32,
        lr: float | None = None,
        regularise: float = 0.01,
        beta: tuple[float, float] = (20.0, 2.0),
        warmup: float = 0.2,
        asymmetric: bool = True,
        activations: bool = False,
        fisher: bool = False,
        drop: float = 0.0,
        step_lr: float = 0.0,
    ) -> None:
        self.unit = check_choice("unit", unit, KINDS)
        if iterations < 1 or batch_size < 1:
            raise ValueError(f"iterations and batch_size must be at least 1, got {iterations} and {batch_size}")
        if not (0 <= warmup < 1 and 0 <= drop <= 1 and regularise >= 0 and step_lr >= 0):
            raise ValueError(
                "warmup and drop must be in 0..1, regularise and step_lr at least 0, "
                f"got {warmup=}, {drop=}, {regularise=}, {step_lr=}"
            )
        if (drop or step_lr) and not activations:
            raise ValueError("drop and step_lr are for quantized activations: they need activations=true")
        self.iterations, self.batch_size, self.step_lr = iterations, batch_size, step_lr
        self.lr = max(1e-3, 10 / iterations) if lr is None else lr
        self.regularise, self.beta, self.warmup, self.drop = regularise, beta, warmup, drop
        self.asymmetric, self.activations, self.fisher = asymmetric, activations, fisher

    def __call__(self, state: State) -> Iterator[Done]:
        names = list(units(state.model, self.unit, Rounding))
        for name in names[state.stage.step :]:
            yield Done(name, len(names), self.unit_done(state, name))

    def unit_done(self, state: State, name: str) -> dict[str, float]:
        """Learn one unit; returns the error of nearest and of learned rounding on all calibration images."""
        model, unit = state.model, state.model.get_submodule(name)
        images = list(state.calibration.epoch(0))
        f = nn.Identity() if self.fisher else activation_of(model, name)
        with as_float(model):
            x, target = layer_io(model, unit, images)
            target = f(target)
            weights = fisher(model, unit, images) if self.fisher else torch.ones((), device=x.device).expand_as(target)
        with as_float(model, () if self.activations else ACTIVATIONS), evaluating(unit):
            given = layer_io(model, unit, images)[0] if self.asymmetric else x
            with torch.no_grad(), as_float(unit), calibrating(unit):
                for piece in given.split(PIECE):
                    unit(piece)

            def error(chosen: Tensor, drop: float = 0.0) -> Tensor:
                off = f(unit(mixed(given[chosen], x[chosen], drop, state.generator))) - target[chosen]
                return torch.mean((off.square() * weights[chosen]).sum(1))

            nearest = whole(error, len(x), x.device)
            undo = self.learn(unit, error, len(x), state.generator)
            learned = whole(error, len(x), x.device)
        if not learned <= nearest:  # also where it is no number
            undo()
            learned = nearest
        return {"nearest": nearest, "learned": learned}

    def learn(
        self, unit: nn.Module, error: Callable[..., Tensor], images: int, generator: torch.Generator
    ) -> Callable[[], None]:
        """Learn the rounding, and the steps, by `error(indices, drop)`; returns what takes both back."""
        layers = [layer for _, layer in quant_layers(unit)]
        rounded = [(q, m.weight) for m in layers if isinstance(q := m.weight_quantizer, Rounding)]
        inputs = [a for a in activation_quantizers(unit).values() if isinstance(a, Activation) and a.enabled]
        before = [a.step.clone() for a in inputs]
        soft = [q.soften(weight) for q, weight in rounded]
        groups: list[dict[str, Any]] = [{"params": soft, "lr": self.lr}]
        if inputs and self.step_lr:
            groups.append({"params": [a.step.requires_grad_() for a in inputs], "lr": self.step_lr})
        for a in inputs:
            a.drop = self.drop

        def loss(i: int, chosen: Tensor) -> Tensor:
            found, beta = error(chosen, self.drop), self.beta_at(i)
            if beta is None:
                return found
            return found + self.regularise * sum(regulariser(rectified_sigmoid(v), beta) for v in soft)

        minimise(groups, loss, self.iterations, self.batch_size, images, generator)
        for q, weight in rounded:
            q.harden(weight)
        for a in inputs:
            a.settle(a.step)

        def undo() -> None:
            for q, _ in rounded:
                q.shift.zero_()
            for a, step in zip(inputs, before, strict=True):
                a.settle(step)

        return undo

    def beta_at(self, iteration: int) -> float | None:
        """The regulariser's exponent; None while there is none."""
        done = iteration / self.iterations
        if done < self.warmup:
            return None
        first, last = self.beta
        return first + (last - first) * (done - self.warmup) / (1 - self.warmup)
