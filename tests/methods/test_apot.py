"""APoT against numbers worked out by hand and against plain autograd (arXiv 1909.13144)."""

import pytest
import torch
from torch import Tensor, nn
from yamls import config_of

from qbench.methods.apot import SMALLEST, APoTInput, APoTWeight, Largest, levels
from qbench.models.resnet import ResNetCIFAR
from qbench.quant.layers import quant_layers
from qbench.quant.surgery import quantize
from qbench.training.build import make_method


def weight(bits: int = 3, alpha: float = 1.0, **options: object) -> APoTWeight:
    options = {"normalize": False, **options}
    return APoTWeight(nn.Linear(4, 1), "weight", bits=bits, alpha=alpha, **options)  # type: ignore[arg-type]


def inputs(bits: int = 2, alpha: float | None = 1.0, **options: object) -> APoTInput:
    return APoTInput(nn.Linear(4, 1), "input", bits=bits, alpha=alpha, **options)  # type: ignore[arg-type]


def test_the_levels() -> None:
    assert levels(1) == (0, 1)
    assert levels(2) == (0, 1 / 4, 1 / 2, 1)
    # 3 bits: {0, 1/2, 1/4, 1/16} + {0, 1/8}, the largest 5/8
    assert levels(3) == pytest.approx([v / 10 for v in (0, 1, 2, 3, 4, 6, 8, 10)])
    # 4 bits: {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}, the largest 3/2 = 48/32
    sums = (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)
    assert levels(4) == pytest.approx([v / 48 for v in sums])
    assert levels(2, "pot") == (0, 1 / 4, 1 / 2, 1)
    assert levels(3, "pot") == (0, *(2.0**-i for i in range(6, -1, -1)))
    assert levels(2, "uniform") == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("grid", ["apot", "pot", "uniform"])
def test_all_codes_have_levels_of_their_own(bits: int, grid: str) -> None:
    found = levels(bits, grid)
    assert len(set(found)) == 2**bits
    assert (found[0], found[-1]) == (0, 1)
    assert list(found) == sorted(found)


def test_levels_of_5_bits_have_as_many_terms_as_their_code_has_parts() -> None:
    """a in 0, 1/2, 1/8, 1/64; b in 0, 1/4, 1/16, 1/128; c in 0, 1/32, divided by 1/2 + 1/4 + 1/32."""
    sums = {a + b + c for a in (0, 1 / 2, 1 / 8, 1 / 64) for b in (0, 1 / 4, 1 / 16, 1 / 128) for c in (0, 1 / 32)}
    assert levels(5) == pytest.approx([s / 0.78125 for s in sorted(sums)])


def test_three_bit_weights_and_their_gradients() -> None:
    # levels 0, .25, .5, 1 of alpha = 2 on both sides; z = -1.5, -.6, -.1, .3, .7, 1
    q, w = weight(alpha=2.0), torch.tensor([-3.0, -1.2, -0.2, 0.6, 1.4, 2.0], requires_grad=True)
    hat = q(w)
    assert hat.tolist() == [-2, -1, 0, 0.5, 1, 2]
    rows = [torch.autograd.grad(hat[i], [w, q.alpha], retain_graph=True) for i in range(6)]
    assert [r[0][i].item() for i, r in enumerate(rows)] == [1] * 6  # also beyond alpha
    assert [r[1].item() for r in rows] == pytest.approx([-1, 0.1, 0.1, -0.05, -0.2, 0], abs=1e-6)
    assert q.codes(w).tolist() == [-3 + 3, 1, 3, 4, 5, 6]
    assert (q.levels, weight(2).levels) == (7, 3)


def test_two_bit_inputs_and_their_gradients() -> None:
    q, x = inputs(alpha=2.0), torch.tensor([[0.0, 0.2, 0.6, 1.4, 2.0, 3.0]], requires_grad=True)
    hat = q(x)
    assert hat.tolist() == [[0, 0, 0.5, 1, 2, 2]]
    rows = [torch.autograd.grad(hat[0, i], [x, q.alpha], retain_graph=True) for i in range(6)]
    assert [r[0][0, i].item() for i, r in enumerate(rows)] == [1, 1, 1, 1, 1, 0]
    assert [r[1].item() for r in rows] == pytest.approx([0, -0.1, -0.05, -0.2, 0, 1], abs=1e-6)
    q = inputs(alpha=2.0, alpha_gradient="pact")
    q(x).sum().backward()
    assert q.alpha.grad is not None
    assert q.alpha.grad.item() == 1


def test_halfway_goes_to_the_smaller_level() -> None:
    assert inputs(3, grid="uniform", alpha=7.0)(torch.tensor([[0.5, 1.5, 2.5]])).tolist() == [[0, 1, 2]]
    assert weight(alpha=1.0)(torch.tensor([-0.75, 0.375, 0.125])).tolist() == [-0.5, 0.25, 0]


