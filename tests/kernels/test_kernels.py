"""Every kernel against the reference in plain torch: values and gradients, memory formats, any number of channels."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench import kernels
from qbench.kernels import build
from qbench.kernels.backend import ACTIVATIONS, KINDS
from qbench.kernels.functions import fused
from qbench.kernels.fuse import RELUS
from qbench.methods.bethge import SignWeight
from qbench.methods.bnn import BinaryActivation
from qbench.methods.irnet import LibraWeight
from qbench.methods.reactnet import RPReLU, RSign
from qbench.methods.shared.binary import BinaryWeight, HardTanh, Sign
from qbench.methods.shared.dorefa_activation import DoReFaActivation
from qbench.methods.shared.dorefa_weight import DoReFaWeight
from qbench.methods.shared.lsq import LSQ
from qbench.methods.shared.pact import PACT
from qbench.methods.xnor import XnorLayer
from qbench.models.mobilenet import MobileNetV2
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import quantizer
from qbench.quant.layers import QuantLayer, quantized_weights
from qbench.quant.method import Rule
from qbench.quant.surgery import quantize
from qbench.quant.uniform import Uniform

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SHAPES = [(5, 3, 7, 9), (2, 600, 2, 3), (6, 8, 1, 1), (40, 20, 13, 13)]


@pytest.fixture
def tier() -> Iterator[str]:
    with kernels.using("cpp") as found:
        assert found == "cpp"
        yield found


def pact(bits: int = 4) -> PACT:
    return PACT(nn.ReLU(), "replace", bits=bits, alpha=1.3)


def lsq(bits: int = 4, signed: bool = False) -> LSQ:
    q = LSQ(nn.Conv2d(1, 1, 1), "input", bits=bits)
    q.signed = signed
    nn.init.constant_(q.step, 0.17)
    return q


def sign(gradient: str) -> Sign:
    q = Sign(QuantLayer(nn.Conv2d(1, 1, 1)), "input", gradient=gradient, clip=1.3, omega=1.1)
    if gradient == "tanh":
        assert q.slope is not None
        q.slope.t.fill_(3.0)
    return q


def rsign(gradient: str, channels: int) -> RSign:
    q = RSign(QuantLayer(nn.Conv2d(channels, 1, 1)), "input", gradient=gradient)
    nn.init.normal_(q.alpha)
    return q


def rprelu(channels: int) -> RPReLU:
    m = RPReLU(nn.ReLU(), "replace", channels=channels)
    for p in m.parameters():
        nn.init.normal_(p)
    return m


QUANTIZERS: dict[str, Callable[[], quantizer.Quantizer]] = {
    "pact": pact,
    "pact1": partial(pact, 1),
    "dorefa": lambda: DoReFaActivation(nn.ReLU(), "replace", bits=3),
    "lsq": lsq,
    "lsq signed": partial(lsq, 8, True),
    "uniform": lambda: Uniform(nn.Conv2d(1, 1, 1), "input", bits=4),
    "sign": lambda: Sign(QuantLayer(nn.Conv2d(1, 1, 1)), "input"),
    "sign inclusive": lambda: Sign(QuantLayer(nn.Conv2d(1, 1, 1)), "input", inclusive=True),
    **{f"sign {g}": partial(sign, g) for g in ("identity", "clipped", "polynomial", "tanh", "fourier")},
}


def gradients(module: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    found = torch.autograd.grad(y, [x, *module.parameters()], g)
    return [y.detach(), *found]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (40, 20, 13, 13)])
def test_a_quantizer_alone(tier: str, name: str, shape: tuple[int, ...]) -> None:
    q = QUANTIZERS[name]()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if x.numel():  # the bounds themselves
        x.view(-1)[:5] = torch.tensor([0.0, 1.0, -1.0, 1.3, 0.17 * 15])
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = gradients(q, x, g)
    with kernels.using("torch"):
        theirs = gradients(q, x, g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item() if b.numel() else 0))


@pytest.mark.parametrize("gradient", ["identity", "clipped", "polynomial", "tanh", "fourier"])
@pytest.mark.parametrize("shape", [(7, 5), (6, 3, 11), (40, 20, 13, 13)])
def test_a_sign_with_a_threshold_per_channel(tier: str, gradient: str, shape: tuple[int, ...]) -> None:
    for layout in FORMATS if len(shape) == 4 else ["contiguous"]:
        q, x = rsign(gradient, shape[1]), torch.randn(shape).contiguous(memory_format=FORMATS[layout])
        g = torch.randn(shape)
        ours = gradients(q, x, g)
        with kernels.using("torch"):
            theirs = gradients(q, x, g)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", ["pact", "lsq", "sign"])
def test_bf16_stays_bf16_and_differs_by_no_more_than_its_rounding(tier: str, name: str) -> None:
    q, x = QUANTIZERS[name](), torch.randn(50, 8, 9, 9).bfloat16()
    y = q(x)
    with kernels.using("torch"):
        assert torch.equal(y, q(x))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [pact, lsq, partial(lsq, 8, True)])
def test_values_on_the_edge_of_two_levels_fall_as_in_torch(tier: str, make: Callable[[], quantizer.Quantizer]) -> None:
    q = make()
    (scale,) = q.parameters()
    for value in torch.linspace(0.5, 3, 300):
        with torch.no_grad():
            scale.fill_(value)
            step = scale / 15 if isinstance(q, PACT) else scale
            edges = (torch.arange(-4, 16) + 0.5) * step
            x = torch.stack([edges, edges.nextafter(torch.tensor(9e9)), edges.nextafter(torch.tensor(-9e9))])
            y = q(x)
            with kernels.using("torch"):
                assert y.equal(q(x)), value


def test_a_nan_shows(tier: str) -> None:
    for name, make in QUANTIZERS.items():
        assert make()(torch.tensor([1.0, torch.nan]))[1].isnan(), name  # the reference of sign says -1 instead


class Reference(nn.Module):
    """What `fused` does, in plain torch."""

    def __init__(self, channels: int, act: nn.Module | None, behind: quantizer.Quantizer | None) -> None:
        super().__init__()
        self.bn, self.act, self.behind = nn.BatchNorm2d(channels), act or nn.Identity(), behind
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)

    def forward(self, x: Tensor, r: Tensor | None) -> list[Tensor]:
        y = self.bn(x) if r is None else self.bn(x) + r
        y = self.act(y)
        return [y] if self.behind is None else [y, self.behind(y)]


def compiled(m: Reference, x: Tensor, r: Tensor | None) -> list[Tensor]:
    act = RELUS.get(type(m.act))
    if hasattr(m.act, "kernel"):
        act = m.act.kernel(x.shape)  # type: ignore[union-attr, operator]
    second = None if m.behind is None else m.behind.kernel(x.shape)
    want = (True, second is not None)
    found = fused(quantizer.fast.backend, x, norm=m.bn, residual=r, activation=act, quantizer=second, want=want)
    return [t for t in found if t is not None]


CASES: dict[str, Callable[[int], tuple[nn.Module | None, quantizer.Quantizer | None]]] = {
    "none": lambda c: (None, None),
    "relu": lambda c: (nn.ReLU(), None),
    "relu6": lambda c: (nn.ReLU6(), None),
    "pact": lambda c: (pact(), None),
    "pact, lsq": lambda c: (pact(), lsq()),
    "relu, lsq": lambda c: (nn.ReLU(), lsq()),
    "relu, uniform": lambda c: (nn.ReLU(), QUANTIZERS["uniform"]()),
    "lsq": lambda c: (None, lsq(4, True)),
    "sign": lambda c: (None, QUANTIZERS["sign"]()),
    "hardtanh, tanh": lambda c: (HardTanh(nn.ReLU(), "replace"), sign("tanh")),
    "polynomial": lambda c: (None, sign("polynomial")),
    "prelu": lambda c: (rprelu(c), None),
    "prelu, threshold": lambda c: (rprelu(c), rsign("polynomial", c)),
    "threshold": lambda c: (None, rsign("clipped", c)),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_batch_norm_and_what_follows(tier: str, case: str, shape: tuple[int, ...], layout: str, residual: bool) -> None:
    torch.manual_seed(0)
    theirs = Reference(shape[1], *CASES[case](shape[1])).double()
    ours = copy.deepcopy(theirs).float()
    x = torch.randn(shape).mul_(3).add_(5).to(memory_format=FORMATS[layout])
    r = torch.randn(shape).to(memory_format=FORMATS[layout]) if residual else None
    inputs = [
        [t.clone().to(d).requires_grad_() for t in (x, r) if t is not None] for d in (torch.float32, torch.double)
    ]
    a = compiled(ours, inputs[0][0], inputs[0][1] if residual else None)
    # the reference in double, with the quantizers' own float32 replaced: rounding must not decide where a value falls
    with kernels.using("torch"):
        b = theirs(inputs[1][0], inputs[1][1] if residual else None)
    same = torch.ones(shape, dtype=torch.bool)
    for u, v in zip(a, b, strict=True):
        same &= (u - v).abs() < 1e-4
    assert same.float().mean() > 0.999  # a value on the edge of two levels may fall on either side
    g = [torch.randn(shape).to(memory_format=FORMATS[layout]) * same for _ in a]
    torch.autograd.backward(a, g)
    torch.autograd.backward(b, [t.double() for t in g])
    pairs = [*zip(inputs[0], inputs[1], strict=True), *zip(ours.parameters(), theirs.parameters(), strict=True)]
    for p, q in pairs:
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=2e-5, atol=3e-6 * max(1.0, q.grad.abs().max().item()))
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=2e-6, atol=2e-6)


def test_the_sum_does_not_depend_on_the_threads(tier: str) -> None:
    x, g = torch.randn(64, 16, 16, 16).to(memory_format=torch.channels_last), torch.randn(64, 16, 16, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            m = Reference(16, pact(), None)
            leaf = x.clone().requires_grad_()
            (y,) = compiled(m, leaf, None)
            y.backward(g)
            found.append([y, leaf.grad, m.bn.weight.grad, m.act.alpha.grad, m.bn.running_var])  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]


FIRST_LAST = [Rule(match="@first", keep="first"), Rule(match="@last", keep="last")]
RULES: dict[str, list[Rule]] = {
    "float": [],
    "pact": [
        *FIRST_LAST,
        Rule(weight=partial(DoReFaWeight, bits=4)),
        Rule(kind="ReLU*", replace=partial(PACT, bits=4, alpha=2.0)),
    ],
    "lsq": [Rule(weight=partial(LSQ, bits=4), input=partial(LSQ, bits=8))],
    "xnor": [
        *FIRST_LAST,
        Rule(replace=XnorLayer, weight=BinaryWeight, input=Sign),
        Rule(kind="ReLU*", replace=lambda module, site: nn.Identity()),
    ],
    "bnn": [*FIRST_LAST, Rule(weight=SignWeight), Rule(kind="ReLU*", replace=BinaryActivation)],
    "reactnet": [
        *FIRST_LAST,
        Rule(weight=BinaryWeight, input=RSign),
        Rule(kind="ReLU*", replace=RPReLU, channels=True),
    ],
}


def net(method: str, make: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make(channels=3, classes=10, size=16)
    quantize(model, RULES[method])
    for q in model.modules():
        if isinstance(q, LSQ) and not q.is_weight:
            q.signed = True
            nn.init.constant_(q.step, 0.03)
    return model.to(memory_format=torch.channels_last)


def trained(model: nn.Module, steps: int, mode: str) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    draw, losses = torch.Generator().manual_seed(0), []
    with kernels.using(mode):
        run = kernels.fuse(model)
        for _ in range(steps):
            x = torch.randn(16, 3, 16, 16, generator=draw).to(memory_format=torch.channels_last)
            y = torch.randint(10, (16,), generator=draw)
            optimizer.zero_grad()
            with quantized_weights(model):
                loss = F.cross_entropy(run(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def exact(model: nn.Module) -> nn.Module:
    """`model` with batch-norms that multiply by a power of 2 and so round once, in whatever order one computes.

    Else the last bit, which differs between the kernels and torch and between processors, decides on which side of a
    level some values fall, and a net of 4-bit activations makes much of that: of MobileNetV2's logits by 0.1 to 0.4.
    """
    draw = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.eps = 2.0**-10
            m.running_mean.zero_()
            m.running_var.fill_(1 - m.eps)
            with torch.no_grad():
                m.weight.copy_(2.0 ** torch.randint(-1, 2, m.weight.shape, generator=draw))
    return model


NETS: dict[str, Callable[..., nn.Module]] = {
    "resnet": partial(ResNetCIFAR, depth=8),
    "preactivation": partial(ResNetCIFAR, depth=8, shortcut="B", preactivation=True),
    "mobilenet": MobileNetV2,
}


@pytest.mark.parametrize(
    ("method", "make"),
    [(m, n) for m in ("float", "pact", "lsq") for n in NETS.values()]
    + [(m, NETS["preactivation"]) for m in ("xnor", "bnn")]
    + [("reactnet", NETS["resnet"])],
)
def test_some_steps_of_a_net(tier: str, method: str, make: Callable[..., nn.Module]) -> None:
    ours, theirs = net(method, make), net(method, make)
    keys = list(ours.state_dict())
    a, b = trained(ours, 3, tier), trained(theirs, 3, "torch")
    assert a[0] == pytest.approx(b[0], rel=1e-5 if method == "float" else 0.02)  # a flipped code moves the loss
    assert a == pytest.approx(b, rel=0.05 if method == "float" else 0.1)
    assert list(ours.state_dict()) == keys
    run = kernels.fuse(exact(ours.eval()))
    x = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = run(x)
        with kernels.using("torch"):
            expected = ours(x)
    assert run.graph is not None  # type: ignore[attr-defined]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_twice_the_same_is_bit_for_bit_the_same(tier: str) -> None:
    make = partial(ResNetCIFAR, depth=8)
    assert trained(net("pact", make), 3, tier) == trained(net("pact", make), 3, tier)


def test_a_disabled_quantizer_a_hook_and_a_replaced_module_count(tier: str) -> None:
    model = net("lsq", partial(ResNetCIFAR, depth=8))
    run, x = kernels.fuse(model.eval()), torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        quantized = run(x)
        for q in model.modules():
            if isinstance(q, LSQ) and not q.is_weight:
                q.enabled = False
        open_ = run(x)
        torch.testing.assert_close(open_, model(x))
        assert not torch.allclose(open_, quantized, atol=1e-3)
        heard: list[Tensor] = []
        handle = model.get_submodule("layer1.0.bn1").register_forward_hook(lambda m, args, out: heard.append(out))
        run(x)
        handle.remove()
        assert len(heard) == 1
        model.set_submodule("layer1.0.relu1", nn.Tanh())
        torch.testing.assert_close(run(x), model(x))


CONV = nn.Conv2d(4, 8, 3)
WEIGHTS: dict[str, Callable[[], list[quantizer.Quantizer]]] = {
    "dorefa": lambda: [
        DoReFaWeight(CONV, "weight", bits=b, detach=d) for b, d in ((4, False), (2, True), (1, False), (8, False))
    ],
    "lsq": lambda: [LSQ(CONV, "weight", bits=b) for b in (2, 4, 8, 4)],
    "xnor": lambda: [BinaryWeight(QuantLayer(CONV), "weight") for _ in range(4)],
    "xnor, two kinds": lambda: [BinaryWeight(QuantLayer(CONV), "weight", gradient=g) for g in ("exact", "paper") * 2],
    "irnet": lambda: [LibraWeight(QuantLayer(CONV), "weight") for _ in range(4)],
    "bethge": lambda: [SignWeight(QuantLayer(CONV), "weight", scale=s) for s in (True, False) * 2],
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("layout", FORMATS)
def test_all_weights_at_once_are_each_alone(name: str, layout: str) -> None:
    draw, qs = torch.Generator().manual_seed(0), WEIGHTS[name]()
    ws = [
        torch.randn(n, 4, 3, 3, generator=draw).contiguous(memory_format=FORMATS[layout]).requires_grad_()
        for n in (8, 8, 16, 5)
    ]
    for q, w in zip(qs, ws, strict=True):
        q.calibrate(w)
        q.finish_calibration()
    gs = [torch.randn(w.shape, generator=draw) for w in ws]
    together, alone = type(qs[0]).quantize_all(ws, qs), [q(w) for q, w in zip(qs, ws, strict=True)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    leaves = [*ws, *(p for q in qs for p in q.parameters())]
    for a, b in zip(torch.autograd.grad(together, leaves, gs), torch.autograd.grad(alone, leaves, gs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_moments_of_channels(tier: str) -> None:
    for shape in [*SHAPES, (64, 10)]:
        for layout in FORMATS if len(shape) == 4 else ["contiguous"]:
            x = torch.randn(shape).mul_(3).add_(2).contiguous(memory_format=FORMATS[layout]).requires_grad_()
            y = x.detach().double().requires_grad_()
            ours, theirs = quantizer.fast.moments(x), torch.var_mean(y, [0, *range(2, y.dim())], correction=0)[::-1]
            g = [torch.randn(shape[1]) for _ in ours]
            torch.autograd.backward(ours, g)
            torch.autograd.backward(theirs, [t.double() for t in g])
            for a, b in (*zip(ours, theirs, strict=True), (x.grad, y.grad)):
                torch.testing.assert_close(a, b, check_dtype=False, rtol=2e-6, atol=2e-6)


def test_a_subclass_with_a_quantize_of_its_own_has_no_kernel() -> None:
    class Half(PACT):
        def quantize(self, x: Tensor) -> Tensor:
            return super().quantize(x) / 2

    q = Half(nn.ReLU(), "replace", bits=2, alpha=1.0)
    assert q.kernel(torch.Size([3])) is None
    with kernels.using("auto"):
        assert q(torch.tensor([3.0])).item() == 0.5


def test_a_batch_norm_of_one_value_per_channel_is_refused_as_torch_refuses_it(tier: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    run, one = kernels.fuse(model), torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(one)
    assert model[0].running_mean.equal(torch.zeros(3))  # type: ignore[union-attr, operator]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(one), model(one))


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="auto, cpp, compile, torch, got 'gpu'"):
        kernels.use("gpu")


@pytest.mark.parametrize(("name", "words"), [("Activation", ACTIVATIONS), ("Kind", KINDS)])
def test_the_kinds_are_numbered_as_in_the_source(name: str, words: tuple[str, ...]) -> None:
    found = re.search(rf"enum {name} {{(.*?)}}", build.SOURCE.read_text())
    assert found is not None
    assert [w.strip().lower() for w in found[1].split(",")] == list(words)


def test_a_tier_of_older_versions_is_answered_in_words(caplog: pytest.LogCaptureFixture) -> None:
    kernels._say.cache_clear()
    with caplog.at_level(logging.WARNING), kernels.using("numba") as tier:
        assert tier == kernels.use("cpp")
    assert [r.getMessage() for r in caplog.records] == [
        "kernels=numba is no longer there, and kernels=cpp does what it did up to rounding"
    ]
    kernels._say.cache_clear()


@pytest.mark.parametrize("setting", [{"CXX": "no-such-compiler"}, {"PATH": "", "CXX": ""}])
def test_without_a_compiler_training_is_told_once_and_goes_on(
    setting: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    kernels._cpp.cache_clear()
    kernels._say.cache_clear()
    try:
        with caplog.at_level(logging.WARNING), kernels.using("cpp") as tier, kernels.using("cpp"):
            assert tier != "cpp"
            assert not kernels.available()["cpp"]
            assert pact()(torch.tensor([9.0])).item() == pytest.approx(1.3)
        assert [r.getMessage().count("no C++ compiler found") for r in caplog.records] == [1]
    finally:
        kernels._cpp.cache_clear()
        kernels._say.cache_clear()
