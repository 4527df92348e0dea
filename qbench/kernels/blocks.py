"""The short loops of fused.cpp for machines without a C++ compiler: numba compiles them. Formulas are those there.

Each works on one block of at most a few thousand values that stay in the first cache; what a block needs is asked once
per block, not once per value. The loops write their selections so that LLVM makes vectors of them.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qbench.kernels.backend import ACTIVATIONS, DOUBLES, KINDS, ROWS, SUMS, WORDS

SHORTEST = 512
BIG = np.float32(12582912.0)  # (x + BIG) - BIG rounds half to even for |x| < 2^22
FAR = np.float32(4e6)
ZERO, ONE, TWO, FOUR = np.float32(0), np.float32(1), np.float32(2), np.float32(4)
FARTHEST, LOG2E = np.float32(-87), np.float32(1.44269504)
LN2, LN2_REST = np.float32(0.693145752), np.float32(1.42860677e-6)
HALF, PI, ONE_BY_PI, SMALL = np.float32(0.5), np.float32(3.14159265), np.float32(0.318309886), np.float32(1e-4)
PIS = tuple(np.float32(x) for x in (3.140625, 9.67502594e-4, 1.50995799e-7))  # their sum is pi
SINES = tuple(np.float32(x) for x in (2.60831598e-6, -1.98106907e-4, 8.33307859e-3, -0.166666597))
SERIES = tuple(np.float32(1 / n) for n in (720, 120, 24, 6, 2, 1, 1))  # of e^x
W = {name: i for i, name in enumerate((*WORDS, *DOUBLES))}
SIZE = len(W)
(BF16, N, CHANNELS, INNER, CHUNKS, ACTIVATION, KIND, NORM) = (
    W[name] for name in ("bf16", "n", "channels", "inner", "chunks", "activation", "kind", "norm")
)
X, R, GY, GQ, Y, Q, DX, DR = (W[name] for name in ("x", "r", "gy", "gq", "y", "q", "dx", "dr"))
ADDED, COEFFICIENTS, WEIGHT, BIAS = (W[name] for name in ("sums", "coefficients", "weight", "bias"))
RUNNING_MEAN, RUNNING_VAR = W["running_mean"], W["running_var"]
DCHANNELS, DSCALARS = W["dchannels"], W["dscalars"]
EPS, MOMENTUM, LO, HI, FROM, BELOW, TIMES, STEP = (
    W[name] for name in ("eps", "momentum", "lo", "hi", "from_", "below", "times", "step")
)
QSTEP, QLO, QHI, QZERO, QBELOW = (W[name] for name in ("qstep", "qlo", "qhi", "qzero", "qbelow"))
A, B, MEAN, INVERSE, KG, KX, K1, BETA, ZETA, SHIFT = range(len(ROWS))
NROWS, NSUMS = len(ROWS), len(SUMS)
DZ, DZX, DSHIFT, DBETA, DZETA, CLIPS, STEPS = range(NROWS, NROWS + NSUMS + 2)
VX, VR, VZ, VY, VG, VH, BLOCKS = range(NROWS + NSUMS + 2, NROWS + NSUMS + 9)  # blocks: coefficients, sums, values
ROUND, PRELU = ACTIVATIONS["round"], ACTIVATIONS["prelu"]
LEARNED, GRID, SIGN, POLYNOMIAL, FOURIER = (
    KINDS[name] for name in ("learned", "grid", "sign", "polynomial", "fourier")
)

# Whoever imports this module has said where these are (build.loops).
thread = types.ExternalFunction("qbench_thread", types.int32())
threads = types.ExternalFunction("qbench_threads", types.int32())
options: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}


@intrinsic
def pointer(typing: Any, word: Any) -> Any:
    """A 64-bit word as a pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.PointerType(cgutils.int8_t))

    return types.voidptr(types.int64), code


