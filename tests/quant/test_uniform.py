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
    assert codes.codes.tolist() == [0, 4, 9, 15, 15, 0]
    assert codes.values().tolist() == pytest.approx([-0.4, 0, 0.5, 1.1, 1.1, -0.4])


def test_symmetric_by_hand() -> None:
    x = torch.tensor([-0.7, -0.26, 0.0, 0.12, 0.5])
    q = fitted(x, bits=4, symmetric=True)
    assert q.codes(x).codes.tolist() == [-7, -3, 0, 1, 5]
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
    assert torch.equal(q.codes(w).values(), q(w))
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
    assert torch.equal(q.codes(values).values(), hat)
    assert q(torch.zeros(1)).item() == 0
    assert q.lo <= 0 <= q.hi


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


def test_symmetric_activations_that_are_never_negative_use_all_codes() -> None:
    """1806.08342 Sec. 2.2: clamp(0, N - 1) if unsigned."""
    q = fitted(torch.full((4,), 3.0), bits=8, symmetric=True)
    assert q.step.item() == pytest.approx(3 / 255)
    assert (q.bounds, q.signed, q.describe()["signed"], q.zero.item()) == ((0, 255), False, False, 0)
    other = Uniform(LAYER, "input", bits=8, symmetric=True)
    other.load_state_dict(q.state_dict())
    x = random(100) * 2
    assert torch.equal(other(x), q(x))
    q.calibrate(torch.tensor([-1.0]))
    q.calibrate(torch.tensor([3.0]))
    q.finish_calibration()
    assert (q.bounds, q.signed) == ((-128, 127), True)
    assert fitted(torch.full((1, 4), 3.0), site="weight", bits=8, symmetric=True).bounds == (-128, 127)


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
        ({"bits": 8, "range": "max"}, "range must be one of minmax, percentile, mse, kl, got 'max'"),
        ({"bits": 8, "percentile": 50}, "percentile must be above 50 and at most 100, got 50"),
        ({"bits": 8, "per_channel": True}, "per_channel is for weights"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Uniform(LAYER, "input", **options)
