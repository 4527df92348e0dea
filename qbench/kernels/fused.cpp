// Batch-norm, a residual sum, an activation and the quantizer behind it, in as few passes over memory as there can be.
//
//   z = a x + b (+ r)                        a, b per channel; a = 1, b = 0 where there is no batch-norm
//   y = activation(z)                        a clip, a clip on equal steps, or a PReLU per channel
//   q = what the next layer's input quantizer makes of y: LSQ, an affine grid, or a sign with one of several slopes
//
// The backward pass computes z, y and the masks again from x (and r): nothing but the inputs is kept. One loop does all of
// it, for each activation and each quantizer its own; what is not there (no residual, a gradient of an output that nobody
// read) is a block of zeros, and what nobody wants goes to a block that is thrown away. Every function takes one block of
// 64-bit words (the order is in backend.py), so that any thread pool can call it: pointers and sizes as integers, scalars
// as doubles. Sums are taken per chunk of memory and added in the order of the chunks, so that the result depends neither
// on the number of threads nor on which of them was first.
//
// build.py compiles this file once for each instruction set (LEVEL) and puts all of them into one library; `level` says
// which of them the processor at hand can run. All give the same bits: products are rounded before they are added.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#define INLINE __attribute__((always_inline)) inline  // a call in a loop would keep it from being made of vectors

namespace {

constexpr int64_t SHORTEST = 512;  // per-channel coefficients are repeated to at least this many: long inner loops

using Bf16 = uint16_t;

// The numbers of a qbench.quant.quantizer.Kernel, which says what each kind does with them.
struct Numbers { double value, steps, lo, hi, zero, closed; };

// What backend.py packs, word by word.
struct Args {
  int (*thread)();
  int (*threads)();
  int64_t bf16, n, channels, inner, chunks, activation, kind, norm;
  const void *x, *r, *gy, *gq;
  void *y, *q, *dx, *dr;
  double* sums;                                          // [chunks, SUMS, channels], then [chunks, 2]
  float *coefficients;                                   // rows of `channels`: see Row
  const float *weight, *bias;
  float *running_mean, *running_var, *dchannels, *dscalars;
  double eps, momentum;
  Numbers first, second;                                 // of the activation, and of the quantizer behind it
};
enum Row { A, B, MEAN, INVERSE, KG, KX, K1, BETA, ZETA, SHIFT };
enum Sum { DZ, DZX, DSHIFT, DBETA, DZETA, SUMS, CLIPS = SUMS, STEPS, LANES };  // the last two are of the whole tensor
enum Activation { BOUNDED, RELU, CLIP, PRELU };  // these two in the order of backend.py
enum Kind { NONE, LEARNED, GRID, SIGN, POLYNOMIAL, TANH, FOURIER };

struct Span { int64_t begin, end; };
inline Span share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }
inline Span mine(const Args& o) { return share(o.chunks, o.thread(), o.threads()); }

// f(j) for j < m, none of which depends on another.
template <class F>
inline void each(int64_t m, F f) {
  #pragma omp simd
  for (int64_t j = 0; j < m; j++) f(j);
}

