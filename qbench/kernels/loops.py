"""The passes of fused.cpp for machines without a C++ compiler, made of the loops of blocks.py. Order as there."""

import numpy as np
from numba import carray, cfunc, njit, types

from qbench.kernels import blocks as b


@njit(**b.options)
def _stats(w, d):
    n, channels, inner, chunks, bf16 = w[b.N], w[b.CHANNELS], w[b.INNER], w[b.CHUNKS], w[b.BF16]
    period = b.period(channels, inner)
    sums = carray(b.pointer(w[b.ADDED]), chunks * (b.NSUMS * channels + 2), np.float64)
    x, lane, mean = np.zeros(period, np.float32), np.zeros(period, np.float32), np.zeros(period, np.float32)
    begin, end = b.share(chunks, b.thread(), b.threads())
    for k in range(begin, end):
        total = sums[k * b.NSUMS * channels :][:channels]
        square = sums[(k * b.NSUMS + 1) * channels :][:channels]
        total[:] = 0
        square[:] = 0
        first, number, length = b.stretches(n, channels, inner, chunks, k)
        count = max(1, number * length // channels)
        for i in range(number):
            channel = -1 if inner == 1 else i % channels
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                b.get(w[b.X], bf16, n, at, m, x)
                b.add(lane, x, m)
            b.collect(lane, total, channels, channel)
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
                b.get(w[b.X], bf16, n, at, m, x)
                for j in range(m):
                    lane[j] += (x[j] - mean[j]) * (x[j] - mean[j])
            b.collect(lane, square, channels, channel)
        for c in range(channels):
            shift = total[c] / count - np.float64(np.float32(total[c] / count))
            square[c] -= count * shift * shift


@njit(**b.options)
def _forward(w, d):
    n, channels, inner, bf16 = w[b.N], w[b.CHANNELS], w[b.INNER], w[b.BF16]
    period, which = b.period(channels, inner), (b.A, b.B, b.BETA, b.ZETA, b.SHIFT)
    memory, blocks = b.memory(period)
    if inner == 1:
        b.fill(blocks, period, which, w, -1)
    begin, end = b.share(w[b.CHUNKS], b.thread(), b.threads())
    for k in range(end - 1, begin - 1, -1):
        first, number, length = b.stretches(n, channels, inner, w[b.CHUNKS], k)
        for i in range(number):
            if inner > 1:
                b.fill(blocks, period, which, w, i % channels)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                y, z = b.block(blocks, b.VY, m), b.block(blocks, b.VZ, m)
                b.point(w, blocks, at, m)
                b.activate(w, d, blocks, m)
                if w[b.Y] != 0:
                    b.put(w[b.Y], bf16, n, at, m, y)
                elif bf16:
                    b.store(y, m)
                if w[b.Q] != 0:
                    b.quantize(w, d, blocks, m)
                    b.put(w[b.Q], bf16, n, at, m, z)
    memory[0] = 0  # it lives until here


@njit(**b.options)
def _reduce_block(w, d, blocks, at, m):
    """The gradient that reaches z in one block, and its sums; x and z as they were in the forward pass."""
    n, bf16 = w[b.N], w[b.BF16]
    y, g, h = b.block(blocks, b.VY, m), b.block(blocks, b.VG, m), b.block(blocks, b.VH, m)
    if w[b.GY] != 0:
        b.get(w[b.GY], bf16, n, at, m, g)
    else:
        g[:] = b.ZERO
    if w[b.GQ] != 0:
        b.get(w[b.GQ], bf16, n, at, m, h)
        b.activate(w, d, blocks, m)
        if bf16:
            b.store(y, m)
        b.quantize_back(w, d, blocks, m)
    b.activate_back(w, d, blocks, m)
    b.add_up(blocks, m)
    b.put(w[b.DR], bf16, n, at, m, g)


@njit(**b.options)
def _reduce(w, d):
    n, channels, inner, chunks = w[b.N], w[b.CHANNELS], w[b.INNER], w[b.CHUNKS]
    period, which = b.period(channels, inner), (b.A, b.B, b.MEAN, b.BETA, b.ZETA, b.SHIFT)
    sums = carray(b.pointer(w[b.ADDED]), chunks * (b.NSUMS * channels + 2), np.float64)
    scalars = sums[chunks * b.NSUMS * channels :]
    memory, blocks = b.memory(period)
    if inner == 1:
        b.fill(blocks, period, which, w, -1)
    begin, end = b.share(chunks, b.thread(), b.threads())
    for k in range(begin, end):
        mine = sums[k * b.NSUMS * channels : (k + 1) * b.NSUMS * channels]
        mine[:] = 0
        scalars[2 * k : 2 * k + 2] = 0
        first, number, length = b.stretches(n, channels, inner, chunks, k)
        for i in range(number):
            if inner > 1:
                b.fill(blocks, period, which, w, i % channels)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                b.point(w, blocks, at, m)
                _reduce_block(w, d, blocks, at, m)
            for row in range(b.NSUMS):
                if row < 2 or (w[b.KIND] >= b.SIGN if row == 2 else w[b.ACTIVATION] == b.PRELU):
                    lane = b.block(blocks, b.DZ + row, period)
                    b.collect(lane, mine[row * channels :], channels, -1 if inner == 1 else i % channels)
        for i in range(2):
            b.collect(b.block(blocks, b.CLIPS + i, period), scalars[2 * k + i :], 1, 0)
    memory[0] = 0  # it lives until here


@njit(**b.options)
def _combine(blocks, m):
    b.apart()
    x, g = b.block(blocks, b.VX, m), b.block(blocks, b.VG, m)
    kg, kx, k1 = b.block(blocks, b.KG, m), b.block(blocks, b.KX, m), b.block(blocks, b.K1, m)
    for j in range(m):
        g[j] = kg[j] * g[j] + kx[j] * x[j] + k1[j]


@njit(**b.options)
def _apply(w, d):
    n, channels, inner, bf16 = w[b.N], w[b.CHANNELS], w[b.INNER], w[b.BF16]
    period, which = b.period(channels, inner), (b.KG, b.KX, b.K1)
    memory, blocks = b.memory(period)
    x, g = b.block(blocks, b.VX, period), b.block(blocks, b.VG, period)
    if inner == 1:
        b.fill(blocks, period, which, w, -1)
    begin, end = b.share(w[b.CHUNKS], b.thread(), b.threads())
    for k in range(end - 1, begin - 1, -1):
        first, number, length = b.stretches(n, channels, inner, w[b.CHUNKS], k)
        for i in range(number):
            if inner > 1:
                b.fill(blocks, period, which, w, i % channels)
            for at in range(first + i * length, first + (i + 1) * length, period):
                m = min(period, first + (i + 1) * length - at)
                b.get(w[b.X], bf16, n, at, m, x)
                b.get(w[b.DR], bf16, n, at, m, g)
                _combine(blocks, m)
                b.put(w[b.DX], bf16, n, at, m, g)
    memory[0] = 0  # it lives until here


@njit(**b.options)
def _stats_end(w, d):
    n, channels, inner, chunks = w[b.N], w[b.CHANNELS], w[b.INNER], w[b.CHUNKS]
    count = n // channels
    sums = carray(b.pointer(w[b.ADDED]), chunks * (b.NSUMS * channels + 2), np.float64)
    f, weight, bias = (
        b.floats(w[b.COEFFICIENTS], b.NROWS * channels),
        b.floats(w[b.WEIGHT], channels),
        b.floats(w[b.BIAS], channels),
    )
    running_mean, running_var = b.floats(w[b.RUNNING_MEAN], channels), b.floats(w[b.RUNNING_VAR], channels)
    for c in range(channels):
        mean = square = 0.0
        for k in range(chunks):
            mean += sums[k * b.NSUMS * channels + c]
        mean /= count
        for k in range(chunks):
            _, number, length = b.stretches(n, channels, inner, chunks, k)
            rows = number * length // channels
            if rows > 0:
                away = sums[k * b.NSUMS * channels + c] / rows - mean
                square += sums[(k * b.NSUMS + 1) * channels + c] + rows * away * away
        square = max(square, 0.0)
        inverse = 1 / np.sqrt(square / count + d[b.EPS])
        a = np.float32(inverse * weight[c])
        f[b.A * channels + c], f[b.B * channels + c] = a, np.float32(bias[c] - mean * np.float64(a))
        f[b.MEAN * channels + c], f[b.INVERSE * channels + c] = np.float32(mean), np.float32(inverse)
        share = d[b.MOMENTUM]
        running_mean[c] = np.float32((1 - share) * running_mean[c] + share * mean)
        running_var[c] = np.float32((1 - share) * running_var[c] + share * square / max(count - 1, 1))


@njit(**b.options)
def _reduce_end(w, d):
    channels, chunks = w[b.CHANNELS], w[b.CHUNKS]
    width = b.NSUMS * channels
    sums = carray(b.pointer(w[b.ADDED]), chunks * (width + 2), np.float64)
    f, dchannels, dscalars = (
        b.floats(w[b.COEFFICIENTS], b.NROWS * channels),
        b.floats(w[b.DCHANNELS], width),
        b.floats(w[b.DSCALARS], 2),
    )
    total, ends = np.zeros(width), np.zeros(2)
    for k in range(chunks):
        for i in range(width):
            total[i] += sums[k * width + i]
        for i in range(2):
            ends[i] += sums[chunks * width + 2 * k + i]
    for c in range(channels if w[b.NORM] != 0 else 0):
        a, mean = np.float64(f[b.A * channels + c]), np.float64(f[b.MEAN * channels + c])
        inverse = np.float64(f[b.INVERSE * channels + c])
        kx = -a * inverse * inverse * total[channels + c] / (w[b.N] // channels)
        f[b.KG * channels + c], f[b.KX * channels + c] = np.float32(a), np.float32(kx)
        f[b.K1 * channels + c] = np.float32(-a * total[c] / (w[b.N] // channels) - kx * mean)
        total[channels + c] *= inverse
    for i in range(2):
        dscalars[i] = np.float32(ends[i])
    for i in range(width):
        dchannels[i] = np.float32(total[i])


_signature = types.void(types.CPointer(types.int64))
_entry_options = {"cache": True, "error_model": "numpy"}


@cfunc(_signature, **_entry_options)
def stats_part(data):
    words = carray(data, b.SIZE)
    _stats(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def stats_end(data):
    words = carray(data, b.SIZE)
    _stats_end(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def forward_part(data):
    words = carray(data, b.SIZE)
    _forward(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def reduce_part(data):
    words = carray(data, b.SIZE)
    _reduce(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def reduce_end(data):
    words = carray(data, b.SIZE)
    _reduce_end(words, words.view(np.float64))


@cfunc(_signature, **_entry_options)
def apply_part(data):
    words = carray(data, b.SIZE)
    _apply(words, words.view(np.float64))
