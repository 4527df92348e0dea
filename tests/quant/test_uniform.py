"""Uniform: by hand, against torch's own fake quantization, and what calibration keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from qbench.quant.uniform import Uniform

torch.set_num_threads(1)

LAYER = nn.Linear(1, 1)


def fitted(x: Tensor, layer: nn.Module = LAYER, site: str = "input", **options: object) -> Uniform:
    q = Uniform(layer, site, **options)
    q.calibrate(x)
    q.finish_calibration()
    return q


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_affine_by_hand() -> None:
    q = fitted(torch.tensor([-0.37, 0.0, 0.5, 1.13]), bits=4)
    assert q.step.item() == pytest.approx(0.1)
    assert q.zero.item() == 4
    codes = q.codes(torch.tensor([-0.37, 0.0, 0.5, 1.13, 9.0, -9.0]))
    assert codes.tolist() == [0, 4, 9, 15, 15, 0]
    assert q.grid().values(codes).tolist() == pytest.approx([-0.4, 0, 0.5, 1.1, 1.1, -0.4])


def test_symmetric_by_hand() -> None:
    x = torch.tensor([-0.7, -0.26, 0.0, 0.12, 0.5])
    q = fitted(x, bits=4, symmetric=True)
    assert q.codes(x).tolist() == [-7, -3, 0, 1, 5]
    assert q(torch.tensor([-0.8, -5.0])).tolist() == pytest.approx([-0.8, -0.8])
    assert q.levels == 16
    restricted = fitted(x, bits=4, symmetric=True, restricted=True)
    assert restricted(torch.tensor([-0.8, -5.0])).tolist() == pytest.approx([-0.7, -0.7])
    assert restricted.levels == 15


def test_rounds_half_to_even() -> None:
    q = fitted(torch.tensor([0.0, 15.0]), bits=4)
    assert q(torch.tensor([0.5, 1.5, 2.5, 3.5])).tolist() == [0, 2, 2, 4]


def test_gradient_is_one_where_no_code_was_clipped() -> None:
    q = fitted(torch.tensor([0.0, 15.0]), bits=4)
    x = torch.tensor([-1.0, -0.51, -0.5, 0.0, 7.3, 15.0, 15.49, 15.5, 16.0], requires_grad=True)
    q(x).backward(torch.full((9,), 2.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 2, 2, 2, 2, 2, 0, 0]  # -0.5 rounds to 0, 15.5 to 16


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_agrees_with_torch_per_tensor(bits: int, symmetric: bool, restricted: bool) -> None:
    x = (random(2000) * 2 + 0.3).requires_grad_()
    q = fitted(x.detach() * 0.7, bits=bits, symmetric=symmetric, restricted=restricted)
    y = q(x)
    y.sum().backward()
    mine = x.grad
    x.grad = None
    zero = q.zero.to(torch.int32)
    theirs = torch.fake_quantize_per_tensor_affine(x, q.step, zero, *q.bounds)
    theirs.sum().backward()
    assert torch.allclose(y, theirs, rtol=1e-6, atol=1e-6)
    assert mine is not None
    assert x.grad is not None
    assert torch.equal(mine, x.grad)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(7, 6)])
def test_agrees_with_torch_per_channel(layer: nn.Module, symmetric: bool) -> None:
    w = random(*layer.weight.shape) * torch.logspace(-3, 1, 6).reshape(6, *[1] * (layer.weight.dim() - 1))
    q = fitted(w, layer, "weight", bits=4, symmetric=symmetric, per_channel=True)
    assert q.step.shape == (6, *[1] * (w.dim() - 1))
    theirs = torch.fake_quantize_per_channel_affine(w, q.step.flatten(), q.zero.flatten(), 0, *q.bounds)
    assert torch.allclose(q(w), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(q.grid(w).values(q.codes(w)), q(w))
    assert q.stored_bits(w) == (4 * w.numel(), 6 * 32 + (0 if symmetric else 6 * 4))
    assert q.granularity == "per_channel"


@given(
    x=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-50, 50, width=32, allow_subnormal=False)),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    kind=st.sampled_from(["minmax", "percentile", "mse", "kl"]),
)
@settings(max_examples=60, deadline=None)
def test_levels_zero_and_idempotence(x: np.ndarray, bits: int, symmetric: bool, kind: str) -> None:
    values = torch.from_numpy(x)
    q = fitted(values, bits=bits, symmetric=symmetric, range=kind)
    hat = q(values)
    assert hat.unique().numel() <= q.levels == 2**bits
    assert torch.equal(q(hat), hat)
    assert torch.equal(q.grid(values).values(q.codes(values)), hat)
    assert q(torch.zeros(1)).item() == 0
    assert q.lo <= 0 <= q.hi


@pytest.mark.parametrize("kind", ["minmax", "mse", "kl"])
def test_symmetric_activations_that_are_never_negative_use_all_codes(kind: str) -> None:
    """A constant 3 at 8 bits: 3 / 255, not 3 / 127 (arXiv 1806.08342, Sec. 2.2); the checkpoint knows."""
    q = fitted(torch.full((64,), 3.0), bits=8, symmetric=True, range=kind)
    assert q.step.item() == pytest.approx(3 / 255)
    assert (q.signed, q.bounds, q.zero.item(), q.levels) == (False, (0, 255), 0, 256)
    assert q(torch.tensor([-1.0, 3.0])).tolist() == [0, 3]
    other = Uniform(LAYER, "input", bits=8, symmetric=True)
    assert other.bounds == (-128, 127)
    other.load_state_dict(q.state_dict())
    assert other.bounds == (0, 255)
    old = q.state_dict() | {"_extra_state": {"enabled": True}}
    other.load_state_dict(old)
    assert other.bounds == (-128, 127)


def test_symmetric_grids_of_weights_and_of_signed_inputs_are_signed() -> None:
    x = torch.tensor([[0.5, 3.0]])
    assert fitted(x, site="weight", bits=8, symmetric=True).step.item() == pytest.approx(3 / 127)
    assert fitted(x - 0.6, bits=8, symmetric=True).bounds == (-128, 127)


def test_minmax_is_exact_over_batches() -> None:
    q = Uniform(LAYER, "input", bits=8)
    for seed in range(5):
        q.calibrate(random(1000, seed=seed))
    q.finish_calibration()
    whole = torch.cat([random(1000, seed=seed) for seed in range(5)])
    assert (q.lo, q.hi) == (whole.min(), whole.max())


def test_the_sample_is_bounded_deterministic_and_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uniform, "SAMPLE", 2**9)
    monkeypatch.setattr(Uniform, "MOST", 2**11)
    found = []
    for _ in range(2):
        q = Uniform(LAYER, "input", bits=8, range="percentile", percentile=90)
        for seed in range(20):
            q.calibrate(random(2000, seed=seed) + (seed >= 10))
            assert sum(s.numel() for s in q._seen) <= 2**11
        q.finish_calibration()
        assert q._seen == []
        found.append((q.lo.item(), q.hi.item()))
    assert found[0] == found[1]
    whole = torch.cat([random(2000, seed=seed) + (seed >= 10) for seed in range(20)])
    assert found[0] == pytest.approx((whole.quantile(0.1).item(), whole.quantile(0.9).item()), abs=0.2)


def test_an_outlier_of_a_sampled_batch_counts_once() -> None:
    """Counted as one of the sample it is worth sixteen, and the range ends at 30."""
    x = random(2**22).abs()
    x[-1] = 40
    q = Uniform(LAYER, "input", bits=8, range="mse")
    for batch in x.chunk(4):
        q.calibrate(batch)
    q.finish_calibration()
    assert q.hi.item() == pytest.approx(6.25, abs=0.3)  # ranges.mse of all values


def test_a_weight_that_is_seen_whole_has_no_value_twice() -> None:
    w = torch.tensor([[-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 50.0]])
    q = fitted(w, nn.Linear(9, 1), "weight", bits=8, range="percentile", percentile=90, per_channel=True)
    assert q.hi.item() == pytest.approx(0.3 + 0.2 * 49.7)  # a fifth of the way from the last but one


def test_before_calibration_and_without_anything_seen_the_range_is_one() -> None:
    q = Uniform(LAYER, "input", bits=8)
    q.finish_calibration()
    assert (q.lo.item(), q.hi.item()) == (-1, 1)
    assert q(torch.tensor([0.5])).item() == pytest.approx(0.5, abs=0.01)


def test_state_round_trips_and_half_precision_comes_back_as_it_was() -> None:
    q = fitted(random(100), bits=6, range="mse")
    other = Uniform(LAYER, "input", bits=6, range="mse")
    other.load_state_dict(q.state_dict())
    x = random(50, seed=3)
    assert torch.equal(q(x), other(x))
    assert q(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits must be a whole number in 2\.\.16, got 1"),
        ({"bits": 17}, r"bits must be a whole number in 2\.\.16, got 17"),
        ({"bits": 8, "range": "max"}, "range must be one of minmax, percentile, mse, kl, ema, .*, got 'max'"),
        ({"bits": 8, "percentile": 50}, "percentile must be above 50 and at most 100, got 50"),
        ({"bits": 8, "per_channel": True}, "per_channel and group are for weights"),
        ({"bits": 8, "group": 4}, "per_channel and group are for weights"),
        ({"bits": 8, "range": "fixed"}, "range=fixed needs a clip above 0, got None"),
        ({"bits": 8, "range": "std", "clip": 0}, "range=std needs a clip above 0, got 0"),
        ({"bits": 8, "range": "ema", "decay": 1}, "decay must be at least 0 and below 1, got 1"),
        ({"bits": 8, "half_range": "always"}, "half_range=always is for symmetric activations"),
        ({"bits": 8, "half_range": "some"}, "half_range must be one of auto, always, never, got 'some'"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Uniform(LAYER, "input", **options)


def test_refuses_of_a_weight() -> None:
    with pytest.raises(ValueError, match="ema averages over calibration batches"):
        Uniform(LAYER, "weight", bits=8, range="ema")
    with pytest.raises(ValueError, match="group must be a whole number of at least 1, or null, got -2"):
        Uniform(LAYER, "weight", bits=8, group=-2)


# --- groups


def test_groups_by_hand() -> None:
    """Two channels of four weights in groups of two, at 2 bits: steps 1/3, 2, 1, 0 (any)."""
    w = torch.tensor([[0.0, 1.0, 0.0, 6.0], [-1.0, 2.0, 0.0, 0.0]], requires_grad=True)
    q = fitted(w.detach(), nn.Linear(4, 2), "weight", bits=2, group=2)
    assert q.step.flatten().tolist() == pytest.approx([1 / 3, 2, 1, 1])
    assert q.zero.flatten().tolist() == [0, 0, 1, 0]
    x = torch.tensor([[0.4, 9.0, 2.9, -1.0], [-1.6, 1.4, 0.0, 0.6]], requires_grad=True)
    q(x).sum().backward()
    assert q(x).detach().flatten().tolist() == pytest.approx([1 / 3, 1, 2, 0, -1, 1, 0, 1])
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 0, 1, 1, 0, 1, 1, 1]  # -1 / 2 rounds to -0: inside
    assert q.codes(x).shape == x.shape
    torch.testing.assert_close(q.grid(x).values(q.codes(x)), q(x).detach())
    assert q.stored_bits(w) == (2 * 8, 4 * 32 + 4 * 2)
    assert (q.granularity, q.describe()["group"]) == ("per_group", 2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_a_whole_channel_is_per_channel_and_smaller_ones_lose_less(symmetric: bool) -> None:
    layer = nn.Conv2d(4, 6, 3)
    w = random(6, 4, 3, 3) * torch.logspace(-1, 1, 36).reshape(1, 4, 3, 3)
    options = {"bits": 3, "symmetric": symmetric}
    whole = fitted(w, layer, "weight", per_channel=True, **options)(w)
    assert fitted(w, layer, "weight", group=36, **options)(w).equal(whole)
    errors = [(fitted(w, layer, "weight", group=g, **options)(w) - w).norm().item() for g in (36, 12, 6, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize(
    ("asked", "weights", "got"),
    [(8, 27, 9), (64, 27, 27), (16, 144, 16), (16, 37, 37), (6, 36, 6), (5, 49, 7), (2, 64, 2)],
)
def test_groups_divide_a_channel(asked: int, weights: int, got: int) -> None:
    assert Uniform(nn.Linear(weights, 2), "weight", bits=4, group=asked).group == got


# --- moving averages, clips, half a range


def test_moving_averages_by_hand() -> None:
    q = Uniform(LAYER, "input", bits=8, range="ema", decay=0.75)
    for lo, hi in ((-1.0, 2.0), (-5.0, 6.0), (1.0, 2.0)):
        q.calibrate(torch.tensor([lo, hi]))
    q.finish_calibration()
    assert q.hi.item() == pytest.approx(0.75 * (0.75 * 2 + 0.25 * 6) + 0.25 * 2)
    assert q.lo.item() == pytest.approx(0.75 * (0.75 * -1 + 0.25 * -5) + 0.25 * 1)


def test_a_clip_is_no_further_than_the_values_go() -> None:
    x = torch.tensor([-0.3, 0.0, 1.0, 4.0])
    assert [fitted(x, bits=8, range="fixed", clip=c).hi.item() for c in (0.5, 2, 100)] == [0.5, 2, 4]
    assert fitted(x, bits=8, range="fixed", clip=2).lo.item() == pytest.approx(-0.3)
    q = fitted(x, bits=8, range="std", clip=1)
    mean, std = x.mean().item(), x.std(correction=0).item()
    assert (q.lo.item(), q.hi.item()) == pytest.approx((-0.3, mean + std))
    w = torch.tensor([[-4.0, 4.0], [1.0, 3.0]])
    q = fitted(w, nn.Linear(2, 2), "weight", bits=8, range="std", clip=0.5, per_channel=True)
    assert q.hi.flatten().tolist() == [2, 2.5]


def test_half_a_range_by_choice() -> None:
    """Negative values become 0, and what is positive has all the codes; or signed codes for what is never negative."""
    x = torch.tensor([-9.0, 0.5, 3.0])
    for kind in ("minmax", "mse", "aciq"):
        q = fitted(x, bits=8, symmetric=True, half_range="always", range=kind)
        assert (q.bounds, q.lo.item()) == ((0, 255), 0)
        assert q.step.item() == pytest.approx(3 / 255, rel=0.02)
        assert q(x)[0].item() == 0
    assert fitted(x.abs(), bits=8, symmetric=True, half_range="never").bounds == (-128, 127)
