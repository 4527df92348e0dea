"""The loops of fused.cpp for machines without a C++ compiler: numba compiles them. Formulas and order are those there.

Every step works on one block of at most a few thousand values that stay in the first cache, so that one function serves
all combinations: what a block needs is asked once per block, not once per value.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qbench.kernels.backend import DOUBLES, WORDS

SHORTEST = 512
BIG = np.float32(12582912.0)  # (x + BIG) - BIG rounds half to even for |x| < 2^22
FAR = np.float32(4e6)
ZERO, ONE = np.float32(0), np.float32(1)
W = {name: i for i, name in enumerate((*WORDS, *DOUBLES))}
SIZE = len(W)
(BF16, N, CHANNELS, INNER, CHUNKS, ROUNDS, KIND) = (
    W[name] for name in ("bf16", "n", "channels", "inner", "chunks", "rounds", "kind")
)
X, R, GY, GQ, Y, Q, DX, DR = (W[name] for name in ("x", "r", "gy", "gq", "y", "q", "dx", "dr"))
SUMS, COEFFICIENTS, WEIGHT, BIAS = (W[name] for name in ("sums", "coefficients", "weight", "bias"))
RUNNING_MEAN, RUNNING_VAR = W["running_mean"], W["running_var"]
DWEIGHT, DBIAS, DSCALARS = (W[name] for name in ("dweight", "dbias", "dscalars"))
EPS, MOMENTUM, LO, HI, FROM, BELOW, TIMES, STEP = (
    W[name] for name in ("eps", "momentum", "lo", "hi", "from_", "below", "times", "step")
)
QSTEP, QLO, QHI, QZERO, QBELOW = (W[name] for name in ("qstep", "qlo", "qhi", "qzero", "qbelow"))
A, B, MEAN, INVERSE, KG, KX, K1 = range(7)
LEARNED, SIGN, GRID = 1, 2, 3

# Whoever imports this module has said where these are (build.loops).
_thread = types.ExternalFunction("qbench_thread", types.int32())
_threads = types.ExternalFunction("qbench_threads", types.int32())
_options: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}


@intrinsic
def _pointer(typing: Any, word: Any) -> Any:
    """A 64-bit word as a pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.PointerType(cgutils.int8_t))

    return types.voidptr(types.int64), code


@njit(**_options)
def _floats(word, n):
    return carray(_pointer(word), n, np.float32)


@njit(**_options)
def _share(count, part, parts):
    return count * part // parts, count * (part + 1) // parts


