"""Where a uniform grid begins and ends: pure functions from values to (lo, hi), and from (lo, hi) to the grid.

Values are [channels, n], one range per row, or [n], one range in all; lo and hi have the shape of x.amin(-1). Where
`weights` are taken, they have the shape [n] and say how often each value counts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.quant.clipping import DISTRIBUTIONS, best

# ema: minmax, of which an activation's quantizer keeps moving averages. fixed and std take the number `clip`.
KINDS = ("minmax", "percentile", "mse", "kl", "ema", "aciq", "aciq_gauss", "aciq_laplace", "fixed", "std")

# Shares of the whole range that `mse` tries: equal steps down to 1/64, then a factor of 2^(1/2) down to 2^-16;
# and, of the gap to the next share, what it tries about the best of them.
SHARES = (*(i / 64 for i in range(63, 0, -1)), *(2 ** (-6 - i / 2) for i in range(1, 21)))
FINER = tuple(i / 8 for i in range(-7, 8) if i)


def code_bounds(bits: int, symmetric: bool, restricted: bool, signed: bool = True) -> tuple[int, int]:
    """Lowest and highest code: 0..2^bits - 1, or -2^(bits-1)..2^(bits-1) - 1 when symmetric and signed.

    `restricted` leaves the lowest code unused: 1..2^bits - 1 (arXiv 1712.05877, Sec. 3.1), or +-(2^(bits-1) - 1). Where
    nothing negative is to be held (`signed` false) a symmetric grid has all its codes above 0, its lowest, which stays.

    Reference: 1806.08342 Sec. 2.2
    """
    if symmetric and not signed:
        return 0, 2**bits - 1
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


def percentile(x: Tensor, percentile: float = 99.99, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The quantiles 100 - `percentile` and `percentile` percent, linear between neighbours; 100 is minmax."""
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
    ordered, order = x.sort(-1)
    last = x.shape[-1] - 1
    if weights is None:
        return tuple(_between(ordered, last * q) for q in (1 - percentile / 100, percentile / 100))  # type: ignore[return-value]
    ranks = weights.double()[order].cumsum(-1) - weights.double()[order] / 2  # the middle of what each value stands for
    first, span = ranks[..., :1], ranks[..., -1:] - ranks[..., :1]
    found = []
    for q in (1 - percentile / 100, percentile / 100):
        place = first + q * span
        above = torch.searchsorted(ranks, place).clamp(min(1, last), last)
        below = (above - 1).clamp_min(0)
        gap = (ranks.gather(-1, above) - ranks.gather(-1, below)).clamp_min(torch.finfo(ranks.dtype).tiny)
        share = ((place - ranks.gather(-1, below)) / gap).to(x.dtype)
        found.append(ordered.gather(-1, below).lerp(ordered.gather(-1, above), share)[..., 0])
    return found[0], found[1]


def _between(ordered: Tensor, place: float) -> Tensor:
    """The value at a fractional place of the sorted last axis."""
    below = min(math.floor(place), ordered.shape[-1] - 1)
    above = min(below + 1, ordered.shape[-1] - 1)
    return ordered[..., below].lerp(ordered[..., above], place - below)