inline float real(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t rounded(float x) {  // its bits as bf16 has them, the rest 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (bits & 0x7fffffffu) <= 0x7f800000u ? even : 0x7fc00000u;
}
inline float get(const float* p, int64_t i) { return p[i]; }
inline float get(const Bf16* p, int64_t i) { return real(uint32_t(p[i]) << 16); }
inline void put(float* p, int64_t i, float x) { p[i] = x; }
inline void put(Bf16* p, int64_t i, float x) { p[i] = Bf16(rounded(x) >> 16); }
inline float stored(const float*, float x) { return x; }  // as it is once it lies in memory
inline float stored(const Bf16*, float x) { return real(rounded(x)); }
inline void keep(float* p, int64_t i, float x) { p[i] = x; }  // a value that needs no rounding
inline void keep(Bf16* p, int64_t i, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p[i] = Bf16(bits >> 16);
}

// Half to even, for |x| < 2^22; unlike rint it needs no instruction of its own.
inline float round_even(float x) {
  constexpr float big = 12582912.f;
  return (x + big) - big;
}
inline float clip(float x, float lo, float hi) {  // a NaN stays one
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}
inline float above(float x) { return std::nextafter(x, INFINITY); }
inline float exponential(float x) {  // for x <= 0, to two units of the last place; below e^-87 it stays there
  x = x < -87.f ? -87.f : x;
  const float k = round_even(x * 1.44269504f), f = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 1.f / 720;
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = p * f + c;
  return p * real(uint32_t(int32_t(k) + 127) << 23);
}

INLINE float sine(float x) {  // for |x| of at most some hundred
  const float k = round_even(x * 0.318309886f), odd = std::fabs(k - 2.f * round_even(.5f * k));
  const float r = ((x - k * 3.140625f) - k * 9.67502594e-4f) - k * 1.50995799e-7f, s = r * r;
  const float p = ((2.60831598e-6f * s - 1.98106907e-4f) * s + 8.33307859e-3f) * s - .166666597f;
  return (r + r * s * p) * (1.f - 2.f * odd);
}

// Rows of floats, each on a cache line of its own and none a multiple of a page behind another.
struct Rows {
  const int64_t stride;
  std::vector<float> memory;
  float* first;
  Rows(int64_t count, int64_t period) : stride((period + 31) / 16 * 16), memory(count * stride + 16) {
    first = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
  }
  Rows(const Rows&) = delete;
  float* operator[](int64_t i) const { return first + i * stride; }
};

// Per-channel rows laid out as memory is: channels last, a row repeated; channels first, one value per plane.
struct Table {
  const Args& o;
  const int64_t period;
  std::vector<int> which;
  Rows rows;

  static int64_t length(const Args& o) {
    return o.inner > 1 ? SHORTEST : o.channels * ((SHORTEST + o.channels - 1) / o.channels);
  }
  Table(const Args& o, std::initializer_list<int> wanted)
      : o(o), period(length(o)), which(wanted), rows(SHIFT + 1, period) {
    for (int w : which)
      for (int64_t j = 0; j < period && o.inner == 1; j += o.channels)
        std::copy_n(o.coefficients + w * o.channels, o.channels, rows[w] + j);
  }
  void enter(int64_t channel) {
    if (channel >= 0)
      for (int w : which) std::fill_n(rows[w], period, o.coefficients[w * o.channels + channel]);
  }
  const float* operator[](int w) const { return rows[w]; }
};

// Calls f(offset, length, channel) for the stretches of one chunk; each starts at channel 0 (channels last) or lies in one.
template <class F>
void walk(const Args& o, int64_t chunk, F f) {
  if (o.inner == 1) {
    Span rows = share(o.n / o.channels, chunk, o.chunks);
    f(rows.begin * o.channels, (rows.end - rows.begin) * o.channels, int64_t(-1));
  } else {
    Span images = share(o.n / (o.channels * o.inner), chunk, o.chunks);
    for (int64_t i = images.begin; i < images.end; i++)
      for (int64_t c = 0; c < o.channels; c++) f((i * o.channels + c) * o.inner, o.inner, c);
  }
}

// Sums over one chunk: lanes of float, added up in double by channel where a stretch ends.
void collect(float* lane, int64_t period, double* out, int64_t channels, int64_t channel) {
  for (int64_t j = 0; j < period; j += channel >= 0 ? 1 : channels) {
    if (channel >= 0) out[channel] += lane[j];
    else
      for (int64_t c = 0; c < channels; c++) out[c] += lane[j + c];
  }
  std::fill_n(lane, period, 0.f);
}

template <class T>
void stats(const Args& o) {
  const int64_t period = Table::length(o), channels = o.channels;
  Rows rows(2, period);
  float *lane = rows[0], *mean = rows[1];
  Span span = mine(o);
  for (int64_t k = span.begin; k < span.end; k++) {
    double *sum = o.sums + k * SUMS * channels, *square = sum + channels;
    std::fill(sum, sum + 2 * channels, 0.0);
    int64_t count = 0;
    auto pass = [&](int64_t at, int64_t length, auto f) {
      for (int64_t i = 0; i < length; i += period) {
        const int64_t m = std::min(period, length - i);
        const T* p = static_cast<const T*>(o.x) + at + i;
        each(m, [=](int64_t j) { lane[j] += f(get(p, j), j); });
      }
    };
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel <= 0) count += channel < 0 ? length / channels : length;
      pass(at, length, [](float x, int64_t) { return x; });
      collect(lane, period, sum, channels, channel);
    });
    if (count == 0) continue;
    for (int64_t j = 0; j < period && o.inner == 1; j += channels)
      for (int64_t c = 0; c < channels; c++) mean[j + c] = float(sum[c] / count);
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel >= 0) std::fill_n(mean, period, float(sum[channel] / count));
      pass(at, length, [=](float x, int64_t j) { return (x - mean[j]) * (x - mean[j]); });
      collect(lane, period, square, channels, channel);
    });
    for (int64_t c = 0; c < channels; c++) {  // about the mean as float has it -> about the mean
      double shift = sum[c] / count - float(sum[c] / count);
      square[c] -= count * shift * shift;
    }
  }
}

