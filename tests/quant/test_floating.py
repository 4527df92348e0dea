"""fp16 and FP8: every code against torch's own types, rounding at ties, saturation, scales, sizes."""

import pytest
import torch
from torch import nn

from qbench.quant.floating import FORMATS, Floating, Floats

TYPES = {"fp16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def numbers(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, values) of all finite numbers, by torch."""
    codes = torch.arange(2 ** FORMATS[name].bits)
    raw = codes.to(torch.int32).to(torch.int16) if name == "fp16" else codes.to(torch.uint8)
    values = raw.view(TYPES[name]).float()
    return codes[values.isfinite()], values[values.isfinite()]


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_torchs(name: str) -> None:
    codes, values = numbers(name)
    form = FORMATS[name]
    grid = Floats(lo=0, hi=2**form.bits - 1, format=form, scale=torch.tensor(1.0))
    assert len(codes) == form.finite == grid.levels
    assert values.max() == form.top
    assert grid.values(codes).equal(values)
    positive = (values != 0) | (codes == 0)  # minus zero is stored as zero
    assert grid.codes(values, values)[positive].equal(codes[positive].to(torch.int32))
    assert form.rounded(values).equal(values)


@pytest.mark.parametrize("name", FORMATS)
def test_rounds_as_torch_does(name: str) -> None:
    """Random values of all sizes, subnormal ones too, and the middles between neighbours."""
    form = FORMATS[name]
    _, values = numbers(name)
    ordered = values.unique()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=draw) * torch.rand(20_000, generator=draw).mul(40).sub(20).exp2()
    x = torch.cat([x.clamp(-form.top, form.top), (ordered[1:] + ordered[:-1]) / 2])
    assert form.rounded(x).equal(x.to(TYPES[name]).float())


def test_too_large_becomes_the_greatest_and_has_no_gradient() -> None:
    q = Floating(nn.Linear(3, 1), "weight", bits=8, format="e4m3")
    q.calibrate(torch.tensor([[448.0]]))
    x = torch.tensor([-1e6, 1.03, 448.0, 449.0], requires_grad=True)
    q(x).sum().backward()
    assert q(x).tolist() == [-448, 1, 448, 448]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_scales_put_the_largest_weight_on_the_greatest_number(name: str, per_channel: bool) -> None:
    layer = nn.Conv2d(3, 4, 2)
    w = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    w *= torch.logspace(-3, 1, 4)[:, None, None, None]
    q = Floating(layer, "weight", bits=8, format=name, per_channel=per_channel)
    q.calibrate(w)
    hat = q(w)
    most = w.flatten(1).abs().amax(1) if per_channel else w.abs().amax()
    torch.testing.assert_close((q.scale * FORMATS[name].top).flatten(), most.flatten())
    torch.testing.assert_close(hat.flatten(1).abs().amax(1) if per_channel else hat.abs().amax(), most)
    torch.testing.assert_close(q.grid(w).values(q.codes(w)), hat, rtol=1e-6, atol=0)
    torch.testing.assert_close(q(hat), hat, rtol=1e-6, atol=0)
    assert (hat - w).abs().max() <= w.abs().max() * 2.0 ** -(FORMATS[name].mantissa + 1)
    assert q.stored_bits(w) == (8 * w.numel(), 32 * (4 if per_channel else 1))
    stored = q.stored(w)["codes"]
    assert q.restored({"codes": stored.unpack(stored.pack())}).equal(q.codes(w))


def test_fp16_has_no_scale() -> None:
    q = Floating(nn.Linear(3, 2), "weight", bits=16, format="fp16", per_channel=True)
    w = torch.tensor([[0.1, 2e-8, -70000.0], [1.0, 3e-5, 0.0]])
    q.calibrate(w)
    assert q(w).equal(w.clamp(-65504, 65504).half().float())
    assert q.stored_bits(w) == (16 * 6, 0)
    assert (q.granularity, q.describe()["format"]) == ("per_tensor", "fp16")


def test_a_row_of_zeros() -> None:
    q = Floating(nn.Linear(3, 2), "weight", bits=8, format="e5m2", per_channel=True)
    q.calibrate(torch.zeros(2, 3))
    assert q(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("bits", "name", "said"),
    [(8, "fp16", "fp16 have 16 bits, got 8"), (8, "e3m4", "format must be one of fp16, e4m3, e5m2")],
)
def test_refuses(bits: int, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Floating(nn.Linear(1, 1), "weight", bits=bits, format=name)