def composed(x: Tensor, alpha: Tensor, table: list[float], signed: bool, masked: bool) -> Tensor:
    """clip, projection with gradient 1, rescaling: the paper's steps, alpha differentiated through all of them."""
    z = x / alpha
    bound = (z.abs() if signed else z) > 1
    clipped = torch.where(bound, z.sign().detach(), z)
    size = clipped.abs().detach()
    near = torch.tensor(table)[(size[:, None] - torch.tensor(table)).abs().argmin(1)] * clipped.sign().detach()
    hat = alpha * (clipped + (near - clipped).detach())
    return hat if masked else hat + (x - x.detach()) * bound


@pytest.mark.parametrize("site", ["weight", "input", "signed input"])
@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("grid", ["apot", "uniform"])
def test_values_and_gradients_are_those_of_autograd(site: str, bits: int, grid: str) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(bits))
    x = x.abs() if site == "input" else x
    q = weight(bits, 1.3, grid=grid) if site == "weight" else inputs(bits, 1.3, grid=grid)
    if site != "weight":
        q.calibrate(x)
    assert q.signed == (site != "input")
    a, b = (x.clone().requires_grad_() for _ in range(2))
    alpha, g = torch.tensor(1.3, requires_grad=True), torch.randn(400, generator=torch.Generator().manual_seed(9))
    table = list(levels(bits - 1 if q.signed else bits, grid))
    ours, theirs = q(a), composed(b, alpha, table, q.signed, site != "weight")
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, [a, q.alpha], g), torch.autograd.grad(theirs, [b, alpha], g), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through", [False, True])
def test_weights_are_normalized_first(through: bool) -> None:
    w = 0.3 + 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    u = (w - w.mean()) / w.std()
    q, plain = (weight(4, 2.5, normalize=n, through=through, init="scratch") for n in (True, False))
    torch.testing.assert_close(q(w), plain(u))
    g, (a, b) = torch.randn(50), (w.clone().requires_grad_() for _ in range(2))
    (q(a) * g).sum().backward()
    m, s = (b.mean(), b.std()) if through else (w.mean(), w.std())
    ((b - m) / s * g).sum().backward()  # gradient 1 to u, clipped or not
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_from_a_float_net_the_weights_keep_their_size() -> None:
    w = 0.02 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    q = weight(5, 3.0, normalize=True, init="float")
    q.calibrate(w)
    assert ((q(w) - w).square().sum() / w.square().sum()).item() < 0.02
    assert q.codes(w).unique().numel() == 31
    torch.testing.assert_close(q.grid().values(q.codes(w)), q(w).detach())
    free = weight(5, 3.0)
    free.calibrate(w)
    assert free.alpha.item() == pytest.approx(3 * w.std().item())


def test_equal_weights_and_a_clip_below_zero_stay_finite() -> None:
    for options in ({"normalize": True}, {"normalize": False}):
        q, w = weight(3, **options), torch.full((4,), 0.2, requires_grad=True)
        q.calibrate(w)
        with torch.no_grad():
            q.alpha.fill_(-1)
        q(w).sum().backward()
        assert w.grad is not None
        assert w.grad.isfinite().all()
    assert q(torch.tensor([9.0, -9.0])).tolist() == pytest.approx([SMALLEST, -SMALLEST])


def test_an_input_starts_at_the_clip_of_least_error_or_where_it_is_told() -> None:
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).relu()
    free, told = inputs(3, None), inputs(3, 8.0)
    for q in (free, told):
        q.calibrate(x)
        q.finish_calibration()
    assert told.alpha.item() == 8
    with torch.no_grad():
        least = (free(x) - x).square().sum()
        for factor in (0.8, 1.25):
            assert (free.level(x, free.alpha * factor) - x).square().sum() > least


def test_first_and_last_weights_are_uniform_up_to_their_largest_magnitude() -> None:
    q = Largest(nn.Linear(3, 1), "weight", bits=3)
    w = torch.tensor([[-0.9, 0.4, 0.2]], requires_grad=True)
    hat = q(w)
    hat.sum().backward()
    assert hat.flatten().tolist() == pytest.approx([-0.9, 0.3, 0.3])
    assert w.grad is not None
    assert w.grad.tolist() == [[1, 1, 1]]
    assert (q.levels, q.codes(w).tolist()) == (7, [[-3, 1, 1]])


def test_shortcuts_are_quantized_and_inputs_of_the_ends_are_not() -> None:
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=8, shortcut="B")
    quantize(net, make_method(config_of("method=apot", "model=tiny")).rules)
    layers = dict(quant_layers(net))
    assert [n for n, layer in layers.items() if layer.input_quantizer is None] == ["conv1", "fc"]
    assert {type(layer.weight_quantizer) for layer in layers.values()} == {APoTWeight, Largest}
    assert sum("shortcut" in name for name in layers) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "2..6"),
        ({"grid": "log"}, "apot, pot, uniform"),
        ({"alpha": 0}, "above 0"),
        ({"alpha": "3"}, "above 0"),
        ({"alpha_gradient": ""}, "pact"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], words: str) -> None:
    for make in (weight, inputs):
        with pytest.raises(ValueError, match="apot, pact, got"):
            make(alpha_gradient="lsq")
        with pytest.raises(ValueError, match=words):
            make(**options)  # type: ignore[arg-type]
