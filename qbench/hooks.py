"""Hooks that two papers or more use."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.method import Hook, State


class Distill(Hook):
    """Add a distillation term from the float parent (arXiv 1503.02531).

    loss += weight * T^2 * KL(softmax(teacher/T) || softmax(logits/T)); T^2 keeps the gradient's size independent of T.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0:
            raise ValueError(
                f"distillation needs weight >= 0 and temperature > 0, got weight={weight}, temperature={temperature}"
            )
        self.weight, self.temperature = weight, temperature

    def loss(self, state: State) -> Tensor | None:
        if state.teacher is None or state.inputs is None or state.logits is None:
            return None
        t = self.temperature
        with torch.no_grad():
            target = F.log_softmax(state.teacher(state.inputs).float() / t, dim=1)
        student = F.log_softmax(state.logits.float() / t, dim=1)
        return self.weight * t * t * F.kl_div(student, target, reduction="batchmean", log_target=True)
