"""What a paper's method is made of: rules, hooks and parameter groups."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

Factory = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """Which modules are touched, and how. The first rule that matches a module wins.

    match: a glob on the module's name, or '@first' / '@last' among the modules of `kind`. kind: class names, '|'
    between them (globs allowed). pair: class name of the module that consumes this one's output (conv + batch-norm);
    the factory in `replace` then gets both. weight / input / output / error: factories called with (layer, site).
    replace: a factory called with (module, 'replace') that makes the new module; the other sites then sit on it.
    channels: give it `channels=` too, the number of channels that reach the module (a ReLU does not know). keep: leave
    it alone, with the reason shown in the manifest. optional: matching nothing is no error.
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
    keep: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        acts = any((self.weight, self.input, self.output, self.error, self.replace))
        if acts == (self.keep is not None):
            raise ValueError(
                f"rule '{self.match}' ({self.kind}) must either quantize "
                "(weight, input, output, error, replace) or 'keep'"
            )


@dataclass
class State:
    """What a hook may see. `teacher` is the float parent, where distillation asks for it."""

    model: nn.Module
    generator: torch.Generator
    steps: int = 0
    step: int = 0
    epoch: float = 0.0
    teacher: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    inputs: Tensor | None = None
    labels: Tensor | None = None
    logits: Tensor | None = None
    labels_loss: Tensor | None = None  # the recipe's loss of this micro-batch, of which hooks see no other part
    lr_scale: float = 1.0  # the schedule's present learning rate divided by its highest
    warmup: float = 0.0  # share of this phase in which the learning rate rises
    lr_drops: tuple[float, ...] = ()  # shares of this phase at which a step schedule cuts the learning rate

    @property
    def training_share(self) -> float:
        """Of this phase, 0..1."""
        return self.step / max(1, self.steps)


class Hook(nn.Module):
    """A no-op at every point; a method overrides what it needs. Parameters that a hook owns are trained and saved.

    On a GPU `loss` and `after_backward` are recorded with the step, as a CUDA graph: what they read of the step number
    must come through a tensor that `before_step` fills, or through `phase`. One that cannot be recorded says in `eager`
    why ("reads the loss on the host"); its runs then go op by op. The other points are called as ever.
    """

    eager: str = ""

    def phase(self, state: State) -> Hashable:
        """What Python decides in this step: steps of one phase do the same but for the values of tensors.

        Called after `before_step`. Which quantizers are enabled counts by itself.
        """
        return None

    def after_calibrate(self, state: State) -> None: ...

    def before_train(self, state: State) -> None: ...

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
    float. init: 'float' (start from the float parent) or 'scratch' in the short budgets; recipe: what budget=paper
    means; budgets: what this method changes in the other budgets. needs: model options used unless the user chose
    otherwise.
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
    init: str = "float"
    needs: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, Any] = field(default_factory=dict)
    check: str | None = None  # dotted path of a torch-free function (options, w_bits) that raises ValueError
    unmoved: Sequence[str] = ()  # globs of parameters that may stand still for some steps, with the reason in the YAML

    def __post_init__(self) -> None:
        names = {f.name for f in fields(Rule)}
        for i, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                unknown = set(rule) - names
                if unknown:
                    raise ValueError(
                        f"rule {i} of {self.name}: unknown key {sorted(unknown)}; allowed: {sorted(names)}"
                    )
        rules = tuple(r if isinstance(r, Rule) else Rule(**r) for r in self.rules)
        object.__setattr__(self, "rules", rules)
