"""What a training step computes, from the batch to the stepped weights: what a CUDA graph holds of it."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qbench.config.recipe import Recipe
from qbench.quant.layers import quantized_weights
from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer
from qbench.screen import Screen
from qbench.training.captured import Captured, NotRecorded, asked
from qbench.training.evaluation import autocast, world
from qbench.training.optim import Optimizers, criterion


class Step:
    """The computing of a step of one net, by the recipe and the optimizers of the present stage.

    On a GPU it becomes a CUDA graph (`captured`); `eager` says why it does not, and is empty where it does.
    """

    model: nn.Module
    net: Any  # what is called: `model`, or its fused or compiled form
    compile: bool
    hooks: nn.ModuleList
    labels_weight: float  # what the recipe's own loss is multiplied by
    quantizers: Sequence[Quantizer]
    device: torch.device
    screen: Screen
    graph: bool | str
    recipe: Recipe
    optimizer: Optimizers
    captured: Captured | None
    eager: str
    state: State
    correct: Tensor  # images that the training got right since it was last recorded

    def own_hooks(self) -> list[Hook]:
        return [h for h in self.hooks if isinstance(h, Hook)]

    def _compute(self, x: Tensor, y: Tensor) -> Tensor:
        """From the batch to the stepped weights; the loss. All that a CUDA graph holds of a step.

        Where parameter groups take turns, each turn has a pass over the batch and a loss of its own.
        """
        return [self._turn(x, y, turn) for turn in self.optimizer.turns][-1]

    def _turn(self, x: Tensor, y: Tensor, turn: int) -> Tensor:
        state, recipe = self.state, self.recipe
        self.optimizer.zero_grad()
        state.logits = None  # its graph goes, and the stream that gathers gradients
        total = torch.zeros((), device=self.device)
        for state.inputs, state.labels in zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True):
            share = len(state.labels) / len(y)
            total += share * self._forward_backward(share)
            if turn == self.optimizer.turns[-1]:
                assert state.logits is not None
                self.correct += (state.logits.argmax(1) == state.labels).sum()
        for hook in self.own_hooks():
            hook.after_backward(state)
        self._exchange()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_([*self.model.parameters(), *self.hooks.parameters()], recipe.clip_grad)
        self.optimizer.step(turn)
        return total

    def _replay(self, step: Captured, x: Tensor, y: Tensor) -> Tensor:
        """`_compute` as a CUDA graph; op by op from now on where torch cannot record it."""
        kind: Hashable = (
            tuple(q.enabled for q in self.quantizers),
            *(hook.phase(self.state) for hook in self.own_hooks()),
        )
        try:
            return step(x, y, kind)
        except NotRecorded as error:
            self.eager = f"torch could not record it ({error})"
            asked(self.graph, self.eager)
            self.screen.line(f"graph: off, {self.eager}")
            self.captured = None
            return self._compute(x, y)

    def _forward_backward(self, share: float) -> Tensor:
        """Forward and backward of one micro-batch, `share` of the batch; its loss, detached."""
        state = self.state
        assert state.inputs is not None
        assert state.labels is not None
        with autocast(self.device, self.recipe.precision):
            if self.compile:  # the compiled graph quantizes the weights itself
                state.logits = self.net(state.inputs)
            else:
                with quantized_weights(self.model):
                    state.logits = self.net(state.inputs)
        assert state.logits is not None
        loss = criterion(self.recipe, state.logits.float(), state.labels) * self.labels_weight
        for hook in self.own_hooks():
            extra = hook.loss(state)
            loss = loss if extra is None else loss + extra
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _exchange(self) -> None:
        """Average the gradients over the workers."""
        if not dist.is_initialized():
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in parameters]
        for hook in self.own_hooks():
            hook.exchange(grads)
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= world()
        for p, g in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = torch.empty_like(p).copy_(g.view_as(p))  # in the memory format of p, as fused optimizers want it