// Rows in the n-th chunk.
inline int64_t rows_in(const Args& o, int64_t k) {
  Span s = share(o.n / (o.channels * o.inner), k, o.chunks);
  return (s.end - s.begin) * o.inner;
}

void finish_stats(const Args& o) {
  const int64_t channels = o.channels;
  const double count = double(o.n / channels);
  std::vector<double> mean(channels), square(channels);
  for (int64_t k = 0; k < o.chunks; k++)
    for (int64_t c = 0; c < channels; c++) mean[c] += o.sums[k * SUMS * channels + c];
  for (int64_t c = 0; c < channels; c++) mean[c] /= count;
  for (int64_t k = 0; k < o.chunks; k++) {
    const double rows = double(rows_in(o, k)), *sum = o.sums + k * SUMS * channels;
    if (rows == 0) continue;
    for (int64_t c = 0; c < channels; c++) {
      double d = sum[c] / rows - mean[c];
      square[c] += sum[channels + c] + rows * d * d;
    }
  }
  for (int64_t c = 0; c < channels; c++) {
    double var = std::max(square[c], 0.0) / count, inverse = 1 / std::sqrt(var + o.eps);
    float a = float(inverse * o.weight[c]);
    o.coefficients[A * channels + c] = a;
    o.coefficients[B * channels + c] = float(o.bias[c] - mean[c] * a);
    o.coefficients[MEAN * channels + c] = float(mean[c]);
    o.coefficients[INVERSE * channels + c] = float(inverse);
    o.running_mean[c] = float((1 - o.momentum) * o.running_mean[c] + o.momentum * mean[c]);
    o.running_var[c] = float((1 - o.momentum) * o.running_var[c] + o.momentum * square[c] / std::max(count - 1, 1.0));
  }
}

// What becomes of one value: by the activation, and by the quantizer behind it. Rows are indexed by j.
template <int activation, int kind>
struct Point {
  float lo, hi, from, below, times, step;  // the activation's clip, open where from <= z < below; then its grid
  float qstep, qlo, qhi, qzero, qbelow;    // the quantizer's
  const float *a, *b, *mean, *beta, *zeta, *shift;
  Point(const Args& o, const Table& rows)
      : lo(0), hi(float(o.first.value)), from(0), below(o.first.closed ? above(hi) : hi),
        times(1 / hi * float(o.first.steps)), step(hi / float(o.first.steps)),  // n / a as torch has it: n times 1 / a
        qstep(float(o.second.value)),
        qlo(float(o.second.lo)), qhi(float(o.second.hi)), qzero(float(o.second.zero)),
        qbelow(o.second.closed ? above(qstep) : qstep), a(rows[A]), b(rows[B]), mean(rows[MEAN]), beta(rows[BETA]),
        zeta(rows[ZETA]), shift(rows[SHIFT]) {
    if (o.activation == RELU) from = above(0);  // torch's gradient is 0 at 0
    if (o.activation == BOUNDED) lo = from = -hi, below = above(hi);
    if (kind == TANH) qhi = std::max(qstep, 1.f);
    if (kind == FOURIER) qlo = float(2 * (o.second.steps + 1)), qhi = float(4 * o.second.value / 3.14159265358979324);
  }

