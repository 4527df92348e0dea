"""AdaRound: the worked numbers, what is learned against nearest rounding, units, and resuming after each of them."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.data import load
from qbench.methods.adaround import Activation, Reconstruct, Rounding, mixed, rectified_sigmoid, regulariser
from qbench.methods.shared.fold import fold
from qbench.methods.shared.reconstruction import activation_of, fisher, units
from qbench.models.mlp import MLP
from qbench.models.mobilenet import MobileNetV2
from qbench.models.resnet import ResNetCIFAR
from qbench.models.tiny import Tiny
from qbench.quant import surgery
from qbench.quant.layers import QuantLayer, quant_layers
from qbench.quant.method import Done, Rule, State
from qbench.quant.passes import calibrating, layer_io
from qbench.quant.uniform import Uniform
from qbench.records import read_metrics
from qbench.training.build import assemble, make_batches
from qbench.training.recorder import Recorder
from qbench.training.trainer import Trainer


class Images:
    """Calibration images as the trainer gives them."""

    def __init__(self, x: Tensor, y: Tensor | None = None) -> None:
        self.x, self.y = x, torch.arange(len(x)) % 10 if y is None else y

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(16), self.y.split(16), strict=True)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rules(bits: int = 4, a_bits: int | None = None, **weight: Any) -> list[Rule]:
    slots: dict[str, Any] = {"weight": partial(Rounding, bits=bits, **{"symmetric": True, "range": "mse", **weight})}
    slots |= {"input": partial(Activation, bits=a_bits)} if a_bits else {}
    return [Rule(pair="BatchNorm*", replace=fold, optional=True, **slots), Rule(**slots)]


def quantized(net: nn.Module, x: Tensor, *options: Any, **more: Any) -> nn.Module:
    """`net`, with statistics of x in its batch-norms, quantized; eval mode."""
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(x)
        surgery.quantize(net.eval(), rules(*options, **more))
        with calibrating(net):
            net(x)
    return net


def learn(net: nn.Module, images: Images, first: int = 0, seed: int = 0, **options: Any) -> list[Done]:
    state = State(net, random(seed), calibration=images)
    state.stage.step = first
    return list(Reconstruct(**{"iterations": 100, **options})(state))


def rounding(layer: nn.Module) -> Rounding:
    assert isinstance(layer, QuantLayer)
    assert isinstance(layer.weight_quantizer, Rounding)
    return layer.weight_quantizer


def one_layer(weight: Tensor, **options: Any) -> tuple[nn.Module, QuantLayer]:
    """A net of one linear layer without bias, weight [out, in], on a grid of step 1 of 8 bits."""
    net = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        net[0].weight.copy_(weight)
    surgery.quantize(net, [Rule(weight=partial(Rounding, **{"bits": 8, "symmetric": True, **options}))])
    layer = net[0]
    assert isinstance(layer, QuantLayer)
    rounding(layer).step.fill_(1.0)
    return net, layer


# --- worked numbers


def test_rectified_sigmoid_and_its_gradient() -> None:
    """frac .3 -> V = -.6931, h = .3, dh/dV = .26667; 0 where h is cut."""
    v = torch.tensor([math.log(0.5), 0.0, 4.0, -4.0], requires_grad=True)
    h = rectified_sigmoid(v)
    assert h.tolist() == pytest.approx([0.3, 0.5, 1.0, 0.0], abs=1e-6)
    (gradient,) = torch.autograd.grad(h.sum(), v)
    assert gradient.tolist() == pytest.approx([0.8 / 3, 0.3, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("beta", "want"), [(20.0, 0.99999999), (2.0, 0.84)])
def test_regulariser(beta: float, want: float) -> None:
    h = torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64)
    assert float(regulariser(h, beta)) == pytest.approx(want, abs=2e-9)


def test_beta_falls_from_20_to_2_after_a_fifth_without() -> None:
    act = Reconstruct(iterations=10)
    assert [act.beta_at(i) for i in range(2)] == [None, None]
    assert [act.beta_at(i) for i in range(2, 11)] == pytest.approx([20 - 18 * i / 8 for i in range(9)])


@pytest.mark.parametrize(("iterations", "lr"), [(500, 0.02), (10_000, 1e-3), (20_000, 1e-3)])
def test_the_rate_is_adams_own_where_there_is_time(iterations: int, lr: float) -> None:
    """1e-3 in the papers, for 10,000 iterations (AdaRound) and for 20,000 (BRECQ, QDrop)."""
    assert Reconstruct(iterations=iterations).lr == pytest.approx(lr)
    assert Reconstruct(iterations=iterations, lr=0.3).lr == 0.3


def test_learning_begins_at_the_float_weight() -> None:
    weight = torch.tensor([[0.3, -0.3, 1.75, -2.0, 3.0]])
    _, layer = one_layer(weight)
    v = rounding(layer).soften(layer.weight)
    assert v[0, :2].tolist() == pytest.approx([math.log(0.5), math.log(2)], abs=1e-5)
    assert torch.allclose(layer.quantized_weight(), weight, atol=1e-6)
    assert "0.weight_quantizer.v" in dict(nn.Sequential(layer).named_parameters())
    rounding(layer).harden(layer.weight)
    assert layer.quantized_weight().tolist() == [[0.0, 0.0, 2.0, -2.0, 3.0]]
    assert "v" not in rounding(layer).state_dict()


def test_a_weight_off_the_grid_stays_at_its_end_and_learns_nothing() -> None:
    """4 bits: codes -8..7. Where floor or floor + 1 is no code there is no choice."""
    weight = torch.tensor([[-9.7, -8.2, -8.0, 6.4, 7.0, 7.3, 12.6]])
    _, layer = one_layer(weight, bits=4)
    q = rounding(layer)
    v = q.soften(layer.weight)
    soft = q(layer.weight)
    assert soft[0].tolist() == pytest.approx([-8.0, -8.0, -8.0, 6.4, 7.0, 7.0, 7.0], abs=1e-5)
    (gradient,) = torch.autograd.grad(soft.sum(), v)
    assert [g != 0 for g in gradient[0].tolist()] == [False, False, True, True, False, False, False]
    with torch.no_grad():
        v.fill_(5.0)
    q.harden(layer.weight)
    assert layer.quantized_weight()[0].tolist() == [-8.0, -8.0, -7.0, 7.0, 7.0, 7.0, 7.0]


def test_the_quadratic_example_where_nearest_is_not_best() -> None:
    """H = [[1, .5], [.5, 1]], w = (.45, .45): nearest costs .6075, (1, 0) and (0, 1) .2575, (1, 1) .9075."""
    h = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    w = torch.tensor([0.45, 0.45])
    choices = list(itertools.product((0.0, 1.0), repeat=2))
    costs = {up: float((torch.tensor(up) - w) @ h @ (torch.tensor(up) - w)) for up in choices}
    assert costs == {
        (0.0, 0.0): pytest.approx(0.6075),
        (1.0, 0.0): pytest.approx(0.2575),
        (0.0, 1.0): pytest.approx(0.2575),
        (1.0, 1.0): pytest.approx(0.9075),
    }
    x = torch.linalg.cholesky(h).T * 2**0.5  # two inputs of which the mean of x x^T is H
    torch.testing.assert_close(x.T @ x / 2, h)
    net, layer = one_layer(w[None] + torch.tensor([[0.0, 1e-3]]))  # the tie between the two best is broken
    (done,) = learn(net, Images(x), iterations=500, regularise=0.3)  # strong enough to force a choice by beta = 2
    assert done.values["nearest"] == pytest.approx(0.6075, abs=5e-3)
    assert done.values["learned"] == pytest.approx(0.2575, abs=5e-3)
    assert layer.quantized_weight().tolist() == [[0.0, 1.0]]


# --- what is learned


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(2, 6),
    symmetric=st.booleans(),
    per_channel=st.booleans(),
    conv=st.booleans(),
    width=st.integers(1, 6),
    lr=st.sampled_from([None, 0.01, 3.0]),
)
def test_never_worse_than_nearest_and_floor_or_floor_plus_one(
    seed: int, bits: int, symmetric: bool, per_channel: bool, conv: bool, width: int, lr: float | None
) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, width, 2) if conv else nn.Linear(12, width)
    x = torch.randn(20, *((3, 3, 3) if conv else (12,)))
    net = nn.Sequential(layer, nn.ReLU())
    surgery.quantize(net, rules(bits, symmetric=symmetric, per_channel=per_channel))
    plain = deepcopy(net)
    (done,) = learn(net, Images(x), iterations=12, batch_size=8, lr=lr)
    float_net = nn.functional.conv2d(x, layer.weight, layer.bias) if conv else layer(x)

    def error(found: nn.Module) -> float:
        return float((found(x) - float_net.relu()).square().sum(1).mean().detach())

    assert done.values["nearest"] == pytest.approx(error(plain), rel=1e-4, abs=1e-7)
    assert done.values["learned"] == pytest.approx(error(net), rel=1e-4, abs=1e-7)
    assert done.values["learned"] <= done.values["nearest"]
    q, weight = rounding(net[0]), net[0].weight.detach()  # type: ignore[union-attr]
    codes, (lo, hi) = q.codes(weight), q.bounds
    below = (weight / q.step).floor() + q.zero
    assert ((codes == below.clamp(lo, hi)) | (codes == (below + 1).clamp(lo, hi))).all()
    assert lo <= int(codes.min()) <= int(codes.max()) <= hi


@pytest.mark.parametrize("step_lr", [0.5, math.inf])
def test_a_rounding_that_is_worse_is_taken_back(step_lr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning is made to end with the worst choice, or without a number; steps of inputs are put back too."""

    def worst(self: Rounding, weight: Tensor) -> None:
        self.shift.copy_((weight > 0) * 2 - 1)
        self.v = None

    monkeypatch.setattr(Rounding, "harden", worst)
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(32, 6, generator=random(0))
    surgery.quantize(net, rules(4, 4))
    with calibrating(net):
        net(x)
    plain = net(x).detach()
    (done,) = learn(net, Images(x), activations=True, step_lr=step_lr)
    assert done.values["learned"] == done.values["nearest"] > 0
    assert not rounding(net[0]).shift.any()
    assert net(x).equal(plain)


