"""FleXOR: numbers by hand, decoding against GF(2), options, surgery."""

import itertools
import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from yamls import method_of

from qbench.config.recipe import Recipe
from qbench.methods.flexor import FleXOR, Sharpness, decode, wiring_tensor
from qbench.methods.shared import xor_spec
from qbench.methods.shared.xor_spec import XorSpec
from qbench.models.lenet import LeNet5
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import layers, surgery
from qbench.quant.method import Rule, State

M = torch.tensor([[1.0, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])[None]
X = torch.tensor([0.02, -0.05, 0.10])[None, None]
G = torch.tensor([1.0, 0.5, -1.0, 2.0])[None, None]


def _rules(**options: object) -> list[Rule]:
    def factory(layer: nn.Module, site: str) -> FleXOR:
        return FleXOR(layer, site, **({"bits": 0.8} | options))  # type: ignore[arg-type]

    return [Rule(match="@first", keep="first"), Rule(match="@last", keep="last"), Rule(weight=factory)]


def _resnet(**options: object) -> nn.Module:
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=16)
    surgery.quantize(net, _rules(**options))
    return net


# the three schemes


@pytest.mark.parametrize(
    ("mode", "gradient"),
    [
        ("flexor", (-14.415645, 15.728955, -14.699102)),
        ("analog", (-5.983178, 6.801661, -3.121358)),
        ("ste", (-1.5, 2.0, -3.5)),
    ],
)
def test_worked_example(mode: str, gradient: tuple[float, ...]) -> None:
    x = X.clone().requires_grad_()
    y = decode(x, 10.0, M, mode)
    assert y.flatten().tolist() == [1.0, -1.0, 1.0, -1.0]
    y.backward(G)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(), torch.tensor(gradient), atol=2e-5, rtol=0)


def test_equation_6_by_loops() -> None:
    """Random fill with 0 to 6 taps, two planes: the matrix form of the gradient is the sum over gates and taps."""
    generator = torch.Generator().manual_seed(1)
    m = (torch.rand(2, 7, 6, generator=generator) < 0.5).float()
    x = 0.1 * torch.randn(2, 3, 6, generator=generator)
    g = torch.randn(2, 3, 7, generator=generator)
    s, want = 10.0, torch.zeros_like(x)
    for p, k, r in itertools.product(range(2), range(3), range(7)):
        taps = m[p, r].nonzero().flatten().tolist()
        for i in taps:
            others = math.prod(1 if x[p, k, j] >= 0 else -1 for j in taps if j != i)
            slope = s * (1 - math.tanh(s * float(x[p, k, i])) ** 2)
            want[p, k, i] += float(g[p, k, r]) * (-1) ** (len(taps) - 1) * slope * others
    x.requires_grad_()
    decode(x, s, m).backward(g)
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("mode", ["flexor", "ste", "analog"])
def test_decode_is_gf2_for_every_pattern(mode: str) -> None:
    spec = XorSpec(6, 9, None, 2, seed=3)
    bits = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    x = (0.01 * (2.0 * bits - 1)).expand(2, -1, -1)
    y = decode(x, 10.0, wiring_tensor(spec), mode)
    want = torch.stack([(bits @ m.T.long()) % 2 for m in wiring_tensor(spec)])
    assert torch.equal((y + 1) / 2, want.float())


def test_zero_counts_as_plus_one_and_a_flip_flips_every_tapped_output() -> None:
    assert torch.equal(decode(torch.zeros(1, 1, 3), 10.0, M).flatten(), torch.tensor([-1.0, -1.0, -1.0, 1.0]))
    flipped = X * torch.tensor([-1.0, 1, 1])
    assert torch.equal(decode(flipped, 10.0, M) * decode(X, 10.0, M), (1 - 2 * M[:, :, 0])[:, None])


def test_identity_wiring_is_plain_sign_with_tanh_surrogate() -> None:
    x = torch.linspace(-0.5, 0.5, 8).reshape(1, 1, 8).requires_grad_()
    y = decode(x, 5.0, torch.eye(8)[None])
    assert torch.equal(y, torch.where(x >= 0, 1.0, -1.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, 5 * (1 - torch.tanh(5 * x.detach()) ** 2))


def test_counts_stay_exact_under_autocast() -> None:
    x = torch.ones(1, 1, 301)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = decode(x, 1.0, torch.ones(1, 2, 301))
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.ones(1, 1, 2))


# the wiring


