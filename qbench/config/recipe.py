"""How long and with what a net is trained: merged from budget, method and the user's words. No torch here."""

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qbench.config.kinds import Kind, is_number, number, numbers, one_of, truth, whole
from qbench.errors import UserError, unknown

EXACT = 2**53  # up to which a float has every whole number
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
# What takes which field; a field that is not here is read by every recipe.
OF_OPTIMIZER = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "betas": ("adam", "adamw", "adamax"),
    "eps": ("adam", "adamw", "adamax", "rmsprop", "adagrad", "adadelta"),
}
OF_LOSS = {"label_smoothing": ("cross_entropy",)}
OF_SCHEDULE = {"milestones": ("step",), "gamma": ("step", "exponential")}


class Dotted(Kind):
    """One of `words`, or the dotted path of a class or function."""

    def check(self, name: str, value: Any) -> None:
        if (value is None and self.null) or value in self.words:
            return
        if "." not in str(value) or not all(part.isidentifier() for part in str(value).split(".")):
            raise unknown(name, str(value), map(str, self.words))


# What the fields of a recipe may be.
FIELDS: dict[str, Kind] = {
    "epochs": number(0, null=True),
    "steps": number(0, whole=True, null=True),
    "batch_size": whole(1),
    "optimizer": Dotted("", lambda x: False, words=tuple(OPTIMIZERS)),
    "lr": number(0),
    "momentum": number(0, 1, below=True),
    "nesterov": truth(),
    "betas": numbers("two numbers in 0..1, 1 excluded", lambda xs: len(xs) == 2 and all(0 <= x < 1 for x in xs)),
    "eps": number(0, above=True, null=True),
    "weight_decay": number(0),
    "decay": one_of(*DECAYS),
    "schedule": one_of(*SCHEDULES),
    "milestones": numbers("a list of numbers (epochs), none below 0", lambda xs: all(x >= 0 for x in xs)),
    "gamma": number(0, above=True),
    "warmup": number(0),
    "label_smoothing": number(0, 1, below=True),
    "loss": Dotted("", lambda x: False, words=LOSSES),
    "accumulate": whole(1),
    "clip_grad": number(0),
    "evaluate_every": number(0, above=True),
    "calibration": whole(1),
    "precision": one_of(*PRECISIONS),
}


@dataclass(frozen=True)
class Recipe:
    """One training phase. Durations: exactly one of `epochs` and `steps`.

    lr is the highest learning rate; `schedule` shapes it over the phase: constant | step (times `gamma` at each of
    `milestones`, in epochs) | cosine | linear (both to 0) | exponential (to lr * gamma at the end) | onecycle (linear
    up over the first 30 %, cosine down to 0). `warmup`: epochs of linear rise from 0 before it. `accumulate`:
    micro-batches per step. `evaluate_every`: epochs between evaluations on the test set. `calibration`: images that set
    the first ranges. `clip_grad`: highest gradient norm, 0 is off. `loss`: cross_entropy | squared_hinge | the
    dotted path of a function of (logits, labels). `eps`: what an optimizer adds to its denominator; null: as torch has
    it. `decay`: what `weight_decay` acts on: all | weights (of convs and linear layers: no bias, no batch-norm) | last
    (the weight of the last layer alone); a method's own word on a parameter goes before it.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
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
        if (self.epochs is None) == (self.steps is None):
            raise UserError(f"give exactly one of epochs and steps, got epochs={self.epochs} steps={self.steps}")
        for name, kind in FIELDS.items():
            kind.check(f"train.{name}", getattr(self, name))
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.accumulate must be a divisor of batch_size={self.batch_size}, got {self.accumulate}"
            )

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


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


KEYS = tuple(f.name for f in fields(Recipe))
DEFAULTS = {f.name: f.default for f in fields(Recipe)}


def merge(parts: Iterable[Mapping[str, Any]]) -> Recipe:
    """One recipe from several, later ones first in rank; null means 'not my business'.

    A part that names `steps` silences an earlier `epochs`, and the other way round.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        if part.get("epochs") is not None and part.get("steps") is not None:
            raise UserError(f"give exactly one of epochs and steps, got epochs={part['epochs']} steps={part['steps']}")
        if part.get("optimizer") is not None:
            merged.pop("eps", None)  # it was meant for the optimizer before
            merged |= {"momentum": 0.0} if part["optimizer"] == "rmsprop" else {}  # torch's; 0.9 is for sgd
        for key, value in part.items():
            if key not in KEYS:
                raise unknown("recipe field", key, KEYS)
            if value is None:
                continue
            if key in ("epochs", "steps"):
                merged.pop("steps" if key == "epochs" else "epochs", None)
            if type(value) is int and abs(value) > EXACT and is_number(value):
                value = float(value)  # torch has no such integer
            merged[key] = tuple(value) if isinstance(value, (list, tuple)) else value
    return Recipe(**merged)


def imported(option: str, path: str) -> Any:
    """What the dotted `path` that `option` names stands for.

    Errors: UserError where it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}={path} cannot be imported: {error}") from error


def optimizer_class(name: str) -> type[Any]:
    """The class that `optimizer` names, from torch.optim or by its dotted path.

    Errors: UserError where it cannot be imported, or where its step wants the loss again and again (LBFGS).
    """
    cls: type[Any] = imported("train.optimizer", f"torch.optim.{OPTIMIZERS[name]}" if name in OPTIMIZERS else name)
    try:
        closure = inspect.signature(cls.step).parameters.get("closure")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"train.optimizer={name} cannot be imported: {error}") from error
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"train.optimizer={name} computes the loss several times in a step, which a run here does once. "
            f"Take one of {', '.join(OPTIMIZERS)}, or another class."
        )
    return cls


def optimizer_fields(recipe: Recipe, name: str | None = None) -> dict[str, Any]:
    """What the recipe tells its optimizer (or `name`) beside learning rate and weight decay.

    Of a class by its dotted path whatever its constructor takes and the recipe does not leave at its default: defaults
    of the class are its own.
    """
    name = name or recipe.optimizer
    if name in OPTIMIZERS:
        found = {k: getattr(recipe, k) for k, takers in OF_OPTIMIZER.items() if name in takers}
        return {k: v for k, v in found.items() if v is not None}
    taken = _taken(name)
    found = {k: getattr(recipe, k) for k in taken if getattr(recipe, k) != DEFAULTS[k]}
    return found | ({"momentum": recipe.momentum} if found.get("nesterov") else {})


def _taken(path: str) -> list[str]:
    parameters = inspect.signature(optimizer_class(path)).parameters
    return [k for k in OF_OPTIMIZER if k in parameters]


def unread(given: Mapping[str, Any], recipes: Sequence[Recipe]) -> str:
    """Why none of `recipes` reads a field that was `given`: what the first takes, and what takes it; else nothing.

    A value that switches its field off (0, false, null) asks for nothing.
    """
    reasons = ([_unread(key, value, recipe) for recipe in recipes] for key, value in given.items() if value)
    return next((why[0] for why in reasons if all(why)), "")


def _unread(key: str, value: Any, recipe: Recipe) -> str:
    for what, table in (("optimizer", OF_OPTIMIZER), ("loss", OF_LOSS), ("schedule", OF_SCHEDULE)):
        chosen = getattr(recipe, what)
        if key not in table or chosen in table[key]:
            continue
        if what == "optimizer" and chosen not in OPTIMIZERS and key in _taken(chosen):
            continue
        return f"{key}={value} is not read with {what}={chosen}; it is for {what}={' or '.join(table[key])}"
    return ""
