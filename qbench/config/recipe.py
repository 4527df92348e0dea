"""How long and with what a net is trained: merged from budget, method and the user's words. No torch here."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from qbench.errors import UserError, unknown

DECAYS = ("all", "weights", "last")
SCHEDULES = ("constant", "step", "cosine", "linear", "exponential", "onecycle")
LOSSES = ("cross_entropy", "squared_hinge")
KERNELS = ("auto", "cpp", "compile", "torch")
PRECISIONS = ("fp32", "tf32", "bf16", "auto")  # auto: qbench.training.precision replaces it before anything is trained
# Names for `optimizer`, beside the dotted path of any class, and what torch.optim calls them.
OPTIMIZERS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "adamax": "Adamax",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
}


@dataclass(frozen=True)
class Recipe:
    """One training phase. Durations: exactly one of `epochs` and `steps`.

    lr is the highest learning rate; `schedule` shapes it over the phase: constant | step (times `gamma` at each of
    `milestones`, in epochs) | cosine | linear (both to 0) | exponential (to lr * gamma at the end) | onecycle (linear
    up over the first 30 %, cosine down to 0). `warmup`: epochs of linear rise from 0 before it. `accumulate`:
    micro-batches per step. `evaluate_every`: epochs between evaluations on the test set. `calibration`: images that set
    the first ranges. `clip_grad`: highest gradient norm, 0 is off. `loss`: cross_entropy | squared_hinge | the
    dotted path of a function of (logits, labels). `decay`: what `weight_decay` acts on: all | weights (of convs and
    linear layers: no bias, no batch-norm) | last (the weight of the last layer alone); a method's own word on a
    parameter goes before it.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay: str = "all"
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    label_smoothing: float = 0.0
    loss: str = "cross_entropy"
    accumulate: int = 1
    clip_grad: float = 0.0
    evaluate_every: float = 1.0
    calibration: int = 1024
    precision: str = "fp32"

    def __post_init__(self) -> None:
        def fail(name: str, allowed: str) -> None:
            raise UserError(f"train.{name} must be {allowed}, got {getattr(self, name)!r}")

        if (self.epochs is None) == (self.steps is None):
            raise UserError(f"give exactly one of epochs and steps, got epochs={self.epochs} steps={self.steps}")
        for name, lo in (("epochs", 0), ("steps", 0), ("lr", 0), ("weight_decay", 0), ("warmup", 0), ("clip_grad", 0)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= lo):
                fail(name, f"a number of at least {lo}")
        for name in ("batch_size", "accumulate", "calibration"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                fail(name, "a whole number of at least 1")
        if self.steps is not None and int(self.steps) != self.steps:
            fail("steps", "a whole number")
        if self.batch_size % self.accumulate:
            fail("accumulate", f"a divisor of batch_size={self.batch_size}")
        if not (_is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1):
            fail("label_smoothing", "in 0..1")
        if not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            fail("momentum", "in 0..1")
        if not (_is_number(self.evaluate_every) and self.evaluate_every > 0):
            fail("evaluate_every", "above 0 (epochs)")
        if not (_is_number(self.gamma) and self.gamma > 0):
            fail("gamma", "above 0")
        for name, form in (("milestones", "a list of numbers (epochs)"), ("betas", "two numbers in 0..1")):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
                fail(name, form)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            fail("betas", "two numbers in 0..1")
        if "." not in str(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise unknown("train.optimizer", str(self.optimizer), OPTIMIZERS)
        for name, choices in (
            ("schedule", SCHEDULES),
            ("decay", DECAYS),
            ("precision", PRECISIONS),
            ("loss", LOSSES),
        ):
            dotted = name == "loss" and "." in str(self.loss)  # a method's own
            if getattr(self, name) not in choices and not dotted:
                raise unknown(f"train.{name}", str(getattr(self, name)), choices)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the phase."""
        return int(self.steps) if self.steps is not None else math.ceil(float(self.epochs or 0) * steps_per_epoch)

    def lr_factor(self, step: int, total: int, steps_per_epoch: int) -> float:
        """Learning rate of `step` (0-based) divided by `lr`; a pure function, so that a resumed run needs no state."""
        warm = round(self.warmup * steps_per_epoch)
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, total - warm)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return 1 - done
        if self.schedule == "exponential":
            return float(self.gamma**done)
        if self.schedule == "step":
            passed = sum(step >= round(m * steps_per_epoch) for m in self.milestones)
            return float(self.gamma**passed)
        if self.schedule == "onecycle":
            rise = 0.3
            return (done + 1 / total) / (rise + 1 / total) if done < rise else _cosine((done - rise) / (1 - rise))
        return 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


KEYS = tuple(f.name for f in fields(Recipe))


def merge(parts: Iterable[Mapping[str, Any]]) -> Recipe:
    """One recipe from several, later ones first in rank; null means 'not my business'.

    A part that names `steps` silences an earlier `epochs`, and the other way round.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        if part.get("epochs") is not None and part.get("steps") is not None:
            raise UserError(f"give exactly one of epochs and steps, got epochs={part['epochs']} steps={part['steps']}")
        for key, value in part.items():
            if key not in KEYS:
                raise unknown("recipe field", key, KEYS)
            if value is None:
                continue
            if key in ("epochs", "steps"):
                merged.pop("steps" if key == "epochs" else "epochs", None)
            merged[key] = tuple(value) if isinstance(value, (list, tuple)) else value
    return Recipe(**merged)