@pytest.mark.parametrize("n_in", [8, 12, 16, 20])
@pytest.mark.parametrize("matrix", xor_spec.MATRICES)
@pytest.mark.parametrize("n_tap", [2, 3, None])
def test_wiring(n_in: int, matrix: str, n_tap: int | None) -> None:
    spec = XorSpec(n_in, 20, n_tap, 2, matrix)
    facts = xor_spec.facts(spec)
    for plane in range(2):
        rows = xor_spec.wiring(spec, plane)
        assert len(rows) == 20
        assert all(len(r) == (n_tap or len(r)) > 0 for r in rows)
    if n_tap == 2:
        assert all(r <= n_in - 1 for r in facts["rank"])  # rows of even weight cannot reach the full rank
    if matrix != "random":
        assert facts["duplicate_rows"] == [0, 0]
    if matrix == "covering":
        assert facts["unused_inputs"] == [0, 0]
        assert n_tap != 2 or min(facts["rank"]) >= {8: 7, 12: 10, 16: 13, 20: 15}[n_in]
    assert xor_spec.wiring(spec, 0) != xor_spec.wiring(spec, 1)
    assert xor_spec.wiring(spec, 0) == xor_spec.wiring.__wrapped__(spec, 0)


def test_wiring_is_pinned() -> None:
    """A stored net is read with the wiring of its seed: the drawing must never change."""
    for matrix, rows in PINNED.items():
        assert xor_spec.wiring(XorSpec(16, matrix=matrix), 0)[:4] == rows


PINNED = {"random": ((3, 15), (4, 9), (3, 8), (4, 8)), "covering": ((3, 15), (7, 12), (2, 5), (8, 11))}


@pytest.mark.parametrize(
    ("matrix", "n_in", "mean", "seed_0", "little"),
    [
        ("random", 16, 13.71, 12, 0.097),
        ("covering", 16, 14.77, 15, 0.0),
        ("random", 20, 15.97, 15, 0.001),
        ("covering", 20, 17.75, 18, 0.0),
        ("random", 8, 6.98, 7, 1.0),
    ],
)
def test_the_rank_of_a_random_wiring_is_luck(matrix: str, n_in: int, mean: float, seed_0: int, little: float) -> None:
    """What FleXOR's Table 1 is told by: ranks over 2,000 seeds, and the share of those of at most 12."""
    ranks = [xor_spec.rank(xor_spec.wiring.__wrapped__(XorSpec(n_in, matrix=matrix, seed=s), 0)) for s in range(2000)]
    assert sum(ranks) / 2000 == pytest.approx(mean, abs=0.005)
    assert ranks[0] == seed_0
    assert sum(r <= 12 for r in ranks) / 2000 == pytest.approx(little, abs=0.001)


def test_covering_comes_round_where_there_are_few_rows() -> None:
    """4 inputs have 6 pairs: 20 gates have each of them three times, and two a fourth time."""
    rows = xor_spec.wiring(XorSpec(4), 0)
    assert sorted(map(rows.count, set(rows))) == [3, 3, 3, 3, 4, 4]
    assert len(set(rows[:6])) == 6
    assert xor_spec.wiring(XorSpec(1, 3, 1), 0) == ((0,), (0,), (0,))


def test_one_input_per_gate_is_plain_signs() -> None:
    assert sorted(xor_spec.wiring(XorSpec(20, n_tap=1), 0)) == [(i,) for i in range(20)]


def test_rank_and_facts_by_hand() -> None:
    assert xor_spec.rank([(0, 1), (0, 2), (1, 2), (0, 1, 2)]) == 3
    assert xor_spec.rank([(0, 1), (0, 2), (1, 2)]) == 2
    spec = XorSpec(20)
    rows = xor_spec.wiring(spec, 0)
    facts = xor_spec.facts(spec)
    assert facts["duplicate_rows"] == [20 - len(set(rows))]
    assert facts["unused_inputs"] == [20 - len(set(itertools.chain(*rows)))]


# bits and options


