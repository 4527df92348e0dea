"""The optimizer and the loss that a recipe names."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.kinds import is_number
from qbench.config.recipe import Recipe, imported, optimizer_class, optimizer_fields
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Hook, Method
from qbench.quant.quantizer import Quantizer


def parameter_groups(model: nn.Module, hooks: Sequence[Hook], method: Method, recipe: Recipe) -> list[dict[str, Any]]:
    """Optimizer groups: the run's weight decay on what `recipe.decay` says, but for parameters of quantizers, and what
    the method says.

    Each names its optimizer, its highest rate `top_lr` and whether the schedule leaves that `constant`, and its `turn`:
    groups of a later turn are stepped after another pass over the same batch. `options` of a method's group are its
    optimizer's own.

    Errors: ValueError when a method's pattern matches no parameter.
    """
    inside = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    weights = [id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, QuantLayer))]
    held = {"all": None, "weights": {*weights}, "last": {*weights[-1:]}}[recipe.decay]
    used: set[int] = set()
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    named = [*model.named_parameters(), *((f"hook.{n}", p) for h in hooks for n, p in h.named_parameters())]
    for name, p in named:
        spared = id(p) in inside or (held is not None and id(p) not in held)
        decay, own = 0.0 if spared else recipe.weight_decay, {}
        for i, group in enumerate(method.param_groups):
            if fnmatchcase(name, group["match"]):
                used.add(i)
                own = group
                asked = group.get("weight_decay", decay)
                decay = recipe.weight_decay if asked == "same" else float(asked)
                break
        lr = float(own["lr"]) if own.get("lr") is not None else recipe.lr * own.get("lr_scale", 1.0)
        options = tuple(sorted((own.get("options") or {}).items()))
        rule = own.get("optimizer") or recipe.optimizer, int(own.get("turn", 0))
        key = *rule, decay, lr, bool(own.get("constant")), options
        groups.setdefault(key, []).append(p)
    for i, group in enumerate(method.param_groups):
        if i not in used and not group.get("optional"):
            raise ValueError(
                f"parameter group '{group['match']}' of {method.name} matches none of: {[n for n, _ in named]}"
            )
    return [
        {"params": ps, "optimizer": o, "turn": t, "weight_decay": d, "top_lr": lr, "constant": c, **dict(options)}
        for (o, t, d, lr, c, options), ps in groups.items()
    ]


def optimizer_names(method: Method, recipe: Recipe) -> list[str]:
    """The update rules of a stage: the recipe's, and those that parameter groups name."""
    return list(dict.fromkeys([recipe.optimizer, *(g["optimizer"] for g in method.param_groups if g.get("optimizer"))]))


# Optimizers whose step can be a part of a CUDA graph, and what they must be told for it. They read the learning rate
# from a tensor, in one kernel for all parameters.
CAPTURABLE: dict[str, dict[str, Any]] = {
    "sgd": {"fused": True},
    "adam": {"fused": True, "capturable": True},
    "adamw": {"fused": True, "capturable": True},
}


def recordable(name: str) -> bool:
    """Whether a step of this optimizer can be a part of a CUDA graph: one of CAPTURABLE, or a class that says so.

    A class of one's own says it by `recorded = True`; then it gets its learning rate as a tensor.
    """
    return name in CAPTURABLE or bool(getattr(optimizer_class(name), "recorded", False))


class Optimizers:
    """The optimizers of a stage as one; most stages have a single one.

    `param_groups` and `state` are those of all of them. One that draws random numbers gets the run's generator as its
    attribute `generator`, if it has one.
    """

    def __init__(
        self, turns: Sequence[tuple[int, torch.optim.Optimizer]], generator: torch.Generator | None = None
    ) -> None:
        self.members = [member for _, member in turns]
        self.by_turn = {t: [m for own, m in turns if own == t] for t in sorted({t for t, _ in turns})}
        self.turns = list(self.by_turn)
        for member in self.members:
            if hasattr(member, "generator"):
                member.generator = generator

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> Mapping[Any, Any]:
        return ChainMap(*(member.state for member in self.members))

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self, turn: int = 0) -> None:
        for member in self.by_turn[turn]:
            member.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [member.state_dict() for member in self.members]

    def load_state(self, saved: Sequence[dict[str, Any]]) -> None:
        """Load `state_dict()` of these optimizers, of whichever device; how they compute stays as it is.

        Errors: ValueError where the groups differ.
        """
        for member, state in zip(self.members, saved, strict=True):
            load_state(member, state)


