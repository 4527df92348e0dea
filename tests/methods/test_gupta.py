"""Limited numerical precision: the method of arXiv 1502.02551 put together from its configuration."""

import math

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from yamls import method_of

from qbench.models.lenet import LeNet5
from qbench.quant.layers import quant_layers
from qbench.quant.method import Method, State
from qbench.quant.quantizer import Quantizer
from qbench.quant.surgery import quantize


def method(bits: int = 16, **options: object) -> Method:
    config = OmegaConf.merge(
        OmegaConf.load("conf/method/gupta.yaml"), {"w_bits": bits, "a_bits": bits, "options": options}
    )
    return method_of(config)


def lenet(made: Method) -> tuple[nn.Module, State]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = LeNet5(channels=1, classes=10, size=28)
    assert not quantize(net, made.rules)
    generator = torch.Generator().manual_seed(0)
    for module in (*net.modules(), *(m for hook in made.hooks for m in hook.modules())):
        if isinstance(module, Quantizer):
            module.generator = generator
    return net, State(
        model=net, generator=generator, optimizer=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    )


def step(net: nn.Module, made: Method, state: State) -> float:
    """One step by hand on random images."""
    assert state.optimizer is not None
    loss = nn.functional.cross_entropy(net(torch.rand(8, 1, 28, 28)), torch.arange(8))
    state.optimizer.zero_grad()
    loss.backward()
    for hook in made.hooks:
        hook.after_backward(state)
    state.optimizer.step()
    for hook in made.hooks:
        hook.after_step(state)
    return loss.item()


def on_grid(x: Tensor, fraction: int) -> bool:
    return torch.equal((x * 2.0**fraction).round(), x * 2.0**fraction)


def test_everything_is_on_its_grid() -> None:
    made = method()
    net, state = lenet(made)
    for hook in made.hooks:
        hook.before_train(state)
    layers = dict(quant_layers(net))
    seen: dict[str, list[tuple[Tensor, int]]] = {"input_quantizer": [], "output_quantizer": [], "error_quantizer": []}
    for layer in layers.values():
        for site, found in seen.items():
            getattr(layer, site).register_forward_hook(
                lambda module, args, out, found=found: found.append((out.detach(), module.fraction))
            )
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert all(math.isfinite(step(net, made, state)) for _ in range(2))
    for site, fraction in (("input_quantizer", 10), ("output_quantizer", 10), ("error_quantizer", 20)):
        assert len(seen[site]) == 2 * len(layers)
        assert all(f == fraction and on_grid(x, f) for x, f in seen[site])
    for name, p in net.named_parameters():
        assert p.grad is not None
        assert on_grid(p, 14), name
        assert on_grid(p.grad, 14), name
        assert not torch.equal(p, before[name]), name
        assert on_grid(state.optimizer.state[p]["momentum_buffer"], 14), name  # type: ignore[union-attr]


def test_the_fraction_follows_the_word_length_and_the_options() -> None:
    net, _ = lenet(method(12, a_integer=4))
    layer = next(layer for _, layer in quant_layers(net))
    assert layer.weight_quantizer is not None
    assert layer.input_quantizer is not None
    assert layer.weight_quantizer.describe()["format"] == "<2,10>"
    assert layer.input_quantizer.describe()["format"] == "<4,8>"


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    net, _ = lenet(method(8))
    x = torch.rand(4, 1, 28, 28)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_nearest_rounding_freezes_a_small_step_that_stochastic_rounding_takes() -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        made = method(12, rounding=rounding, momentum=False)
        net, state = lenet(made)
        for hook in made.hooks:
            hook.before_train(state)
        for group in state.optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = 1e-3
        before = [p.detach().clone() for p in net.parameters()]
        step(net, made, state)
        moved[rounding] = any(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    assert moved == {"nearest": False, "stochastic": True}