@njit(**_options)
def _period(channels, inner):
    return SHORTEST if inner > 1 else channels * ((SHORTEST + channels - 1) // channels)


@njit(**_options)
def _stretches(n, channels, inner, chunks, k):
    """(first value, number of stretches, length of each) of chunk k."""
    if inner == 1:
        begin, end = _share(n // channels, k, chunks)
        return begin * channels, 1, (end - begin) * channels
    begin, end = _share(n // (channels * inner), k, chunks)
    return begin * channels * inner, (end - begin) * channels, inner


@njit(**_options)
def _fill(rows, which, coefficients, channels, channel):
    """Lay the coefficients out as memory is: repeated (channel < 0), or one value."""
    for i in range(len(which)):
        for j in range(0, rows.shape[1], channels if channel < 0 else 1):
            if channel < 0:
                for c in range(channels):
                    rows[i, j + c] = coefficients[which[i] * channels + c]
            else:
                rows[i, j] = coefficients[which[i] * channels + channel]


@njit(**_options)
def _get(word, bf16, n, at, m, out):
    """out[:m] = the values from `at` on."""
    if bf16:
        short, bits = carray(_pointer(word), n, np.uint16)[at : at + m], out.view(np.uint32)
        for j in range(m):
            bits[j] = np.uint32(short[j]) << np.uint32(16)
    else:
        real = _floats(word, n)[at : at + m]
        for j in range(m):
            out[j] = real[j]


@njit(**_options)
def _store(v, m):
    """v[:m] as it is once it lies in memory as bf16."""
    bits = v.view(np.uint32)
    for j in range(m):
        b = bits[j]
        even = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        bits[j] = even if (b & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else np.uint32(0x7FC00000)


@njit(**_options)
def _put(word, bf16, n, at, m, v):
    """Write v[:m] from `at` on; v is rounded."""
    if bf16:
        _store(v, m)
        short, bits = carray(_pointer(word), n, np.uint16)[at : at + m], v.view(np.uint32)
        for j in range(m):
            short[j] = np.uint16(bits[j] >> np.uint32(16))
    else:
        real = _floats(word, n)[at : at + m]
        for j in range(m):
            real[j] = v[j]


@njit(**_options)
def _linear(x, a, b, z, m):
    for j in range(m):
        z[j] = a[j] * x[j] + b[j]


@njit(**_options)
def _add(z, r, m):
    for j in range(m):
        z[j] += r[j]


@njit(**_options)
def _activate(z, y, m, d):
    lo, hi = np.float32(d[LO]), np.float32(d[HI])
    times, step = np.float32(d[TIMES]), np.float32(d[STEP])
    if step > ZERO:
        for j in range(m):
            v = lo if z[j] < lo else z[j]
            v = hi if v > hi else v
            y[j] = ((v * times + BIG) - BIG) * step
    else:
        for j in range(m):
            v = lo if z[j] < lo else z[j]
            y[j] = hi if v > hi else v


@njit(**_options)
def _quantize(y, q, m, kind, d):
    step, lo, hi, zero = np.float32(d[QSTEP]), np.float32(d[QLO]), np.float32(d[QHI]), np.float32(d[QZERO])
    if kind == LEARNED:
        for j in range(m):
            v = y[j] / step
            v = lo if v < lo else v
            v = hi if v > hi else v
            q[j] = ((v + BIG) - BIG) * step
    elif kind == SIGN:
        for j in range(m):
            q[j] = -ONE if y[j] < ZERO else (ONE if y[j] >= ZERO else y[j])
    else:
        for j in range(m):
            v = y[j] / step
            v = -FAR if v < -FAR else v
            v = FAR if v > FAR else v
            v = ((v + BIG) - BIG) + zero
            v = lo if v < lo else v
            q[j] = ((hi if v > hi else v) - zero) * step


@njit(**_options)
def _behind(y, h, g, m, kind, d, steps):
    """g += h where the quantizer is open; the gradient of the step is added to `steps`."""
    step, lo, hi, zero = np.float32(d[QSTEP]), np.float32(d[QLO]), np.float32(d[QHI]), np.float32(d[QZERO])
    below = np.float32(d[QBELOW])
    if kind == LEARNED:
        for j in range(m):
            v = y[j] / step
            c = lo if v < lo else v
            c = hi if c > hi else c
            t, u = h[j], v
            t = t if v > lo else ZERO
            u = u if v > lo else ZERO
            g[j] += t if v < hi else ZERO
            steps[j] += h[j] * (((c + BIG) - BIG) - (u if v < hi else ZERO))
    elif kind == SIGN:
        for j in range(m):
            g[j] += h[j] if abs(y[j]) < below else ZERO
    else:
        for j in range(m):
            v = y[j] / step
            v = -FAR if v < -FAR else v
            v = FAR if v > FAR else v
            v = ((v + BIG) - BIG) + zero
            g[j] += h[j] if (v >= lo) & (v <= hi) else ZERO


@njit(**_options)
def _mask(z, g, out, m, low, below):
    """out = g where low <= z < below, else 0."""
    for j in range(m):
        v, there = g[j], z[j]
        v = v if there >= low else ZERO
        out[j] = v if there < below else ZERO


@njit(**_options)
def _gradient(w, d, x, z, y, g, h, at, m, steps):
    """g = the gradient at y, from both outputs; x, z as they were in the forward pass."""
    n, bf16 = w[N], w[BF16]
    if w[GY] != 0:
        _get(w[GY], bf16, n, at, m, g)
    else:
        for j in range(m):
            g[j] = ZERO
    if w[GQ] != 0:
        _get(w[GQ], bf16, n, at, m, h)
        _activate(z, y, m, d)
        if bf16:
            _store(y, m)
        _behind(y, h, g, m, w[KIND], d, steps)


@njit(**_options)
def _point(w, at, m, rows, x, r, z):
    """x and z = a x + b (+ r) of one block."""
    _get(w[X], w[BF16], w[N], at, m, x)
    _linear(x, rows[0], rows[1], z, m)
    if w[R] != 0:
        _get(w[R], w[BF16], w[N], at, m, r)
        _add(z, r, m)


@njit(**_options)
def _collect(lane, out, channels, channel):
    """Add the lanes to their channels, and clear them."""
    for j in range(0, len(lane), channels if channel < 0 else 1):
        if channel < 0:
            for c in range(channels):
                out[c] += lane[j + c]
        else:
            out[channel] += lane[j]
    lane[:] = ZERO


@njit(**_options)
def _stats(w, d):
    n, channels, inner, chunks, bf16 = w[N], w[CHANNELS], w[INNER], w[CHUNKS], w[BF16]
    period = _period(channels, inner)
    sums = carray(_pointer(w[SUMS]), chunks * 2 * (channels + 1), np.float64)
    x, lane, mean = np.zeros(period, np.float32), np.zeros(period, np.float32), np.zeros(period, np.float32)
    begin, end = _share(chunks, _thread(), _threads())
    for k in range(begin, end):
        total = sums[k * 2 * channels : (k * 2 + 1) * channels]
        square = sums[(k * 2 + 1) * channels : (k * 2 + 2) * channels]
        total[:] = 0
        square[:] = 0
        first, number, length = _stretches(n, channels, inner, chunks, k)
        count = max(1, number * length // channels)
        for i in range(number):
            channel = -1 if inner == 1 else i % channels
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                _get(w[X], bf16, n, at, m, x)
                _add(lane, x, m)
            _collect(lane, total, channels, channel)
        for i in range(number):
            channel = -1 if inner == 1 else i % channels
            if channel < 0:
                for j in range(0, period, channels):
                    for c in range(channels):
                        mean[j + c] = np.float32(total[c] / count)
            else:
                mean[:] = np.float32(total[channel] / count)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                _get(w[X], bf16, n, at, m, x)
                for j in range(m):
                    lane[j] += (x[j] - mean[j]) * (x[j] - mean[j])
            _collect(lane, square, channels, channel)
        for c in range(channels):
            shift = total[c] / count - np.float64(np.float32(total[c] / count))
            square[c] -= count * shift * shift


@njit(**_options)
def _forward(w, d):
    n, channels, inner, bf16 = w[N], w[CHANNELS], w[INNER], w[BF16]
    period = _period(channels, inner)
    coefficients = _floats(w[COEFFICIENTS], 7 * channels)
    rows, which = np.zeros((2, period), np.float32), (A, B)
    x, r = np.zeros(period, np.float32), np.zeros(period, np.float32)
    z, y = np.zeros(period, np.float32), np.zeros(period, np.float32)
    if inner == 1:
        _fill(rows, which, coefficients, channels, -1)
    begin, end = _share(w[CHUNKS], _thread(), _threads())
    for k in range(begin, end):
        first, number, length = _stretches(n, channels, inner, w[CHUNKS], k)
        for i in range(number):
            if inner > 1:
                _fill(rows, which, coefficients, channels, i % channels)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                _point(w, at, m, rows, x, r, z)
                _activate(z, y, m, d)
                if w[Y] != 0:
                    _put(w[Y], bf16, n, at, m, y)
                elif bf16:
                    _store(y, m)
                if w[Q] != 0:
                    _quantize(y, z, m, w[KIND], d)
                    _put(w[Q], bf16, n, at, m, z)


@njit(**_options)
def _reduce(w, d):
    n, channels, inner, chunks = w[N], w[CHANNELS], w[INNER], w[CHUNKS]
    period = _period(channels, inner)
    coefficients = _floats(w[COEFFICIENTS], 7 * channels)
    sums = carray(_pointer(w[SUMS]), chunks * 2 * (channels + 1), np.float64)
    scalars = sums[chunks * 2 * channels :]
    rows, which, lanes = np.zeros((3, period), np.float32), (A, B, MEAN), np.zeros((4, period), np.float32)
    x, r, z = np.zeros(period, np.float32), np.zeros(period, np.float32), np.zeros(period, np.float32)
    y, g, h = np.zeros(period, np.float32), np.zeros(period, np.float32), np.zeros(period, np.float32)
    s1, s2, clips, steps, mean = lanes[0], lanes[1], lanes[2], lanes[3], rows[2]
    low, below, rounds = np.float32(d[FROM]), np.float32(d[BELOW]), w[ROUNDS]
    if inner == 1:
        _fill(rows, which, coefficients, channels, -1)
    begin, end = _share(chunks, _thread(), _threads())
    for k in range(begin, end):
        total = sums[k * 2 * channels : (k * 2 + 1) * channels]
        product = sums[(k * 2 + 1) * channels : (k * 2 + 2) * channels]
        total[:] = 0
        product[:] = 0
        first, number, length = _stretches(n, channels, inner, chunks, k)
        for i in range(number):
            if inner > 1:
                _fill(rows, which, coefficients, channels, i % channels)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                _point(w, at, m, rows, x, r, z)
                _gradient(w, d, x, z, y, g, h, at, m, steps)
                if rounds:
                    for j in range(m):
                        v = g[j]
                        clips[j] += v if z[j] >= below else ZERO
                _mask(z, g, h, m, low, below)
                for j in range(m):
                    s1[j] += h[j]
                    s2[j] += h[j] * (x[j] - mean[j])
                if w[DR] != 0:
                    _put(w[DR], w[BF16], n, at, m, h)
            _collect(s1, total, channels, -1 if inner == 1 else i % channels)
            _collect(s2, product, channels, -1 if inner == 1 else i % channels)
        scalars[2 * k], scalars[2 * k + 1] = 0, 0
        for j in range(period):
            scalars[2 * k] += clips[j]
            scalars[2 * k + 1] += steps[j]
        clips[:] = ZERO
        steps[:] = ZERO


@njit(**_options)
def _apply(w, d):
    n, channels, inner, bf16 = w[N], w[CHANNELS], w[INNER], w[BF16]
    period = _period(channels, inner)
    coefficients = _floats(w[COEFFICIENTS], 7 * channels)
    rows, which = np.zeros((5, period), np.float32), (A, B, KG, KX, K1)
    x, r, z = np.zeros(period, np.float32), np.zeros(period, np.float32), np.zeros(period, np.float32)
    y, g, h = np.zeros(period, np.float32), np.zeros(period, np.float32), np.zeros(period, np.float32)
    steps, kg, kx, k1 = np.zeros(period, np.float32), rows[2], rows[3], rows[4]
    low, below = np.float32(d[FROM]), np.float32(d[BELOW])
    if inner == 1:
        _fill(rows, which, coefficients, channels, -1)
    begin, end = _share(w[CHUNKS], _thread(), _threads())
    for k in range(begin, end):
        first, number, length = _stretches(n, channels, inner, w[CHUNKS], k)
        for i in range(number):
            if inner > 1:
                _fill(rows, which, coefficients, channels, i % channels)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                if w[DR] != 0:
                    _get(w[X], bf16, n, at, m, x)
                    _get(w[DR], bf16, n, at, m, h)
                else:
                    _point(w, at, m, rows, x, r, z)
                    _gradient(w, d, x, z, y, g, h, at, m, steps)
                    _mask(z, g, h, m, low, below)
                for j in range(m):
                    g[j] = kg[j] * h[j] + kx[j] * x[j] + k1[j]
                _put(w[DX], bf16, n, at, m, g)


@njit(**_options)
def _stats_end(w, d):
    n, channels, inner, chunks = w[N], w[CHANNELS], w[INNER], w[CHUNKS]
    count = n // channels
    sums = carray(_pointer(w[SUMS]), chunks * 2 * (channels + 1), np.float64)
    f, weight, bias = _floats(w[COEFFICIENTS], 7 * channels), _floats(w[WEIGHT], channels), _floats(w[BIAS], channels)
    running_mean, running_var = _floats(w[RUNNING_MEAN], channels), _floats(w[RUNNING_VAR], channels)
    for c in range(channels):
        mean = square = 0.0
        for k in range(chunks):
            mean += sums[k * 2 * channels + c]
        mean /= count
        for k in range(chunks):
            _, number, length = _stretches(n, channels, inner, chunks, k)
            rows = number * length // channels
            if rows > 0:
                away = sums[k * 2 * channels + c] / rows - mean
                square += sums[(k * 2 + 1) * channels + c] + rows * away * away
        square = max(square, 0.0)
        inverse = 1 / np.sqrt(square / count + d[EPS])
        a = np.float32(inverse * weight[c])
        f[A * channels + c], f[B * channels + c] = a, np.float32(bias[c] - mean * np.float64(a))
        f[MEAN * channels + c], f[INVERSE * channels + c] = np.float32(mean), np.float32(inverse)
        share = d[MOMENTUM]
        running_mean[c] = np.float32((1 - share) * running_mean[c] + share * mean)
        running_var[c] = np.float32((1 - share) * running_var[c] + share * square / max(count - 1, 1))


@njit(**_options)
def _reduce_end(w, d):
    channels, chunks = w[CHANNELS], w[CHUNKS]
    count = w[N] // channels
    sums = carray(_pointer(w[SUMS]), chunks * 2 * (channels + 1), np.float64)
    f, dscalars = _floats(w[COEFFICIENTS], 7 * channels), _floats(w[DSCALARS], 2)
    for i in range(2):
        total = 0.0
        for k in range(chunks):
            total += sums[chunks * 2 * channels + 2 * k + i]
        dscalars[i] = np.float32(total)
    if w[DWEIGHT] == 0:
        return
    dweight, dbias = _floats(w[DWEIGHT], channels), _floats(w[DBIAS], channels)
    for c in range(channels):
        total = product = 0.0
        for k in range(chunks):
            total += sums[k * 2 * channels + c]
            product += sums[(k * 2 + 1) * channels + c]
        a, mean = np.float64(f[A * channels + c]), np.float64(f[MEAN * channels + c])
        inverse = np.float64(f[INVERSE * channels + c])
        dweight[c], dbias[c] = np.float32(product * inverse), np.float32(total)
        kx = -a * inverse * inverse * product / count
        f[KG * channels + c], f[KX * channels + c] = np.float32(a), np.float32(kx)
        f[K1 * channels + c] = np.float32(-a * total / count - kx * mean)


_signature = types.void(types.CPointer(types.int64))
_entry_options = {"cache": True, "error_model": "numpy"}


@cfunc(_signature, **_entry_options)
def stats_part(data):
    words = carray(data, SIZE)
    _stats(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def stats_end(data):
    words = carray(data, SIZE)
    _stats_end(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def forward_part(data):
    words = carray(data, SIZE)
    _forward(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def reduce_part(data):
    words = carray(data, SIZE)
    _reduce(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def reduce_end(data):
    words = carray(data, SIZE)
    _reduce_end(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def apply_part(data):
    words = carray(data, SIZE)
    _apply(words, words.view(np.float64))
