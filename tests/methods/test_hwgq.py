"""HWGQ against numbers worked out by hand, and its constants against the least error on a Gaussian (1702.00953)."""

import math

import pytest
import torch
from torch import Tensor, nn
from yamls import config_of

from qbench.errors import UserError
from qbench.methods.hwgq import HWGQ, STEPS, lloyd, plain_norm
from qbench.models.resnet import ResNetCIFAR
from qbench.quant.surgery import quantize
from qbench.training.build import make_method

X = torch.tensor([-0.2, 0.01, 0.3, 0.7, 0.9, 1.4, 2.0])


def hwgq(bits: int = 2, site: str = "replace", **options: object) -> HWGQ:
    return HWGQ(nn.ReLU(), site, bits=bits, **options)  # type: ignore[arg-type]


def gradient(q: HWGQ, x: Tensor) -> list[float]:
    x = x.clone().requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_the_worked_example() -> None:
    q = hwgq()
    assert q(X).tolist() == pytest.approx([0, 0.538, 0.538, 0.538, 1.076, 1.614, 1.614])
    assert gradient(q, X) == [0, 1, 1, 1, 1, 1, 0]
    assert q.codes(X).tolist() == [0, 1, 1, 1, 2, 3, 3]


def test_memory_in_channels_last_order_gives_the_same() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    y = hwgq()(x.to(memory_format=torch.channels_last))
    assert torch.equal(y, hwgq()(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_bound_belongs_to_the_interval_below_it() -> None:
    x = torch.tensor([0.0, 1e-30, 1.5 * 0.538, 2.5 * 0.538, 3 * 0.538])
    q = hwgq()
    x[2:4] = q.ends[1:]
    x[4] = q.table[-1]
    assert q.codes(x).tolist() == [0, 1, 1, 2, 3]
    assert gradient(q, x) == [0, 1, 1, 1, 1]
    assert q.codes(torch.nextafter(x[2:4], torch.tensor(9.0))).tolist() == [2, 3]


def test_three_gradients_above_the_largest_value() -> None:
    x = torch.tensor([-1.0, 1.0, 2.614, 3.614])  # 1 and 2 above 1.614
    assert gradient(hwgq(backward="vanilla"), x) == [0, 1, 1, 1]
    assert gradient(hwgq(backward="log"), x) == pytest.approx([0, 1, 1 / 2, 1 / 3])
    assert gradient(hwgq(backward="log"), torch.tensor([1.614, 1.615])) == pytest.approx([1, 1 / 1.001])


def half_gaussian() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 9, 90001, dtype=torch.float64)
    return x, torch.exp(-x * x / 2)


@pytest.mark.parametrize("n", STEPS)
def test_the_steps_leave_the_least_error_on_half_a_gaussian(n: int) -> None:
    x, weight = half_gaussian()

    def error(step: float) -> float:
        return float((weight * (x - step * (x / step).round().clamp(1, n)).square()).sum())

    at = error(STEPS[n])
    assert at == pytest.approx(min(error(STEPS[n] + d / 1e4) for d in range(-30, 31)), rel=1e-4)
    assert at < error(STEPS[n] * 1.02)
    assert at < error(STEPS[n] * 0.98)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 15])
def test_lloyds_values_are_the_means_of_what_is_nearest_to_them(n: int) -> None:
    values = torch.tensor(lloyd(n), dtype=torch.float64)
    x, weight = half_gaussian()
    nearest = (x[:, None] - values).abs().argmin(1)
    means = [float((x * weight)[nearest == i].sum() / weight[nearest == i].sum()) for i in range(n)]
    assert means == pytest.approx(values.tolist(), abs=1e-3)


def test_the_papers_non_uniform_two_bits() -> None:
    q = hwgq(grid="lloyd", positive=2)
    assert q(torch.tensor([-1.0, 0.1, 0.98, 0.99, 5])).tolist() == pytest.approx(
        [0, 0.453, 0.453, 1.51, 1.51], abs=1e-3
    )
    assert lloyd(1)[0] == pytest.approx(math.sqrt(2 / math.pi))
    assert (q.levels, hwgq(grid="lloyd").levels, hwgq(4, grid="lloyd").levels, hwgq(1).levels) == (3, 4, 16, 2)
    assert sum(part.bits for part in q.grid().tables(encoder=True).values()) == 0  # constants are not stored


def test_an_input_of_both_signs_has_a_half_wave_on_each_side() -> None:
    for grid in ("uniform", "lloyd"):
        q = hwgq(3, "input", grid=grid)
        x = torch.tensor([-2.0, -0.1, 0.0, 0.6])
        q.calibrate(x)
        a, b, c = (0.538, 1.076, 1.614) if grid == "uniform" else lloyd(3)
        assert q(x).tolist() == pytest.approx([-c, -a, 0, a])
        assert q.levels == 7
        assert q.grid().values(q.codes(x)).tolist() == pytest.approx(q(x).tolist())
        assert gradient(q, torch.tensor([-c - 0.1, -b, 0.0, a])) == [0, 1, 0, 1]
        again = hwgq(3, "input", grid=grid)
        again.load_state_dict(q.state_dict())
        assert torch.equal(again(x), q(x))
    slot = hwgq(2, "input")
    slot.calibrate(X.relu())
    assert torch.equal(slot(X.relu()), hwgq()(X))
    with pytest.raises(UserError, match="a_bits=1 leaves HWGQ no codes"):
        hwgq(1, "input").calibrate(X)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "1..4"),
        ({"positive": 4}, "positive must be a whole number in 1..3, got 4"),
        ({"bits": 3, "positive": 5}, "1, 3, 7 or 15 values above 0"),
        ({"grid": "log"}, "uniform, lloyd"),
        ({"backward": "none"}, "clipped, vanilla, log"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hwgq(**{"bits": 2, **options})  # type: ignore[arg-type]


def test_a_plain_norm_gives_variance_1_and_keeps_95_hundredths() -> None:
    norm = nn.BatchNorm2d(2)
    nn.init.constant_(norm.weight, 3)
    plain = plain_norm(norm, "replace").train()
    x = 2 + 5 * torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    y = plain(x)
    assert list(plain.parameters()) == []
    assert y.var((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1], abs=1e-3)
    assert plain.running_mean.tolist() == pytest.approx((0.05 * x.mean((0, 2, 3))).tolist())


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norms_lose_their_scale_where_affine_is_false(affine: bool) -> None:
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, preactivation=True)
    quantize(net, make_method(config_of("method=hwgq", "model=tiny", f"options.affine={str(affine).lower()}")).rules)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.weight is None for m in norms} == {not affine}
    kinds = [type(m) for m in net.modules() if isinstance(m, nn.ReLU | HWGQ)]
    assert kinds == [HWGQ] * 6 + [nn.ReLU]
