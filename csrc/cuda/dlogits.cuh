// Products overwritten by their gradient, or by probabilities, in place.
//
// Bytes: 2 * rows * cols * sizeof(T), plus 32 per row and segment. Roof: the bandwidth of memory,
// or of the second-level cache where the tile is still there. No reduction, so rows are cut into
// segments that fill the device however few they are.
#pragma once
#include "common.cuh"

namespace ift {
namespace gpu {

// norm (2, rows) and coef (4, rows) as in ift_kernels/backends/reference/.
struct RowGradient {
  const int64_t* target;
  const float* norm;
  int64_t norm_ld;
  const float* coef;
  int64_t coef_ld;
};

constexpr int kSegment = 4;  // packs of one thread

template <class T>
inline __host__ __device__ int64_t segments_of(int64_t cols) {
  const int64_t packs = cols / kPack<T>;
  const int64_t segments = (packs + kSegment * kThreads - 1) / (kSegment * kThreads);
  return segments > 0 ? segments : 1;
}

// Whether it is this thread that rewrites the column, in this segment.
template <class T>
__device__ inline bool rewrites(const Row<T>& row, int64_t segment, int column) {
  const int lead = static_cast<int>(row.lead), packs = static_cast<int>(row.packs);
  const int pack = (column - lead) / kPack<T>, thread = static_cast<int>(threadIdx.x);
  if (column < lead) return segment == 0 && thread == column;
  if (pack >= packs) return segment == 0 && thread == column - packs * kPack<T>;
  return segment == pack / (kSegment * kThreads) && thread == pack % kThreads;
}

// Applies f to every value of one segment of a row: x[column] = f(x[column], column).
template <class T, class F>
__device__ inline void rewrite(const Row<T>& row, int64_t segment, const F& f) {
  constexpr int kSize = kPack<T>;
  const int64_t first = segment * kSegment * kThreads + threadIdx.x;
  uint4 raw[kSegment];
#pragma unroll
  for (int i = 0; i < kSegment; ++i)
    if (first + i * kThreads < row.packs) raw[i] = load16(row.x + row.column(first + i * kThreads));
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    if (first + i * kThreads >= row.packs) continue;
    const int64_t column = row.column(first + i * kThreads);
    float v[kSize];
    unpack<T>(raw[i], v);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = f(v[j], static_cast<int>(column) + j);
    store16(row.x + column, pack<T>(v));
  }
  if (segment != 0 || static_cast<int>(threadIdx.x) >= row.loose()) return;
  const int64_t column = row.loose_column(static_cast<int>(threadIdx.x));
  put(row.x + column, f(to_float(row.x[column]), static_cast<int>(column)));
}

struct Zero {
  __device__ float operator()(float, int) const { return 0.0f; }
};

template <class T, bool kPlain>
struct Gradient {
  const Chunk& c;
  float top, log_sum, c_target, c_prob, c_plogp, c_uniform;

  __device__ float operator()(float x, int column) const {
    const float z = logit<kPlain>(c, x, column);
    const float log_p = (z - top) - log_sum, p = exp_of<T>(log_p);
    const float sum = p * ((c_prob - c_target) + tail(log_p, p)) + c_uniform;
    return sum * (c.slope * cap_slope<kPlain>(c, z));
  }
  __device__ float of_target(float x, int column) const {
    const float z = logit<kPlain>(c, x, column);
    const float log_p = (z - top) - log_sum, p = expf(log_p);
    const float sum = p * (c_prob + tail(log_p, p)) - c_target * expm1f(log_p) + c_uniform;
    return sum * (c.slope * cap_slope<kPlain>(c, z));
  }
  // 0 * (-inf) of a masked-out token must stay 0.
  __device__ float tail(float log_p, float p) const {
    return c_plogp == 0.0f || p == 0.0f ? 0.0f : c_plogp * log_p;
  }
};

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    dlogits_kernel(Chunk c, RowGradient g, int64_t segments) {
  const int64_t r = blockIdx.x / segments, segment = blockIdx.x % segments;
  const Row<T> row(c, r);
  const float* coef = g.coef + r;
  const Gradient<T, kPlain> f{c,
                              g.norm[r],
                              g.norm[r + g.norm_ld],
                              coef[0],
                              coef[g.coef_ld],
                              coef[2 * g.coef_ld],
                              coef[3 * g.coef_ld]};
  // Rows without any upstream gradient: 0, also where they have a NaN.
  if (f.c_target == 0.0f && f.c_prob == 0.0f && f.c_plogp == 0.0f && f.c_uniform == 0.0f) {
    rewrite(row, segment, Zero{});
    return;
  }
  // The target's product is read before it is overwritten, by the thread that does that: so its
  // gradient, which takes many registers, is for after the loop.
  const int at = local_target(c, g.target, r);
  const bool own = at >= 0 && rewrites(row, segment, at);
  const float product = own ? to_float(row.x[at]) : 0.0f;
  rewrite(row, segment, f);
  if (own) put(row.x + at, f.of_target(product, at));
}

template <class T, bool kPlain>
struct Probability {
  const Chunk& c;
  float top, log_sum;

  __device__ float operator()(float x, int column) const {
    return exp_of<T>((logit<kPlain>(c, x, column) - top) - log_sum);
  }
};

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    probabilities_kernel(Chunk c, const float* norm, int64_t norm_ld, int64_t segments) {
  const int64_t r = blockIdx.x / segments, segment = blockIdx.x % segments;
  rewrite(Row<T>(c, r), segment, Probability<T, kPlain>{c, norm[r], norm[r + norm_ld]});
}

}  // namespace gpu
}  // namespace ift
