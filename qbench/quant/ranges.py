"""Where a uniform grid begins and ends: pure functions from values to (lo, hi), and from (lo, hi) to the grid.

Values are [channels, n], one range per row, or [n], one range in all; lo and hi have the shape of x.amin(-1).
"""

import math

import numpy as np
import torch
from torch import Tensor

KINDS = ("minmax", "percentile", "mse", "kl")


def code_bounds(bits: int, symmetric: bool, restricted: bool) -> tuple[int, int]:
    """Lowest and highest code: 0..2^bits - 1, or -2^(bits-1)..2^(bits-1) - 1 when symmetric.

    `restricted` leaves the lowest code unused: 1..2^bits - 1 (arXiv 1712.05877, Sec. 3.1), or +-(2^(bits-1) - 1).
    """
    lowest = -(2 ** (bits - 1)) if symmetric else 0
    return lowest + restricted, lowest + 2**bits - 1


def grid(lo: Tensor, hi: Tensor, bounds: tuple[int, int], symmetric: bool) -> tuple[Tensor, Tensor]:
    """(step, zero) of the grid that covers lo..hi with the codes `bounds`; value = (code - zero) * step.

    The range is widened to contain 0, and 0 is on the grid. Affine: step = (hi - lo) / (highest - lowest code),
    zero = lowest - round(lo / step). Symmetric: zero = 0, step = max(|lo|, |hi|) / highest code. Where lo = hi = 0 (a
    dead channel) every step represents the values; it is 1.

    Reference: 1712.05877 Eq. 1 and 13; 1806.08342 Eq. 1-9
    """
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    lowest, highest = bounds
    step = torch.maximum(-lo, hi) / highest if symmetric else (hi - lo) / (highest - lowest)
    step = torch.where(step < torch.finfo(step.dtype).tiny, 1.0, step)
    zero = torch.zeros_like(step) if symmetric else (lowest - (lo / step).round()).clamp(lowest, highest)
    return step, zero


def codes(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """round(x / step) + zero, half to even, not yet clipped to the lowest and highest code."""
    return (x / step).round_().add_(zero)


def minmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value."""
    return x.amin(-1), x.amax(-1)


def percentile(x: Tensor, percentile: float = 99.99) -> tuple[Tensor, Tensor]:
    """The quantiles 100 - `percentile` and `percentile` percent, linear between neighbours; 100 is minmax."""
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
    ordered = x.sort(-1).values
    last = x.shape[-1] - 1
    place = last * (1 - percentile / 100)
    below = min(math.floor(place), last)
    above, share = min(below + 1, last), place - below
    lo = ordered[..., below].lerp(ordered[..., above], share)
    hi = ordered[..., last - below].lerp(ordered[..., last - above], share)
    return lo, hi


def mse(
    x: Tensor, bits: int, symmetric: bool = False, restricted: bool = False, candidates: int = 64
) -> tuple[Tensor, Tensor]:
    """The clipping with the least mean squared error of quantizing x, among shares of the whole range.

    Starts at minmax; tries `candidates` shares 1/candidates .. 1 of both ends together, then, where the grid is affine,
    of each end alone. Never worse than minmax. Memory: a few copies of x.
    """
    bounds = code_bounds(bits, symmetric, restricted)

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        step, zero = (t[..., None] for t in grid(lo, hi, bounds, symmetric))
        return codes(x, step, zero).clamp_(*bounds).sub_(zero).mul_(step).sub_(x).square_().mean(-1)

    lo, hi = minmax(x)
    lo, hi = full_lo, full_hi = lo.clamp_max(0), hi.clamp_min(0)
    best = error(lo, hi)
    shares = (torch.arange(candidates - 1, 0, -1) / candidates).tolist()
    for move_lo, move_hi in [(True, True)] if symmetric else [(True, True), (True, False), (False, True)]:
        stay_lo, stay_hi = lo, hi
        for share in [1.0, *shares]:
            try_lo, try_hi = full_lo * share if move_lo else stay_lo, full_hi * share if move_hi else stay_hi
            found = error(try_lo, try_hi)
            better = found < best
            best = torch.where(better, found, best)
            lo, hi = torch.where(better, try_lo, lo), torch.where(better, try_hi, hi)
    return lo, hi


def kl(x: Tensor, bits: int, symmetric: bool = False, bins: int = 2048) -> tuple[Tensor, Tensor]:
    """Entropy calibration: the threshold T on |x| that loses the least information; returns max(lo, -T), min(hi, T).

    For each T on the edge of one of `bins` bins: P is the histogram of |x| up to T with all that lies above put into
    the last bin, Q the same histogram merged into the levels that a side of the grid has; T minimises KL(P || Q).
    Levels: 2^bits for values without a sign on an affine grid, else 2^(bits-1). At most 256 thresholds are tried. Wants
    many values per row: a histogram of a few hundred says little. With as many levels as bins, T is the maximum.

    Reference: S. Migacz, "8-bit inference with TensorRT", GTC 2017
    """
    lo, hi = minmax(x)
    rows = x.reshape(-1, x.shape[-1]).abs().double().cpu().numpy()
    one_sided = [not symmetric and low >= 0 for low in lo.reshape(-1).tolist()]
    found = [_threshold(row, 2 ** (bits if one else bits - 1), bins) for row, one in zip(rows, one_sided, strict=True)]
    t = torch.tensor(found, dtype=x.dtype, device=x.device).reshape(lo.shape)
    return torch.maximum(lo, -t), torch.minimum(hi, t)


def _threshold(values: np.ndarray, levels: int, bins: int) -> float:
    """The threshold of `kl` for one row of magnitudes."""
    top = float(values.max())
    if levels >= bins or top == 0:
        return top
    counts = np.histogram(values, bins, (0, top))[0].astype(float)
    counts[0] = counts[1]  # 0 is on every grid: how many zeros a ReLU made says nothing about the clipping
    best, best_bins = math.inf, bins
    for i in np.unique(np.linspace(levels, bins, 256).astype(int)).tolist():
        divergence = _divergence(counts, i, levels)
        if divergence < best:
            best, best_bins = divergence, i
    return top * best_bins / bins


def _divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q) when the first `kept` bins are merged into `levels`; infinite where Q misses what P has."""
    inside = counts[:kept]
    p = inside.copy()
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    used = np.bincount(level, inside > 0, levels)
    q = np.where(inside > 0, (np.bincount(level, inside, levels) / np.maximum(used, 1))[level], 0.0)
    if not inside.any() or (q[p > 0] == 0).any():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    on = p > 0
    return float((p[on] * np.log(p[on] / q[on])).sum())


def find(
    kind: str, x: Tensor, *, bits: int, symmetric: bool, restricted: bool = False, percent: float = 99.99
) -> tuple[Tensor, Tensor]:
    """(lo, hi) of `x` by the function called `kind`; `percent` is what `percentile` takes."""
    if kind == "percentile":
        return percentile(x, percent)
    if kind == "mse":
        return mse(x, bits, symmetric, restricted)
    if kind == "kl":
        return kl(x, bits, symmetric)
    return minmax(x)
