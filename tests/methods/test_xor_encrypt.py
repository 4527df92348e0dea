"""XOR encryption: solved by hand, lossless on pruned codes, bits that are really needed, surgery."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn
from yamls import method_of

from qbench.methods import xor_encrypt
from qbench.methods.shared import xor_spec
from qbench.methods.shared.xor_spec import XorSpec
from qbench.methods.xor_encrypt import Encrypted, PrunedCode, decrypt, encrypt, mask_bits
from qbench.models.resnet import ResNetCIFAR
from qbench.quant import layers, surgery


def _bools(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


def _layer(**options: object) -> layers.QuantLayer:
    torch.manual_seed(0)
    layer = layers.QuantLayer(nn.Conv2d(8, 16, 3))
    layer.set_weight_quantizer(PrunedCode(layer, "weight", **options))  # type: ignore[arg-type]
    return layer


# the gates


def test_a_system_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four gates y = (x0+x1, x0+x2, x1+x2, x0+x1+x2); the third is the sum of the first two."""
    rows = ((0, 1), (0, 2), (1, 2), (0, 1, 2))
    monkeypatch.setattr(xor_spec, "wiring", lambda spec, plane: rows)
    spec = XorSpec(3, 4, None, matrix="random")
    bits = _bools("1010", "1110", "1101", "0000")
    care = _bools("1111", "1110", "1001", "0000")
    found = encrypt(bits, care, spec)
    # slice 1: y0 = y1 = y2 = 1 contradict each other, one patch; the others have solutions
    assert found.patches.sum(1).tolist() == [0, 1, 0, 0]
    assert ((decrypt(found, spec) == bits) | ~care).all()
    assert decrypt(Encrypted(_bools("010"), _bools("0000")), spec).tolist() == _bools("1011").tolist()
    # slice 0 has one solution: x2 = y0 + y3 = 1, x0 = y1 + x2 = 1, x1 = y0 + x0 = 0
    assert found.seeds[0].tolist() == [True, False, True]
    assert found.seeds[3].tolist() == [False, False, False]


def test_a_slice_is_patched_only_where_no_seed_fits() -> None:
    """Against all 2^n_in seeds: no patch exactly where some seed gives every bit that is cared for."""
    spec = XorSpec(5, 12, None, matrix="random", seed=3)
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(200, 12, generator=generator) < 0.5
    care = torch.rand(200, 12, generator=generator) < 0.4
    seeds = torch.tensor(list(itertools.product((False, True), repeat=5)))
    outputs = decrypt(Encrypted(seeds, torch.zeros(32, 12, dtype=torch.bool)), spec)
    wrong = ((outputs[None] ^ bits[:, None]) & care[:, None]).sum(2).min(1).values
    patches = encrypt(bits, care, spec).patches.sum(1)
    assert ((wrong == 0) == (patches == 0)).all()
    assert (patches >= wrong).all()
    assert 0.2 < float((patches == 0).float().mean()) < 0.9


