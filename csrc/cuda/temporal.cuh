// Rows of tables: the temporal residual, its adjoint, and the sums of head rows that the active set
// needs.
//
// Bytes: mixing reads one or two table rows per token and writes one; the adjoint reads every part
// once and writes every row of the table once, in its final type: no atomics, no float32 copy of
// the table, the same sum in the same order every time. bucket_sums reads the matrix once. Roof of
// all: the bandwidth of memory.
#pragma once
#include <cassert>

#include "common.cuh"
#include "records.h"

namespace ift {
namespace gpu {

__device__ inline int64_t mixed_in_id(const ResidualTokens& in, int64_t t) {
  if (t % in.row_length == 0 || in.labels[t] == in.ignore_index) return in.ids[t];
  if (in.offsets) {
    int64_t low = 0, high = in.documents + 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (in.offsets[middle] < t)
        low = middle + 1;
      else
        high = middle;
    }
    if (low <= in.documents && in.offsets[low] == t) return in.ids[t];
  }
  return in.predicted[t - 1];
}

// Both must lie inside the table: like torch's own gather, this stops the device otherwise.
__device__ inline void check_tokens(const ResidualTokens& in, int64_t token_id, int64_t mixed_id) {
  assert(token_id >= 0 && token_id < in.vocabulary && "ids: token outside the table");
  assert(mixed_id >= 0 && mixed_id < in.vocabulary && "predicted: token outside the table");
  (void)token_id, (void)mixed_id, (void)in;
}

// out[t] = keep * table[ids[t]] + share * table[mixed_in_id(t)], a warp per token. `units`: groups
// of eight elements at the start of every row, 0 where rows are not aligned.
template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(const T* table, ResidualTokens in, T* out, int64_t width, int64_t units,
                    float keep, float share) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= in.tokens) return;
  const int64_t token_id = in.ids[t], mixed_id = mixed_in_id(in, t);
  check_tokens(in, token_id, mixed_id);
  const T* const token_row = table + token_id * width;
  const T* const mixed_row = table + mixed_id * width;
  T* const to = out + t * width;
  const bool unmixed = token_id == mixed_id;  // then bit for bit, whatever share is
#pragma unroll 2
  for (int64_t u = lane; u < units; u += kWarp) {
    float a[8], b[8];
    load8(token_row + 8 * u, a);
    if (!unmixed) {
      load8(mixed_row + 8 * u, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = keep * a[i] + share * b[i];
    }
    store8(to + 8 * u, a);
  }
  for (int64_t e = 8 * units + lane; e < width; e += kWarp) {
    if (unmixed)
      to[e] = token_row[e];
    else
      put(to + e, keep * to_float(token_row[e]) + share * to_float(mixed_row[e]));
  }
}

// keys (2, tokens): the table row that each token's gradient goes to, and the row that it is mixed
// with; `vocabulary`, which sorts behind all rows, where it is not mixed.
static __global__ void __launch_bounds__(kThreads)
    residual_keys_kernel(ResidualTokens in, int64_t* keys) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= in.tokens) return;
  const int64_t token_id = in.ids[t], mixed_id = mixed_in_id(in, t);
  check_tokens(in, token_id, mixed_id);
  keys[t] = token_id;
  keys[in.tokens + t] = mixed_id == token_id ? in.vocabulary : mixed_id;
}

template <int kCount, class T>
__device__ inline void load_some(const T* from, float (&v)[kCount]) {
  if constexpr (kCount == 8)
    load8(from, v);
  else
    v[0] = to_float(*from);
}

// `kCount` columns of one row of the sum, by one thread.
template <int kCount, class T>
__device__ inline void sum_row(const T* parts, const Parts& in, T* out, int64_t row, int64_t width,
                               int64_t column) {
  float total[kCount];
  T* const to = out + row * width + column;
#pragma unroll
  for (int i = 0; i < kCount; ++i) total[i] = 0.0f;
  const int64_t last = in.first[row + 1];
#pragma unroll 4
  for (int64_t entry = in.first[row]; entry < last; ++entry) {
    int64_t part = in.order[entry];
    float weight = 1.0f;
    if (part >= in.tokens) {
      part -= in.tokens;
      weight = in.share;
    } else if (in.keys[in.tokens + part] != in.vocabulary) {
      weight = in.keep;
    }
    float v[kCount];
    load_some<kCount>(parts + part * width + column, v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] += weight * v[i];
  }
  if constexpr (kCount == 8)
    store8(to, total);
  else
    put(to, total[0]);
}

// out[v] = the weighted sum of the parts of v. `lanes` threads, a power of two, share a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const T* parts, Parts in, T* out, int64_t rows, int64_t width, int64_t units,
                    int lanes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  if (row >= rows) return;
  for (int64_t u = lane; u < units; u += lanes) sum_row<8>(parts, in, out, row, width, 8 * u);
  for (int64_t e = 8 * units + lane; e < width; e += lanes)
    sum_row<1>(parts, in, out, row, width, e);
}

constexpr int kBucketRows = kThreads / kWarp;

// One thread's columns of a bucket, every kBucketRows-th row, then over the threads of the block.
template <int kCount, class T>
__device__ inline void sum_bucket(const T* matrix, const float* tail_weights, int64_t begin,
                                  int64_t end, int64_t ld, int64_t column, bool inside, float* out,
                                  float (&part)[kBucketRows][8 * kWarp]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float total[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) total[i] = 0.0f;
  if (inside) {
    // Pointers that move, not indices: so float32 rows leave registers for a sixth block.
    const T* from = matrix + (begin + warp) * ld + column;
    const float* weight = tail_weights + begin + warp;
#pragma unroll 4
    for (int64_t left = end - begin - warp; left > 0; left -= kBucketRows) {
      float v[kCount];
      load_some<kCount>(from, v);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += *weight * v[i];
      from += kBucketRows * ld;
      weight += kBucketRows;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) part[warp][i * kWarp + lane] = total[i];
  __syncthreads();
  if (warp != 0 || !inside) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float sum = 0.0f;
    for (int w = 0; w < kBucketRows; ++w) sum += part[w][i * kWarp + lane];
    out[column + i] = sum;
  }
}

// sums (buckets, width) of every `bucket` rows of a matrix (rows, width), each times its weight; a
// block per bucket and kWarp groups of columns: eight each for the first `units` of them, then
// single ones.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bucket_sums_kernel(const T* matrix, const float* tail_weights, int64_t rows, int64_t width,
                       int64_t ld, int64_t bucket, int64_t units, float* sums) {
  __shared__ float part[kBucketRows][8 * kWarp];
  const int64_t wide = (units + kWarp - 1) / kWarp;
  const int64_t single = (width - 8 * units + kWarp - 1) / kWarp;
  const int64_t t = blockIdx.x / (wide + single), job = blockIdx.x % (wide + single);
  const int64_t begin = t * bucket, end = begin + bucket < rows ? begin + bucket : rows;
  const int64_t lane = threadIdx.x % kWarp;
  float* const out = sums + t * width;
  if (job < wide) {
    const int64_t unit = job * kWarp + lane;
    sum_bucket<8>(matrix, tail_weights, begin, end, ld, 8 * unit, unit < units, out, part);
  } else {
    const int64_t column = 8 * units + (job - wide) * kWarp + lane;
    sum_bucket<1>(matrix, tail_weights, begin, end, ld, column, column < width, out, part);
  }
}

}  // namespace gpu
}  // namespace ift