def test_a_hard_rounding_is_a_grid_like_any_other() -> None:
    net, x = Tiny(channels=3, classes=10, size=8), torch.randn(32, 3, 8, 8, generator=random(1))
    quantized(net, x)
    learn(net, Images(x))
    for _, layer in quant_layers(net):
        q = rounding(layer)
        assert set(q.shift.unique().tolist()) <= {-1, 0, 1}
        assert q.shift.any()
        grid = q.grid(layer.weight)
        torch.testing.assert_close(grid.values(q.codes(layer.weight)), layer.quantized_weight())
        layer.quantized_weight().sum().backward()
        assert layer.weight.grad is not None
        assert set(layer.weight.grad.unique().tolist()) <= {0.0, 1.0}


def test_no_choice_yet_is_uniform() -> None:
    layer = nn.Linear(64, 8)
    a, b = (cls(layer, "weight", bits=3, range="mse") for cls in (Rounding, Uniform))
    for q in (a, b):
        q.calibrate(layer.weight)
        q.finish_calibration()
    assert a(layer.weight).equal(b(layer.weight))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"asymmetric": False},
        {"unit": "block"},
        {"unit": "block", "fisher": True},
        {"unit": "block", "activations": True, "drop": 0.5, "step_lr": 4e-5},
        {"activations": True},
    ],
)
def test_every_way_to_learn_helps_a_residual_net(options: dict[str, Any]) -> None:
    """On its own loss by a quarter, in all units together, and nothing but rounding and ranges has changed."""
    torch.manual_seed(0)
    net, x = ResNetCIFAR(channels=3, classes=10, size=8, depth=8, width=0.5, shortcut="B"), torch.randn(32, 3, 8, 8)
    quantized(net, x, 3, 4)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    done = learn(net, Images(x), iterations=40, batch_size=16, **options)
    assert len(done) == done[0].total == (5 if options.get("unit") == "block" else 10)
    nearest, learned = (sum(d.values[k] / d.values["nearest"] for d in done) for k in ("nearest", "learned"))
    assert learned < 0.75 * nearest
    assert {n: p.equal(before[n]) for n, p in net.named_parameters()} == dict.fromkeys(before, True)
    assert all(p.grad is None for p in net.parameters())
    for q in surgery.activation_quantizers(net).values():
        assert isinstance(q, Activation)
        assert q.enabled
        assert not q.drop
        assert not q.step.requires_grad


