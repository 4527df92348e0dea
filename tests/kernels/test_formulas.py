"""kernels=compile: the quantizers' formulas under torch.compile, against the formulas as they stand."""

import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from qbench import kernels
from qbench.methods.shared.binary import Sign
from qbench.methods.shared.dorefa_activation import DoReFaActivation
from qbench.methods.shared.dorefa_weight import DoReFaWeight
from qbench.methods.shared.lsq import LSQ
from qbench.methods.shared.pact import PACT
from qbench.models.mobilenet import MobileNetV2
from qbench.quant import quantizer
from qbench.quant.layers import QuantLayer, quantized_weights
from qbench.quant.method import Rule
from qbench.quant.surgery import quantize
from qbench.quant.uniform import Uniform

# torch's own, while it loads its compiler
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
CONV = nn.Conv2d(1, 1, 1)
SHAPES = [(2, 3), (17,), (5, 3, 7, 9), (2, 600, 2, 3), (6, 8, 1, 1), (1, 1, 9, 9), (4, 20, 13, 13), (1,), (0,), ()]


def lsq(signed: bool = False) -> LSQ:
    q = LSQ(CONV, "input", bits=4)
    q.signed = signed
    nn.init.constant_(q.step, 0.17)
    return q


# Each with the number of formulas that it has.
QUANTIZERS: dict[str, tuple[Callable[[], quantizer.Quantizer], int]] = {
    "pact": (lambda: PACT(nn.ReLU(), "replace", bits=4, alpha=1.3), 2),
    "lsq": (lsq, 2),
    "lsq signed": (partial(lsq, True), 2),
    "dorefa": (lambda: DoReFaActivation(nn.ReLU(), "replace", bits=3), 1),
    "uniform": (lambda: Uniform(CONV, "input", bits=4), 1),
    "sign": (lambda: Sign(QuantLayer(CONV), "input"), 1),
}


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with kernels.using("compile") as tier:
        assert tier == kernels.tier() == "compile"
        yield


def gradients(module: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], g)]


def added_up(module: nn.Module, x: Tensor, g: Tensor) -> list[float]:
    """Of the gradient of each parameter, which is a sum over x: at least the sum of its terms' absolute values.

    A term is largest where x saturates. What rounding does to a sum, in whatever order a processor takes it, is a share
    of this, and not of what is left of the sum after terms of both signs.
    """
    ends = [gradients(module, torch.full_like(x, end), g.abs())[2:] for end in (-1e3, 1e3)]
    return [max(t.abs().max().item() for t in pair) for pair in zip(*ends, strict=True)]


def inputs() -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x, g = (torch.randn(shape, generator=random) for _ in range(2))
        bounds = torch.tensor([0.0, 1.0, -1.0, 1.3, 0.17 * 15])  # ties and saturation
        x.view(-1)[: bounds.numel()] = bounds[: x.numel()]
        yield x, g
        if len(shape) == 4:
            yield x.contiguous(memory_format=torch.channels_last), g
            yield x[::2, ::2], g[::2, ::2]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_and_gradients_of_any_shape_from_two_compilations(name: str) -> None:
    make, formulas = QUANTIZERS[name]
    q, before = make(), counters["stats"]["unique_graphs"]
    for x, g in inputs():
        ours = gradients(q, x, g)
        with kernels.using("torch"):
            theirs = gradients(q, x, g)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        with kernels.using("torch"):
            bounds = added_up(q, x, g)
        for a, b, bound in zip(ours[2:], theirs[2:], bounds, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, bound))
    assert kernels.tier() == "compile"
    assert 0 < counters["stats"]["unique_graphs"] - before <= 2 * formulas


