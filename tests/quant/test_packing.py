"""Packing: by hand, against a reader written from the docstring alone, every width and shape, and how fast."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant import packing
from qbench.quant.packing import Part, pack, unpack


def read(data: bytes, widths: list[int]) -> list[int]:
    """What the docstring says, bit by bit."""
    stream = [data[p // 8] >> p % 8 & 1 for p in range(8 * len(data))]
    codes, place = [], 0
    for width in widths:
        codes.append(sum(stream[place + k] << k for k in range(width)))
        place += width
    assert not any(stream[place:])
    assert len(stream) - place < 8
    return codes


def test_by_hand() -> None:
    assert pack(torch.tensor([1, 2, 3]), 3) == bytes([0xD1, 0x00])
    assert pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]), 1) == bytes([0b10001101, 1])
    assert pack(torch.tensor([0x1234]), 16) == bytes([0x34, 0x12])
    # 1 of 1 bit, 0b10 of 2, 0b0101 of 4: 0101 10 1
    assert pack(torch.tensor([1, 2, 5]), torch.tensor([1, 2, 4])) == bytes([0b00101101])
    assert pack(torch.zeros(0, dtype=torch.int32), 3) == b""
    assert unpack(b"", (0, 4), 3).shape == (0, 4)


shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4)


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(1, 32), st.integers(0, 2**31))
def test_one_width(shape: list[int], width: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**width, shape))
    data = pack(codes, width)
    assert len(data) == -(-codes.numel() * width // 8)
    assert read(data, [width] * codes.numel()) == codes.flatten().tolist()
    assert unpack(data, shape, width).equal(codes)


@settings(max_examples=150, deadline=None)
@given(shapes, st.data())
def test_mixed_widths(shape: list[int], draw: st.DataObject) -> None:
    """A width per element, or for all along some axes."""
    alike = [draw.draw(st.booleans()) for _ in shape]
    random = np.random.default_rng(draw.draw(st.integers(0, 2**31)))
    widths = torch.from_numpy(random.integers(1, 17, [1 if one else n for one, n in zip(alike, shape, strict=True)]))
    codes = torch.from_numpy(random.integers(0, 2 ** widths.numpy(), shape))
    data = pack(codes, widths)
    each = widths.expand(shape).flatten().tolist()
    assert len(data) == -(-sum(each) // 8)
    assert read(data, each) == codes.flatten().tolist()
    assert unpack(data, shape, widths).equal(codes)


@pytest.mark.parametrize("widths", [5, torch.tensor([[3], [11]])])
def test_lots_meet_without_a_gap(widths: int | Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (2, 37), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, widths)
    monkeypatch.setattr(packing, "AT_ONCE", 8)
    assert pack(codes, widths) == whole
    assert unpack(whole, codes.shape, widths).equal(codes)


def test_ten_million_codes_in_a_second() -> None:
    codes = torch.randint(0, 8, (10_000_000,), dtype=torch.int32)
    took = []
    for _ in range(2):  # the better of two: the machine may be busy
        began = time.process_time()
        data = pack(codes, 3)
        packed = time.process_time()
        back = unpack(data, codes.shape, 3)
        took.append((packed - began, time.process_time() - packed))
    assert back.equal(codes.long())
    assert all(min(times) < 1 for times in zip(*took, strict=True)), took


@pytest.mark.parametrize(
    ("codes", "widths", "message"),
    [
        ([1, 8], 3, "code 8 does not fit into 3 bits"),
        ([1, -1], 3, "code -1 does not fit into 3 bits"),
        ([1, 2], torch.tensor([1, 1]), "code 2 does not fit into 1 bits"),
        ([1], 0, "a width must be a whole number in 1..32, got 0"),
        ([1], 33, "a width must be"),
        ([1], torch.tensor([0]), "widths must be whole numbers in 1..32"),
        ([1, 2], torch.tensor([1, 2, 3]), r"widths of shape \[3\] do not broadcast to codes of \[2\]"),
        ([1.5], 3, "codes must be integers"),
    ],
)
def test_refuses(codes: list[int], widths: int | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor(codes), widths)


def test_refuses_what_was_not_packed_so() -> None:
    with pytest.raises(ValueError, match="3 codes of 9 bits in all take 2 bytes, got 1"):
        unpack(b"\xd1", (3,), 3)
    with pytest.raises(ValueError, match="behind the last code"):
        unpack(b"\xd1\x80", (3,), 3)


def test_parts() -> None:
    part = Part(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2], [3]]))
    assert (part.bits, part.size, len(part.pack())) == (15, 2, 2)
    assert part.unpack(part.pack()).numbers.equal(part.numbers)
    floats = Part(torch.tensor([1.0, -0.5]))
    assert (floats.bits, floats.pack()) == (64, bytes.fromhex("0000803f000000bf"))
    assert floats.unpack(floats.pack()).numbers.equal(floats.numbers)
    with pytest.raises(ValueError, match="2 floats take 8 bytes, got 7"):
        floats.unpack(floats.pack()[:7])