@pytest.mark.parametrize(
    ("bits", "options", "n_in", "q"),
    [
        (0.8, {}, 16, 1),
        (1.0, {}, 20, 1),
        (0.4, {"n_out": 10}, 4, 1),
        (2, {}, 20, 2),
        (1.2, {}, 12, 2),
        (0.8, {"q": 2}, 8, 2),
        (0.87, {"n_in": 13, "n_out": 15}, 13, 1),
        (0.47, {"n_in": [19, 16, 7], "stage": 2}, 7, 1),
    ],
)
def test_bits_give_the_shape(bits: float, options: dict[str, object], n_in: int, q: int) -> None:
    spec = xor_spec.make(bits, **options)  # type: ignore[arg-type]
    assert (spec.n_in, spec.q) == (n_in, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_in": 25, "bits": 1}, "n_in must be at most n_out=20, got 25"),
        ({"n_tap": 17}, "n_tap must be at most n_in=16, got 17"),
        ({"n_tap": 0}, "n_tap must be a whole number of at least 1, got 0"),
        ({"q": 0}, "q must be a whole number of at least 1, got 0"),
        ({"bits": 2, "q": 1}, "more planes"),
        ({"bits": 0.77}, r"nearest widths are 0.75 \(n_in=15\) and 0.8 \(n_in=16\)"),
        ({"bits": 0.01}, r"nearest widths are 0.05 \(n_in=1\)"),
        ({"n_in": 8}, "0.4 bits per weight, but w_bits=0.8"),
        ({"n_in": [19, 16]}, "list of three"),
        ({"n_in": 16.5}, "n_in must be a whole number of at least 1, got 16.5"),
        ({"n_in": "16"}, "n_in must be a whole number"),
        ({"n_in": [19, 16, 7]}, "outside layer1"),
        ({"n_in": 4, "bits": 0.2, "matrix": "distinct"}, "only 6"),
        ({"matrix": "dense"}, "matrix must be one of random, distinct, covering"),
        ({"mode": "hard"}, "mode must be one of"),
        ({"alpha": "glorot"}, "alpha must be"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"s": 0.0}, "s and std must be above 0"),
        ({"bits": 0}, "above 0"),
    ],
)
def test_option_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FleXOR(nn.Conv2d(4, 8, 3), "weight", **({"bits": 0.8} | options))  # type: ignore[arg-type]


def test_check_before_torch() -> None:
    assert [s.n_in for s in xor_spec.check({"n_in": [19, 16, 7], "n_out": 20}, 0.47)] == [19, 16, 7]
    assert xor_spec.check({}, 0.8) == [XorSpec(16)]
    with pytest.raises(ValueError, match=r"n_tap must be at most n_in=16, got 17.*options\.n_in"):
        xor_spec.check({"n_tap": 17}, 0.8)


# the quantizer


@pytest.mark.parametrize(("bits", "q"), [(0.8, None), (1.2, 2), (2, None)])
def test_quantizer(bits: float, q: int | None) -> None:
    layer = layers.QuantLayer(nn.Conv2d(5, 7, 3))
    quantizer = FleXOR(layer, "weight", bits=bits, q=q)
    layer.set_weight_quantizer(quantizer)
    planes, slices = quantizer.spec.q, math.ceil(315 / 20)
    assert layer.weight.shape == (planes, slices, quantizer.spec.n_in)
    assert 0.0008 < float(layer.weight.detach().std()) < 0.0012
    hat = layer.quantized_weight()
    assert hat.shape == (7, 5, 3, 3)
    assert torch.equal(quantizer.codes(layer.weight).values(), hat)
    assert all(2 <= len(channel.unique()) <= quantizer.levels == 2**planes for channel in hat)
    codes, scales = quantizer.stored_bits(layer.weight)
    assert codes == planes * slices * quantizer.spec.n_in
    assert scales == 32 * 7 * planes
    assert codes / 315 == pytest.approx(bits * 320 / 315)  # 16 slices hold 320 codes for 315 weights


def test_size_counts_padding_scales_and_one_matrix() -> None:
    net = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Conv2d(7, 3, 3), nn.Conv2d(3, 4, 1))
    surgery.quantize(net, [Rule(weight=lambda layer, site: FleXOR(layer, site, bits=0.8))])
    # 315, 189 and 12 weights are 16, 10 and 1 slices of 16 bits; 14 scales; M is 16 x 20, once
    bits = (16 + 10 + 1) * 16 + 14 * 32 + 320
    assert surgery.size(net)["bits_per_weight"] == pytest.approx(bits / 516)
    entry = surgery.manifest(net, {})["weights"]["1.weight"]
    rows = [tuple(map(int, gate.split("+"))) for gate in entry["wiring"][0].split()]
    assert tuple(rows) == xor_spec.wiring(XorSpec(16), 0)
    assert entry["rank"] == [xor_spec.rank(rows)]


def test_alpha_he() -> None:
    quantizer = FleXOR(nn.Conv2d(4, 8, 3), "weight", bits=0.8, alpha="he")
    assert torch.allclose(quantizer.alpha, torch.tensor(math.sqrt(2 / 36)))


def test_latent_is_reproducible_and_differs_between_layers() -> None:
    one, two = _resnet(), _resnet()
    weights = [layer.weight for _, layer in layers.quant_layers(one)]
    assert all(torch.equal(w, layer.weight) for w, (_, layer) in zip(weights, layers.quant_layers(two), strict=True))
    firsts = {w.detach().flatten()[0].item() for w in weights}
    assert len(firsts) == len(weights)


