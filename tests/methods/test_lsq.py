"""LSQ, by the numbers of arXiv 1902.08153."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.cli.overrides import resolve_row
from qbench.methods.shared.lsq import LSQ, SMALLEST
from qbench.models.tiny import Tiny
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Rule
from qbench.quant.surgery import activation_quantizers, quantize

V = torch.tensor([-0.9, -0.28, 0.12, 0.26, 0.8])


def lsq(bits: int = 2, site: str = "weight", step: float = 0.2, **options: str) -> LSQ:
    q = LSQ(nn.Linear(1, 1), site, bits=bits, **options)
    with torch.no_grad():
        q.step.fill_(step)
    return q


def slopes(q: LSQ, x: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, float]:
    """(dL/dx, dL/ds without the gradient scale)."""
    x = x.clone().requires_grad_()
    q.step.grad = None
    (q(x) * (torch.ones_like(x) if upstream is None else upstream)).sum().backward()
    assert x.grad is not None
    assert q.step.grad is not None
    n = x.numel() if q.is_weight or q.count == "numel" else x[0].numel()
    return x.grad, q.step.grad.item() * math.sqrt(n * q.bounds[1])


@pytest.mark.parametrize(
    ("bits", "values", "ds", "dx"),
    [
        (2, [-0.4, -0.2, 0.2, 0.2, 0.2], [-2, 0.4, 0.4, 1, 1], [0, 1, 1, 0, 0]),
        (3, [-0.8, -0.2, 0.2, 0.2, 0.6], [-4, 0.4, 0.4, -0.3, 3], [0, 1, 1, 1, 0]),
    ],
)
def test_worked_examples(bits: int, values: list[float], ds: list[float], dx: list[float]) -> None:
    q = lsq(bits)
    torch.testing.assert_close(q(V), torch.tensor(values))
    assert slopes(q, V)[0].tolist() == dx
    for i, expected in enumerate(ds):
        upstream = torch.zeros(5)
        upstream[i] = 1
        assert slopes(q, V, upstream)[1] == pytest.approx(expected, abs=1e-5)


def test_at_the_bounds_the_value_counts_as_clipped() -> None:
    q = lsq(2, step=0.5)
    dx, ds = slopes(q, torch.tensor([-1.0, 0.5]))
    assert dx.tolist() == [0, 0]
    assert ds == pytest.approx(-2 + 1)


def test_unsigned_inputs_clip_at_0_and_15() -> None:
    q = lsq(4, "input")
    x = torch.tensor([[-1.0, 0.0, 0.55, 2.95, 5.0]])
    assert q.codes(x).tolist() == [[0, 0, 3, 15, 15]]
    dx, ds = slopes(q, x)
    assert dx.tolist() == [[0, 0, 1, 1, 0]]
    assert ds == pytest.approx(0.25 + 0.25 + 15, abs=1e-4)


@pytest.mark.parametrize(("shape", "bits", "g"), [((256, 256, 3, 3), 4, 4.921e-4), ((10, 5), 2, 1 / math.sqrt(50))])
def test_gradient_scale_of_weights(shape: tuple[int, ...], bits: int, g: float) -> None:
    q = lsq(bits, step=1.0)
    x = torch.zeros(shape)
    x.view(-1)[0] = 100.0
    q(x).sum().backward()
    assert q.step.grad is not None
    assert q.step.grad.item() == pytest.approx(g * q.bounds[1], rel=1e-3)


def test_gradient_scale_of_inputs_leaves_the_batch_out_unless_asked() -> None:
    found = []
    for count in ("features", "numel"):
        q = lsq(2, "input", step=1.0, count=count)
        q(torch.full((16, 5), 9.0)).sum().backward()
        assert q.step.grad is not None
        found.append(q.step.grad.item())
    assert found[0] == pytest.approx(80 * 3 / math.sqrt(5 * 3))
    assert found[0] / found[1] == pytest.approx(4)


@pytest.mark.parametrize("count", ["features", "numel"])
@pytest.mark.parametrize("site", ["weight", "input"])
def test_gradient_of_the_step_is_that_of_the_whole_batch_in_pieces(site: str, count: str) -> None:
    x, found = torch.full((16, 5), 9.0), []
    for parts in (1, 2, 4):
        q = lsq(2, site, step=1.0, count=count)
        q.pieces = (parts, 1)
        for piece in x.chunk(parts) if site == "input" else [x] * parts:
            (q(piece).sum() / (1 if site == "input" else parts)).backward()
        assert q.step.grad is not None
        found.append(q.step.grad.item())
    assert found[1:] == pytest.approx([found[0]] * 2)


def test_start_from_the_mean_over_all_batches() -> None:
    q = lsq(2)
    q.calibrate(V)
    q.finish_calibration()
    assert q.step.item() == pytest.approx(0.944)
    q = lsq(4, "input")
    for x in (torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)):
        q.calibrate(x)
    q.finish_calibration()
    assert q.step.item() == pytest.approx(2 * 1.5 / math.sqrt(15))


def test_an_all_zero_tensor_keeps_a_usable_step() -> None:
    q = lsq(2, step=1.0)
    q.calibrate(torch.zeros(4))
    q.finish_calibration()
    assert q.step.item() == 1


def test_negative_inputs_make_the_grid_signed_and_the_checkpoint_remembers() -> None:
    q = lsq(4, "input")
    q.calibrate(V.relu())
    assert q.bounds == (0, 15)
    q.calibrate(V)
    q.finish_calibration()
    assert q.bounds == (-8, 7)
    assert q.describe()["signed"]
    assert q.step.item() == pytest.approx(2 * float(V.relu().sum() + V.abs().sum()) / 10 / math.sqrt(7))
    other = lsq(4, "input")
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(V), q(V))


def test_a_step_below_zero_stays_usable_and_can_return() -> None:
    q = lsq(2, step=-0.5)
    q(V).sum().backward()
    assert q(V).max().item() == pytest.approx(SMALLEST)
    assert q.step.grad is not None
    assert q.step.grad.isfinite()
    assert q.step.grad != 0


def test_an_overflowing_quotient_leaves_a_finite_gradient() -> None:
    q = lsq(2, step=0.0)
    assert slopes(q, torch.tensor([1e35, -1e35, 0.0]))[1] == pytest.approx(1 - 2)


@given(st.integers(2, 8), st.floats(1e-3, 10), st.sampled_from(["weight", "input"]), st.lists(st.floats(-99, 99)))
def test_codes_and_idempotence(bits: int, step: float, site: str, values: list[float]) -> None:
    q, x = lsq(bits, site, step), torch.tensor([[0.0, *values]])
    y, codes = q(x).detach(), q.codes(x)
    assert q.bounds[0] <= codes.min() <= codes.max() <= q.bounds[1]
    assert torch.equal(q.grid().values(codes), y)
    torch.testing.assert_close(q(y).detach(), y)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 17}, {"bits": 4, "count": "pixels"}])
def test_arguments_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LSQ(nn.Linear(1, 1), "weight", **options)  # type: ignore[arg-type]


def test_the_recipe_depends_on_the_bits() -> None:
    found = {}
    for bits in (2, 3, 4, 8):
        recipe = resolve_row(["method=lsq", f"bits={bits}", "budget=paper"])["train"]
        found[bits] = (recipe["weight_decay"], recipe["epochs"], recipe["lr"])
    assert found == {2: (0.25e-4, 90, 0.01), 3: (0.5e-4, 90, 0.01), 4: (1e-4, 90, 0.01), 8: (1e-4, 1, 0.001)}


def test_two_steps_from_a_calibrated_net() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Tiny(channels=3, classes=4, size=8)
    quantize(
        net,
        [
            Rule(
                match=match,
                weight=lambda layer, site, bits=bits: LSQ(layer, site, bits=bits),
                input=lambda layer, site, bits=bits: LSQ(layer, site, bits=bits),
            )
            for match, bits in (("@first", 8), ("@last", 8), ("*", 2))
        ],
    )
    x, inputs = torch.randn(8, 3, 8, 8), activation_quantizers(net)
    handles = [q.register_forward_pre_hook(lambda module, args: module.calibrate(args[0])) for q in inputs.values()]
    net(x)
    for handle, q in zip(handles, inputs.values(), strict=True):
        handle.remove()
        q.finish_calibration()
    assert [q.signed for q in inputs.values()] == [True, False, False]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(x), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert math.isfinite(loss.item())
    assert not [name for name, p in net.named_parameters() if torch.equal(p, before[name])]
    levels = [m.quantized_weight().unique().numel() for m in net.modules() if isinstance(m, QuantLayer)]
    assert levels[1] <= 4
    assert max(levels) <= 256
