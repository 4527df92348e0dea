"""The optimizer and the loss that a recipe names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.recipe import Recipe, optimizer_class, optimizer_fields
from qbench.quant.method import Hook, Method
from qbench.quant.quantizer import Quantizer


def parameter_groups(model: nn.Module, hooks: Sequence[Hook], method: Method, recipe: Recipe) -> list[dict[str, Any]]:
    """Optimizer groups: the run's weight decay, none for parameters of quantizers, and what the method says.

    Errors: ValueError when a method's pattern matches no parameter.
    """
    inside = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    used: set[int] = set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    named = [*model.named_parameters(), *((f"hook.{n}", p) for h in hooks for n, p in h.named_parameters())]
    for name, p in named:
        decay, scale = 0.0 if id(p) in inside else recipe.weight_decay, 1.0
        for i, group in enumerate(method.param_groups):
            if fnmatchcase(name, group["match"]):
                used.add(i)
                asked = group.get("weight_decay", decay)
                decay, scale = (recipe.weight_decay if asked == "same" else float(asked)), group.get("lr_scale", 1.0)
                break
        groups.setdefault((decay, scale), []).append(p)
    for i, group in enumerate(method.param_groups):
        if i not in used and not group.get("optional"):
            raise ValueError(
                f"parameter group '{group['match']}' of {method.name} matches none of: {[n for n, _ in named]}"
            )
    return [{"params": ps, "weight_decay": d, "lr_scale": s} for (d, s), ps in groups.items()]


# Optimizers whose step can be a part of a CUDA graph, and what they must be told for it. They read the learning rate
# from a tensor, in one kernel for all parameters.
CAPTURABLE: dict[str, dict[str, Any]] = {
    "sgd": {"fused": True},
    "adam": {"fused": True, "capturable": True},
    "adamw": {"fused": True, "capturable": True},
}


def make_optimizer(
    groups: list[dict[str, Any]], recipe: Recipe, device: torch.device | None = None, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, from torch.optim or by its dotted path.

    On a CUDA `device` fused where torch has it. `capturable`: fit for a CUDA graph, one of `CAPTURABLE`.
    """
    cls, options = optimizer_class(recipe.optimizer), optimizer_fields(recipe)
    if capturable:
        options |= CAPTURABLE[recipe.optimizer]
        groups = [{**group, "lr": torch.tensor(recipe.lr, device=device)} for group in groups]
    elif device is not None and device.type == "cuda" and recipe.optimizer in CAPTURABLE:
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

    Errors: ValueError where the groups differ.
    """
    own = [{k: g[k] for k in ("lr", "fused", "foreach", "capturable") if k in g} for g in optimizer.param_groups]
    groups = [group | ours for group, ours in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    _start_momentum(optimizer)


def criterion(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's loss on float32 logits, mean over the batch.

    squared_hinge: mean of max(0, 1 - t * y)^2 with targets t of -1 / +1 (arXiv 1511.00363, Sec. 3).
    """
    if recipe.loss == "squared_hinge":
        classes = torch.arange(logits.shape[1], device=labels.device)
        target = (labels.unsqueeze(1) == classes).to(logits.dtype) * 2 - 1
        return (1 - target * logits).clamp_min(0).square().mean()
    return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