  float y(float z, int64_t j) const {
    if (activation == PRELU) return (z > 0 ? z : beta[j] * z) + zeta[j];
    return activation == CLIP ? round_even(clip(z, lo, hi) * times) * step : clip(z, lo, hi);
  }
  float code(float y) const { return round_even(clip(y / qstep, -4e6f, 4e6f)) + qzero; }
  float q(float y, int64_t j) const {
    if (kind == LEARNED) return round_even(clip(y / qstep, qlo, qhi)) * qstep;
    if (kind == GRID) return (clip(code(y), qlo, qhi) - qzero) * qstep;
    float v = y - shift[j];
    return v < 0.f ? -1.f : v >= 0.f ? 1.f : v;
  }
  INLINE float slope(float y, int64_t j) const {  // dq / dy
    if (kind == LEARNED) return (y / qstep > qlo) & (y / qstep < qhi) ? 1.f : 0.f;
    if (kind == GRID) return (code(y) >= qlo) & (code(y) <= qhi) ? 1.f : 0.f;
    float v = std::fabs(y - shift[j]);
    if (kind == SIGN) return v < qbelow ? 1.f : 0.f;
    if (kind == POLYNOMIAL) return v < 1.f ? 2.f - 2.f * v : 0.f;
    if (kind == FOURIER) {  // a sum of cosines; where its closed form is 0 / 0, each of them is 1 or each -1
      float u = clip(qstep * v, 0.f, 4.f), bottom = sine(u), flat = std::fabs(bottom) < 1e-4f ? 1.f : 0.f;
      float sum = (1.f - flat) * sine(qlo * u) / (2.f * bottom + flat) + flat * (u < 1.f ? .5f : -.5f) * qlo;
      return qhi * sum * (u < 3.14159265f ? 1.f : 0.f);
    }
    float e = exponential(-2.f * qstep * v), one = 1.f + e;  // 1 - tanh^2 = 4 e / (1 + e)^2
    return qhi * 4.f * e / (one * one);
  }
  float step_slope(float y) const {  // of LEARNED
    float v = y / qstep;
    return round_even(clip(v, qlo, qhi)) - ((v > qlo) & (v < qhi) ? v : 0.f);
  }
};

// Where a block begins; where there is no tensor, `instead`.
template <class T>
const T* at(const void* p, int64_t i, const float* instead) {
  return p ? static_cast<const T*>(p) + i : reinterpret_cast<const T*>(instead);
}
template <class T>
T* at(void* p, int64_t i, float* instead) { return p ? static_cast<T*>(p) + i : reinterpret_cast<T*>(instead); }

template <class T, int activation, int kind>
void forward(const Args& o) {
  Table rows(o, {A, B, BETA, ZETA, SHIFT});
  Rows spare(2, rows.period);
  const Point<activation, kind> point(o, rows);
  Span span = mine(o);
  for (int64_t k = span.end; k-- > span.begin;)  // backwards: what `stats` has read last is still near
    walk(o, k, [&](int64_t begin, int64_t length, int64_t channel) {
      rows.enter(channel);
      for (int64_t s = begin; s < begin + length; s += rows.period) {
        const T *x = at<T>(o.x, s, spare[0]), *r = at<T>(o.r, s, spare[0]);
        T *y = at<T>(o.y, s, spare[1]), *q = at<T>(o.q, s, spare[1]);
        each(std::min(rows.period, begin + length - s), [=](int64_t j) {
          float v = point.y(point.a[j] * get(x, j) + point.b[j] + get(r, j), j);
          if (kind == NONE) return put(y, j, v);
          v = stored(x, v);
          keep(y, j, v);
          kind == SIGN ? keep(q, j, point.q(v, j)) : put(q, j, point.q(v, j));
        });
      }
    });
}

