// Batch-norm, a residual sum, an activation and the quantizers behind it, in as few passes over memory as there can be.
//
//   z = a x + b (+ r)                        a, b per channel; a = 1, b = 0 where there is no batch-norm
//   y = clip(z, lo, hi), then on equal steps where the activation is quantized
//   q = what the next layer's input quantizer makes of y: LSQ, a sign, or an affine grid
//
// The backward pass computes z, y and the masks again from x (and r): nothing but the inputs is kept. Every function
// takes one block of 64-bit words (the order is in backend.py), so that any thread pool can call it: pointers and sizes
// as integers, scalars as doubles. Sums are taken per chunk of memory and added in the order of the chunks, so that the
// result depends neither on the number of threads nor on which of them was first. No instruction set is assumed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t SHORTEST = 512;  // per-channel coefficients are repeated to at least this many: long inner loops

using Bf16 = uint16_t;

inline float get(const float* p, int64_t i) { return p[i]; }
inline float get(const Bf16* p, int64_t i) {
  uint32_t bits = uint32_t(p[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void put(float* p, int64_t i, float x) { p[i] = x; }
inline void put(Bf16* p, int64_t i, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p[i] = Bf16(x == x ? even : 0x7fc0u);
}
inline float stored(const float*, float x) { return x; }
inline float stored(const Bf16*, float x) {  // as it is once it lies in memory
  Bf16 b;
  put(&b, 0, x);
  return get(&b, 0);
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

// What backend.py packs, word by word.
struct Args {
  int (*thread)();
  int (*threads)();
  int64_t bf16, n, channels, inner, chunks, rounds, kind, unused;
  const void *x, *r, *gy, *gq;
  void *y, *q, *dx, *dr;
  double* sums;                                          // [chunks, 2, channels], then [chunks, 2]
  float *coefficients;                                   // rows of `channels`: see A, B, ...
  const float *weight, *bias;
  float *running_mean, *running_var, *dweight, *dbias, *dscalars;
  double eps, momentum;
  double lo, hi, from, below, times, step;               // the activation; it is open where from <= z < below
  double qstep, qlo, qhi, qzero, qbelow;                 // the quantizer behind it
};
enum Row { A, B, MEAN, INVERSE, KG, KX, K1 };            // rows of the coefficients
enum Kind { NONE, LEARNED, SIGN, GRID };

struct Span { int64_t begin, end; };
inline Span share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }
inline Span mine(const Args& o) {
  return share(o.chunks, o.thread(), o.threads());
}

// Per-channel rows laid out as memory is: channels last, a row repeated; channels first, one value per plane.
struct Table {
  int64_t channels, period;
  std::vector<std::vector<float>> rows;

  Table(const Args& o, std::initializer_list<int> which) : channels(o.channels), rows(which.size()) {
    period = o.inner > 1 ? SHORTEST : channels * ((SHORTEST + channels - 1) / channels);
    size_t i = 0;
    for (int w : which) {
      auto& row = rows[i++];
      row.resize(period);
      if (o.inner == 1)
        for (int64_t j = 0; j < period; j += channels)
          std::copy_n(o.coefficients + w * channels, channels, row.data() + j);
    }
    this->which.assign(which);
  }
  void set(const Args& o, int64_t channel) {
    for (size_t i = 0; i < rows.size(); i++) rows[i].assign(period, o.coefficients[which[i] * channels + channel]);
  }
  std::vector<int> which;
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

// Sums by channel over one chunk: lanes of float, added up in double where a stretch ends.
struct Lanes {
  std::vector<float> lane;
  explicit Lanes(int64_t period) : lane(period) {}
  void clear() { std::fill(lane.begin(), lane.end(), 0.f); }
  void add(double* out, int64_t channels, int64_t channel) {
    const int64_t period = int64_t(lane.size());
    if (channel >= 0)
      for (float x : lane) out[channel] += x;
    else
      for (int64_t j = 0; j < period; j += channels)
        for (int64_t c = 0; c < channels; c++) out[c] += lane[j + c];
    clear();
  }
};

template <class T>
void stats(const Args& o) {
  const T* x = static_cast<const T*>(o.x);
  Table none(o, {});
  const int64_t period = none.period, channels = o.channels;
  Lanes lanes(period);
  std::vector<float> mean(period);
  Span span = mine(o);
  for (int64_t k = span.begin; k < span.end; k++) {
    double *sum = o.sums + k * 2 * channels, *square = sum + channels;
    std::fill(sum, sum + 2 * channels, 0.0);
    int64_t count = 0;
    float* __restrict lane = lanes.lane.data();
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel <= 0) count += channel < 0 ? length / channels : length;
      for (int64_t i = 0; i < length; i += period) {
        const T* p = x + at + i;
        int64_t m = std::min(period, length - i);
        #pragma omp simd
        for (int64_t j = 0; j < m; j++) lane[j] += get(p, j);
      }
      lanes.add(sum, channels, channel);
    });
    if (count == 0) continue;
    for (int64_t j = 0; j < period && o.inner == 1; j += channels)
      for (int64_t c = 0; c < channels; c++) mean[j + c] = float(sum[c] / count);
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel >= 0) mean.assign(period, float(sum[channel] / count));
      const float* __restrict m0 = mean.data();
      for (int64_t i = 0; i < length; i += period) {
        const T* p = x + at + i;
        int64_t m = std::min(period, length - i);
        #pragma omp simd
        for (int64_t j = 0; j < m; j++) {
          float d = get(p, j) - m0[j];
          lane[j] += d * d;
        }
      }
      lanes.add(square, channels, channel);
    });
    for (int64_t c = 0; c < channels; c++) {  // about the mean as float has it -> about the mean
      double shift = sum[c] / count - float(sum[c] / count);
      square[c] -= count * shift * shift;
    }
  }
}

