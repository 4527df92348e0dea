"""Fake quantization with folded batch-norm: by hand, against nn.BatchNorm2d, and the whole method on small nets."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from qbench.config import resolve
from qbench.errors import UserError
from qbench.methods.jacob import Activation, FoldedLayer, FreezeStatistics, Quantized, Weight
from qbench.models.mobilenet import MobileNetV2
from qbench.models.parts import Add
from qbench.models.tiny import Tiny
from qbench.quant import surgery
from qbench.quant.hooks import EnableAfter
from qbench.quant.layers import quantized_weights
from qbench.quant.method import Method, State
from qbench.quant.surgery import activation_quantizers
from qbench.training import build, evaluation

torch.set_num_threads(1)

CONF = str(Path(__file__).resolve().parents[2] / "conf")
LAYER = nn.Linear(1, 1)
FOLDS = pytest.mark.parametrize("fold", ["jacob", "krishnamoorthi"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def method(*words: str) -> Method:
    with initialize_config_dir(CONF, version_base=None):
        config = compose("config", overrides=["method=qat", *words])
    return build.make_method(resolve.resolve(config))


def net(*words: str, model: nn.Module | None = None) -> nn.Module:
    """A small net after surgery and calibration, as a run has it."""
    torch.manual_seed(0)
    model = Tiny(channels=3, classes=10, size=16) if model is None else model
    with torch.no_grad():
        for seed in range(20):
            model(random(8, 3, 16, 16, seed=seed))
    model.eval()
    surgery.quantize(model, method(*words).rules)
    evaluation.calibrate(model, [(random(8, 3, 16, 16), LAYER.weight)], torch.device("cpu"), "fp32", scratch=False)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    model.train()
    optimizer.zero_grad()
    with quantized_weights(model):
        loss = nn.functional.cross_entropy(model(random(10, 3, 16, 16, seed=seed)), torch.arange(10))
    loss.backward()
    optimizer.step()
    return loss.detach()


# Weights


def test_weight_codes_leave_the_lowest_unused() -> None:
    w = torch.tensor([-0.37, 0.0, 0.5, 1.13])
    q = Weight(LAYER, "weight", bits=8)
    codes = q.codes(w)
    assert (codes.codes.min(), codes.codes.max(), q.levels) == (1, 255, 255)
    step = 1.5 / 254
    assert codes.tensors["step"].item() == pytest.approx(step)
    assert codes.tensors["zero"].item() == 1 + 63  # 0.37 / step = 62.65
    assert q(w).tolist() == pytest.approx([-63 * step, 0, 85 * step, 191 * step])


def test_weight_range_is_that_of_the_tensor_at_hand() -> None:
    q = Weight(LAYER, "weight", bits=4)
    w = random(29)
    assert torch.allclose(q(4 * w), 4 * q(w))
    x = w.clone().requires_grad_()
    q(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(29))
    assert list(q.state_dict()) == ["_extra_state"]


def test_weight_per_channel_has_one_range_per_row() -> None:
    layer = nn.Conv2d(2, 3, 1)
    w = random(3, 2, 1, 1) * torch.tensor([0.01, 1, 100]).reshape(3, 1, 1, 1)
    q = Weight(layer, "weight", bits=4, per_channel=True)
    assert ((q(w) - w).abs().amax((1, 2, 3)) < q.codes(w).tensors["step"].flatten()).all()


# Activations


def test_averages_by_hand() -> None:
    q = Activation(LAYER, "input", bits=8, decay=0.9).train()
    q(torch.tensor([-1.0, 4.0]))
    assert (q.lo.item(), q.hi.item()) == (-1, 4)  # the first batch sets them
    q(torch.tensor([0.0, 14.0]))
    assert (q.lo.item(), q.hi.item()) == pytest.approx((-0.9, 5))
    q.eval()
    q(torch.tensor([-100.0, 100.0]))
    assert (q.lo.item(), q.hi.item()) == pytest.approx((-0.9, 5))


def test_averages_weigh_a_step_alike_in_however_many_pieces() -> None:
    batch, found = torch.tensor([-3.0, 9.0]), []
    for parts in (1, 4):
        q = Activation(LAYER, "input", bits=8, decay=0.9).train()
        q.calibrate(torch.tensor([-1.0, 4.0]))
        q.calibrate(torch.tensor([0.0, 14.0]))  # calibration knows of no steps
        q.pieces = (parts, 1)
        for _ in range(parts):
            q(batch)
        found.append((q.lo.item(), q.hi.item()))
    assert found[0] == pytest.approx((-0.9 * 0.9 - 0.3, 5 * 0.9 + 0.9))
    assert found[1] == pytest.approx(found[0])


def test_averages_move_while_quantization_is_off() -> None:
    q = Activation(LAYER, "input", bits=8, decay=0.5).train()
    q.enabled = False
    x = torch.tensor([0.0, 3.3])
    assert torch.equal(q(x), x)
    q(torch.tensor([0.0, 1.3]))
    assert q.hi.item() == pytest.approx(2.3)
    q.eval()
    q(torch.tensor([0.0, 100.0]))
    assert q.hi.item() == pytest.approx(2.3)


def test_activation_nudged_range_and_gradient() -> None:
    """1712.05877 Sec. 3: [-0.37, 1.13] at 8 bits becomes [-0.3705882, 1.1294118]."""
    q = Activation(LAYER, "input", bits=8)
    q.calibrate(torch.tensor([-0.37, 1.13]))
    q.eval()
    x = torch.tensor([-9.0, -0.3, 0.0, 1.1, 9.0], requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert (y.min().item(), y.max().item()) == pytest.approx((-0.3705882, 1.1294118))
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert y[2] == 0


def test_averages_survive_a_checkpoint() -> None:
    q, other = (Activation(LAYER, "input", bits=8) for _ in range(2))
    q.calibrate(random(50))
    other.load_state_dict(q.state_dict())
    assert torch.equal(q.eval()(random(9)), other.eval()(random(9)))


@pytest.mark.parametrize("decay", [1, -0.1])
def test_activation_refuses(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        Activation(LAYER, "input", bits=8, decay=decay)


# Folding


def conv_bn(kind: str = "conv", momentum: float | None = 0.1) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, its batch-norm with a history, and a batch."""
    torch.manual_seed(1)
    layer: nn.Module
    if kind == "linear":
        layer, bn, x = nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=momentum), random(32, 5)
    else:
        groups = 6 if kind == "depthwise" else 1
        layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=kind == "bias")
        bn, x = nn.BatchNorm2d(6, momentum=momentum), random(16, 6, 5, 5)
    nn.init.uniform_(bn.weight, 0.5, 2)
    nn.init.normal_(bn.bias)
    with torch.no_grad():
        bn(layer(random(*x.shape, seed=5) * 2 + 1))
    return layer, bn, x