@intrinsic
def real(typing: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def apart(typing: Any) -> Any:
    """Keeps the function that calls it from being inlined, where LLVM would no longer see which arrays are distinct."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), code


@njit(**options)
def floats(word, n):
    return carray(pointer(word), n, np.float32)


@njit(**options)
def share(count, part, parts):
    return count * part // parts, count * (part + 1) // parts


@njit(**options)
def period(channels, inner):
    return SHORTEST if inner > 1 else channels * ((SHORTEST + channels - 1) // channels)


@njit(**options)
def stretches(n, channels, inner, chunks, k):
    """(first value, number of stretches, length of each) of chunk k."""
    if inner == 1:
        begin, end = share(n // channels, k, chunks)
        return begin * channels, 1, (end - begin) * channels
    begin, end = share(n // (channels * inner), k, chunks)
    return begin * channels * inner, (end - begin) * channels, inner


@njit(**options)
def memory(period):
    """Memory for all blocks; (where it begins, bytes from one block to the next) goes to whoever works on them."""
    memory = np.zeros(BLOCKS * (period + 16), np.float32)
    return memory, (memory.ctypes.data, 4 * (period + 16))


@njit(**options)
def block(blocks, i, m):
    return floats(blocks[0] + blocks[1] * i, m)


@njit(**options)
def fill(blocks, period, which, w, channel):
    """Lay the coefficients out as memory is: repeated (channel < 0), or one value."""
    channels = w[CHANNELS]
    coefficients = floats(w[COEFFICIENTS], NROWS * channels)
    for i in which:
        row = block(blocks, i, period)
        for j in range(0, period, channels if channel < 0 else 1):
            if channel < 0:
                for c in range(channels):
                    row[j + c] = coefficients[i * channels + c]
            else:
                row[j] = coefficients[i * channels + channel]


@njit(**options)
def get(word, bf16, n, at, m, out):
    """out[:m] = the values from `at` on."""
    apart()
    if bf16:
        short, bits = carray(pointer(word), n, np.uint16)[at : at + m], out.view(np.uint32)
        for j in range(m):
            bits[j] = np.uint32(short[j]) << np.uint32(16)
    else:
        real = floats(word, n)[at : at + m]
        for j in range(m):
            out[j] = real[j]


@njit(**options)
def store(v, m):
    """v[:m] as it is once it lies in memory as bf16."""
    apart()
    bits = v.view(np.uint32)
    for j in range(m):
        b = bits[j]
        even = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        bits[j] = even if (b & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else np.uint32(0x7FC00000)


@njit(**options)
def put(word, bf16, n, at, m, v):
    """Write v[:m] from `at` on; v is rounded."""
    apart()
    if bf16:
        store(v, m)
        short, bits = carray(pointer(word), n, np.uint16)[at : at + m], v.view(np.uint32)
        for j in range(m):
            short[j] = np.uint16(bits[j] >> np.uint32(16))
    else:
        real = floats(word, n)[at : at + m]
        for j in range(m):
            real[j] = v[j]


@njit(**options)
def linear(x, a, b, z, m):
    apart()
    for j in range(m):
        z[j] = a[j] * x[j] + b[j]


@njit(**options)
def add(z, r, m):
    apart()
    for j in range(m):
        z[j] += r[j]


@njit(**options)
def activate(w, d, blocks, m):
    """y from z."""
    apart()
    lo, hi = np.float32(d[LO]), np.float32(d[HI])
    times, step = np.float32(d[TIMES]), np.float32(d[STEP])
    z, y = block(blocks, VZ, m), block(blocks, VY, m)
    if w[ACTIVATION] == PRELU:
        beta, zeta = block(blocks, BETA, m), block(blocks, ZETA, m)
        for j in range(m):
            y[j] = (z[j] if z[j] > ZERO else beta[j] * z[j]) + zeta[j]
        return
    for j in range(m):
        v = lo if z[j] < lo else z[j]
        y[j] = hi if v > hi else v
    if w[ACTIVATION] == ROUND:
        for j in range(m):
            y[j] = ((y[j] * times + BIG) - BIG) * step


@njit(**options)
def activate_back(w, d, blocks, m):
    """The gradient g that arrives at y -> at z, in place."""
    apart()
    low, below = np.float32(d[FROM]), np.float32(d[BELOW])
    z, g = block(blocks, VZ, m), block(blocks, VG, m)
    if w[ACTIVATION] == PRELU:
        beta, dbeta, dzeta = block(blocks, BETA, m), block(blocks, DBETA, m), block(blocks, DZETA, m)
        for j in range(m):
            dzeta[j] += g[j]
            dbeta[j] += g[j] * (ZERO if z[j] > ZERO else z[j])
        for j in range(m):
            g[j] *= ONE if z[j] > ZERO else beta[j]
        return
    if w[ACTIVATION] == ROUND:
        clips = block(blocks, CLIPS, m)
        for j in range(m):
            clips[j] += g[j] * (ONE if z[j] >= below else ZERO)
    for j in range(m):
        g[j] *= ONE if (z[j] >= low) & (z[j] < below) else ZERO


@njit(**options)
def add_up(blocks, m):
    """Add g, and g times x - mean, to their lanes."""
    apart()
    x, g, mean = block(blocks, VX, m), block(blocks, VG, m), block(blocks, MEAN, m)
    s1, s2 = block(blocks, DZ, m), block(blocks, DZX, m)
    for j in range(m):
        s1[j] += g[j]
        s2[j] += g[j] * (x[j] - mean[j])


@njit(**options)
def codes(y, q, m, step, zero):
    apart()
    for j in range(m):
        v = y[j] / step
        v = -FAR if v < -FAR else v
        v = FAR if v > FAR else v
        q[j] = ((v + BIG) - BIG) + zero


@njit(**options)
def quantize(w, d, blocks, m):
    """q from y, to where z was."""
    apart()
    step, lo, hi, zero = np.float32(d[QSTEP]), np.float32(d[QLO]), np.float32(d[QHI]), np.float32(d[QZERO])
    y, q, shift = block(blocks, VY, m), block(blocks, VZ, m), block(blocks, SHIFT, m)
    if w[KIND] == LEARNED:
        for j in range(m):
            v = y[j] / step
            v = lo if v < lo else v
            v = hi if v > hi else v
            q[j] = ((v + BIG) - BIG) * step
    elif w[KIND] == GRID:
        codes(y, q, m, step, zero)
        for j in range(m):
            v = lo if q[j] < lo else q[j]
            q[j] = ((hi if v > hi else v) - zero) * step
    else:
        for j in range(m):
            v = y[j] - shift[j]
            q[j] = -ONE if v < ZERO else (ONE if v >= ZERO else v)


@njit(**options)
def quantize_back(w, d, blocks, m):
    """g += the gradient h that arrives at q, brought to y; r and h are spent."""
    apart()
    step, lo, hi, zero = np.float32(d[QSTEP]), np.float32(d[QLO]), np.float32(d[QHI]), np.float32(d[QZERO])
    kind, below = w[KIND], np.float32(d[QBELOW])
    y, g, h = block(blocks, VY, m), block(blocks, VG, m), block(blocks, VH, m)
    if kind == LEARNED:
        steps = block(blocks, STEPS, m)
        for j in range(m):
            v = y[j] / step
            c = lo if v < lo else v
            c = hi if c > hi else c
            inside = ONE if (v > lo) & (v < hi) else ZERO
            g[j] += h[j] * inside
            steps[j] += h[j] * (((c + BIG) - BIG) - (v if inside > ZERO else ZERO))
        return
    if kind == GRID:
        code = block(blocks, VR, m)
        codes(y, code, m, step, zero)
        for j in range(m):
            g[j] += h[j] * (ONE if (code[j] >= lo) & (code[j] <= hi) else ZERO)
        return
    shift, dshift = block(blocks, SHIFT, m), block(blocks, DSHIFT, m)
    if kind == SIGN:
        for j in range(m):
            h[j] *= ONE if abs(y[j] - shift[j]) < below else ZERO
    elif kind == POLYNOMIAL:
        for j in range(m):
            v = abs(y[j] - shift[j])
            h[j] *= TWO - TWO * v if v < ONE else ZERO
    elif kind == FOURIER:  # see fused.cpp
        for j in range(m):
            u = step * abs(y[j] - shift[j])
            u = FOUR if u > FOUR else u
            bottom = sine(u)
            flat = ONE if abs(bottom) < SMALL else ZERO
            top = sine(lo * u) / (TWO * bottom + flat)
            total = flat * HALF * lo * (ONE if u < ONE else -ONE) + (ONE - flat) * top
            h[j] *= hi * total * (ONE if u < PI else ZERO)
    else:
        for j in range(m):
            e = exponential(-TWO * abs(step * (y[j] - shift[j])))
            h[j] *= hi * FOUR * e / ((ONE + e) * (ONE + e))
    for j in range(m):
        g[j] += h[j]
        dshift[j] += h[j]


@njit(**options)
def sine(x):
    k = (x * ONE_BY_PI + BIG) - BIG
    odd = abs(k - TWO * ((HALF * k + BIG) - BIG))
    r = ((x - k * PIS[0]) - k * PIS[1]) - k * PIS[2]
    s = r * r
    p = ((SINES[0] * s + SINES[1]) * s + SINES[2]) * s + SINES[3]
    return (r + r * s * p) * (ONE - TWO * odd)


@njit(**options)
def exponential(x):
    """e^x for x <= 0; below e^-87 it stays there."""
    x = FARTHEST if x < FARTHEST else x
    k = (x * LOG2E + BIG) - BIG
    f = (x - k * LN2) - k * LN2_REST
    p = SERIES[0]
    for c in SERIES[1:]:
        p = p * f + c
    return p * real((np.int32(k) + np.int32(127)) << np.int32(23))


@njit(**options)
def point(w, blocks, at, m):
    """x and z = a x + b (+ r) of one block."""
    x, r, z = block(blocks, VX, m), block(blocks, VR, m), block(blocks, VZ, m)
    get(w[X], w[BF16], w[N], at, m, x)
    linear(x, block(blocks, A, m), block(blocks, B, m), z, m)
    if w[R] != 0:
        get(w[R], w[BF16], w[N], at, m, r)
        add(z, r, m)


@njit(**options)
def collect(lane, out, channels, channel):
    """Add the lanes to their channels, and clear them."""
    for j in range(0, len(lane), channels if channel < 0 else 1):
        if channel < 0:
            for c in range(channels):
                out[c] += lane[j + c]
        else:
            out[channel] += lane[j]
    lane[:] = ZERO
