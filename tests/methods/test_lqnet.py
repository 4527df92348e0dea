"""LQ-Nets against numbers worked out by hand and against NumPy's least squares (arXiv 1807.10029)."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qbench.methods.lqnet import LearnBases, LQInput, LQWeight, levels, refit
from qbench.quant.layers import QuantLayer
from qbench.quant.method import State


def weight(channels: int = 1, bits: int = 2, basis: list[list[float]] | None = None, **options: object) -> LQWeight:
    q = LQWeight(QuantLayer(nn.Linear(4, channels)), "weight", bits=bits, **options)  # type: ignore[arg-type]
    if basis is not None:
        q.basis.copy_(torch.tensor(basis))
    return q


def inputs(bits: int = 2, basis: list[float] | None = None, **options: object) -> LQInput:
    q = LQInput(nn.Linear(4, 1), "input", bits=bits, **options)  # type: ignore[arg-type]
    if basis is not None:
        q.basis.copy_(torch.tensor([basis]))
    return q


def qem(x: np.ndarray, basis: np.ndarray, signed: bool) -> np.ndarray:
    """One turn by enumeration and numpy.linalg.lstsq, with the ridge as rows of their own."""
    codes = np.array(list(product([-1, 1] if signed else [0, 1], repeat=len(basis))), dtype=float)
    b = codes[np.abs(x[:, None] - codes @ basis).argmin(1)]
    ridge = np.sqrt(1e-4)
    a = np.concatenate([b, ridge * np.eye(len(basis))])
    return np.linalg.lstsq(a, np.concatenate([x, ridge * basis]), rcond=None)[0]


def test_two_bit_weights_by_hand() -> None:
    # channel 0: +-1 +-2, levels -3, -1, 1, 3 and ends -2, 0, 2; channel 1: +-.5 +-.25
    q = weight(2, basis=[[1, 2], [0.5, 0.25]])
    w = torch.tensor([[-2.5, -1.9, 0.1, 2.2], [-0.8, -0.3, 0.2, 0.6]], requires_grad=True)
    hat = q(w)
    assert hat.tolist() == [[-3, -1, 1, 3], [-0.75, -0.25, 0.25, 0.75]]
    hat.backward(g := torch.arange(8.0).view(2, 4))
    assert w.grad is not None
    assert torch.equal(w.grad, g)
    assert q.codes(w).tolist() == [[0, 1, 2, 3], [0, 2, 1, 3]]  # bit 0 is v_1: 1 = (+, -)
    assert q.grid(w).values(q.codes(w)).tolist() == hat.tolist()


def test_halfway_goes_to_the_lower_level() -> None:
    assert weight(basis=[[1, 2]])(torch.tensor([[-2.0, 0.0, 2.0, 2.1]])).tolist() == [[-3, -1, 1, 3]]
    assert inputs(basis=[1, 2])(torch.tensor([[0.5, 1.5, 2.5, 2.6]])).tolist() == [[0, 1, 2, 3]]


def test_two_bit_inputs_by_hand() -> None:
    q, x = inputs(basis=[0.5, 1.5]), torch.tensor([[0.0, 0.2, 0.9, 1.1, 1.6, 1.8, 2.0, 2.5]], requires_grad=True)
    hat = q.eval()(x)  # levels 0, .5, 1.5, 2; ends .25, 1, 1.75
    assert hat.tolist() == [[0, 0, 0.5, 1.5, 1.5, 2, 2, 2]]
    hat.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert q.codes(x).tolist() == [[0, 0, 1, 2, 2, 3, 3, 3]]
    assert q.levels == 4


def test_a_turn_by_hand() -> None:
    # -2.6, .8, 2.9, 3.3 have the codes --, -+, ++, ++ of the basis (1, 2); B B^T = ((4, 2), (2, 4)), B x = (8, 9.6)
    x, want = torch.tensor([[-2.6, 0.8, 2.9, 3.3]]), (6.4 / 6, 11.2 / 6)
    assert refit(x, torch.tensor([[1.0, 2.0]]), True)[0].tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turns_are_numpys_least_squares(bits: int, signed: bool) -> None:
    random = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 500, generator=random)
    x = x if signed else x.relu()
    basis = torch.rand(3, bits, generator=random) + 2.0 ** torch.arange(bits) / 2**bits
    found = refit(x, basis, signed, turns=3)
    for row in range(3):
        want = basis[row].double().numpy()
        for _ in range(3):
            want = qem(x[row].double().numpy(), want, signed)
        np.testing.assert_allclose(found[row].numpy(), want, rtol=1e-4, atol=1e-5)


def error(x: Tensor, basis: Tensor, signed: bool) -> Tensor:
    rising = levels(basis, signed)[0]
    return (x[..., None] - rising[:, None]).abs().amin(-1).square().sum(1)


@pytest.mark.parametrize("signed", [True, False])
def test_no_turn_increases_the_error(signed: bool) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    basis = torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    last = error(x if signed else x.abs(), basis, signed)
    for _ in range(8):
        basis = refit(x if signed else x.abs(), basis, signed)
        now = error(x if signed else x.abs(), basis, signed)
        assert (now <= last * (1 + 1e-5)).all()
        last = now


def test_a_bit_that_no_value_uses_keeps_its_part() -> None:
    assert refit(torch.tensor([[1.0, 1.2, 0.0]]), torch.tensor([[1.0, 50.0]]), False)[0].tolist() == pytest.approx(
        [1.1, 50], abs=1e-3
    )


def test_weights_of_a_float_net_start_near_their_best_basis() -> None:
    w = (
        torch.randn(6, 400, generator=torch.Generator().manual_seed(3))
        * torch.tensor([0.1, 0.2, 0.5, 1, 2, 4])[:, None]
    )
    q = weight(6)
    q.calibrate(w)
    # the best four levels of a Gaussian, +-.453 and +-1.51, leave 0.1175 of its variance
    assert ((q(w) - w).square().mean(1) / w.square().mean(1) < 0.135).all()
    plain = weight(6, init="scratch")
    plain.calibrate(w)
    sigma = w.square().mean(1).sqrt()
    torch.testing.assert_close(plain.basis, sigma[:, None] * torch.tensor([0.6745 / 2, 0.6745]))


def test_inputs_start_as_the_authors_or_at_what_they_are() -> None:
    x = 3 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(4)).relu()
    told, free = inputs(3, init="scratch"), inputs(3)
    for q in (told, free):
        q.calibrate(x)
        q.finish_calibration()
    assert told.basis[0].tolist() == pytest.approx([0.6745 * 2 / 7 * v for v in (1, 2, 4)])
    free.eval()
    assert ((free(x) - x).square().sum() / x.square().sum()).item() < 0.02


def test_a_basis_moves_by_a_tenth_of_the_way_in_training_alone() -> None:
    x = torch.rand(2, 50, generator=torch.Generator().manual_seed(5))
    q = inputs(basis=[0.2, 0.5])
    start, goal = q.basis.clone(), refit(x.reshape(1, -1), q.basis, False)
    before = q(x)
    torch.testing.assert_close(q.basis, 0.9 * start + 0.1 * goal)
    assert torch.equal(before, inputs(basis=[0.2, 0.5]).eval()(x))  # quantized before it moved
    after = q.basis.clone()
    q.eval()(x)
    with torch.no_grad():
        q.train()(x)
    assert torch.equal(q.basis, after)
    q.pieces = (2, 1)
    goal = refit(x.reshape(1, -1), q.basis, False)
    q(x)
    torch.testing.assert_close(q.basis, 0.9**0.5 * after + (1 - 0.9**0.5) * goal)


def test_weights_move_before_each_step() -> None:
    layer = QuantLayer(nn.Linear(4, 2))
    layer.set_weight_quantizer(LQWeight(layer, "weight", bits=2, turns=2))
    q = layer.weight_quantizer
    assert isinstance(q, LQWeight)
    with torch.no_grad():
        layer.weight.add_(torch.randn(2, 4, generator=torch.Generator().manual_seed(6)))
    start = q.basis.clone()
    LearnBases().before_step(State(nn.Sequential(layer), torch.Generator()))
    torch.testing.assert_close(q.basis, 0.9 * start + 0.1 * refit(layer.weight.detach(), start, True, 2))
    q.enabled, after = False, q.basis.clone()
    LearnBases().before_step(State(nn.Sequential(layer), torch.Generator()))
    assert torch.equal(q.basis, after)


def test_an_input_of_both_signs() -> None:
    q = inputs(basis=[0.5, 1.0])
    q.calibrate(torch.tensor([[-1.0, 1.0]]))
    x = torch.tensor([[-2.0, -1.4, -0.3, 0.2, 1.4, 1.6]], requires_grad=True)
    hat = q.eval()(x)  # levels -1.5, -.5, .5, 1.5
    assert hat.tolist() == [[-1.5, -1.5, -0.5, 0.5, 1.5, 1.5]]
    hat.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 0]]


def test_memory_in_channels_last_order_gives_the_same() -> None:
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(7))
    a, b = inputs(basis=[0.2, 0.5]), inputs(basis=[0.2, 0.5])
    assert torch.equal(a(x), b(x.to(memory_format=torch.channels_last)))
    torch.testing.assert_close(a.basis, b.basis)


def test_dead_tensors_stay_finite() -> None:
    q = weight()
    q.calibrate(torch.zeros(1, 4))
    q.learn(torch.zeros(1, 4))
    assert q(torch.zeros(1, 4)).tolist() == [[0] * 4]
    free = inputs()
    free.calibrate(torch.zeros(1, 4))
    free.finish_calibration()
    assert free(torch.zeros(1, 4)).tolist() == [[0] * 4]
    assert free.basis.isfinite().all()


@pytest.mark.parametrize("options", [{"bits": 5}, {"decay": 1.0}, {"turns": 0}])
def test_arguments_out_of_range(options: dict[str, float]) -> None:
    for make in (weight, inputs):
        with pytest.raises(ValueError, match="must be"):
            make(**options)  # type: ignore[arg-type]
