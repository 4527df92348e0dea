"""What the tests of several methods do with a quantized net."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qbench import layers
from qbench.method import Method, State


@pytest.fixture
def still_after_two_steps() -> Callable[[nn.Module, Method, torch.optim.Optimizer], list[str]]:
    """still_after_two_steps(net, method, optimizer): two steps, with hooks; gives the parameters that stood still."""

    def run(net: nn.Module, method: Method, optimizer: torch.optim.Optimizer) -> list[str]:
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        state = State(net, torch.Generator(), steps=2)
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
        for state.step in range(2):
            for hook in method.hooks:
                hook.before_step(state)
            optimizer.zero_grad()
            with layers.quantized_weights(net):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
        assert torch.isfinite(loss)
        return [name for name, p in net.named_parameters() if torch.equal(p, before[name])]

    return run
