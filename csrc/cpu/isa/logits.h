// Reading a row of products as logits, and walking the rows of a chunk on all threads.
#pragma once
#include <algorithm>

#include "../epilogues.h"
#include "vec.h"

namespace ift {
namespace IFT_ISA {

template <bool kCapped, bool kBiased>
struct Transform {
  vf pre, post;
  float cap_slope, plain_slope;

  explicit Transform(const Chunk& c)
      : pre(splat(kCapped ? c.scale / c.softcap : c.scale / c.temperature)),
        post(splat(kCapped ? c.softcap / c.temperature : 1.0f)),
        cap_slope(c.scale / c.temperature),
        plain_slope(c.scale / c.temperature) {}

  // Logit of products x whose biases start at `b`.
  vf logit(vf x, vf b) const {
    if (kBiased) x = x + b;
    // Rounded before tanh too, where the compiler could fuse it differently from place to place.
    x = rounded(x * pre);
    return kCapped ? rounded(post * vtanh(x)) : x;
  }
  // dz/dx, from the logit.
  vf slope(vf z) const {
    if (!kCapped) return splat(plain_slope);
    vf t = z / post;
    return cap_slope * (1.0f - t * t);
  }
};

// Block of columns whose logits are kept in the first-level cache between two passes.
constexpr int kBlock = 1024;

// The logits of columns [begin, begin + n) of a row into `z`, padded with -inf to whole vectors;
// returns their maximum (NaNs are passed over).
template <class T, bool kCapped, bool kBiased>
inline float read_block(const T* row, const float* bias, const Transform<kCapped, kBiased>& f,
                        int64_t begin, int n, float* z) {
  vf m0 = splat(-kInf), m1 = m0;
  const T* x = row + begin;
  const float* b = kBiased ? bias + begin : nullptr;
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    vf z0 = f.logit(load(x + i), kBiased ? load(b + i) : (vf){});
    vf z1 = f.logit(load(x + i + W), kBiased ? load(b + i + W) : (vf){});
    store(z + i, z0);
    store(z + i + W, z1);
    m0 = vmax(z0, m0);
    m1 = vmax(z1, m1);
  }
  for (; i < n; i += W) {
    int left = std::min(n - i, W);
    vf z0 = f.logit(load_part(x + i, left, 0.0f), kBiased ? load_part(b + i, left, 0.0f) : (vf){});
    for (int j = left; j < W; ++j) z0[j] = -kInf;
    store(z + i, z0);
    m0 = vmax(z0, m0);
  }
  return maximum(vmax(m0, m1));
}

// The largest of x[0, n), whole vectors; NaNs may be passed over.
inline float raw_maximum(const float* x, int n) {
  vf m0 = splat(-kInf), m1 = m0, m2 = m0, m3 = m0;
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = vmax(load(x + i), m0);
    m1 = vmax(load(x + i + W), m1);
    m2 = vmax(load(x + i + 2 * W), m2);
    m3 = vmax(load(x + i + 3 * W), m3);
  }
  for (; i < n; i += W) m0 = vmax(load(x + i), m0);
  return maximum(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// 16-bit floats order like their bits once those of negative numbers are flipped.
template <class T>
inline float raw_maximum(const T* x, int n) {
  static_assert(sizeof(T) == 2, "16-bit floats");
  typedef int16_t vs __attribute__((vector_size(W * 4)));
  vs m0, m1;
  auto ordered = [](const T* p) {
    vs v;
    std::memcpy(&v, p, sizeof v);
    return v ^ ((v >> 15) & 0x7FFF);
  };
  m0 = m1 = ordered(x);
  int i = 2 * W;
  for (; i + 4 * W <= n; i += 4 * W) {
    vs a = ordered(x + i), b = ordered(x + i + 2 * W);
    m0 = a > m0 ? a : m0;
    m1 = b > m1 ? b : m1;
  }
  for (; i < n; i += 2 * W) {
    vs a = ordered(x + i);
    m0 = a > m0 ? a : m0;
  }
  m0 = m0 > m1 ? m0 : m1;
  int16_t lanes[2 * W], top;
  std::memcpy(lanes, &m0, sizeof m0);
  top = lanes[0];
  for (int j = 1; j < 2 * W; ++j) top = std::max(top, lanes[j]);
  T raw{static_cast<uint16_t>(top ^ ((top >> 15) & 0x7FFF))};
  return to_float(raw);
}

// Asks for the cache lines of [p, p + bytes): the prefetcher starts anew at every row of a
// tile, whose rows are far apart.
inline void prefetch(const void* p, int64_t bytes) {
  const char* line = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
}

// Calls body(row, T*) for every row of the chunk, rows split among the threads.
template <class T, class Body>
inline void each_row(const Chunk& c, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows > 1 && c.threads > 1)
  for (int64_t r = 0; r < c.rows; ++r) body(r, static_cast<T*>(c.x) + r * c.ld);
}

// Calls f(T{}, bool_constant<capped>, bool_constant<biased>) for the chunk's types.
template <class F>
inline void dispatch(const Chunk& c, const F& f) {
  ift::dispatch(c.dtype, [&](auto t) {
    using std::bool_constant;
    if (c.softcap != 0.0f)
      c.bias ? f(t, bool_constant<true>{}, bool_constant<true>{})
             : f(t, bool_constant<true>{}, bool_constant<false>{});
    else
      c.bias ? f(t, bool_constant<false>{}, bool_constant<true>{})
             : f(t, bool_constant<false>{}, bool_constant<false>{});
  });
}

}  // namespace IFT_ISA
}  // namespace ift
