"""DiffQ, by the formulas of arXiv 2104.09987 and numbers worked out from them by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.data import load
from qbench.figures import report
from qbench.figures.drawing import title_of
from qbench.methods.diffq import DiffQ, ModelSize
from qbench.models.tiny import Tiny
from qbench.quant import surgery
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Rule, State
from qbench.training.build import assemble
from qbench.training.trainer import Trainer

W = torch.tensor([-1.0, -0.6, -0.1, 0.0, 0.26, 0.5, 0.7, 1.0])
WORDS = ("method=diffq", "model=tiny", "dataset=synthetic", "dataset.size=8", "device=cpu", "budget=smoke")


def diffq(weight: Tensor = W, widths: tuple[float, ...] = (), **options: Any) -> DiffQ:
    """A quantizer of `weight`; `widths` are the learned bits of its groups, 1 and 16 excluded."""
    layer = nn.Linear(weight.numel(), 1, bias=False)
    if widths:
        options |= {"min_bits": 1, "max_bits": 16, "group": weight.numel() // len(widths)}
    q = DiffQ(QuantLayer(layer), "weight", **options)
    if widths:
        with torch.no_grad():
            q.logits.copy_(((torch.tensor(widths) - 1) / 15).logit()[:, None])
    q.generator = torch.Generator().manual_seed(0)
    return q


def uniform(*shape: int) -> Tensor:
    """The noise that the next forward of a new `diffq` draws."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize(("lo", "hi", "logit"), [(2, 15, -0.15415), (1, 10, 1.25276)])
def test_all_groups_start_at_the_bits_that_were_asked_for(lo: int, hi: int, logit: float) -> None:
    q = diffq(torch.zeros(32), bits=8, min_bits=lo, max_bits=hi)
    torch.testing.assert_close(q.logits.detach(), torch.full((4, 1), logit), rtol=0, atol=1e-5)
    torch.testing.assert_close(q.learned().detach(), torch.full((4, 1), 8.0))
    assert q.bits == 8


@pytest.mark.parametrize(
    ("bits", "delta", "slope"), [(2, 0.66667, -0.61613), (4, 0.13333, -0.09858), (8, 0.00784, -0.00546)]
)
def test_size_of_the_noise_and_its_slope_over_the_bits(bits: int, delta: float, slope: float) -> None:
    q, u = diffq(widths=(bits,)), uniform(1, 8)
    hat = q(W)
    torch.testing.assert_close(hat.detach(), W + delta * u[0], rtol=0, atol=1e-5)
    (hat * torch.arange(8.0)).sum().backward()
    dbits = 15 * (s := (bits - 1) / 15) * (1 - s)  # db/dl
    assert q.logits.grad is not None
    assert q.logits.grad.item() == pytest.approx(slope * float((u[0] * torch.arange(8.0)).sum()) * dbits, rel=2e-3)


def test_the_gradient_reaches_every_weight_and_the_ends_through_the_noise_of_all_groups() -> None:
    q, u = diffq(widths=(2, 4)), uniform(2, 4)
    g = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.0, 3.0, -0.5, 0.75])
    w = W.clone().requires_grad_()
    (q(w) * g).sum().backward()
    through = float((g.view(2, 4) * u / torch.tensor([[3.0], [15.0]])).sum())  # d/d(max - min)
    expected = g.clone()
    expected[0] -= through
    expected[-1] += through
    torch.testing.assert_close(w.grad, expected)


def test_noise_is_drawn_anew_in_training_from_the_generator_and_never_in_evaluation() -> None:
    q = diffq(widths=(3,))
    assert q.generator is not None
    first, second = q(W), q(W)
    assert not first.equal(second)
    q.generator.manual_seed(0)
    assert q(W).equal(first)
    before = q.generator.get_state()
    q.eval()
    assert q(W).equal(q(W))
    assert q.generator.get_state().equal(before)


@pytest.mark.parametrize(("noise", "std"), [("uniform", 1 / math.sqrt(12)), ("gaussian", 0.5)])
def test_how_wide_the_noise_is(noise: str, std: float) -> None:
    w = torch.zeros(80000)
    w[0], w[1] = -1, 1
    off = (diffq(w, (4,), noise=noise)(w) - w).detach() * 15 / 2  # in steps
    assert off.std().item() == pytest.approx(std, rel=0.01)
    assert off.mean().item() == pytest.approx(0, abs=0.01)
    assert bool((off.abs() <= 0.5 + 1e-5).all()) == (noise == "uniform")


