"""What a paper's method is made of: rules, hooks and parameter groups."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

Factory = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """Which modules are touched, and how. The first rule that matches a module wins.

    match: a glob on the module's name, or '@first', '@last' or '@ends' (both) among the modules of `kind`. kind: class
    names, '|' between them (globs allowed). pair: class name of the module that consumes this one's output (conv +
    batch-norm); the factory in `replace` then gets both. weight / input / output / error: factories called with (layer,
    site).
    replace: a factory called with (module, 'replace') that makes the new module; the other sites then sit on it.
    channels: give it `channels=` too, the number of channels that reach the module (a ReLU does not know). corrected:
    how the method corrects biases afterwards; unless 'none', a layer without a bias gets one of zeros. keep: leave it
    alone, with the reason shown in the manifest. below: only modules of fewer weights than this. optional: matching
    nothing is no error.
    """

    match: str = "*"
    kind: str = "Conv2d|Linear"
    pair: str | None = None
    weight: Factory | None = None
    input: Factory | None = None
    output: Factory | None = None
    error: Factory | None = None
    replace: Factory | None = None
    channels: bool = False
    corrected: str = "none"
    keep: str | None = None
    below: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        acts = any((self.weight, self.input, self.output, self.error, self.replace))
        if acts == (self.keep is not None):
            raise ValueError(
                f"rule '{self.match}' ({self.kind}) must either quantize "
                "(weight, input, output, error, replace) or 'keep'"
            )


SITES = ("weight", "input", "output", "error")


@dataclass(frozen=True)
class Stage:
    """One phase of a method: it trains by a recipe of its own, or it acts.

    Length of one that trains: `share` of the run's (those without one divide what is left), or `epochs` or `steps` of
    its own; 0 is allowed: `Hook.before_stage` is called all the same. recipe: what differs from the run's; each stage
    has its own optimizer state and its own course of the learning rate. quantize: the sites whose quantizers are on.
    value: what `each` in the YAML gave it (INQ's portion). act: in place of training, a function of the State that
    yields a `Done` after each layer or block; it begins with unit number `state.stage.step`, as a resumed run has done
    those before, and keeps what later units need in the net itself.
    """

    name: str
    share: float | None = None
    epochs: float | None = None
    steps: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    quantize: Sequence[str] = SITES
    value: Any = None
    act: "Callable[[State], Iterator[Done]] | None" = None

    def __post_init__(self) -> None:
        unknown = [site for site in self.quantize if site not in SITES]
        if unknown:
            raise ValueError(f"stage '{self.name}': quantize may hold {', '.join(SITES)}, got {unknown[0]!r}")


@dataclass(frozen=True)
class Done:
    """What an acting stage has just finished: name of the layer or block, of how many, and numbers worth keeping."""

    name: str
    total: int
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass
class StageState:
    """Where in which stage a run is; `step` counts optimizer steps, or units of a stage that acts."""

    name: str = "train"
    index: int = 0
    step: int = 0
    steps: int = 0
    value: Any = None

    @property
    def share(self) -> float:
        """Of this stage, 0..1."""
        return self.step / max(1, self.steps)


@dataclass
class State:
    """What a hook may see. Steps and shares are those of the whole training, `stage` has those of the stage.

    teacher: the frozen net of a distillation, where one is asked for. calibration: the calibration images, as batches.
    """

    model: nn.Module
    generator: torch.Generator
    steps: int = 0
    step: int = 0
    epoch: float = 0.0
    stage: StageState = field(default_factory=StageState)
    teacher: nn.Module | None = None
    calibration: Any = None
    optimizer: Any = None  # qbench.training.optim.Optimizers
    inputs: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None
    lr_scale: float = 1.0  # the schedule's present learning rate divided by its highest
    warmup: float = 0.0  # share of the training in which the learning rate rises
    lr_drops: tuple[float, ...] = ()  # shares of the training at which a step schedule cuts the learning rate

    @property
    def training_share(self) -> float:
        """Of the whole training, 0..1."""
        return self.step / max(1, self.steps)


class Hook(nn.Module):
    """A no-op at every point; a method overrides what it needs. Parameters that a hook owns are trained and saved.

    On a GPU `loss` and `after_backward` are recorded with the step, as a CUDA graph: what they read of the step number
    must come through a tensor that `before_step` fills, or through `phase`. One that cannot be recorded says in `eager`
    why ("reads the loss on the host"); its runs then go op by op. The other points are called as ever.
    """

    eager: str = ""
    labels_weight: float = 1.0  # what the recipe's own loss is multiplied by; the product of all hooks' counts

    def phase(self, state: State) -> Hashable:
        """What Python decides in this step: steps of one phase do the same but for the values of tensors.

        Called after `before_step`. Which quantizers are enabled counts by itself.
        """
        return None

    def after_calibrate(self, state: State) -> None: ...

    def before_train(self, state: State) -> None: ...

    def before_stage(self, state: State) -> None:
        """Called once at the begin of each stage; a run that is resumed within the stage does not call it again."""

    def before_step(self, state: State) -> None: ...

    def loss(self, state: State) -> Tensor | None:
        """One more loss term, or None."""
        return None

    def after_backward(self, state: State) -> None: ...

    def exchange(self, grads: list[Tensor]) -> None:
        """See or change the gradients before they are averaged over worker processes."""

    def after_step(self, state: State) -> None: ...

    def eval_models(self, state: State) -> dict[str, nn.Module]:
        """Further nets to evaluate, by name (an average, say)."""
        return {}

    def after_train(self, state: State) -> None: ...


@dataclass(frozen=True)
class Method:
    """A paper's method, declared in conf/method/<name>.yaml.

    w_bits / a_bits: what may be asked for, as {default, lo, hi, float, fractional} or {default, only: [..]}; 32 is
    float, {learned: true} says that the training decides. init: 'float' (start from the float parent) or 'scratch' in
    the short budgets; recipe: what budget=paper means; budgets: what this method changes in the other budgets, `every`
    in all of them (its own loss or update rule). needs: model options used unless the user chose otherwise. stages: the
    phases of the training; none: one. param_groups: {match, weight_decay, lr_scale}, or with an optimizer and a rate of
    their own {match, optimizer, lr, constant}; `options` are what that optimizer alone knows. added: options that came
    later, with the value that changes nothing.
    """

    name: str
    title: str
    family: str
    arxiv: str | None = None
    summary: str = ""
    w_bits: dict[str, Any] = field(default_factory=dict)
    a_bits: dict[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    hooks: Sequence[Hook] = ()
    param_groups: Sequence[dict[str, Any]] = ()
    stages: Sequence[Stage] = ()
    init: str = "float"
    needs: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, Any] = field(default_factory=dict)
    check: str | None = None  # dotted path of a torch-free function (options, w_bits) that raises ValueError
    added: dict[str, Any] = field(default_factory=dict)
    unmoved: Sequence[str] = ()  # globs of parameters that may stand still for some steps, with the reason in the YAML

    def __post_init__(self) -> None:
        for name, kind in (("rules", Rule), ("stages", Stage)):
            parts = [
                p if isinstance(p, kind) else _made(kind, p, f"{kind.__name__.lower()} {i} of {self.name}")
                for i, p in enumerate(getattr(self, name) or ())
            ]
            object.__setattr__(self, name, tuple(parts))

    @property
    def only_acts(self) -> bool:
        """Whether no stage trains by steps of an optimizer over the net: all of them act."""
        return bool(self.stages) and all(stage.act is not None for stage in self.stages)


def _made(kind: type, words: Mapping[str, Any], what: str) -> Any:
    allowed = sorted(f.name for f in fields(kind))
    if strange := sorted(set(words) - set(allowed)):
        raise ValueError(f"{what}: unknown key {strange}; allowed: {allowed}")
    return kind(**words)