// Rows in the n-th chunk.
inline int64_t rows_in(const Args& o, int64_t k) {
  int64_t per = o.inner == 1 ? 1 : o.inner;
  Span s = share(o.n / (o.channels * per), k, o.chunks);
  return (s.end - s.begin) * per;
}

void finish_stats(const Args& o) {
  const int64_t channels = o.channels;
  const double count = double(o.n / channels);
  std::vector<double> mean(channels), square(channels);
  for (int64_t k = 0; k < o.chunks; k++)
    for (int64_t c = 0; c < channels; c++) mean[c] += o.sums[k * 2 * channels + c];
  for (int64_t c = 0; c < channels; c++) mean[c] /= count;
  for (int64_t k = 0; k < o.chunks; k++) {
    const double rows = double(rows_in(o, k)), *sum = o.sums + k * 2 * channels;
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

// The quantizer behind the activation: its value, where it is open, and what its step's gradient is multiplied by.
struct Behind {
  float step, lo, hi, zero, below;
  explicit Behind(const Args& o)
      : step(float(o.qstep)), lo(float(o.qlo)), hi(float(o.qhi)), zero(float(o.qzero)), below(float(o.qbelow)) {}
  template <int kind>
  float value(float y) const {
    if (kind == LEARNED) return round_even(clip(y / step, lo, hi)) * step;
    if (kind == SIGN) return y < 0.f ? -1.f : y >= 0.f ? 1.f : y;
    if (kind == GRID) return (clip(round_even(clip(y / step, -4e6f, 4e6f)) + zero, lo, hi) - zero) * step;
    return y;
  }
  template <int kind>
  float open(float y) const {
    if (kind == LEARNED) {
      float v = y / step;
      return (v > lo) & (v < hi) ? 1.f : 0.f;
    }
    if (kind == SIGN) return std::fabs(y) < below ? 1.f : 0.f;
    if (kind == GRID) {
      float code = round_even(clip(y / step, -4e6f, 4e6f)) + zero;
      return (code >= lo) & (code <= hi) ? 1.f : 0.f;
    }
    return 1.f;
  }
  float slope(float y) const {  // of LEARNED
    float v = y / step, c = clip(v, lo, hi);
    return round_even(c) - ((v > lo) & (v < hi) ? v : 0.f);
  }
};

struct Activation {
  float lo, hi, from, below, times, step;
  explicit Activation(const Args& o)
      : lo(float(o.lo)), hi(float(o.hi)), from(float(o.from)), below(float(o.below)), times(float(o.times)),
        step(float(o.step)) {}
  template <bool rounds>
  float value(float z) const {
    float y = clip(z, lo, hi);
    return rounds ? round_even(y * times) * step : y;
  }
};

template <class T, bool rounds, int kind, bool residual>
void forward(const Args& o) {
  const T *x = static_cast<const T*>(o.x), *r = static_cast<const T*>(o.r);
  T *y = static_cast<T*>(o.y), *q = static_cast<T*>(o.q);
  const Activation act(o);
  const Behind behind(o);
  Table table(o, {A, B});
  Span span = mine(o);
  for (int64_t k = span.begin; k < span.end; k++)
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel >= 0) table.set(o, channel);
      const float *__restrict a = table.rows[0].data(), *__restrict b = table.rows[1].data();
      for (int64_t i = 0; i < length; i += table.period) {
        const int64_t s = at + i, m = std::min(table.period, length - i);
        const T *__restrict px = x + s, *__restrict pr = residual ? r + s : nullptr;
        auto point = [&](int64_t j) {
          float z = a[j] * get(px, j) + b[j];
          if (residual) z += get(pr, j);
          return act.template value<rounds>(z);
        };
        if constexpr (kind == NONE) {
          T* __restrict py = y + s;
          #pragma omp simd
          for (int64_t j = 0; j < m; j++) put(py, j, point(j));
        } else if (kind == GRID || !y) {
          T* __restrict pq = q + s;
          #pragma omp simd
          for (int64_t j = 0; j < m; j++) put(pq, j, behind.template value<kind>(stored(px, point(j))));
        } else {
          T *__restrict py = y + s, *__restrict pq = q + s;
          #pragma omp simd
          for (int64_t j = 0; j < m; j++) {
            float v = stored(px, point(j));
            put(py, j, v);
            put(pq, j, behind.template value<kind>(v));
          }
        }
      }
    });
}