def _squared_error(
    x: Tensor, bounds: tuple[int, int], symmetric: bool, weights: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of (lo, hi): the mean squared error of quantizing each row of x on the grid of that range."""
    share_of = None if weights is None else weights / weights.sum()

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        step, zero = (t[..., None] for t in grid(lo, hi, bounds, symmetric))
        square = codes(x, step, zero).clamp_(*bounds).sub_(zero).mul_(step).sub_(x).square_()
        return square.mean(-1) if share_of is None else square.mul_(share_of).sum(-1)

    return error


def mse(
    x: Tensor,
    bits: int,
    symmetric: bool = False,
    restricted: bool = False,
    signed: bool = True,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipping with the least mean squared error of quantizing x, among shares of the whole range.

    Starts at minmax; tries the SHARES of both ends together, then, where the grid is affine, of each end alone; then,
    in the same order, shares between the best and its neighbours. Never worse than minmax; an outlier 2^16 times the
    rest is still cut. Memory: a few copies of x.
    """
    error = _squared_error(x, code_bounds(bits, symmetric, restricted, signed), symmetric, weights)
    lo, hi = minmax(x)
    whole = torch.stack([lo.clamp_max(0), hi.clamp_min(0)])
    best, shares = error(*whole), torch.ones_like(whole)
    together = symmetric or bool((whole == 0).any(0).all())  # one end is 0, and stays
    ends = [[True, True]] if together else [[True, True], [True, False], [False, True]]
    moves = [torch.tensor(e, device=x.device).reshape(2, *[1] * lo.dim()) for e in ends]
    for finer, move in [(finer, move) for finer in (False, True) for move in moves]:
        start, gap = shares, (shares * (1 - 0.5**0.5)).clamp_max(1 / 64)
        for offset in FINER if finer else SHARES:
            tried = torch.where(move, (start + gap * offset).clamp_max(1) if finer else offset, start)
            found = error(*(whole * tried))
            better = found < best
            best, shares = torch.where(better, found, best), torch.where(better, tried, shares)
    return whole[0] * shares[0], whole[1] * shares[1]


def moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, mean distance from it, standard deviation) of each row, over all its values: no n - 1."""
    if weights is None:
        mean = x.mean(-1)
        return mean, (x - mean[..., None]).abs().mean(-1), (x - mean[..., None]).square().mean(-1).sqrt()
    share = weights / weights.sum()
    mean = (x * share).sum(-1)
    off = x - mean[..., None]
    return mean, (off.abs() * share).sum(-1), (off.square() * share).sum(-1).sqrt()


def upper_half(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(middle, mean distance from it, deviation) of a symmetric distribution of which a ReLU left the rows of x >= 0.

    From what lies above the middle alone, where a ReLU leaves everything as it was: the middle is the median, and 0
    where half of all or more are 0; E[x - middle | x > middle], and the root of E[(x - middle)^2 | x > middle].
    """
    ordered, order = x.sort(-1)
    shares = torch.ones_like(x) if weights is None else weights.expand_as(x).gather(-1, order)
    place = (shares.cumsum(-1) < shares.sum(-1, keepdim=True) / 2).sum(-1, keepdim=True).clamp_max(x.shape[-1] - 1)
    middle = ordered.gather(-1, place)
    above = (ordered - middle).clamp_min(0)
    count = (shares * (above > 0)).sum(-1).clamp_min(torch.finfo(x.dtype).tiny)
    return middle[..., 0], (above * shares).sum(-1) / count, ((above.square() * shares).sum(-1) / count).sqrt()


def aciq(
    x: Tensor,
    bits: int,
    symmetric: bool = False,
    restricted: bool = False,
    signed: bool = True,
    weights: Tensor | None = None,
    distribution: str | None = None,
) -> tuple[Tensor, Tensor]:
    """mean +- a, the clipping that is best for x's distribution; no further than x goes.

    a = `clipping.best` times the standard deviation (gauss) or the mean distance from the mean (laplace). Where x is
    never negative it is what a ReLU left: 0..max(mean, 0) + a with the a of half a range, mean and scale being those of
    the values before the ReLU, as the authors' code measures them; here they come from its `upper_half`. Without a
    `distribution` each row has the one whose range has the less squared error, measured on the grid, Laplace where they
    are equal.

    Reference: 1810.05723; the choice by measured error is `mix` in the authors' code
    """
    lo, hi = minmax(x)
    mean, spread, deviation = moments(x, weights)
    error = _squared_error(x, code_bounds(bits, symmetric, restricted, signed), symmetric, weights)
    half, found = lo >= 0, []
    if bool(half.any()):
        rectified = zip(upper_half(x.clamp_min(0), weights), (mean, spread, deviation), strict=True)
        mean, spread, deviation = (torch.where(half, of_half, of_all) for of_half, of_all in rectified)
    for kind in DISTRIBUTIONS if distribution is None else (distribution,):
        scale = deviation if kind == "gauss" else spread
        a = torch.where(half, best(kind, bits, half=True), best(kind, bits)) * scale
        ends = torch.where(half, 0.0, torch.maximum(mean - a, lo)), torch.minimum(mean + a, hi)
        found.append((ends, error(*ends)))
    ends, least = found[0]
    for other, loss in found[1:]:
        ends = tuple(torch.where(loss <= least, b, a) for a, b in zip(ends, other, strict=True))  # type: ignore[assignment]
    return ends