@pytest.mark.parametrize("mode", ["flexor", "ste", "analog"])
def test_decoding_all_layers_at_once_equals_layer_by_layer(mode: str) -> None:
    net = _resnet(mode=mode, q=2)
    members = [layer for _, layer in layers.quant_layers(net)]
    for i, layer in enumerate(members):
        layer.weight_quantizer.s.fill_(5.0 + i)  # type: ignore[union-attr, operator]

    def gradients(hats: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(sum(h.square().sum() + h.sum() for h in hats), [m.weight for m in members]))

    alone = [layer.quantized_weight() for layer in members]
    with layers.quantized_weights(net):
        together = [layer.quantized_weight() for layer in members]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    for a, b in zip(gradients(alone), gradients(together), strict=True):
        torch.testing.assert_close(a, b)


# the hook


def test_sharpness() -> None:
    hook = Sharpness(10.0, warmup=0.2, doublings=[0.75, 0.875])
    shares = (0.0, 0.1, 0.2, 0.5, 0.7499, 0.75, 0.875, 1.0)
    assert [hook.value(t) for t in shares] == [5.0, 7.5, 10.0, 10.0, 10.0, 20.0, 40.0, 40.0]
    assert Sharpness(100.0).value(0.0) == Sharpness(100.0).value(1.0) == 100.0
    for bad in ({"s": 0.0}, {"warmup": 2.0}, {"warmup": "epochs"}, {"warmup": [0.5]}):
        with pytest.raises(ValueError, match="must be"):
            Sharpness(**bad)  # type: ignore[arg-type]
    for doublings in ([150], ["lr"], 0.5, None):
        with pytest.raises(ValueError, match="doublings must be a list of shares"):
            Sharpness(doublings=doublings)  # type: ignore[arg-type]


def test_sharpness_follows_the_learning_rate() -> None:
    """500 epochs, 100 of warm-up, drops at 350, 400 and 450: S rises with the rate and doubles where it halves."""
    recipe = Recipe(epochs=500, warmup=100, schedule="step", milestones=(350, 400, 450), gamma=0.5)
    hook = Sharpness(10.0, warmup="lr", doublings="lr")
    shares = [round(m) / 500 for m in recipe.milestones]
    for epoch in range(500):
        lr = recipe.lr_factor(epoch, 500, 1)
        s = hook.value(epoch / 500, recipe.warmup / 500, shares)
        assert s == pytest.approx(5 + 5 * epoch / 100 if epoch < 100 else 10 / lr)
    assert hook.value(0.9) == 10.0  # neither warm-up nor drops


def test_sharpness_sets_the_buffers_and_clips() -> None:
    net = _resnet(std=1.0)
    state = State(net, torch.Generator(), steps=8, step=6)
    hook = Sharpness(10.0, doublings=[0.75], clip=True)
    hook.before_step(state)
    hook.after_step(state)
    for _, layer in layers.quant_layers(net):
        assert float(layer.weight_quantizer.s) == 20.0  # type: ignore[union-attr, arg-type]
        assert float(layer.weight.detach().abs().max()) == pytest.approx(0.1)


# the net


def test_yaml_on_a_resnet_with_stages_trains() -> None:
    conf = OmegaConf.load("conf/method/flexor.yaml")
    conf.w_bits, conf.options.n_in = 0.47, [19, 16, 7]
    method = method_of(conf)
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=16)
    kept = surgery.quantize(net, method.rules)
    assert kept == dict.fromkeys(("conv1", "fc"), "first and last layer")
    assert {tuple(m.weight.shape[::2]) for _, m in layers.quant_layers(net)} == {(1, 19), (1, 16), (1, 7)}
    entry = surgery.manifest(net, kept)["weights"]["layer2.0.conv1.weight"]
    assert entry["bits"] == 0.8
    assert entry["rank"]
    assert entry["matrix_seed"] == 0
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    state = State(net, torch.Generator(), steps=2)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    for state.step in range(2):
        method.hooks[0].before_step(state)
        optimizer.zero_grad()
        with layers.quantized_weights(net):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        method.hooks[0].after_step(state)
    assert torch.isfinite(loss)
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_all_layers_of_lenet() -> None:
    conf = OmegaConf.load("conf/method/flexor.yaml")
    conf.w_bits, conf.options.layers, conf.options.n_tap, conf.options.alpha = 0.6, "all", None, "he"
    net = LeNet5(channels=1, classes=10, size=8, width=0.25)
    kept = surgery.quantize(net, method_of(conf).rules)
    assert not kept
    assert len(list(layers.quant_layers(net))) == 4
    assert surgery.size(net)["bits_per_weight"] > 0.6
    assert torch.isfinite(net(torch.randn(2, 1, 8, 8))).all()