// The gradient that reaches z, written to dr; sums of it, of it times x - mean, and those for what is trained.
template <class T, int activation, int kind>
void reduce(const Args& o) {
  Table rows(o, {A, B, MEAN, BETA, ZETA, SHIFT});
  Rows zeros(1, rows.period), lanes(LANES, rows.period);
  const Point<activation, kind> point(o, rows);
  float *dz = lanes[DZ], *dzx = lanes[DZX], *dshift = lanes[DSHIFT], *dbeta = lanes[DBETA], *dzeta = lanes[DZETA];
  float *clips = lanes[CLIPS], *steps = lanes[STEPS];
  const int64_t channels = o.channels;
  Span span = mine(o);
  for (int64_t k = span.begin; k < span.end; k++) {
    double *sums = o.sums + k * SUMS * channels, *scalars = o.sums + o.chunks * SUMS * channels + 2 * k;
    std::fill(sums, sums + SUMS * channels, 0.0);
    walk(o, k, [&](int64_t begin, int64_t length, int64_t channel) {
      rows.enter(channel);
      for (int64_t s = begin; s < begin + length; s += rows.period) {
        const T *x = at<T>(o.x, s, zeros[0]), *r = at<T>(o.r, s, zeros[0]);
        const T *gy = at<T>(o.gy, s, zeros[0]), *gq = at<T>(o.gq, s, zeros[0]);
        T* out = at<T>(o.dr, s, nullptr);
        each(std::min(rows.period, begin + length - s), [=](int64_t j) {
          float v = get(x, j), z = point.a[j] * v + point.b[j] + get(r, j), g = get(gy, j);
          if (kind != NONE) {
            float y = stored(x, point.y(z, j)), h = get(gq, j), d = h * point.slope(y, j);
            g += d;
            if (kind == LEARNED) steps[j] += h * point.step_slope(y);
            if (kind >= SIGN) dshift[j] += d;
          }
          if (activation == PRELU) {
            dzeta[j] += g;
            dbeta[j] += g * (z > 0 ? 0.f : z);
            g *= z > 0 ? 1.f : point.beta[j];
          } else {
            if (activation == CLIP) clips[j] += z >= point.below ? g : 0.f;
            g = (z >= point.from) & (z < point.below) ? g : 0.f;
          }
          put(out, j, g);
          dz[j] += g;
          dzx[j] += g * (v - point.mean[j]);
        });
      }
      auto add = [&](int i) { collect(lanes[i], rows.period, sums + i * channels, channels, channel); };
      add(DZ), add(DZX);
      if (kind >= SIGN) add(DSHIFT);
      if (activation == PRELU) add(DBETA), add(DZETA);
    });
    scalars[0] = scalars[1] = 0;
    collect(clips, rows.period, scalars, 1, 0);
    collect(steps, rows.period, scalars + 1, 1, 0);
  }
}