def folded(layer: nn.Module, bn: nn.Module, bits: int = 32, **options: object) -> FoldedLayer:
    new = FoldedLayer(deepcopy(layer), "replace", pair=deepcopy(bn), **options)
    if bits < 32:
        new.set_weight_quantizer(Weight(new, "weight", bits=bits))
    return new


class Spy(Weight):
    """Remembers what it was asked to quantize, and leaves it as it is."""

    def quantize(self, x: Tensor) -> Tensor:
        self.asked = x.detach()
        return x


def by_hand(fold: str) -> tuple[FoldedLayer, Spy, Tensor]:
    """1806.08342: gamma=1.5, beta=.3, sigma=1, mu=.1, and a batch with sigma_B=.8, mu_B=.2; w=1."""
    conv, bn = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        bn.weight.fill_(1.5)
        bn.bias.fill_(0.3)
        bn.running_mean.fill_(0.1)
    layer = FoldedLayer(conv, "replace", pair=bn, fold=fold)
    spy = Spy(layer, "weight", bits=8)
    layer.set_weight_quantizer(spy)
    return layer, spy, torch.tensor([-0.6, 1.0]).reshape(2, 1, 1, 1)


def test_training_by_hand_jacob() -> None:
    layer, spy, x = by_hand("jacob")
    y = layer.train()(x)
    assert spy.asked.item() == pytest.approx(1.5 / 0.8)
    assert y.flatten().tolist() == pytest.approx([1.875 * v - 0.075 for v in (-0.6, 1.0)])


def test_training_by_hand_krishnamoorthi() -> None:
    layer, spy, x = by_hand("krishnamoorthi")
    y = layer.train()(x)
    assert spy.asked.item() == pytest.approx(1.5)  # gamma / sigma, and the output is divided by c = .8
    assert y.flatten().tolist() == pytest.approx([1.5 * v / 0.8 - 0.075 for v in (-0.6, 1.0)])


@FOLDS
def test_evaluation_and_frozen_training_by_hand(fold: str) -> None:
    layer, spy, x = by_hand(fold)
    expected = [1.5 * v + 0.15 for v in (-0.6, 1.0)]  # the long-term bias
    assert layer.eval()(x).flatten().tolist() == pytest.approx(expected)
    layer.frozen = True
    assert layer.train()(x).flatten().tolist() == pytest.approx(expected)
    assert spy.asked.item() == pytest.approx(1.5)
    assert layer.bn.num_batches_tracked == 0
    assert layer.bn.running_mean.item() == pytest.approx(0.1)