def test_evaluation_rounds_the_bits_and_then_the_weights() -> None:
    q = diffq(widths=(2.3, 3.6)).eval()  # 2 and 4 bits: steps of 2/3 and 2/15
    assert q.codes(W).tolist() == [0, 1, 1, 2, 9, 11, 13, 15]
    expected = [-1, -1 / 3, -1 / 3, 1 / 3, 9 * 2 / 15 - 1, 11 * 2 / 15 - 1, 13 * 2 / 15 - 1, 1]
    torch.testing.assert_close(q(W), torch.tensor(expected))
    assert q.bits == 3
    assert (q.levels, q.grid().hi.flatten().tolist()) == (16, [3, 15])  # type: ignore[union-attr]
    assert not q(W).requires_grad


def test_groups_follow_each_other_in_the_flattened_weight_in_whatever_memory_format() -> None:
    w = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    q = diffq(w, widths=(2, 5, 3, 8)).eval()  # of 18 weights each: one output channel
    hat = q(w)
    torch.testing.assert_close(q(w.contiguous(memory_format=torch.channels_last)), hat)
    for channel, bits in zip(hat, (2, 5, 3, 8), strict=True):
        place = (channel - w.min()) / (w.max() - w.min()) * (2**bits - 1)
        torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-4)


def test_equal_weights_are_finite_and_stay() -> None:
    q = diffq(widths=(4,))
    w = torch.full((8,), 0.3, requires_grad=True)
    q(w).sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()
    assert q.eval()(w).equal(w)
    assert q.codes(w).tolist() == [0] * 8


def test_what_is_stored_is_codes_of_each_groups_width_the_ends_and_the_bits() -> None:
    w = torch.cat([W, W / 2])
    q = diffq(w, (4.2, 2.8)).eval()
    assert {name: part.bits for name, part in q.stored(w).items()} == {"codes": 8 * 4 + 8 * 3}
    tables = q.grid(w).tables()
    assert tables["ends"].numbers.tolist() == [-1, 1]
    assert tables["bits"].numbers.flatten().tolist() == [3, 2]  # beyond the fewest, 1
    assert q.stored_bits(w) == (56, 64 + 8 + 2 * 2)
    assert diffq(w, (1.1, 1.2)).stored_bits(w) == (16, 64 + 8)  # all have the fewest bits: nothing more to say
    net = nn.Sequential(QuantLayer(nn.Linear(16, 1, bias=False)))
    net[0].set_weight_quantizer(q)
    assert surgery.size(net)["bytes"] == 7 + 8 + 1 + 1


def test_the_penalty_is_what_the_codes_take_in_megabytes() -> None:
    net = Tiny(channels=3, classes=4, size=8)
    surgery.quantize(net, [Rule(weight=lambda layer, site: DiffQ(layer, site, bits=5))])
    layers = [m for m in net.modules() if isinstance(m, QuantLayer)]
    quantizers = [q for layer in layers if isinstance(q := layer.weight_quantizer, DiffQ)]
    for q in quantizers:  # whole bits, from 3 to 7
        with torch.no_grad():
            widths = torch.arange(len(q.logits)) % 5 + 3
            q.logits.copy_(((widths - 2) / 13).logit()[:, None])
    hook, state = ModelSize(penalty=3.0), State(net, torch.Generator())
    found = hook.loss(state)
    assert found is not None
    parts = surgery.packed(net)
    held = sum(len(part.pack()) for name, part in parts.items() if str(name).endswith("weight.codes"))
    assert found.item() == pytest.approx(3.0 * held / 2**20, rel=1e-6)
    found.backward()
    s = quantizers[0].logits.detach().sigmoid()
    torch.testing.assert_close(quantizers[0].logits.grad, 3.0 * 8 / 2**23 * 13 * s * (1 - s))
    assert ModelSize().loss(State(nn.Linear(2, 2), torch.Generator())) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 2}, "between 2 and 15, both excluded, got 2"),
        ({"bits": 15}, "between 2 and 15, both excluded, got 15"),
        ({"min_bits": 0}, "min_bits must be a whole number in 1..15"),
        ({"min_bits": 9, "max_bits": 9}, "max_bits must be a whole number in 10..16"),
        ({"group": 0}, "group must be a whole number of at least 1, got 0"),
        ({"group": 0}, "got 0"),
        ({"noise": "pink"}, "noise must be one of uniform, gaussian, got 'pink'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        diffq(**options)


def test_a_penalty_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        ModelSize(-1.0)


# --- the method


def trainer(folder: Path, *words: str) -> Trainer:
    config = resolve_row([*WORDS, "train.batch_size=8", "train.steps=8", "checkpoint_seconds=1e9", *words])
    net = assemble(config, load(config["dataset"]))
    loop = net.trainer(folder)
    net.calibrate(loop)
    return loop


def test_bits_have_an_adam_of_their_own_with_a_constant_rate_and_no_decay(tmp_path: Path) -> None:
    loop = trainer(tmp_path, "options.bits_lr=0.25", "train.schedule=cosine", "train.weight_decay=0.1")
    sgd, adam = loop.optimizer.members
    assert isinstance(adam, torch.optim.Adam)
    (group,) = adam.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for n, p in loop.model.named_parameters() if n.endswith("logits")}
    assert group["weight_decay"] == 0
    loop.train()
    assert group["lr"] == 0.25
    assert sgd.param_groups[0]["lr"] < 0.01