@settings(max_examples=40, deadline=None)
@given(
    n_in=st.integers(1, 62), more=st.integers(0, 40), share=st.floats(0, 1), seed=st.integers(0, 9), n=st.integers(1, 6)
)
def test_decoding_is_lossless(n_in: int, more: int, share: float, seed: int, n: int) -> None:
    spec = XorSpec(n_in, n_in + more, None, matrix="random", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(n, spec.n_out, generator=generator) < 0.5
    care = torch.rand(n, spec.n_out, generator=generator) < share
    found = encrypt(bits, care, spec)
    assert ((decrypt(found, spec) == bits) | ~care).all()
    assert not (found.patches & ~care).any()
    matrix = [list(row) for row in xor_spec.wiring(spec, 0)]
    for patches, cared in zip(found.patches, care, strict=True):  # every other equation that is cared for holds
        assert int(patches.sum()) <= int(cared.sum()) - xor_spec.rank([matrix[i] for i in cared.nonzero().flatten()])


# the bits


def test_bits_of_seeds_and_patches() -> None:
    patches = _bools("0000000000", "1000000001", "1110000000")
    # two bits say how many there are (up to 3), four where one of ten is
    assert Encrypted(torch.zeros(3, 4, dtype=torch.bool), patches).bits() == (12, 3 * 2 + 5 * 4)
    assert Encrypted(torch.zeros(3, 4, dtype=torch.bool), torch.zeros_like(patches)).bits() == (12, 0)


def _rice(gaps: list[int], k: int) -> str:
    return "".join("0" * (g >> k) + "1" + (f"{g % 2**k:0{k}b}" if k else "") for g in gaps)


def test_bits_of_the_mask() -> None:
    kept = _bools("0000000010000000000000000001000000000001")
    coded = {k: _rice([8, 18, 11], k) for k in range(8)}
    assert mask_bits(kept) == min(map(len, coded.values())) + 5 < kept.numel()
    assert coded[3] == "01000" + "001010" + "01011"  # 8, 16 + 2, 8 + 3
    assert mask_bits(torch.ones(40, dtype=torch.bool)) == 40
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(100_000, generator=generator) < 0.1
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert entropy < mask_bits(random) / 1e5 < 1.03 * entropy


def test_bits_per_weight_of_a_layer() -> None:
    layer = _layer(bits=3, sparsity=0.9)
    q = layer.weight_quantizer
    assert isinstance(q, PrunedCode)
    assert (q.spec.n_in, q.spec.n_out, q.planes) == (20, 170, 2)
    codes, scales = q.stored_bits(layer.weight)
    counted = q.describe()
    assert scales == 32 * 2 * 16
    assert counted["slices"] == 2 * math.ceil(1152 / 170)
    assert counted["seed_bits"] == pytest.approx(14 * 20 / 1152)
    assert codes / 1152 == pytest.approx(sum(counted[f"{part}_bits"] for part in ("seed", "patch", "mask")))
    assert counted["mask_bits"] < 0.5
    assert counted["compression_ratio"] == pytest.approx(q.bits * 1152 / codes)
    hidden = (counted["seed_bits"] + counted["patch_bits"]) * 1152
    assert counted["compression_ratio_without_mask"] == pytest.approx((q.bits - 1) * 1152 / hidden)  # the paper's
    size = surgery.size(nn.Sequential(layer))
    assert size["bits_per_weight"] == pytest.approx((codes + scales + 20 * 170) / 1152)


def test_loss_of_a_code_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()
    monkeypatch.setattr(xor_encrypt, "decrypt", lambda encrypted, spec: ~decrypt(encrypted, spec))
    with pytest.raises(RuntimeError, match="other codes"):
        surgery.size(nn.Sequential(layer))


# the quantizer


def test_pruning_and_codes_by_hand() -> None:
    layer = layers.QuantLayer(nn.Linear(4, 2))
    layer.weight.data = torch.tensor([[1.0, -3.0, 0.5, 0.25], [-0.1, 2.0, -4.0, 0.2]])
    layer.set_weight_quantizer(PrunedCode(layer, "weight", sparsity=0.5, n_in=2, n_out=4))
    q = layer.weight_quantizer
    assert isinstance(q, PrunedCode)
    assert q.mask.tolist() == [[True, True, False, False], [False, True, True, False]]
    assert q.alpha.flatten().tolist() == [2.0, 3.0]
    hat = layer.quantized_weight()
    assert hat.tolist() == [[2.0, -2.0, 0.0, 0.0], [0.0, 3.0, -3.0, 0.0]]
    hat.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.0, 2.0, 0.0, 0.0], [0.0, 6.0, 7.0, 0.0]]
    assert q.alpha.grad is not None
    assert q.alpha.grad.flatten().tolist() == [1.0 - 2.0, 6.0 - 7.0]
    assert q.codes(layer.weight).codes.tolist() == [[[1, -1, 0, 0], [0, 1, -1, 0]]]


def test_slices_take_every_sth_weight() -> None:
    layer = layers.QuantLayer(nn.Linear(7, 1))
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0, 4.0, -5.0, 6.0, -7.0]])
    layer.set_weight_quantizer(PrunedCode(layer, "weight", sparsity=0.2, n_in=2, n_out=3))
    q = layer.weight_quantizer
    assert isinstance(q, PrunedCode)
    bits, care = q.slices(layer.weight)  # three slices of three: weights 0 3 6, 1 4 and 2 5; weight 0 is pruned
    assert bits.tolist() == [[False, True, False], [False, False, False], [True, True, False]]
    assert care.tolist() == [[False, True, True], [True, True, False], [True, True, False]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_more_planes_fit_better(bits: int) -> None:
    layer = _layer(bits=bits, sparsity=0.5)
    q = layer.weight_quantizer
    assert isinstance(q, PrunedCode)
    w, hat = layer.weight.detach() * q.mask, layer.quantized_weight().detach()
    assert int((hat != 0).sum()) == 576
    assert all(len(channel.unique()) <= 2 ** (bits - 1) + 1 for channel in hat)
    error = float((w - hat).square().mean() / w.square().mean())
    assert error < {2: 0.1, 3: 0.02, 4: 0.008, 5: 0.004}[bits]
    assert torch.equal(q(hat), hat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be a whole number in 2..5, got 1"),
        ({"sparsity": 1.0}, "sparsity must be in 0..1"),
        ({"sparsity": -0.1}, "sparsity must be in 0..1"),
        ({"n_in": 63}, "n_in must be at most 62, got 63"),
        ({"n_in": 20, "n_out": 10}, "n_in must be at most n_out=10"),
        ({"n_in": 0}, "n_in must be a whole number"),
    ],
)
def test_option_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _layer(**options)


def test_yaml_on_a_resnet() -> None:
    conf = OmegaConf.load("conf/method/xor_encrypt.yaml")
    conf.w_bits = 2
    torch.manual_seed(0)
    net = ResNetCIFAR(depth=8, channels=3, classes=10, size=16)
    kept = surgery.quantize(net, method_of(conf).rules)
    assert kept == dict.fromkeys(("conv1", "fc"), "first and last layer")
    manifest = surgery.manifest(net, kept)
    # 0.9 pruned: 0.12 of seeds, some patches, 0.48 of mask, scales and one matrix
    assert 0.6 < manifest["size"]["bits_per_weight"] < 0.8
    entry = manifest["weights"]["layer3.0.conv2.weight"]
    assert entry["seed_bits"] == pytest.approx(0.1181, abs=1e-3)
    assert entry["patch_bits"] < 0.05
    assert entry["rank"] == [20]
    assert torch.isfinite(net(torch.randn(2, 3, 16, 16))).all()