@FOLDS
@pytest.mark.parametrize("kind", ["conv", "bias", "depthwise", "linear"])
def test_equals_layer_and_batch_norm_at_16_bits(kind: str, fold: str) -> None:
    layer, bn, x = conv_bn(kind)
    new = folded(layer, bn, bits=16, fold=fold)
    assert torch.allclose(new.eval()(x), bn.eval()(layer(x)), atol=3e-3)
    assert torch.allclose(new.train()(x), bn.train()(layer(x)), atol=3e-3)


@FOLDS
@pytest.mark.parametrize("kind", ["conv", "bias", "depthwise", "linear"])
def test_gradients_are_those_of_layer_and_batch_norm(kind: str, fold: str) -> None:
    layer, bn, x = conv_bn(kind)
    new = folded(layer, bn, fold=fold).train()
    g = random(*bn.train()(layer(x)).shape, seed=9)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    new(a).backward(g)
    bn(layer(b)).backward(g)
    assert torch.allclose(a.grad, b.grad, atol=1e-4)
    assert torch.allclose(new.weight.grad, layer.weight.grad, atol=1e-3)
    assert torch.allclose(new.bn.weight.grad, bn.weight.grad, atol=1e-3)
    assert torch.allclose(new.bn.bias.grad, bn.bias.grad, atol=1e-3)


@FOLDS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["conv", "bias", "linear"])
def test_running_statistics_move_as_batch_norm_moves_them(kind: str, momentum: float | None, fold: str) -> None:
    layer, bn, x = conv_bn(kind, momentum)
    new = folded(layer, bn, bits=4, fold=fold).train()
    bn.train()
    for scale in (1, 3):
        new(scale * x)
        bn(layer(scale * x))
    assert torch.allclose(new.bn.running_mean, bn.running_mean, atol=1e-6)
    assert torch.allclose(new.bn.running_var, bn.running_var, rtol=1e-5)
    assert new.bn.num_batches_tracked == bn.num_batches_tracked
    new.eval()(x)
    assert torch.allclose(new.bn.running_mean, bn.running_mean, atol=1e-6)


def test_what_is_quantized_is_the_folded_weight() -> None:
    layer, bn, _ = conv_bn("conv")
    new = folded(layer, bn, bits=3)
    hat, (w, _) = new.quantized_weight(), new.folded()
    assert hat.unique().numel() <= 7
    assert (hat - w).abs().max() <= w.max() - w.min()
    assert torch.equal(hat, new.weight_quantizer(w))


def scaled_statistics(bn: nn.BatchNorm2d, factor: float) -> nn.BatchNorm2d:
    """`bn` for outputs whose variance, and its eps, are `factor` times as large."""
    new = deepcopy(bn)
    with torch.no_grad():
        new.running_var.mul_(factor)
    new.eps *= factor
    return new