@pytest.mark.parametrize("name", ["pact", "sign"])
def test_bf16_is_cast_inside(name: str) -> None:
    q = QUANTIZERS[name][0]()
    assert q.casts
    x, g = torch.randn(6, 8, 9, 9).bfloat16(), torch.randn(6, 8, 9, 9).bfloat16()
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    ours = gradients(q, x, g)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours[:2])
    with kernels.using("torch"):
        theirs = gradients(q, x, g)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_net_of_many_shapes_makes_torch_compile_each_formula_twice_at_most() -> None:
    """MobileNetV2, trained one step as it is and one as it was compiled."""
    rules = [Rule(weight=partial(LSQ, bits=4), input=partial(LSQ, bits=8)), Rule(kind="ReLU*", keep="a ReLU")]
    grads: list[list[Tensor]] = []
    before = counters["stats"]["unique_graphs"]
    for mode in ("compile", "torch"):
        torch.manual_seed(0)
        net = MobileNetV2(channels=3, classes=10, size=16, width=0.25)
        quantize(net, rules)
        x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
        with kernels.using(mode), quantized_weights(net):
            F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), y).backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    shapes = {tuple(p.shape) for p in net.parameters()}
    assert len(shapes) > 30
    # weights and activations have bounds of their own, of which 0 is one: each formula once for either
    assert counters["stats"]["unique_graphs"] - before <= 2 * 2
    assert len(grads[0]) == len(grads[1]) > 100
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


def test_all_bits_numbers_and_sizes_together_stay_compiled() -> None:
    """Of a formula torch compiles eight versions and no more."""
    before = counters["stats"]["unique_graphs"]
    for bits, signed, dtype, bf16, count in itertools.product(
        (2, 3, 4, 8), (True, False), (torch.float32, torch.bfloat16), (True, False), (50, 9000)
    ):
        q = LSQ(CONV, "input", bits=bits)
        q.signed = signed
        nn.init.constant_(q.step, 0.17)
        x = torch.randn(count).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y, *_ = gradients(q, x, torch.ones_like(x))
        with kernels.using("torch"):
            assert y.equal(q(x))
    assert kernels.tier() == "compile"
    assert counters["stats"]["unique_graphs"] - before <= 12


def test_the_backward_pass_may_run_on_another_thread() -> None:
    """As it does on a GPU."""
    q, x = QUANTIZERS["pact"][0](), torch.randn(40, requires_grad=True)
    y, found = q(x), []
    thread = Thread(target=lambda: found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0]))
    thread.start()
    thread.join()
    assert found[0].equal(((x >= 0) & (x < 1.3)).float())
    assert kernels.tier() == "compile"


def test_where_nothing_can_be_compiled_it_is_told_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("Cannot find a working triton installation\nmore")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    kernels._say.cache_clear()
    x, g = torch.randn(4, 5), torch.randn(4, 5)
    with caplog.at_level(logging.WARNING):
        for name in ("pact", "lsq"):
            q = QUANTIZERS[name][0]()
            ours = gradients(q, x, g)
            with kernels.using("torch"):
                assert all(a.equal(b) for a, b in zip(ours, gradients(q, x, g), strict=True))
    assert [r.getMessage() for r in caplog.records] == [
        "kernels=compile is not used: Cannot find a working triton installation; "
        "training is slower, and otherwise the same up to rounding"
    ]
    assert kernels.tier() == "torch"
    kernels._say.cache_clear()


def test_weights_of_all_layers_at_once_are_not_touched() -> None:
    w = torch.randn(4, 3, 3, 3)
    q = DoReFaWeight(nn.Identity(), "weight", bits=4)
    (hat,) = DoReFaWeight.quantize_all([w], [q])
    with kernels.using("torch"):
        assert DoReFaWeight.quantize_all([w], [q])[0].equal(hat)


def test_a_quantizer_of_its_own_over_one_that_casts_is_given_float32() -> None:
    class Half(PACT):
        def quantize(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return super().quantize(x) / 2

    q = Half(nn.ReLU(), "replace", bits=2, alpha=1.0)
    assert not q.casts
    assert q(torch.tensor([3.0, 3.0]).bfloat16()).tolist() == [0.5, 0.5]
