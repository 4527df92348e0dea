"""The optimizer and the loss that a recipe names."""

import importlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import UserError
from qbench.method import Hook, Method
from qbench.quantizer import Quantizer
from qbench.recipe import OPTIMIZERS, Recipe


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


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, from torch.optim or by its dotted path."""
    if "." in recipe.optimizer:
        module, _, name = recipe.optimizer.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"train.optimizer={recipe.optimizer} cannot be imported: {error}") from error
        return cls(groups, lr=recipe.lr)  # type: ignore[no-any-return]
    cls = getattr(torch.optim, OPTIMIZERS[recipe.optimizer])
    options: dict[str, Any] = {}
    if recipe.optimizer == "sgd":
        options = {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    elif recipe.optimizer in ("adam", "adamw", "adamax"):
        options = {"betas": tuple(recipe.betas)}
    return cls(groups, lr=recipe.lr, **options)  # type: ignore[no-any-return]


def criterion(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's loss on float32 logits, mean over the batch.

    squared_hinge: mean of max(0, 1 - t * y)^2 with targets t of -1 / +1 (arXiv 1511.00363, Sec. 3).
    """
    if recipe.loss == "squared_hinge":
        target = F.one_hot(labels, logits.shape[1]).to(logits.dtype) * 2 - 1
        return (1 - target * logits).clamp_min(0).square().mean()
    return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