// The gradient that reaches z; sums of it, of it times x - mean, of what goes to the clip and to the step.
template <class T, bool rounds, int kind, bool residual>
void reduce(const Args& o) {
  const T *x = static_cast<const T*>(o.x), *r = static_cast<const T*>(o.r);
  const T *gy = static_cast<const T*>(o.gy), *gq = static_cast<const T*>(o.gq);
  T* dr = static_cast<T*>(o.dr);
  const Activation act(o);
  const Behind behind(o);
  Table table(o, {A, B, MEAN});
  const int64_t period = table.period, channels = o.channels;
  Lanes first(period), second(period), clips(period), steps(period);
  double* scalars = o.sums + o.chunks * 2 * channels;
  Span span = mine(o);
  for (int64_t k = span.begin; k < span.end; k++) {
    double *sum = o.sums + k * 2 * channels, *product = sum + channels;
    std::fill(sum, sum + 2 * channels, 0.0);
    scalars[2 * k] = scalars[2 * k + 1] = 0;
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel >= 0) table.set(o, channel);
      const float *__restrict a = table.rows[0].data(), *__restrict b = table.rows[1].data();
      const float* __restrict mean = table.rows[2].data();
      float *__restrict s1 = first.lane.data(), *__restrict s2 = second.lane.data();
      float *__restrict s3 = clips.lane.data(), *__restrict s4 = steps.lane.data();
      auto pass = [&](auto has_y, auto has_q, auto keep) {
        for (int64_t i = 0; i < length; i += period) {
          const int64_t s = at + i, m = std::min(period, length - i);
          const T *__restrict px = x + s, *__restrict pr = residual ? r + s : nullptr;
          const T *__restrict py = has_y ? gy + s : nullptr, *__restrict pq = has_q ? gq + s : nullptr;
          T* __restrict out = keep ? dr + s : nullptr;
          #pragma omp simd
          for (int64_t j = 0; j < m; j++) {
            float value = get(px, j), z = a[j] * value + b[j], g = 0.f;
            if (residual) z += get(pr, j);
            if (has_y) g = get(py, j);
            if (has_q) {
              float y = stored(px, act.template value<rounds>(z)), h = get(pq, j);
              g += h * behind.template open<kind>(y);
              if (kind == LEARNED) s4[j] += h * behind.slope(y);
            }
            if (rounds) s3[j] += z >= act.below ? g : 0.f;
            g = (z >= act.from) & (z < act.below) ? g : 0.f;
            if (keep) put(out, j, g);
            s1[j] += g;
            s2[j] += g * (value - mean[j]);
          }
        }
      };
      auto yes = std::true_type(); auto no = std::false_type();
      if constexpr (kind == NONE) {
        dr ? pass(yes, no, yes) : pass(yes, no, no);
      } else if constexpr (kind == GRID) {
        pass(no, yes, yes);
      } else {
        if (gq && gy) dr ? pass(yes, yes, yes) : pass(yes, yes, no);
        else if (gq) dr ? pass(no, yes, yes) : pass(no, yes, no);
        else dr ? pass(yes, no, yes) : pass(yes, no, no);
      }
      first.add(sum, channels, channel);
      second.add(product, channels, channel);
    });
    for (int64_t j = 0; j < period; j++) scalars[2 * k] += clips.lane[j], scalars[2 * k + 1] += steps.lane[j];
    clips.clear();
    steps.clear();
  }
}

void finish_reduce(const Args& o) {
  const int64_t channels = o.channels;
  const double count = double(o.n / channels), *scalars = o.sums + o.chunks * 2 * channels;
  std::vector<double> sum(channels), product(channels);
  double clips = 0, steps = 0;
  for (int64_t k = 0; k < o.chunks; k++) {
    for (int64_t c = 0; c < channels; c++) {
      sum[c] += o.sums[k * 2 * channels + c];
      product[c] += o.sums[(k * 2 + 1) * channels + c];
    }
    clips += scalars[2 * k];
    steps += scalars[2 * k + 1];
  }
  o.dscalars[0] = float(clips);
  o.dscalars[1] = float(steps);
  if (!o.dweight) return;
  for (int64_t c = 0; c < channels; c++) {
    const float *f = o.coefficients + c;
    double a = f[A * channels], mean = f[MEAN * channels], inverse = f[INVERSE * channels];
    o.dweight[c] = float(product[c] * inverse);
    o.dbias[c] = float(sum[c]);
    double kx = -a * inverse * inverse * product[c] / count;
    o.coefficients[KG * channels + c] = float(a);
    o.coefficients[KX * channels + c] = float(kx);
    o.coefficients[K1 * channels + c] = float(-a * sum[c] / count - kx * mean);
  }
}