void finish_reduce(const Args& o) {
  const int64_t channels = o.channels;
  const double count = double(o.n / channels), *scalars = o.sums + o.chunks * SUMS * channels;
  std::vector<double> total(SUMS * channels);
  double ends[2] = {0, 0};
  for (int64_t k = 0; k < o.chunks; k++) {
    for (int64_t i = 0; i < SUMS * channels; i++) total[i] += o.sums[k * SUMS * channels + i];
    for (int i : {0, 1}) ends[i] += scalars[2 * k + i];
  }
  for (int i : {0, 1}) o.dscalars[i] = float(ends[i]);
  for (int64_t c = 0; c < channels && o.norm; c++) {
    const float *f = o.coefficients + c;
    double a = f[A * channels], mean = f[MEAN * channels], inverse = f[INVERSE * channels];
    double kx = -a * inverse * inverse * total[DZX * channels + c] / count;
    o.coefficients[KG * channels + c] = float(a);
    o.coefficients[KX * channels + c] = float(kx);
    o.coefficients[K1 * channels + c] = float(-a * total[c] / count - kx * mean);
    total[DZX * channels + c] *= inverse;
  }
  for (int64_t i = 0; i < SUMS * channels; i++) o.dchannels[i] = float(total[i]);
}

// dx = a (g - mean g - xhat mean(g xhat)), with g as `reduce` left it in dr (which may be dx).
template <class T>
void apply(const Args& o) {
  Table rows(o, {KG, KX, K1});
  Span span = mine(o);
  for (int64_t k = span.end; k-- > span.begin;)
    walk(o, k, [&](int64_t begin, int64_t length, int64_t channel) {
      rows.enter(channel);
      const float *kg = rows[KG], *kx = rows[KX], *k1 = rows[K1];
      for (int64_t s = begin; s < begin + length; s += rows.period) {
        const T *x = at<T>(o.x, s, nullptr), *g = at<T>(o.dr, s, nullptr);
        T* dx = at<T>(o.dx, s, nullptr);
        each(std::min(rows.period, begin + length - s),
             [=](int64_t j) { put(dx, j, kg[j] * get(g, j) + kx[j] * get(x, j) + k1[j]); });
      }
    });
}

// Run-time choices to template arguments. The value of all signs is the same.
template <class T, int activation>
void choose(const Args& o, bool back) {
  switch (o.kind) {
    case NONE: return back ? reduce<T, activation, NONE>(o) : forward<T, activation, NONE>(o);
    case LEARNED: return back ? reduce<T, activation, LEARNED>(o) : forward<T, activation, LEARNED>(o);
    case GRID: return back ? reduce<T, activation, GRID>(o) : forward<T, activation, GRID>(o);
    case SIGN: return back ? reduce<T, activation, SIGN>(o) : forward<T, activation, SIGN>(o);
    case POLYNOMIAL: return back ? reduce<T, activation, POLYNOMIAL>(o) : forward<T, activation, SIGN>(o);
    case TANH: return back ? reduce<T, activation, TANH>(o) : forward<T, activation, SIGN>(o);
    default: return back ? reduce<T, activation, FOURIER>(o) : forward<T, activation, SIGN>(o);
  }
}
template <class T>
void choose(const Args& o, bool back) {
  if (o.activation == PRELU) choose<T, PRELU>(o, back);
  else o.activation == CLIP ? choose<T, CLIP>(o, back) : choose<T, BOUNDED>(o, back);  // RELU: the same loop
}
void choose(const Args& o, bool back) { o.bf16 ? choose<Bf16>(o, back) : choose<float>(o, back); }
const Args& args(void* data) { return *static_cast<const Args*>(data); }

}  // namespace

#define PASTE(name, level) name##_##level
#define NAMED(name, level) PASTE(name, level)
#define ENTRY(name) void NAMED(name, LEVEL)(void* data)

extern "C" {
ENTRY(stats_part) { args(data).bf16 ? stats<Bf16>(args(data)) : stats<float>(args(data)); }
ENTRY(stats_end) { finish_stats(args(data)); }
ENTRY(forward_part) { choose(args(data), false); }
ENTRY(reduce_part) { choose(args(data), true); }
ENTRY(reduce_end) { finish_reduce(args(data)); }
ENTRY(apply_part) { args(data).bf16 ? apply<Bf16>(args(data)) : apply<float>(args(data)); }
#ifdef BASE  // what is asked for are the instruction sets that build.py names
const char* level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "plain";
}
#endif
}
