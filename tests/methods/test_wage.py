"""WAGE: its four quantizers, update and loss by hand; what is stored and passed on is on its grid."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.data import load
from qbench.errors import UserError
from qbench.methods import wage
from qbench.models.lenet import LeNet5
from qbench.models.vgg_small import VGGSmall
from qbench.quant import ops, surgery
from qbench.quant.layers import quant_layers, quantized_weights
from qbench.quant.method import Method
from qbench.training.build import assemble, make_method
from qbench.training.trainer import Trainer

CODE = {"c": 3.0, "start_bits": 2, "clip_bits": 2, "last_output": 32}  # the authors' code
LSB = 1 / 128


def method(**options: object) -> Method:
    return make_method(resolve_row(["method=wage", *(f"options.{k}={v}" for k, v in options.items())]))


def weight(n_in: int = 1, **options: Any) -> wage.WageWeight:
    return wage.WageWeight(nn.Linear(n_in, 4, bias=False), "weight", **{"bits": 2, **options})  # type: ignore[arg-type]


def trainer(folder: Path, *words: str) -> Trainer:
    tiny = ("model=tiny", "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=16", "dataset.size=8")
    config = resolve_row(["method=wage", *tiny, "budget=smoke", "train.batch_size=16", "device=cpu", *words])
    net = assemble(config | {"checkpoint_seconds": 1e9}, load(config["dataset"]), place=torch.device("cpu"))
    loop = net.trainer(folder)
    net.calibrate(loop)
    return loop


def steps(loop: Trainer, count: int) -> None:
    for x, y in loop.train_batches.epoch(0, 0):
        if loop.state.step == count:
            return
        loop._step(x, y)


@pytest.mark.parametrize(
    ("x", "want"), [(-1.0, -0.5), (0.2, 0.0), (0.6, 0.5), (0.25, 0.0), (-0.25, 0.0), (0.26, 0.5), (-0.75, -0.5)]
)
def test_two_bits_have_three_values_and_ties_go_to_even(x: float, want: float) -> None:
    assert wage.on_grid(torch.tensor(x), 2).item() == want
    w = torch.tensor([x], requires_grad=True)
    hat = weight()(w)
    assert hat.tolist() == [want]
    hat.backward(torch.tensor([3.0]))
    assert w.grad is not None
    assert w.grad.tolist() == [3.0]  # beyond the clip too


@pytest.mark.parametrize("bits", [2, 3, 8, 12])
def test_the_grid_is_symmetric(bits: int) -> None:
    values = wage.on_grid(torch.linspace(-2, 2, 100_001), bits).unique()
    assert len(values) == 2**bits - 1
    assert values[-1] == -values[0] == 1 - 2.0 ** (1 - bits)


@pytest.mark.parametrize(
    ("x", "shift"), [(1.0, 1), (1.4, 1), (1.42, 2), (0.7, 0.5), (0.71, 1), (0.1, 0.125), (3e-5, 2**-15)]
)
def test_the_shift_of_a_tensor(x: float, shift: float) -> None:
    assert wage.shifted(torch.tensor([x, -x / 4])).tolist() == pytest.approx([x / shift, -x / 4 / shift])


def test_errors_keep_their_direction_alone() -> None:
    q = wage.WageError(nn.Linear(1, 1), "error", bits=8)
    e = torch.tensor([3e-5, -1.2e-5, 4e-7, 1e-7, -9e-8])
    assert (q(e) * 128).tolist() == [126, -50, 2, 0, 0]
    assert q(e * 2.0**20).equal(q(e))
    assert (q(torch.tensor([1.4, -1.4])) * 128).tolist() == [127, -127]  # the shift is 1: saturated
    assert q(torch.zeros(3)).tolist() == [0, 0, 0]
    assert q(torch.tensor([1e-42])).isfinite().all()


def test_an_activation_and_its_error_by_hand() -> None:
    """Saturated: no error, and not in the maximum. Off: none, but in the maximum, 0.9, whose shift is 1."""
    q = wage.WageActivation(nn.ReLU(), "replace", bits=3)
    x = torch.tensor([-0.2, 0.0, 0.1, 0.3, 0.75, 0.76, 5.0], requires_grad=True)
    y = q(x)
    assert y.tolist() == [0, 0, 0, 0.25, 0.75, 0.75, 0.75]
    y.backward(torch.tensor([0.9, 0.1, 0.3, -0.2, 0.0625, 8.0, 8.0]))
    assert x.grad is not None
    assert (x.grad * 128).tolist() == [0, 0, 38, -26, 8, 0, 0]
    x.grad = None
    wage.WageActivation(nn.ReLU(), "replace", bits=3, e_bits=32)(x).backward(torch.full((7,), 0.3))
    assert x.grad.tolist() == pytest.approx([0, 0, 0.3, 0.3, 0.3, 0, 0])  # type: ignore[union-attr]


def test_images_in_minus_one_to_one_need_no_scale_and_others_get_a_power_of_two() -> None:
    for most, scale in ((1.0, 1), (0.9, 1), (2.83, 4), (4.0, 4)):
        q = wage.WageValue(nn.Linear(1, 1), "input", bits=8, fit=True)
        q.calibrate(torch.tensor([-0.3, most / 2]))
        q.calibrate(torch.tensor([-most, 0.1]))
        q.finish_calibration()
        assert q.scale.item() == scale
        x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
        y = q(x)
        assert (y / scale * 128).tolist() == [-127, round(0.3 / scale * 128), 127]
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1, 0]


def test_the_squared_error_is_a_sum_and_its_gradient_the_difference() -> None:
    logits = torch.tensor([[0.5, -0.25, 0.0], [1.0, 0.0, 2.0]], requires_grad=True)
    loss = wage.squared_error(logits, torch.tensor([0, 2]))
    assert loss.item() == (0.25 + 0.0625 + 1 + 1) / 2
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, -0.25, 0], [1, 0, 1]]


def update(w: Tensor, g: Tensor, seed: int = 0, **options: Any) -> Tensor:
    p = nn.Parameter(w.clone())
    p.grad = g.clone()
    optimizer = wage.IntegerSGD([p], **options)
    optimizer.generator = torch.Generator().manual_seed(seed)
    optimizer.step()
    return p.detach()


def test_an_update_moves_whole_steps_and_rounds_without_bias() -> None:
    """eta = 8, shift 0.125: g_s = 6.4, -2.56, 0.192. The first weight moves 6 steps in 60 % of all cases, else 7."""
    g = torch.tensor([0.1, -0.04, 0.003]).repeat(100_000, 1)
    moved = -update(torch.zeros_like(g), g, lr=8.0) / LSB
    for i, found in enumerate(([6, 7], [-3, -2], [0, 1])):
        assert moved[:, i].unique().tolist() == found
    torch.testing.assert_close(moved.mean(0), torch.tensor([6.4, -2.56, 0.192]), atol=0.006, rtol=0)
    assert (moved[:, 0] == 6).float().mean().item() == pytest.approx(0.6, abs=0.006)


def test_an_update_is_drawn_from_the_generator_alone() -> None:
    g = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    w = torch.zeros(1000)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert update(w, g, 3).equal(update(w, g, 3))
    assert not update(w, g, 3).equal(update(w, g, 4))
    assert torch.get_rng_state().equal(before)


def test_whole_updates_draw_nothing_that_counts_and_no_gradient_moves_nothing() -> None:
    assert update(torch.tensor([0.5, 0.5]), torch.tensor([0.5, -0.25]), lr=2.0).tolist() == [0.5 - 2 * LSB, 0.5 + LSB]
    assert update(torch.tensor([0.5]), torch.zeros(1), lr=8.0).tolist() == [0.5]


def test_stored_weights_are_clipped() -> None:
    w, g = torch.tensor([0.984375, 0.5]), torch.tensor([-1.0, -1.0])
    assert update(w, g, lr=8.0).tolist() == [1 - LSB, 0.5 + 8 * LSB]
    assert update(w, g, lr=8.0, clip_bits=2).tolist() == [0.5, 0.5]
    assert update(torch.zeros(1), torch.ones(1), bits=12, lr=1.0).tolist() == [-(2.0**-11)]


def test_a_rate_between_two_powers_is_rounded_and_what_makes_no_sense_is_refused() -> None:
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    optimizer = wage.IntegerSGD([p], lr=8.0)
    optimizer.param_groups[0]["lr"] = 8 * 0.7  # 2^2.49
    optimizer.step()
    assert p.item() == -4 * LSB
    for options, words in (
        ({"lr": 0.1}, "power of two, such as 8, 1 or 0.125, got 0.1"),
        ({"lr": 0.0}, "got 0.0"),
        ({"bits": 1}, r"2\.\.16, got 1"),
        ({"clip_bits": 40}, r"clip_bits must be .*2\.\.16, got 40"),
    ):
        with pytest.raises(ValueError, match=words):
            wage.IntegerSGD([p], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not decayed, got weight_decay=0\.1"):
        wage.IntegerSGD([{"params": [p], "weight_decay": 0.1}])


def test_the_first_weights_are_thirds_and_stored_on_eight_bits() -> None:
    q = weight(512)
    assert q.limit == 0.75
    w = q.latent(torch.empty(200, 512))
    assert w.equal(wage.on_grid(w, 8))
    assert w.abs().max().item() == 0.75
    assert len(w.unique()) == 2 * 96 + 1
    values, counts = q.quantize(w).unique(return_counts=True)
    assert (values * q.alpha).tolist() == [-0.5, 0, 0.5]
    torch.testing.assert_close(counts / w.numel(), torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    assert weight(2).limit == math.sqrt(3)  # of few inputs the usual limit is the greater one
    assert weight(512, start_bits=2).latent(torch.empty(9, 512)).unique().tolist() == [-0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("c", "net", "want"),
    [
        (3.0, VGGSmall(channels=3, classes=10, size=32, hidden=[1024]), [2, 16, 16, 16, 16, 32, 32, 16]),
        (6.0, VGGSmall(channels=3, classes=10, size=32, hidden=[1024]), [2, 8, 8, 16, 16, 16, 32, 8]),
        (3.0, LeNet5(channels=1, classes=10, size=28, padding=0), [2, 16, 16, 8]),
    ],
)
def test_the_scales_are_those_of_the_authors_logs(c: float, net: nn.Module, want: list[int]) -> None:
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [wage.WageWeight(m, "weight", bits=2, c=c).alpha for m in layers] == want  # type: ignore[arg-type]


def test_a_scale_in_the_weight_is_a_scale_in_the_activation() -> None:
    """Eq. 8 divides the activation. Bit for bit the same values, and the same errors behind Eq. 9."""
    torch.manual_seed(0)
    layer, w = nn.Conv2d(8, 4, 3), wage.on_grid(torch.empty(4, 8, 3, 3).uniform_(-0.75, 0.75), 8)
    q = wage.WageWeight(layer, "weight", bits=2)  # type: ignore[arg-type]
    assert q.alpha > 1
    activation, error = wage.WageActivation(layer, "replace", bits=8), wage.WageError(layer, "error", bits=8)
    found = []
    for inside in (True, False):
        x = wage.on_grid(torch.rand(2, 8, 6, 6, generator=torch.Generator().manual_seed(1)), 8).requires_grad_()
        leaf = w.clone().requires_grad_()
        hat = q(leaf) if inside else ops.straight_through(leaf, wage.on_grid(w, 2))
        y = nn.functional.conv2d(ops.on_backward(x, error), hat)
        pooled = nn.functional.max_pool2d(activation(y if inside else y / q.alpha), 2)
        pooled.backward(torch.rand(pooled.shape, generator=torch.Generator().manual_seed(2)))
        assert leaf.grad is not None
        found.append((pooled, x.grad, wage.shifted(leaf.grad)))
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert a.equal(b)


@pytest.mark.parametrize("options", [{}, CODE])
def test_the_paper_s_net_holds_integers_alone(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = LeNet5(channels=1, classes=10, size=28, padding=0)
    assert not surgery.quantize(net, method(**options).rules)
    assert {n for n, _ in net.named_parameters()} == {f"{n}.weight" for n in ("conv1", "conv2", "fc1", "fc")}
    found = surgery.manifest(net, {})
    assert found["size"]["bits_per_weight"] == 2
    assert found["float_inputs"] == {}
    assert len(found["errors"]) == 4  # three activations and the logits
    assert ("fc.output_quantizer" in found["activations"]) == (not options)
    seen: dict[str, Tensor] = {}

    def look(name: str, args: Any, y: Tensor) -> None:
        seen.update({f"{name} in": args[0], f"{name} out": y})
        y.register_hook(lambda e: seen.update({f"{name} error": e}))

    for name, layer in quant_layers(net):
        layer.register_forward_hook(lambda m, args, y, name=name: look(name, args, y))
    with quantized_weights(net):
        wage.squared_error(net(torch.rand(4, 1, 28, 28) * 2 - 1), torch.arange(4)).backward()
    on_8_bits = ["conv2 in", "fc1 in", "fc in", "conv1 error", "conv2 error", "fc1 error"]
    for name in on_8_bits if options else [*on_8_bits, "fc out"]:
        assert seen[name].abs().max() > 0, name
        assert wage.on_grid(seen[name].detach(), 8).equal(seen[name].detach()), name


def test_errors_go_to_the_maximum_of_a_window_and_not_to_another_of_its_code() -> None:
    """Pooling, scale, activation (Sec. 3.3.2): a maximum of what is not quantized yet, so that few are equal."""
    astray = {}

    def look(m: nn.Module, args: Any, y: Tensor) -> None:
        seen.append(y)
        y.register_hook(seen.append)

    for first in (True, None):
        seen: list[Tensor] = []
        torch.manual_seed(0)
        net = LeNet5(channels=1, classes=10, size=28, padding=0, pool_first=first)
        surgery.quantize(net, method().rules)
        net.conv2.register_forward_hook(look)
        with quantized_weights(net):
            wage.squared_error(net(torch.rand(4, 1, 28, 28) * 2 - 1), torch.arange(4)).backward()
        y, error = seen
        _, places = nn.functional.max_pool2d(y, 2, return_indices=True)
        highest = torch.zeros_like(y).flatten(2).scatter(2, places.flatten(2), 1.0).view_as(y)
        assert (error * highest).any()
        astray[first] = bool((error * (1 - highest)).any())
    assert astray == {True: False, None: True}


@pytest.mark.parametrize(("net", "order"), [("lenet5", True), ("vgg7", True), ("resnet20", None)])
def test_nets_that_have_the_choice_pool_first(net: str, order: bool | None) -> None:
    config = resolve_row(["method=wage", f"model={net}"])
    assert config["model"].get("pool_first") is order
    assert config["model"].get("preactivation") is None


@pytest.mark.parametrize("words", [(), ("options.g_bits=12",), ("options.start_bits=2", "options.clip_bits=2")])
def test_nothing_is_trained_in_float_behind_the_back(words: tuple[str, ...], tmp_path: Path) -> None:
    loop = trainer(tmp_path, "train.steps=3", *words)
    bits = 12 if "options.g_bits=12" in words else 8
    assert loop.optimizer.param_groups[0]["bits"] == bits
    for step in range(4):
        for name, p in loop.model.named_parameters():
            most = 0.5 if step and len(words) == 2 else 1
            assert p.abs().max() <= most, name
            assert wage.on_grid(p.detach(), bits).equal(p.detach()), (step, name)
        steps(loop, step + 1)
    assert not loop.optimizer.state
    assert not loop.hooks.state_dict()


def test_the_runs_generator_draws_and_a_checkpoint_holds_it(tmp_path: Path) -> None:
    ends = []
    for cut in (False, True):
        loop = trainer(tmp_path / str(cut), "train.steps=4", "seed=3")
        (tmp_path / str(cut)).mkdir()
        steps(loop, 2)
        assert loop.optimizer.members[0].generator is loop.state.generator  # type: ignore[attr-defined]
        if cut:
            loop.save()
            loop = trainer(tmp_path / "True", "train.steps=4", "seed=3")
            loop.state.generator.manual_seed(9)
            assert loop.restore()
        for step, (x, y) in enumerate(loop.train_batches.epoch(0, 0)):
            if step >= 2:
                loop._step(x, y)
        ends.append({n: p.detach().clone() for n, p in loop.model.named_parameters()})
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_what_the_paper_does_not_have_is_refused(tmp_path: Path) -> None:
    for word, message in (
        ("init=float", "init must be scratch"),
        ("train.lr=0.3", "lr must be a power of two"),
        ("train.weight_decay=1e-4", "not decayed"),
        ("options.c=0", "above 0"),
        ("options.e_bits=1", r"2\.\.16, got 1"),
        ("w_bits=1", r"w_bits of a whole number in 2\.\.8"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, word)


def test_workers_hold_the_first_one_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draws numbers of its own, which would carry their nets apart."""
    g, sent = torch.linspace(0.1, 1, 50), []

    def broadcast(p: Tensor, source: int) -> None:
        assert source == 0
        sent.append(p.clone())
        p.copy_(sent[0])

    alone = [update(torch.zeros(50), g, rank) for rank in (0, 1)]
    assert not alone[0].equal(alone[1])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    together = [update(torch.zeros(50), g, rank) for rank in (0, 1)]
    assert sent[0].equal(alone[0])
    assert sent[1].equal(alone[1])
    assert together[0].equal(together[1])
