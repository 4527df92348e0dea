"""Telemetry: measures by hand, records that a resumed run repeats, the picture."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qbench.figures import telemetry_plots
from qbench.methods.flexor import FleXOR
from qbench.methods.shared.binary import BinaryWeight
from qbench.methods.twn import TernaryWeight
from qbench.quant import layers, ops, surgery
from qbench.quant.grid import Grid, signs
from qbench.quant.method import Rule, State
from qbench.quant.quantizer import Quantizer
from qbench.records import read_metrics
from qbench.training.recorder import Recorder
from qbench.training.telemetry import Telemetry, record_activations


class Clipped(Quantizer):
    """sign(x) with gradient 1[|x| < 1]; in training mode it draws random numbers, as a stochastic method does."""

    bits = 1

    def quantize(self, x: Tensor) -> Tensor:
        if self.training:
            torch.rand((), generator=self.generator)
        return ops.sign_clipped(x)

    def grid(self, x: Tensor | None = None) -> Grid:
        return signs(1.0)


def _net(*weights: list[float]) -> nn.Module:
    net = nn.Sequential(*[nn.Linear(len(w), 1, bias=False) for w in weights])
    surgery.quantize(net, [Rule(weight=lambda layer, site: Clipped())])
    for (_, layer), w in zip(layers.quant_layers(net), weights, strict=True):
        layer.weight.data = torch.tensor([w])
    return net


def _measured(net: nn.Module, telemetry: Telemetry, folder: Path, step: int = 0) -> dict[str, Any]:
    with closing(Recorder(folder, tensorboard=False, resume_step=step - 1)) as recorder:
        telemetry.record(net, recorder, step, float(step))
    return read_metrics(folder)[-1]["telemetry"]


def test_measures_by_hand(tmp_path: Path) -> None:
    net, telemetry = _net([0.5, -0.5, 2.0, 2.0, 2.0, 0.1, -0.2, 0.3]), Telemetry()
    first = _measured(net, telemetry, tmp_path)["0"]
    assert first == {
        "entropy": pytest.approx(0.811278),  # 6 of 8 are +1
        "used": 1.0,
        "saturated": 3 / 8,
        "clipped": 3 / 8,  # at 2.0; the lowest stands alone
        "scale": 1.0,
    }
    weight = next(iter(layers.quant_layers(net)))[1].weight
    weight.data[0, :2] *= -1
    weight.data[0, 7] = 2.0
    second = _measured(net, telemetry, tmp_path, 1)["0"]
    assert (second["flips"], second["saturated"], second["clipped"]) == (2 / 8, 4 / 8, 4 / 8)
    weight.data.fill_(0.5)
    third = _measured(net, telemetry, tmp_path, 2)["0"]
    assert third == {"flips": 2 / 8, "entropy": 0.0, "used": 0.5, "saturated": 0.0, "clipped": 1.0, "scale": 1.0}


def test_the_scale_of_two_and_three_levels_is_theirs(tmp_path: Path) -> None:
    """mean|w| = .7 for two levels; of TWN's three, the mean of what lies beyond 0.75 mean|w| = .525."""
    w = torch.tensor([[0.5, -0.3, 1.2, -0.8]])
    for name, make, want in (("bwn", BinaryWeight, 0.7), ("twn", TernaryWeight, 1.0)):
        net = nn.Sequential(nn.Linear(4, 1, bias=False))
        surgery.quantize(net, [Rule(weight=lambda layer, site, make=make: make(layer, site))])
        next(iter(layers.quant_layers(net)))[1].weight.data = w
        assert _measured(net, Telemetry(), tmp_path / name)["0"]["scale"] == pytest.approx(want)