def test_what_a_layer_is_given_comes_from_the_layers_that_are_done() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    floats = deepcopy(net)
    surgery.quantize(net, rules(3))
    done = learn(net, Images(x))
    given, _ = layer_io(net, net[2], [(x, x)])
    assert not given.allclose(floats[:2](x), atol=1e-3)
    found = (net[2](given) - floats(x)).square().sum(1).mean().detach()
    assert done[1].values["learned"] == pytest.approx(float(found), rel=1e-4)
    symmetric = deepcopy(floats)
    surgery.quantize(symmetric, rules(3))
    done = learn(symmetric, Images(x), asymmetric=False)
    found = (symmetric[2](floats[:2](x)) - floats(x)).square().sum(1).mean().detach()
    assert done[1].values["learned"] == pytest.approx(float(found), rel=1e-4)


def test_on_digits_four_bits_are_better_than_nearest_on_images_never_seen() -> None:
    """Of a trained net: what it makes of the test images is nearer to the float net, on the grid of ptq."""
    config = resolve_row(["method=adaround", "dataset=digits", "budget=demo", "device=cpu"])
    data, cpu = load(config["dataset"]), torch.device("cpu")
    (x, y), (unseen, right) = (
        (torch.cat(part) for part in zip(*make_batches(config, data, split, cpu, False).epoch(0), strict=True))
        for split in (data.train, data.test)
    )
    torch.manual_seed(0)
    net = MLP(channels=data.channels, classes=10, size=data.size, hidden=[64])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        part = torch.randperm(len(x))[:64]
        nn.functional.cross_entropy(net(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        want = net.eval()(unseen)
        assert (want.argmax(1) == right).float().mean() > 0.85
        surgery.quantize(net, rules(4))
        nearest = (net(unseen) - want).square().mean()
    learn(net, Images(x[:512], y[:512]), iterations=150)
    assert (net(unseen) - want).square().mean() < 0.75 * nearest


# --- units


def test_units_of_nets() -> None:
    x = torch.randn(4, 3, 8, 8)
    net = quantized(ResNetCIFAR(channels=3, classes=10, size=8, depth=8, shortcut="B"), x)
    assert list(units(net, "block", Rounding)) == ["conv1", "layer1.0", "layer2.0", "layer3.0", "fc"]
    layers = [n for n, _ in quant_layers(net)]
    assert list(units(net, "layer", Rounding)) == layers
    assert list(units(net, "layer", Activation)) == []
    mobile = quantized(MobileNetV2(channels=3, classes=10, size=8, width=0.1), x)
    blocks = list(units(mobile, "block", Rounding))
    assert blocks == ["conv1", *[f"blocks.{i}" for i in range(17)], "conv2", "fc"]


def test_the_activation_that_follows() -> None:
    """Behind a folded batch-norm; none before a residual sum, nor at the end, nor for a block."""
    x = torch.randn(4, 3, 8, 8)
    net = quantized(ResNetCIFAR(channels=3, classes=10, size=8, depth=8, shortcut="B"), x)
    kinds = {n: type(activation_of(net, n)) for n in ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0", "fc")}
    assert kinds == {
        "conv1": nn.ReLU,
        "layer1.0.conv1": nn.ReLU,
        "layer1.0.conv2": nn.Identity,
        "layer1.0": nn.Identity,
        "fc": nn.Identity,
    }
    mobile = quantized(MobileNetV2(channels=3, classes=10, size=8, width=0.1), x)
    assert type(activation_of(mobile, "conv2")) is nn.ReLU6
    assert type(activation_of(mobile, "blocks.3.body.conv3")) is nn.Identity


def test_fisher_weights_by_hand() -> None:
    """Of the last layer the gradient is softmax - one-hot; before it, that times the weight; of mean 1."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(7, 4), torch.arange(7) % 3
    gradient = net(x).softmax(1) - nn.functional.one_hot(y, 3)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    for i, want in ((1, gradient.square()), (0, (gradient @ net[1].weight).square())):
        torch.testing.assert_close(fisher(net, net[i], batches), (want / want.mean()).detach())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


# --- activations


def test_a_learned_step_has_the_gradient_of_lsq() -> None:
    """round(x / s) - x / s to half a step beyond the ends, then the end's code: codes 0..15 less the zero point."""
    q = Activation(nn.Linear(1, 1), "input", bits=4)
    q.step.fill_(0.1)
    q.zero.fill_(4.0)
    q.step.requires_grad_()
    for x, want in ((0.52, 5 - 5.2), (-0.13, -1 + 1.3), (1.13, 11 - 11.3), (1.17, 11.0), (9.0, 11.0), (-9.0, -4.0)):
        (found,) = torch.autograd.grad(q(torch.tensor([x])).sum(), q.step)
        assert float(found) == pytest.approx(want, abs=1e-4), x
    assert q.kernel(torch.Size([1])) is None
    q.settle(torch.tensor(0.2))
    assert (float(q.lo), float(q.hi), float(q.step)) == pytest.approx((-0.8, 2.2, 0.2))
    assert q.kernel(torch.Size([1])) is not None
    assert float(q(torch.tensor(9.0))) == pytest.approx(2.2)


def test_dropped_values_stay_float_with_their_probability() -> None:
    x = torch.rand(10_000, generator=random(0))
    q = Activation(nn.Linear(1, 1), "input", bits=2)
    q.calibrate(x)
    q.finish_calibration()
    hat = q(x)
    q.drop, q.generator = 0.3, random(1)
    y = q(x)
    assert ((y == x) | (y == hat)).all()
    assert float((y == x).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert mixed(hat, x, 0.0, None) is hat
    assert mixed(hat, x, 1.0, random(0)).equal(x)


# --- words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unit": "net"}, "unit must be one of layer, block, got 'net'"),
        ({"iterations": 0}, "iterations and batch_size must be at least 1, got 0 and 32"),
        ({"drop": 1.5, "activations": True}, "warmup and drop must be in 0..1"),
        ({"step_lr": 1e-4}, "need activations=true"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Reconstruct(**options)


TINY = ("method=adaround", "model=tiny", "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=32")
HERE = ("dataset.size=8", "device=cpu", "checkpoint_seconds=1e9", "tensorboard=false", "init=scratch")
QDROP = (
    *("options.unit=block", "options.activations=true", "options.drop=0.5", "options.step_lr=1e-3", "bits=4"),
    *("model=resnet20", "model.depth=8", "model.width=0.25"),
)


def test_a_wrong_option_is_said_by_name(cli: Callable[..., Any]) -> None:
    said = cli(*TINY, "budget=smoke", "options.drop=0.5")
    assert said.status != 0
    assert "drop and step_lr are for quantized activations" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(("budget", "iterations"), [("paper", 10_000), ("demo", 500), ("smoke", 10)])
def test_iterations_follow_the_budget_and_the_user_wins(budget: str, iterations: int) -> None:
    def act(*words: str) -> Any:
        return resolve_row([*TINY, f"budget={budget}", *words])["method"]["stages"][0]["act"]["iterations"]

    assert act() == iterations
    assert act("options.iterations=77") == 77


# --- resuming


class Cut(Exception):
    pass


def loop(folder: Path, recorder: Recorder, *words: str) -> Trainer:
    config = resolve_row(
        [
            *(w for w in TINY if not any("model=" in v for v in words) or "model=" not in w),
            *HERE,
            "budget=smoke",
            *words,
        ]
    )
    net = assemble(config, load(config["dataset"]))
    made = net.trainer(folder, recorder)
    if not made.restore():
        net.calibrate(made)
    return made


@pytest.mark.parametrize(("words", "cut"), [*(((), c) for c in range(1, 4)), *((QDROP, c) for c in (1, 3, 5))])
def test_cut_off_after_any_unit_it_ends_with_the_same_weights(words: tuple[str, ...], cut: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with closing(Recorder(tmp_path / "a", tensorboard=False)) as recorder:
        straight = loop(tmp_path / "a", recorder, *words)
        straight.train()
    saves = 0
    with closing(Recorder(tmp_path / "b", tensorboard=False)) as recorder:
        made = loop(tmp_path / "b", recorder, *words)
        save = made.save

        def counted() -> None:
            nonlocal saves
            save()
            saves += 1
            if saves == cut:
                raise Cut

        made.save = counted  # type: ignore[method-assign]
        with pytest.raises(Cut):
            made.train()
    kept = torch.load(made.checkpoint_path, weights_only=True)
    assert kept["stage"] == [0, cut]
    torch.manual_seed(123)
    resumed = {"resume_step": kept["step"], "resume_records": kept["records"]}
    with closing(Recorder(tmp_path / "b", tensorboard=False, **resumed)) as recorder:
        again = loop(tmp_path / "b", recorder, *words)
        again.train()
    found, want = again.model.state_dict(), straight.model.state_dict()
    assert all(not isinstance(v, Tensor) or v.equal(found[k]) for k, v in want.items())
    assert any(k.endswith(".shift") and v.any() for k, v in want.items())
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