def test_a_dead_channel_does_not_set_the_range() -> None:
    layer, bn, x = conv_bn("depthwise")
    with torch.no_grad():
        bn.running_var[2] = 0.0
    plain, guarded = (folded(layer, bn, floor=floor).eval() for floor in (0.0, 0.01))
    tiny = folded(layer, scaled_statistics(bn, 1e-4), floor=0.01).eval()
    assert torch.allclose(tiny.folded()[0], 100 * guarded.folded()[0], rtol=1e-3)  # whatever the unit of the outputs
    assert guarded.folded()[0].abs().max() < 0.1 * plain.folded()[0].abs().max()
    others = [c for c in range(6) if c != 2]
    assert torch.equal(guarded(x)[:, others], plain(x)[:, others])


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (nn.ReLU(), {}, "only a batch-norm with running statistics can be folded, got ReLU"),
        (nn.BatchNorm2d(1, track_running_stats=False), {}, "only a batch-norm with running statistics"),
        (nn.BatchNorm2d(1), {"fold": "both"}, "fold must be one of jacob, krishnamoorthi, got 'both'"),
        (nn.BatchNorm2d(1), {"floor": -1}, "floor must be at least 0, got -1"),
    ],
)
def test_folded_layer_refuses(pair: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoldedLayer(nn.Conv2d(1, 1, 1), "replace", pair=pair, **options)


# Hooks


def run_hook(hook: EnableAfter, model: nn.Module, steps: int, at: Sequence[int]) -> list[bool]:
    state = State(model, torch.Generator(), steps=steps)
    seen = []
    for state.step in at:
        hook.before_step(state)
        (enabled,) = {q.enabled for q in activation_quantizers(model).values()}
        seen.append(enabled)
    return seen


def test_activations_are_enabled_by_the_step_alone() -> None:
    model = nn.Sequential(Quantized(nn.ReLU(), "replace", bits=8), Quantized(nn.ReLU(), "replace", bits=8))
    assert run_hook(EnableAfter(0.5), model, 8, range(8)) == [False] * 4 + [True] * 4
    assert run_hook(EnableAfter(0.5), model, 8, [3, 4, 2]) == [False, True, False]
    assert run_hook(EnableAfter(0.5, steps=2), model, 8, range(4)) == [False, False, True, True]
    assert run_hook(EnableAfter(), model, 8, [0]) == [True]


def test_a_resumed_run_has_the_same_activations() -> None:
    def make() -> nn.Module:
        return nn.Sequential(Quantized(nn.ReLU(), "replace", bits=8))

    first = make()
    run_hook(EnableAfter(0.5), first, 8, range(3))
    second, hook = make(), EnableAfter(0.5)
    second.load_state_dict(first.state_dict())
    hook.load_state_dict(EnableAfter(0.5).state_dict())
    assert not second[0].quantizer.enabled
    assert run_hook(hook, second, 8, [3, 4]) == [False, True]


def test_enable_after_leaves_others_alone_and_refuses() -> None:
    model = nn.ModuleDict({n: Quantized(nn.ReLU(), "replace", bits=8) for n in ("a", "b")})
    hook = EnableAfter(0.5, match="a.*")
    hook.before_train(State(model, torch.Generator(), steps=4))
    assert [q.enabled for q in activation_quantizers(model).values()] == [False, True]
    with pytest.raises(UserError, match=r"'c.*' matches none of: a.quantizer, b.quantizer"):
        EnableAfter(0.5, match="c.*").before_train(State(model, torch.Generator(), steps=4))
    with pytest.raises(UserError, match="quantized after 4 steps, but the training has 4"):
        EnableAfter(steps=4).before_train(State(model, torch.Generator(), steps=4))
    for share, steps in ((1.0, None), (-0.1, None), (0.0, -1), (0.0, 1.5)):
        with pytest.raises(ValueError, match="before activations are quantized must be"):
            EnableAfter(share, steps)


def test_statistics_freeze_by_the_step_alone() -> None:
    model = net()
    state = State(model, torch.Generator(), steps=4)
    for hook, frozen in ((FreezeStatistics(0.5), [False, False, True, True]), (FreezeStatistics(1), [False] * 4)):
        seen = []
        for state.step in range(4):
            hook.before_step(state)
            seen.append(model.conv1.frozen)
        assert seen == frozen
    with pytest.raises(ValueError, match=r"must be in 0..1, got 1.5"):
        FreezeStatistics(1.5)


# The method


def test_one_quantizer_per_tensor() -> None:
    """The addition of Tiny is followed by a ReLU and has none of its own."""
    assert list(activation_quantizers(net())) == [
        "conv1.input_quantizer",
        "relu1.quantizer",
        "bn2.quantizer",
        "relu2.quantizer",
        "pool.quantizer",
        "fc.output_quantizer",
    ]


def test_additions_without_a_relu_are_quantized() -> None:
    model = MobileNetV2(channels=3, classes=10, size=16, width=0.1)
    additions = [f"{name}.quantizer" for name, m in model.named_modules() if isinstance(m, Add)]
    surgery.quantize(model, method().rules)
    assert [n for n in activation_quantizers(model) if n.endswith("add.quantizer")] == additions != []
    assert not any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())


@FOLDS
def test_two_steps(fold: str) -> None:
    model = net("bits=4", f"options.fold={fold}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [step(model, optimizer, seed) for seed in range(2)]
    assert torch.stack(losses).isfinite().all()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    x = random(4, 3, 16, 16)
    averages = {n: b.clone() for n, b in model.named_buffers()}
    once = model(x)
    with quantized_weights(model):
        assert torch.equal(model(x), once)
    assert all(torch.equal(b, averages[n]) for n, b in model.named_buffers())
    other = net("bits=4", f"options.fold={fold}")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), once)


def test_sixteen_bits_train_as_the_float_net() -> None:
    torch.manual_seed(0)
    float_net = Tiny(channels=3, classes=10, size=16)
    model = net("bits=16", "options.decay=0", model=deepcopy(float_net))
    with torch.no_grad():
        for seed in range(20):
            float_net(random(8, 3, 16, 16, seed=seed))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, float_net)]
    for seed in range(3):
        losses = [step(m, o, seed) for m, o in zip((model, float_net), optimizers, strict=True)]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-3)


def test_manifest_says_what_every_tensor_is() -> None:
    weights = surgery.manifest(net("bits=6/8"), {})["weights"]
    assert weights["conv1.weight"]["levels"] == 63
    assert weights["conv1.bn.weight"]["why"] == "batch-norm"
    assert {n for n, e in weights.items() if e["bits"] == 6} == {"conv1.weight", "conv2.weight", "fc.weight"}
