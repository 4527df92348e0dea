"""Fixed point <IL, FL> and weights stored on a grid (arXiv 1502.02551)."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.quant.fixed_point import FixedPoint
from qbench.quant.hooks import QuantizeUpdate
from qbench.quant.layers import QuantLayer
from qbench.quant.method import State

ROUNDINGS = ("nearest", "stochastic", "floor")


def fixed(bits: int = 4, seed: int = 0, **options: object) -> FixedPoint:
    q = FixedPoint(nn.Linear(1, 1), "weight", bits=bits, **options)  # type: ignore[arg-type]
    q.generator = torch.Generator().manual_seed(seed)
    return q


def test_two_two_format() -> None:
    x = torch.tensor([0.3, 1.9, 5.0, -9.0, -0.3, 0.0])
    assert fixed()(x).tolist() == [0.25, 1.75, 1.75, -2.0, -0.25, 0.0]
    assert fixed().codes(x).tolist() == [1, 7, 7, -8, -1, 0]
    assert fixed(rounding="floor")(x).tolist() == [0.25, 1.75, 1.75, -2.0, -0.5, 0.0]
    assert fixed().describe()["format"] == "<2,2>"


@pytest.mark.parametrize(
    ("rounding", "values"),
    [("nearest", [0.0, 2.0, 2.0, -2.0]), ("floor", [0.0, 1.0, 2.0, -3.0])],
)
def test_ties(rounding: str, values: list[float]) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -2.5])
    assert fixed(8, fraction=0, rounding=rounding)(x).tolist() == values


def test_fraction_sets_the_integer_bits_and_may_exceed_the_word() -> None:
    q = fixed(16, fraction=20)
    assert q.describe()["format"] == "<-4,20>"
    assert q(torch.tensor([1.0, -1.0])).tolist() == [2**-5 - 2**-20, -(2**-5)]
    assert fixed(16, integer=-4).fraction == 20


def test_stochastic_rounding_is_unbiased_between_two_neighbours() -> None:
    n = 40000
    for value, below in ((0.3, 0.25), (-0.3, -0.5), (1.7, 1.5)):
        y = fixed(rounding="stochastic")(torch.full((n,), value))
        assert set(y.tolist()) <= {below, below + 0.25}
        spread = math.sqrt((value - below) * (below + 0.25 - value) / n)
        assert abs(float(y.double().mean()) - value) < 5 * spread


def test_stochastic_rounding_is_nearest_in_eval_mode_and_follows_its_generator() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    q = fixed(rounding="stochastic").eval()
    assert torch.equal(q(x), fixed()(x))
    one, same, other = (fixed(rounding="stochastic", seed=s)(x) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_gradient_is_1_saturated_values_included() -> None:
    x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    fixed()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


@given(
    st.integers(2, 24),
    st.integers(-4, 8),
    st.sampled_from(ROUNDINGS),
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20),
)
def test_grid(bits: int, integer: int, rounding: str, values: list[float]) -> None:
    q, x = fixed(bits, integer=integer, rounding=rounding), torch.tensor(values)
    y = q(x)
    step, top = 2.0 ** (integer - bits), 2.0 ** (integer - 1)
    assert y.min() >= -top
    assert y.max() <= top - step
    assert torch.equal((y / step).round() * step, y)
    inside = (x >= -top) & (x <= top - step)
    assert ((y - x).abs()[inside] <= (step / 2 if rounding == "nearest" else step)).all()
    assert torch.equal(q(y), y)  # what is on the grid stays, whatever the noise
    assert torch.equal(q.grid(y).values(q.codes(y)), y)


def test_large_numbers_on_the_grid_are_not_moved_by_the_noise() -> None:
    x = torch.full((200000,), 2.0**22 + 1)
    assert torch.equal(fixed(24, fraction=0, rounding="stochastic")(x), x)


def test_wide_words_refuse_bf16() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="precision=fp32"):
        fixed(16)(x)
    assert fixed(8)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 25}, {"fraction": 99}, {"rounding": "up"}])
def test_arguments_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        fixed(**options)  # type: ignore[arg-type]


def descend(rounding: str, steps: int) -> list[float]:
    """Minimize (w - 0.37)^2 / 2 from 0.9 with rate 0.1, w stored in steps of 1/16; all w."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.9)
    net = nn.Sequential(QuantLayer(layer))
    hook = QuantizeUpdate(lambda owner, site: fixed(8, fraction=4, rounding=rounding))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = State(model=net, generator=torch.Generator(), optimizer=optimizer)
    hook.before_train(state)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        (net(torch.ones(1, 1)) - 0.37).square().div(2).sum().backward()
        hook.after_backward(state)
        optimizer.step()
        hook.after_step(state)
        path.append(next(net.parameters()).item())
    return path