def make_optimizers(
    groups: Sequence[dict[str, Any]],
    recipe: Recipe,
    device: torch.device | None = None,
    capturable: bool = False,
    generator: torch.Generator | None = None,
) -> Optimizers:
    """The optimizers that `parameter_groups` names, each with its groups."""
    members = []
    for turn, name in dict.fromkeys((group["turn"], group["optimizer"]) for group in groups):
        own = [g for g in groups if (g["turn"], g["optimizer"]) == (turn, name)]
        members.append((turn, make_optimizer(own, recipe, device, capturable, name)))
    return Optimizers(members, generator)


def make_optimizer(
    groups: list[dict[str, Any]],
    recipe: Recipe,
    device: torch.device | None = None,
    capturable: bool = False,
    name: str | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that the recipe (or `name`) names, from torch.optim or by its dotted path.

    On a CUDA `device` fused where torch has it. `capturable`: fit for a CUDA graph, one that is `recordable`.
    """
    name = name or recipe.optimizer
    cls, options = optimizer_class(name), optimizer_fields(recipe, name)
    if capturable:
        options |= CAPTURABLE.get(name, {})
        groups = [{**group, "lr": torch.tensor(recipe.lr, device=device)} for group in groups]
    elif device is not None and device.type == "cuda" and name in CAPTURABLE:
        options["fused"] = True
    optimizer: torch.optim.Optimizer = cls(groups, lr=recipe.lr, **options)
    _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give fused SGD the momentum 0 from which its first step makes the gradient.

    By itself it makes all buffers of a group at its first step, and fails on a parameter whose gradient comes later.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        for p in group["params"] if group["fused"] and group["momentum"] else []:
            if optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a group; in place where it is a tensor, which a CUDA graph reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a state_dict of this optimizer, of whichever device; how it computes stays as it is.

    Errors: ValueError where the groups differ, or a value is of another kind than it can be.
    """
    own = [{k: g[k] for k in ("lr", "fused", "foreach", "capturable") if k in g} for g in optimizer.param_groups]
    groups = [group | ours for group, ours in zip(saved["param_groups"], own, strict=True)]
    for group, ours in zip(groups, optimizer.param_groups, strict=True):
        if strange := [k for k, v in ours.items() if k != "params" and not _alike(group.get(k), v)]:
            raise ValueError(f"{strange[0]} of a group of parameters is {group.get(strange[0])!r:.40}")
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for p, state in optimizer.state.items():
        for k, v in state.items():
            sizes = zip(reversed(v.shape), reversed(p.shape), strict=False) if isinstance(v, Tensor) else ()
            fits = v.ndim <= p.ndim if isinstance(v, Tensor) else is_number(v)
            if not fits or any(mine not in (1, its) for mine, its in sizes):
                raise ValueError(f"{k} of a parameter of shape {list(p.shape)} does not fit")
    _start_momentum(optimizer)


def _alike(saved: Any, own: Any) -> bool:
    """Whether a field of a group may have been this one's: numbers and tensors may stand for each other."""
    numbers = [isinstance(v, Tensor) or is_number(v) for v in (saved, own)]
    lists = [isinstance(v, list | tuple) for v in (saved, own)]
    return all(numbers) or all(lists) or type(saved) is type(own)


def criterion(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's loss on float32 logits, mean over the batch; one named by its dotted path gets (logits, labels).

    squared_hinge: mean of max(0, 1 - t * y)^2 with targets t of -1 / +1 (arXiv 1511.00363, Sec. 3).
    """
    if recipe.loss == "squared_hinge":
        classes = torch.arange(logits.shape[1], device=labels.device)
        target = (labels.unsqueeze(1) == classes).to(logits.dtype) * 2 - 1
        return (1 - target * logits).clamp_min(0).square().mean()
    if "." in recipe.loss:
        return imported("train.loss", recipe.loss)(logits, labels)  # type: ignore[no-any-return]
    return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