def test_a_resumed_run_records_what_it_would_have(tmp_path: Path) -> None:
    net, telemetry = _net([0.5, -0.5, 0.25], [1.0, 1.0, -1.0]), Telemetry()
    _measured(net, telemetry, tmp_path)
    other = Telemetry()
    torch.save(telemetry.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _, layer in layers.quant_layers(net):
        layer.weight.data.neg_()
    assert _measured(net, telemetry, tmp_path, 1) == _measured(net, other, tmp_path, 1)
    assert all(found["flips"] == 1.0 for found in read_metrics(tmp_path)[-1]["telemetry"].values())


def test_watching_disturbs_nothing(tmp_path: Path) -> None:
    net = _net([0.5, -0.5, 0.25]).train()
    q = next(iter(layers.quant_layers(net)))[1].weight_quantizer
    assert q is not None
    q.generator = torch.Generator().manual_seed(0)
    before, draws = torch.get_rng_state(), q.generator.get_state()
    _measured(net, Telemetry(), tmp_path)
    assert torch.get_rng_state().equal(before)
    assert q.generator.get_state().equal(draws)
    assert all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_a_float_net_leaves_no_record(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        Telemetry().record(nn.Linear(2, 2), recorder, 0, 0.0)
    assert read_metrics(tmp_path) == []


def test_gradient_share() -> None:
    x = torch.tensor([[0.3, -0.2, 1.5, -3.0]])
    assert Clipped().eval().gradient_share(x).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert not Frozen().gradient_share(x).any()
    layer = layers.QuantLayer(nn.Linear(4, 1))
    share = BinaryWeight(layer, "weight").gradient_share(x)  # 1/n + alpha 1[|w| <= 1] with n = 4 and alpha = 1.25
    assert share.tolist()[0] == pytest.approx([1.0, 1.0, 0.25 / 1.5, 0.25 / 1.5])


class Frozen(Quantizer):
    """Its values do not depend on the latent."""

    bits = 1

    def quantize(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def grid(self, x: Tensor | None = None) -> Grid:
        return signs(1.0)


def test_gradient_share_of_flexor() -> None:
    q = FleXOR(layers.QuantLayer(nn.Conv2d(4, 8, 3)), "weight", bits=0.8)
    q.matrix[0, :, 3] = 0  # an input that no gate reads
    x = torch.full((1, 15, 16), 0.1)
    share = q.gradient_share(x)[0, 0]
    used = {i for i in range(16) if q.matrix[0, :, i].any()}
    assert len(used) == 15
    for i, value in enumerate(share.tolist()):
        assert value == (pytest.approx(0.419974) if i in used else 0.0)  # 1 - tanh^2(1)
    q.mode = "ste"
    assert set(q.gradient_share(x).flatten().tolist()) == {0.0, 1.0}


def _write(folder: Path, count: int, records: int) -> None:
    net, telemetry = _net(*[[0.5, -0.5, 0.25]] * count), Telemetry()
    generator = torch.Generator().manual_seed(0)
    with closing(Recorder(folder, tensorboard=False)) as recorder:
        for epoch in range(records):
            for _, layer in layers.quant_layers(net):
                layer.weight.data = torch.randn(1, 500, generator=generator)
            telemetry.record(net, recorder, epoch, float(epoch))
            recorder.trace(epoch, float(epoch), {f"{i}.weight_quantizer.alpha": 0.1 * i for i in range(count)})


def test_activations_by_hand(tmp_path: Path) -> None:
    """Of two layers in a row the second sees the first one's output; a quantizer that is off is left out."""
    net = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    surgery.quantize(net, [Rule(input=lambda layer, site: Clipped())])
    for _, layer in layers.quant_layers(net):
        layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    net[2].input_quantizer.enabled = False
    batch = torch.tensor([[0.5, 0.25], [-2.0, 0.75]])
    calibration = SimpleNamespace(epoch=lambda number: iter([(batch, None)]))
    state = State(model=net, generator=torch.Generator(), steps=3, calibration=calibration)
    before = torch.get_rng_state()
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        record_activations(net.train(), state, recorder)
    assert torch.get_rng_state().equal(before)
    assert net.training
    found = read_metrics(tmp_path)[0]["activations"]
    assert set(found) == {"0", "1"}
    assert (found["0"]["latent"]["lo"], found["0"]["latent"]["hi"], found["0"]["count"]) == (-2.0, 0.75, 4)
    assert found["0"]["quantized"] == {"values": [-1.0, 1.0], "counts": [1, 3]}
    assert found["1"]["quantized"] == {"values": [-1.0, 1.0], "counts": [3, 1]}  # 1, -1 and -1, -1 come out of "0"
    assert found["1"]["codes"]["counts"] == [3, 1]


@pytest.mark.parametrize(("count", "records"), [(1, 2), (4, 3), (18, 5)])
def test_picture(count: int, records: int, tmp_path: Path) -> None:
    _write(tmp_path, count, records)
    assert telemetry_plots.telemetry(tmp_path, {"method": "bwn", "w_bits": 1, "seed": 0}, forms=("png", "pdf"))
    assert (tmp_path / "telemetry.pdf").is_file()
    with Image.open(tmp_path / "telemetry.png") as image:
        assert image.size == (1080, 922)  # two rows of measures (`clipped` is 0 throughout), one of histograms
        assert len(image.convert("L").getcolors() or []) > 10


def test_no_picture_where_nothing_moves(tmp_path: Path) -> None:
    _write(tmp_path, 2, 1)
    assert not telemetry_plots.telemetry(tmp_path)
    assert not (tmp_path / "telemetry.png").exists()
