"""Batches: crops and flips against a slow reference, determinism, resume, ranks, sizes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.data import Batches, Split
from qbench.data.batching import crop_flip, pad_for

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def a_split(count: int = 50, channels: int = 3, size: int = 16) -> Split:
    """Random images whose labels are their indices."""
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=random)
    return Split(images, torch.arange(count))


def make(split: Split, **options: object) -> Batches:
    defaults: dict[str, object] = {"batch_size": 8, "mean": MEAN, "std": STD, "augment": "crop_flip", "seed": 3}
    return Batches(split, **(defaults | options))  # type: ignore[arg-type]


def same(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(got, want, strict=True)
    )


def crop_flip_slowly(image: Tensor, top: int, left: int, flip: bool, pad: int) -> Tensor:
    """One image [C, H, W], by slicing."""
    height, width = image.shape[1:]
    out = F.pad(image, (pad, pad, pad, pad))[:, top : top + height, left : left + width]
    return out.flip(-1) if flip else out


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 4), st.integers(0, 2**31))
def test_crop_flip_is_pad_slice_mirror(count: int, size: int, channels: int, pad: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=random)
    top, left = (torch.randint(0, 2 * pad + 1, (count,), generator=random) for _ in range(2))
    flip = torch.rand(count, generator=random) < 0.5
    got = crop_flip(images.permute(0, 2, 3, 1).contiguous(), top, left, flip, pad).permute(0, 3, 1, 2)
    rows = zip(images, top.tolist(), left.tolist(), flip.tolist(), strict=True)
    assert torch.equal(got, torch.stack([crop_flip_slowly(*row, pad=pad) for row in rows]))


def test_every_image_of_an_epoch_is_some_crop_of_its_original() -> None:
    split = a_split(40)
    seen = torch.zeros(5, 5, 2, dtype=torch.long)
    for x, y in (batch for epoch in range(20) for batch in make(split).epoch(epoch)):
        pixels = (x * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)) * 255
        for image, index in zip(pixels.round().to(torch.uint8), y.tolist(), strict=True):
            found = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (0, 1)
                if torch.equal(image, crop_flip_slowly(split.images[index], top, left, bool(flip), pad_for(16)))
            ]
            assert len(found) == 1
            seen[found[0]] += 1
    assert seen.sum() == 20 * 40
    assert seen.sum((1, 2)).min() > 100  # 160 expected of each shift, 400 of each side
    assert seen.sum((0, 2)).min() > 100
    assert seen.sum((0, 1)).min() > 340


def test_crop_never_mirrors_and_none_leaves_the_pixels() -> None:
    one_sided = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    one_sided[:, :, 6:10, 3:5] = 200  # stays in the left half after any shift by 2
    split = Split(one_sided, torch.zeros(64, dtype=torch.long))
    for augment, right_half_used in (("crop", False), ("crop_flip", True)):
        ((x, _),) = make(split, batch_size=64, augment=augment, mean=(0.0,), std=(1.0,)).epoch(0)
        assert bool((x[..., 8:] > 0).any()) == right_half_used
    ((x, y),) = make(a_split(), batch_size=50, augment="none").epoch(0)
    want = (a_split().images[y] / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(x.contiguous(), want, rtol=1e-6, atol=2e-6)


def test_epochs_differ_and_repeat() -> None:
    split = a_split()
    first = list(make(split).epoch(0))
    torch.manual_seed(123)  # the global generator is neither read nor moved
    state = torch.get_rng_state()
    assert same(list(make(split).epoch(0)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(list(make(split).epoch(1)), first)
    assert not same(list(make(split, seed=4).epoch(0)), first)


@pytest.mark.parametrize("start", [0, 1, 3, 6])
def test_resume_at_any_step_is_bit_identical(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(make(a_split()).epoch(2))
    assert len(whole) == 6
    assert same(list(make(a_split()).epoch(2, start)), whole[start:])
    monkeypatch.setattr("qbench.data.batching.CHUNK", 16 * 16 * 16)  # nor does the size of a chunk matter
    assert same(list(make(a_split()).epoch(2, start)), whole[start:])


def test_ranks_take_slices_of_the_same_batches() -> None:
    whole = list(make(a_split()).epoch(1))
    ranks = [list(make(a_split(), rank=rank, world=4).epoch(1)) for rank in range(4)]
    joined = [
        (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for parts in zip(*ranks, strict=True)
    ]
    assert same(joined, whole)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8, 9, 50])
def test_evaluation_sees_every_image_once(count: int, world: int) -> None:
    options = {"augment": "none", "shuffle": False, "drop_last": False, "world": world}
    ranks = [make(a_split(count), rank=rank, **options) for rank in range(world)]
    seen = [[y for _, y in batches.epoch(0)] for batches in ranks]
    assert [len(part) for part in seen] == [len(batches) for batches in ranks]
    assert sorted(torch.cat(sum(seen, [])).tolist()) == list(range(count))  # noqa: RUF017
    assert all(len(y) for part in seen for y in part)
    if world == 1:
        assert torch.cat(seen[0]).tolist() == list(range(count))


def test_steps_of_an_epoch() -> None:
    assert len(make(a_split(50))) == 6
    assert len(make(a_split(50), drop_last=False)) == 7
    assert [len(y) for _, y in make(a_split(5)).epoch(0)] == [5]  # fewer than a batch: one smaller batch, not none
    labels = torch.cat([y for _, y in make(a_split(48)).epoch(0)])
    assert labels.sort().values.tolist() == list(range(48))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_memory_format_and_types(channels_last: bool, augment: str) -> None:
    x, y = next(make(a_split(), channels_last=channels_last, augment=augment).epoch(0))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    other, _ = next(make(a_split(), channels_last=not channels_last, augment=augment).epoch(0))
    assert torch.equal(x, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple of world=1, got 0"),
        ({"batch_size": 9, "world": 2}, "multiple of world=2, got 9"),
        ({"rank": 2, "world": 2}, r"rank must be in 0..1, got 2"),
        ({"augment": "mixup"}, "augment must be one of none, crop, crop_flip, got 'mixup'"),
        ({"std": (0.1, 0.0, 0.1)}, "std be positive"),
        ({"mean": (0.1,)}, "one value per channel"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(a_split(), **options)


def test_start_beyond_the_epoch_and_empty_split() -> None:
    with pytest.raises(ValueError, match=r"start must be in 0..6 \(steps per epoch\), got 7"):
        next(make(a_split()).epoch(0, 7))
    with pytest.raises(ValueError, match="the split holds no image"):
        make(a_split().take(torch.arange(0)))
