"""Batches whose order and augmentation are functions of (seed, epoch, position), so that resuming needs no state."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qbench.config.data import AUGMENTATIONS
from qbench.data.splits import Split
from qbench.data.whiten import Whiten

# Pixels augmented at once, 2500 images of 32 x 32: enough to hide the cost of a call, few enough to stay in the cache.
CHUNK = 2500 * 32 * 32


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded with a hash of `key`, independent of the global generators and of every other key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pad_for(size: int) -> int:
    """The padding of a random crop, in pixels: the usual 4 for 32 x 32 images, in proportion for others."""
    return size // 8


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pads with zeros, crops each image back to its size at (top, left), and mirrors it where `flip` is set.

    out[n, i, j] = padded[n, top[n] + i, left[n] + (W - 1 - j if flip[n] else j)]

    One gather of whole pixels: `images` uint8 [N, H, W, C]; `top` and `left` int64 [N] in 0..2 * pad; `flip` bool [N].
    Returns uint8 [N, H, W, C].
    """
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], columns.flip(0), columns) + left[:, None]
    first = torch.arange(count, device=images.device)[:, None] * (height + 2 * pad) + top[:, None]
    pixels = (first + rows)[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.flatten()).view(images.shape)


class Layout:
    """Which positions of the epoch's order belong to which step, and to this rank.

    Step s covers the positions s * batch_size up to (s + 1) * batch_size of one order that all ranks share; rank r
    takes the r-th of `world` equal pieces. The smaller last batch is kept unless `drop_last`, or if it is the only one;
    its pieces differ by at most one image, and a rank whose piece would be empty has one step fewer.

    Errors: ValueError on sizes that do not fit.
    """

    def __init__(self, total: int, batch_size: int, rank: int, world: int, drop_last: bool) -> None:
        if total < 1:
            raise ValueError("the split holds no image")
        if batch_size < 1 or world < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of world={world}, got {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, got {rank}")
        self.total, self.batch_size, self.rank, self.world = total, batch_size, rank, world
        full, rest = divmod(total, batch_size)
        keep_rest = rest > 0 and (not drop_last or full == 0)
        self.steps = full + (1 if keep_rest and len(self.positions(full)) else 0)

    def positions(self, step: int) -> range:
        """The positions that this rank takes in `step`."""
        first = step * self.batch_size
        count = min(self.batch_size, self.total - first)
        each, more = divmod(count, self.world)
        start = first + self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def check_start(self, start: int) -> None:
        """Errors: ValueError when an epoch cannot be resumed at step `start`."""
        if not 0 <= start <= self.steps:
            raise ValueError(f"start must be in 0..{self.steps} (steps per epoch), got {start}")


class Batches:
    """Batches of a `Split` that lies on `device` as one uint8 tensor; no worker processes.

    `len()` is the number of steps of an epoch. `epoch(e, start)` yields (x, y): x = (pixel / 255 - mean) / std as
    float32 [B, C, H, W], or whitened by `whitening` (see whiten.fit), channels_last in memory when asked, and y int64
    [B]. Order, crops and flips of epoch e are drawn on the CPU from (seed, e), one per position: the same on every
    device, from every start and for every rank.

    Errors: ValueError on an argument out of range.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        whitening: tuple[Tensor, Tensor] | None = None,
        augment: str = "none",
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
        self.layout = Layout(len(split), batch_size, rank, world, drop_last)
        self.normalize = (
            Whiten(*whitening, device, channels_last) if whitening else Normalize(mean, std, device, channels_last)
        )
        # Pixels lie together (NHWC), so that a crop gathers whole pixels and its result is channels_last as it is.
        self.images = split.images.to(device).permute(0, 2, 3, 1).contiguous()
        self.labels = split.labels.to(device)
        self.augment, self.shuffle, self.seed = augment, shuffle, seed

    def __len__(self) -> int:
        return self.layout.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch`, from step `start` on; bit-identical to the same steps of the whole epoch."""
        self.layout.check_start(start)
        device = self.images.device
        order = _sent(order_of(self.layout.total, self.seed, epoch, self.shuffle), device)
        crops = self._crops(epoch)
        pixels_per_step = self.images[0, :, :, 0].numel() * self.layout.batch_size // self.layout.world
        per_chunk = max(1, CHUNK // pixels_per_step)
        for first in range(start, len(self), per_chunk):
            pieces = [self.layout.positions(step) for step in range(first, min(first + per_chunk, len(self)))]
            positions = torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in pieces])
            images, labels = self.images[order[positions]], self.labels[order[positions]]
            if crops is not None:
                top, left, flip = (values[positions] for values in crops)
                images = crop_flip(images, top, left, flip, pad_for(images.shape[2]))
            sizes = [len(piece) for piece in pieces]
            for x, y in zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True):
                yield self.normalize(x.permute(0, 3, 1, 2)), y

    def _crops(self, epoch: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(top, left, flip) of each position, or None."""
        if self.augment == "none":
            return None
        total, random = self.layout.total, generator("augment", self.seed, epoch)
        shifts = 2 * pad_for(self.images.shape[2]) + 1
        top = torch.randint(shifts, (total,), generator=random)
        left = torch.randint(shifts, (total,), generator=random)
        flip = torch.rand(total, generator=random) < (0.5 if self.augment == "crop_flip" else 0.0)
        device = self.images.device
        return _sent(top, device), _sent(left, device), _sent(flip, device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; the host does not wait for a GPU to take them."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Normalize:
    """uint8 [B, C, H, W] -> (x / 255 - mean) / std, float32, on `device`; one multiplication and one addition."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: str | torch.device, channels_last: bool
    ) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must have one value per channel and std be positive, got {mean} and {std}")
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1).to(device)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1).to(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.device, torch.float32, non_blocking=True, memory_format=self.memory_format)
        return x.mul_(self.scale).add_(self.shift)


def order_of(total: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The order of the images in `epoch`, int64 [total]: a permutation drawn from (seed, epoch), or 0, 1, 2, ..."""
    if not shuffle:
        return torch.arange(total)
    return torch.randperm(total, generator=generator("order", seed, epoch))
