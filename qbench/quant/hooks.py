"""Hooks that two papers or more use."""

from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import UserError
from qbench.quant.layers import quant_layers
from qbench.quant.method import Factory, Hook, State
from qbench.quant.quantizer import Quantizer
from qbench.quant.surgery import activation_quantizers


class Distill(Hook):
    """Add a distillation term from a teacher, and weigh the loss from the labels.

    loss = labels * loss + weight * T^2 * KL(softmax(teacher/T) || softmax(logits/T))

    T^2 keeps the gradient independent of T in size; for Hinton's mixture labels = 1 - weight. A teacher that is frozen
    is the State's. One that learns beside the student, `teacher`, adds its own cross-entropy and gets no gradient from
    the student's term; it is evaluated beside it. Apprentice (without a temperature, labels = weight = 0.5): scheme A
    is a teacher that learns, with the student from scratch; B a frozen one; C a frozen one, the student from its float
    net. Its third term H(z_T, p_A) is taken with softmax(z_T), whose gradient is that of the divergence.

    Reference: 1503.02531; 1711.05852
    """

    def __init__(
        self, weight: float = 1.0, temperature: float = 1.0, labels: float = 1.0, teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0 or labels < 0:
            raise ValueError(
                "distillation needs weight >= 0, temperature > 0 and labels >= 0, "
                f"got weight={weight}, temperature={temperature}, labels={labels}"
            )
        self.weight, self.temperature, self.labels_weight = weight, temperature, labels
        self.learner = teacher

    def loss(self, state: State) -> Tensor | None:
        teacher = self.learner or state.teacher
        if teacher is None or state.inputs is None or state.logits is None:
            return None
        own: Tensor | float = 0.0
        if self.learner is None:
            with torch.no_grad():
                told = teacher(state.inputs).float()
        else:
            assert state.labels is not None
            told = teacher(state.inputs).float()
            own, told = F.cross_entropy(told, state.labels), told.detach()
        t = self.temperature
        target = F.log_softmax(told / t, dim=1)
        student = F.log_softmax(state.logits.float() / t, dim=1)
        return own + self.weight * t * t * F.kl_div(student, target, reduction="batchmean", log_target=True)

    def eval_models(self, state: State) -> dict[str, nn.Module]:
        return {} if self.learner is None else {"teacher": self.learner}


class EnableAfter(Hook):
    """Keep activations in float for the first part of the training, then quantize them.

    A function of the step alone, so that a resumed run needs no state. Ranges that follow the training batches follow
    them from the start. Evaluations during the delay are those of the net as it stands: float activations.

    Args:
        share: of the training steps, at least 0 and below 1; 0 is no delay
        steps: optimizer steps; where given, in place of `share`
        match: glob on the names of the activation quantizers

    Raises:
        ValueError: share or steps out of range
        UserError: the delay is as long as the training, or `match` matches nothing

    Reference: 1712.05877 Sec. 3.1 (50 000 to 2 million steps)
    """

    def __init__(self, share: float = 0.0, steps: int | None = None, match: str = "*") -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"the share of the training before activations are quantized must be in 0..1, got {share}")
        if steps is not None and (isinstance(steps, bool) or steps != int(steps) or steps < 0):
            raise ValueError(f"steps before activations are quantized must be a whole number >= 0, got {steps}")
        self.share, self.steps, self.match = share, steps, match
        self.found: list[Quantizer] | None = None

    def before_train(self, state: State) -> None:
        if 0 < state.steps <= (self.steps or 0):
            raise UserError(
                f"activations would be quantized after {self.steps} steps, but the training has {state.steps}; "
                "make the delay shorter or the training longer"
            )
        quantizers = activation_quantizers(state.model)
        if quantizers and not self._chosen(quantizers):
            raise UserError(f"EnableAfter: '{self.match}' matches none of: {', '.join(quantizers)}")
        self.found = None
        self.before_step(state)

    def before_step(self, state: State) -> None:
        first = self.share * state.steps if self.steps is None else self.steps
        if self.found is None:  # looking for them takes milliseconds
            self.found = self._chosen(activation_quantizers(state.model))
        for q in self.found:
            q.enabled = state.step >= first

    def _chosen(self, quantizers: dict[str, Quantizer]) -> list[Quantizer]:
        return [q for name, q in quantizers.items() if fnmatchcase(name, self.match)]


class QuantizeUpdate(Hook):
    """Keep the stored weights and biases of quantized layers on a grid: no float copy outlives an optimizer step.

    After each step w = Q(w) for the weight (the latent) and bias of every QuantLayer; also before the first step, so
    that training starts on the grid. With nearest rounding an update below half a step is lost for good; with
    stochastic rounding it happens with the right probability. Batch-norm's scale, shift and statistics and the
    parameters of quantizers stay in float. With several workers all hold what the first one's random numbers make of
    it; each rounds the gradient of its own share of the batch, and the mean of these is not rounded again.

    Args:
        quantizer: factory of Q, called with (this hook, 'update')
        grad: factory of a quantizer for dL/dw and dL/db, called with (this hook, 'grad'); None leaves them in float
        momentum: also put the optimizer's state (momentum, moments) on Q's grid

    Reference: 1502.02551 Sec. 3
    """

    def __init__(self, quantizer: Factory, grad: Factory | None = None, momentum: bool = False) -> None:
        super().__init__()
        self.quantizer = quantizer(self, "update")
        self.grad_quantizer = None if grad is None else grad(self, "grad")
        self.momentum = momentum

    def _stored(self, state: State) -> list[Tensor]:
        return [p for _, layer in quant_layers(state.model) for p in (layer.weight, layer.bias) if p is not None]

    def _round(self, values: list[Tensor]) -> None:
        """Put each on the grid, in place; those of the first worker count."""
        for value in values:
            value.copy_(self.quantizer(value))
        if dist.is_initialized() and values:
            flat = torch.cat([value.flatten() for value in values])
            dist.broadcast(flat, 0)
            for value, first in zip(values, flat.split([value.numel() for value in values]), strict=True):
                value.copy_(first.view(value.shape))

    @torch.no_grad()
    def before_train(self, state: State) -> None:
        self._round(self._stored(state))

    @torch.no_grad()
    def after_backward(self, state: State) -> None:
        if self.grad_quantizer is not None:
            for p in self._stored(state):
                if p.grad is not None:
                    p.grad.copy_(self.grad_quantizer(p.grad))

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        values: list[Tensor] = []
        for p in self._stored(state):
            values.append(p)
            if self.momentum and state.optimizer is not None:
                moments = state.optimizer.state.get(p, {}).values()
                values += [m for m in moments if isinstance(m, Tensor) and m.shape == p.shape]
        self._round(values)