def kl(
    x: Tensor,
    bits: int,
    symmetric: bool = False,
    restricted: bool = False,
    signed: bool = True,
    weights: Tensor | None = None,
    bins: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Entropy calibration: the threshold T on |x| that loses the least information; returns max(lo, -T), min(hi, T).

    For each T on the edge of one of `bins` bins: P is the histogram of |x| up to T with all that lies above put into
    the last bin, Q the histogram up to T merged into as many levels as the grid of that range has on the side of its
    larger end (T / step + 1), each spread evenly over those of its bins that hold anything. At most 256 values of T are
    tried, from the largest down, and T minimises

        KL(P || Q) - (bins that hold anything - levels that do) / 2n.

    As in NVIDIA's code the first bin counts as the second, since 0 is on every grid, and a tie goes to the larger T. An
    empty last bin holds one value in Q. A row and its mirror image have mirrored ranges. Three things are ours:
      - The last term is the divergence that n values drawn from Q itself are expected to have. Without it the noise of
        the histogram, which grows with T, decides: 4096 Gaussian values at 8 bits then have 6 times minmax's error.
      - KL counts the values that are cut, not how far they are moved. A T is left out if the squared error, taken as
        step^2 / 12 for each value and the distance to T for those beyond, is more than twice that of the whole range.
      - Where fewer values than bins lie beyond the first bin (most channels of a weight), or no T has more bins than
        levels, the range is that of minmax: so few values have no histogram, and two full bins no divergence.

    Reference: S. Migacz, "8-bit inference with TensorRT", GTC 2017; NVIDIA's pytorch-quantization (calib/histogram.py)
    """
    shape = x.shape[:-1]
    lo, hi = (t.reshape(-1).double() for t in minmax(x))
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    top = torch.maximum(-lo, hi)
    top = torch.where(top > 0, top, 1.0)
    lo, hi = lo / top, hi / top
    counts = _histogram(x.reshape(len(top), -1), top, bins, weights)
    bounds = code_bounds(bits, symmetric, restricted, signed)
    least, threshold = torch.full_like(top, math.inf), torch.ones_like(top)
    running, error, enough = _running(counts), torch.zeros_like(top), counts.sum(1) >= bins
    for kept in torch.linspace(bins, 1, 256).long().unique().flip(0).tolist():
        t = kept / bins
        step, _ = grid(lo.clamp_min(-t), hi.clamp_max(t), bounds, symmetric)
        levels = (t / step + 1).round()
        if not bool(((levels < kept) & enough).any()):
            break  # there are no more bins than levels in a smaller range
        moved = step.square() / 12 * running["n"][:, -1] + _beyond(running, kept, t)
        error = moved if kept == bins else error
        found = torch.where(
            (levels < kept) & (moved <= 2 * error), _divergence(counts, running, kept, levels), math.inf
        )
        least, threshold = torch.where(found < least, found, least), torch.where(found < least, t, threshold)
    threshold = torch.where(enough, threshold, 1.0)
    low, high = torch.maximum(lo, -threshold) * top, torch.minimum(hi, threshold) * top
    return low.to(x.dtype).reshape(shape), high.to(x.dtype).reshape(shape)


def _histogram(x: Tensor, top: Tensor, bins: int, weights: Tensor | None) -> Tensor:
    """[rows, bins] counts of |x| in equal bins up to `top` [rows]; the first bin counts as the second."""
    place = (x.abs().double() / top[:, None] * bins).long().clamp_(max=bins - 1)
    counts = torch.zeros(len(x), bins, dtype=torch.double, device=x.device)
    one = torch.ones((), dtype=torch.double, device=x.device) if weights is None else weights.double()
    counts.scatter_add_(1, place, one.expand_as(place))
    counts[:, 0] = counts[:, min(1, bins - 1)]
    return counts


def _running(counts: Tensor) -> dict[str, Tensor]:
    """[rows, bins + 1] sums up to each edge: n, n log n, bins in use, and of the middles and their squares."""
    middle = (torch.arange(counts.shape[1], device=counts.device, dtype=counts.dtype) + 0.5) / counts.shape[1]
    of = {"n": counts, "n log n": counts.xlogy(counts), "used": (counts > 0).to(counts.dtype)}
    of |= {"middle": counts * middle, "square": counts * middle.square()}
    return {name: torch.nn.functional.pad(t.cumsum(1), (1, 0)) for name, t in of.items()}


def _beyond(running: dict[str, Tensor], kept: int, t: float) -> Tensor:
    """Sum of (middle - t)^2 over what lies beyond the first `kept` bins."""
    n, first, second = (running[k][:, -1] - running[k][:, kept] for k in ("n", "middle", "square"))
    return second - 2 * t * first + t * t * n


def _divergence(counts: Tensor, running: dict[str, Tensor], kept: int, levels: Tensor) -> Tensor:
    """What `kl` minimises, for each row, when its first `kept` bins are merged into its `levels`."""
    n, inside = running["n"][:, -1], running["n"][:, kept]
    edges = torch.arange(int(levels.max()) + 1, device=counts.device) * kept / levels[:, None]
    edges = edges.ceil().clamp_max(kept).long()
    merged, used = (running[k].gather(1, edges).diff(dim=1) for k in ("n", "used"))
    even = merged / used.clamp_min(1)
    last, beyond = counts[:, kept - 1], n - inside
    empty = last == 0
    q_last = torch.where(empty, 1.0, even.gather(1, (levels - 1).long()[:, None])[:, 0])
    p_log_p = running["n log n"][:, kept] - last.xlogy(last) + (last + beyond).xlogy(last + beyond)
    p_log_q = merged.xlogy(even).sum(1) + beyond.xlogy(q_last)
    noise = (used.sum(1) - (used > 0).sum(1)) / 2
    divergence = (p_log_p - p_log_q - noise) / n + ((inside + empty) / n).log()
    return torch.where(inside > 0, divergence, math.inf)


def find(
    kind: str,
    x: Tensor,
    *,
    bits: int,
    symmetric: bool,
    restricted: bool = False,
    signed: bool = True,
    percent: float = 99.99,
    clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(lo, hi) of `x` by the function called `kind`; `percent` is what `percentile` takes.

    fixed: -clip..clip, std: mean +- clip standard deviations; both no further than x goes.

    Errors: UserError where a value is not finite: it has no place on a grid.
    """
    lo, hi = minmax(x)
    if not bool((hi - lo).isfinite().all()):
        raise UserError(
            f"a tensor to be quantized holds infinite values or NaN, of which no range ({kind}) can be made; "
            "look at the net that the run starts from"
        )
    if kind == "percentile":
        return percentile(x, percent, weights)
    if kind == "mse":
        return mse(x, bits, symmetric, restricted, signed, weights)
    if kind == "kl":
        return kl(x, bits, symmetric, restricted, signed, weights)
    if kind.startswith("aciq"):
        return aciq(x, bits, symmetric, restricted, signed, weights, kind.partition("_")[2] or None)
    if clip is not None and kind in ("fixed", "std"):
        mean, _, deviation = moments(x, weights)
        mean, deviation = (mean, deviation) if kind == "std" else (torch.zeros_like(lo), torch.ones_like(lo))
        return torch.maximum(lo, mean - clip * deviation), torch.minimum(hi, mean + clip * deviation)
    return lo, hi