def test_a_penalty_takes_bits_and_without_one_they_are_kept(tmp_path: Path) -> None:
    found = []
    for penalty in (0, 1000):
        loop = trainer(tmp_path, f"options.penalty={penalty}", "options.bits_lr=0.3")
        loop.train()
        found.append(surgery.learned_bits(loop.model, {"w_bits": {"learned": True}})["w_bits_learned"])
    assert found[1] < 4 < 6 < found[0]


def test_small_layers_stay_in_float_and_the_manifest_says_why(tmp_path: Path) -> None:
    loop = trainer(tmp_path, "options.min_size=217")  # tiny: 216 (first), 576 and 80 (last) weights
    widths = {n: m.weight_quantizer is not None for n, m in loop.model.named_modules() if isinstance(m, QuantLayer)}
    assert widths == {"conv2": True}
    config = resolve_row([*WORDS, "options.min_size=217"])
    net = assemble(config, load(config["dataset"]))
    assert surgery.manifest(net.model, net.kept)["weights"]["fc.weight"]["why"] == "fewer weights than options.min_size"
    assert isinstance(trainer(tmp_path, "options.min_size=216").model.conv1, QuantLayer)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "a", "options.bits_lr=0.1")
    straight.train()
    cut = trainer(tmp_path / "b", "options.bits_lr=0.1")
    cut.begin()
    (tmp_path / "b").mkdir()
    for step in range(5):
        cut._step(*next(iter(cut.train_batches.epoch(*divmod(step, cut.steps_per_epoch)))))
    cut.save()
    again = trainer(tmp_path / "b", "options.bits_lr=0.1")
    assert again.restore()
    again.train()
    for name, value in straight.model.state_dict().items():
        assert not isinstance(value, Tensor) or value.equal(again.model.state_dict()[name]), name


def test_tables_and_last_lines_tell_the_bits_that_were_learned(tmp_path: Path, cli: Callable[..., Any]) -> None:
    said = cli(*WORDS, "options.bits_lr=0.5", "options.penalty=1000", "tensorboard=false", "out=o", "kernels=torch")
    assert said.status == 0, said.err
    (folder,) = (tmp_path / "o").iterdir()
    result = json.loads((folder / "result.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())["weights"].values()
    learned = result["w_bits_learned"]
    assert folder.name.startswith("diffq-wlearneda32-tiny-synthetic-")
    assert result["w_bits"] == 8
    assert learned < 7
    quantized = [e for e in manifest if "quantizer" in e]
    assert learned == pytest.approx(sum(e["bits"] * e["numel"] for e in quantized) / sum(e["numel"] for e in quantized))
    assert learned < result["bits_per_weight"] < learned + 1.5
    assert f"W{learned:.1f}* A32" in said.out
    assert f"learned bits          {learned:>7.2f}     (mean of the weights' codes; asked for: 8)" in said.out
    assert f"W{learned:.1f}*/A32" in title_of(result)
    seeds = [{**result, "w_bits_learned": b, "bits_per_weight": b + 1, "bytes": n} for b, n in ((4.0, 100), (5.0, 201))]
    seeds = [{**r, "key": str(r["bytes"])} for r in seeds]
    (row,) = report.rows(seeds)
    assert (row[1], row[9], row[10]) == ("4.5*/32", "5.50", "150")
    assert json.loads(report.table(seeds, form="json"))[0]["w_bits_learned"] == 4.5
    assert report.table(seeds).endswith("\n*: learned, the mean over the codes")