// dx = a (g - mean g - xhat mean(g xhat)), with g from memory where `reduce` kept it, else computed again.
template <class T, bool rounds, int kind, bool kept>
void apply(const Args& o) {
  const T *x = static_cast<const T*>(o.x), *gy = static_cast<const T*>(o.gy), *gq = static_cast<const T*>(o.gq);
  const T* g0 = static_cast<const T*>(o.dr);
  T* dx = static_cast<T*>(o.dx);
  const Activation act(o);
  const Behind behind(o);
  Table table(o, {A, B, KG, KX, K1});
  Span span = mine(o);
  for (int64_t k = span.begin; k < span.end; k++)
    walk(o, k, [&](int64_t at, int64_t length, int64_t channel) {
      if (channel >= 0) table.set(o, channel);
      const float *__restrict a = table.rows[0].data(), *__restrict b = table.rows[1].data();
      const float *__restrict kg = table.rows[2].data(), *__restrict kx = table.rows[3].data();
      const float* __restrict k1 = table.rows[4].data();
      auto pass = [&](auto has_y, auto has_q) {
        for (int64_t i = 0; i < length; i += table.period) {
          const int64_t s = at + i, m = std::min(table.period, length - i);
          const T *__restrict px = x + s, *__restrict pg = kept ? g0 + s : nullptr;
          const T *__restrict py = has_y ? gy + s : nullptr, *__restrict pq = has_q ? gq + s : nullptr;
          T* __restrict out = dx + s;
          #pragma omp simd
          for (int64_t j = 0; j < m; j++) {
            float value = get(px, j), g = 0.f;
            if (kept) {
              g = get(pg, j);
            } else {
              float z = a[j] * value + b[j];
              if (has_y) g = get(py, j);
              if (has_q) g += get(pq, j) * behind.template open<kind>(stored(px, act.template value<rounds>(z)));
              g = (z >= act.from) & (z < act.below) ? g : 0.f;
            }
            put(out, j, kg[j] * g + kx[j] * value + k1[j]);
          }
        }
      };
      auto yes = std::true_type(); auto no = std::false_type();
      if constexpr (kept) {
        pass(no, no);
      } else if constexpr (kind == NONE) {
        pass(yes, no);
      } else {
        if (gq && gy) pass(yes, yes);
        else if (gq) pass(no, yes);
        else pass(yes, no);
      }
    });
}

// Run-time choices to template arguments. An activation on a grid has no quantizer behind it, and an affine grid stands
// alone: a quantizer that wants more takes two calls.
template <class T, bool rounds, int kind>
void choose(const Args& o, int what) {
  constexpr bool alone = kind == GRID;
  if (what == 0) o.r && !alone ? forward<T, rounds, kind, !alone>(o) : forward<T, rounds, kind, false>(o);
  if (what == 1) o.r && !alone ? reduce<T, rounds, kind, !alone>(o) : reduce<T, rounds, kind, false>(o);
  if constexpr (!alone)
    if (what == 2) o.dr ? apply<T, false, NONE, true>(o) : apply<T, rounds, kind, false>(o);
}
template <class T>
void choose(const Args& o, int what) {
  switch (o.kind) {
    case NONE: return o.rounds ? choose<T, true, NONE>(o, what) : choose<T, false, NONE>(o, what);
    case LEARNED: return choose<T, false, LEARNED>(o, what);
    case SIGN: return choose<T, false, SIGN>(o, what);
    default: return choose<T, false, GRID>(o, what);
  }
}
void choose(const void* data, int what) {
  const Args& o = *static_cast<const Args*>(data);
  o.bf16 ? choose<Bf16>(o, what) : choose<float>(o, what);
}

}  // namespace

extern "C" {
void stats_part(void* data) {
  const Args& o = *static_cast<const Args*>(data);
  o.bf16 ? stats<Bf16>(o) : stats<float>(o);
}
void stats_end(void* data) { finish_stats(*static_cast<const Args*>(data)); }
void forward_part(void* data) { choose(data, 0); }
void reduce_part(void* data) { choose(data, 1); }
void reduce_end(void* data) { finish_reduce(*static_cast<const Args*>(data)); }
void apply_part(void* data) { choose(data, 2); }
}
