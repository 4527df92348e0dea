"""BinaryConnect: values, probabilities, gradients and the update of latents by hand; surgery."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from yamls import method_of

from qbench.config.recipe import OPTIMIZERS, Recipe
from qbench.methods.binaryconnect import BinaryConnect, Latents, OutputNorm, glorot
from qbench.models.tiny import Tiny
from qbench.quant import layers, surgery
from qbench.quant.layers import QuantLayer
from qbench.quant.method import State
from qbench.training import optim


def make(**options: object) -> BinaryConnect:
    q = BinaryConnect(nn.Linear(5, 5), "weight", **options)  # type: ignore[arg-type]
    q.generator = torch.Generator().manual_seed(0)
    return q


def test_sign_of_zero_is_plus() -> None:
    w = torch.tensor([[-1.5, -0.2, 0.0, 0.4, 2.0]])
    assert make()(w).tolist() == [[-1, -1, 1, 1, 1]]
    assert make(h=0.25)(w).tolist() == [[-0.25, -0.25, 0.25, 0.25, 0.25]]
    assert torch.equal(make(h=0.25).codes(w).values(), make(h=0.25)(w))


@pytest.mark.parametrize("h", [1.0, 0.25])
def test_stochastic_weights_have_the_hard_sigmoids_probabilities(h: float) -> None:
    """hard_sigmoid(-1.5, -0.2, 0, 0.4, 2) = 0, 0.4, 0.5, 0.7, 1; the mean is clip(w, -H, H)."""
    w = h * torch.tensor([-1.5, -0.2, 0.0, 0.4, 2.0]).repeat(40_000, 1)
    hat = make(stochastic=True, h=h)(w)
    assert hat.unique().tolist() == [-h, h]
    plus = (hat > 0).float().mean(0)
    torch.testing.assert_close(plus, torch.tensor([0, 0.4, 0.5, 0.7, 1]), atol=0.01, rtol=0)
    assert plus[0] == 0
    assert plus[4] == 1
    torch.testing.assert_close(hat.mean(0), w[0].clamp(-h, h), atol=0.02 * h, rtol=0)


def test_the_draws_follow_the_generator_and_change_from_batch_to_batch() -> None:
    q, w = make(stochastic=True), torch.zeros(100)
    first, second = q(w), q(w)
    assert not torch.equal(first, second)
    q.generator = torch.Generator().manual_seed(0)
    assert torch.equal(q(w), first)


@pytest.mark.parametrize("stochastic", [False, True])
def test_evaluation_is_with_binary_or_with_real_weights(stochastic: bool) -> None:
    w = torch.tensor([[-0.5, 0.25, 0.0]])
    binary, real = (make(stochastic=stochastic, evaluate=e).eval() for e in ("binary", "real"))
    assert make(stochastic=stochastic).evaluate == ("real" if stochastic else "binary")
    assert binary(w).tolist() == [[-1, 1, 1]]
    assert real(w).tolist() == w.tolist()
    assert (binary.stored_bits(w), real.stored_bits(w)) == ((3.0, 0.0), (96.0, 0.0))
    assert (binary.describe()["evaluated_with"], real.describe()["evaluated_with"]) == ("binary", "real")
    assert set(real.train()(w).flatten().tolist()) <= {-1, 1}


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("clip", "want"), [(False, [1, 2, 3, 4, 5]), (True, [0, 2, 3, 4, 0])])
def test_the_gradient_goes_to_the_latent_unchanged(stochastic: bool, clip: bool, want: list[float]) -> None:
    """With clipping only where |w| <= H = 0.5, the bound inside."""
    w = torch.tensor([-0.6, -0.5, 0.0, 0.5, 0.51], requires_grad=True)
    make(stochastic=stochastic, clip_gradients=clip, h=0.5)(w).backward(torch.arange(1.0, 6.0))
    assert w.grad is not None
    assert w.grad.tolist() == want


def test_glorots_coefficient() -> None:
    assert 1 / glorot(nn.Conv2d(128, 128, 3)) == pytest.approx(math.sqrt(2304 / 1.5))  # 39.19
    assert glorot(nn.Linear(784, 2048)) == pytest.approx(math.sqrt(6 / (784 + 2048)) / 2)
    assert glorot(nn.Conv2d(8, 8, 3, groups=8)) == pytest.approx(math.sqrt(1.5 / 18))
    assert BinaryConnect(nn.Linear(4, 2), "weight", h="glorot").h == pytest.approx(0.5)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-4, 10), st.floats(0.01, 2))
def test_latents_start_as_wide_as_the_papers(seed: int, size: float, h: float) -> None:
    w = size * (2 * torch.rand(4000, generator=torch.Generator().manual_seed(seed)) - 1)
    q = make(h=h)
    latent = q.latent(w)
    assert latent.abs().max() <= h
    assert latent.std().item() == pytest.approx(h / math.sqrt(3), rel=0.05)
    assert torch.equal(q(latent), q(w))


def _layer(weight: Tensor, **options: object) -> tuple[State, QuantLayer]:
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    surgery_layer = QuantLayer(net[0])  # type: ignore[arg-type]
    surgery_layer.set_weight_quantizer(BinaryConnect(surgery_layer, "weight", **options))  # type: ignore[arg-type]
    surgery_layer.weight.data = weight.clone()
    net[0] = surgery_layer
    return State(net, torch.Generator()), surgery_layer


@pytest.mark.parametrize(
    ("scale", "clip", "want"),
    [
        (1.0, True, [0.6, -1.0]),
        (1.0, False, [0.6, -1.1]),
        (3.0, False, [0.8, -1.5]),
        ("glorot", False, [0.5 + 0.1 * 1.41421, -0.9 - 0.2 * 1.41421]),  # 1 / sqrt(1.5 / (2 + 1)) = sqrt(2)
        ("glorot_squared", False, [0.5 + 0.1 * 2, -0.9 - 0.2 * 2]),
        ("glorot_squared", True, [0.7, -1.0]),
    ],
)
def test_updates_are_scaled_and_latents_clipped(scale: float | str, clip: bool, want: list[float]) -> None:
    state, layer = _layer(torch.tensor([[0.5, -0.9]]))
    hook = Latents(scale, clip)
    hook.before_step(state)
    layer.weight.data += torch.tensor([[0.1, -0.2]])
    hook.after_step(state)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([want]))


def test_latents_are_clipped_at_h() -> None:
    state, layer = _layer(torch.tensor([[0.1, -0.1]]), h=0.25)
    hook = Latents(1)
    hook.before_step(state)
    layer.weight.data += torch.tensor([[1.0, -1.0]])
    hook.after_step(state)
    assert layer.weight.tolist() == [[0.25, -0.25]]


def test_the_output_is_normalized_and_has_no_bias() -> None:
    torch.manual_seed(0)
    layer = OutputNorm(nn.Linear(20, 3), "replace")
    assert {name for name, _ in layer.named_parameters()} == {"weight", "norm.weight", "norm.bias"}
    y = layer(100 * torch.randn(500, 20))
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(bits=2), r"1\.\.1, got 2"),
        (lambda: make(h=0.0), "h must be a number above 0 or 'glorot', got 0.0"),
        (lambda: make(h="he"), "h must be a number above 0 or 'glorot', got 'he'"),
        (lambda: make(evaluate="float"), "evaluate must be one of binary, real, got 'float'"),
        (lambda: Latents("xavier"), "must be one of glorot, glorot_squared, got 'xavier'"),
        (lambda: Latents(0.0), "scale must be above 0, glorot or glorot_squared, got 0.0"),
        (lambda: OutputNorm(nn.Conv2d(2, 2, 1), "replace"), "needs a linear layer, got Conv2d"),  # type: ignore[arg-type]
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_yaml_trains_with_every_optimizer(optimizer: str, stochastic: bool) -> None:
    conf = OmegaConf.load("conf/method/binaryconnect.yaml")
    conf.w_bits, conf.a_bits, conf.options.stochastic = 1, 32, stochastic
    method = method_of(conf)
    torch.manual_seed(0)
    net = Tiny(channels=3, classes=10, size=8)
    surgery.quantize(net, method.rules)
    quantized = {name for name, layer in layers.quant_layers(net) if layer.weight_quantizer is not None}
    assert quantized == {"conv1", "conv2", "fc"}  # first and last too
    assert surgery.size(net)["bits_per_weight"] == (32 if stochastic else 1)  # evaluated with real weights
    recipe = Recipe(steps=2, optimizer=optimizer, lr=1e-3, loss="squared_hinge")
    trained = optim.make_optimizers(optim.parameter_groups(net, [], method, recipe), recipe)
    state = State(net, torch.Generator(), optimizer=trained)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    for _ in range(2):
        method.hooks[0].before_step(state)
        trained.zero_grad()
        with layers.quantized_weights(net):
            loss = optim.criterion(recipe, net(x), y)
        loss.backward()
        trained.step()
        method.hooks[0].after_step(state)
    assert torch.isfinite(loss)
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(layer.weight.abs().max() <= 1 for _, layer in layers.quant_layers(net))
    assert net.eval()(x).shape == F.one_hot(y, 10).shape
