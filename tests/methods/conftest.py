"""What the tests of several methods do with a quantized net."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qbench.quant import layers
from qbench.quant.method import Method, State

Look = Callable[[State], None]


@pytest.fixture
def still_after_training() -> Callable[..., list[str]]:
    """still_after_training(net, method, optimizer, steps=2, look=None): what stood still in so many steps.

    With the hooks' before_step and after_step; `look` is called between the two, before the gradient is taken.
    """

    def run(
        net: nn.Module, method: Method, optimizer: torch.optim.Optimizer, steps: int = 2, look: Look | None = None
    ) -> list[str]:
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        state = State(net, torch.Generator(), steps=steps, optimizer=optimizer)
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
        for state.step in range(steps):
            for hook in method.hooks:
                hook.before_step(state)
            if look is not None:
                look(state)
            optimizer.zero_grad()
            with layers.quantized_weights(net):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            for hook in method.hooks:
                hook.after_step(state)
        assert torch.isfinite(loss)
        return [name for name, p in net.named_parameters() if torch.equal(p, before[name])]

    return run