def test_nearest_rounding_stalls_where_the_update_is_below_half_a_step() -> None:
    path = descend("nearest", 50)
    assert path[-1] == path[10] == 0.625  # 0.1 * (0.625 - 0.37) = 0.0255 < 1/32
    assert abs(path[-1] - 0.37) > 0.2


def test_stochastic_rounding_arrives_on_average() -> None:
    path = descend("stochastic", 1000)
    assert all(w * 16 == int(w * 16) for w in path)
    assert abs(sum(path[500:]) / 500 - 0.37) < 0.03


def trained(**options: object) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """Two steps of an MLP of quantized layers with a batch-norm between them; the last gradient of the first weight."""
    torch.manual_seed(0)
    net = nn.Sequential(QuantLayer(nn.Linear(5, 4)), nn.BatchNorm1d(4), QuantLayer(nn.Linear(4, 3)))

    def grid(owner: nn.Module, site: str) -> FixedPoint:
        return FixedPoint(owner, site, bits=8, fraction=6, rounding="stochastic")

    hook = QuantizeUpdate(grid, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = State(model=net, generator=torch.Generator(), optimizer=optimizer)
    hook.before_train(state)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(6, 5)).square().sum().backward()
        hook.after_backward(state)
        optimizer.step()
        hook.after_step(state)
    first = net[0].weight
    assert isinstance(first, Tensor)
    assert first.grad is not None
    return net, optimizer, first.grad


def on_grid(x: Tensor, fraction: int = 6) -> bool:
    return torch.equal((x * 2**fraction).round(), x * 2**fraction)


def test_weights_and_biases_have_no_float_copy() -> None:
    net, optimizer, grad = trained()
    assert {name: on_grid(p) for name, p in net.named_parameters()} == {
        "0.weight": True,
        "0.bias": True,
        "1.weight": False,
        "1.bias": False,
        "2.weight": True,
        "2.bias": True,
    }
    assert not on_grid(grad)
    assert not on_grid(optimizer.state[net.get_parameter("0.weight")]["momentum_buffer"])


def test_gradients_and_momentum_on_the_grid_when_asked() -> None:
    net, optimizer, grad = trained(grad=lambda owner, site: FixedPoint(owner, site, bits=8, fraction=3), momentum=True)
    assert on_grid(grad, 3)
    assert on_grid(optimizer.state[net.get_parameter("0.weight")]["momentum_buffer"])
    assert not on_grid(optimizer.state[net.get_parameter("1.weight")]["momentum_buffer"])


@pytest.mark.parametrize("momentum", [False, True])
def test_workers_hold_what_the_first_one_rounded(momentum: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draws numbers of its own, which would carry their weights and momenta apart."""
    sent: list[Tensor] = []

    def step(rank: int, flow: Callable[[Tensor], object] | None) -> list[Tensor]:
        """All that is stored after one step; `flow` is what the other workers see of it."""
        torch.manual_seed(0)
        net = nn.Sequential(QuantLayer(nn.Linear(5, 4)), QuantLayer(nn.Linear(4, 3, bias=False)))
        hook = QuantizeUpdate(lambda owner, site: fixed(8, fraction=6, rounding="stochastic"), momentum=momentum)
        hook.quantizer.generator = torch.Generator().manual_seed(rank)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        state = State(model=net, generator=torch.Generator(), optimizer=optimizer)
        monkeypatch.setattr(dist, "is_initialized", lambda: flow is not None)
        monkeypatch.setattr(dist, "broadcast", lambda flat, source: flow(flat) if source == 0 and flow else None)
        hook.before_train(state)
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        hook.after_step(state)
        moments = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
        return [p.detach() for p in net.parameters()] + moments * momentum

    alone = [step(rank, None) for rank in (0, 1)]
    assert not any(a.equal(b) for a, b in zip(*alone, strict=True))
    first = step(0, lambda flat: sent.append(flat.clone()))
    other = step(1, lambda flat: flat.copy_(sent.pop(0)))
    assert not sent
    for a, b, c in zip(first, other, alone[0], strict=True):
        assert a.equal(b)
        assert a.equal(c)
