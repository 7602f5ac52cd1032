// Row statistics of a chunk of products: one read of the chunk, nothing written to it.
//
// Bytes: rows * cols * sizeof(T), plus 64 per row. Roof: the bandwidth of memory, or of the second-
// level cache where the tile is still there. About 10 instructions per value of 17 that an H100 can
// issue in the time that memory takes to bring two bytes.
//
// Short rows have a warp each, longer ones a block; where there are too few rows to fill the device
// several blocks share one, and a second small kernel puts their parts together. Each thread keeps
// its own running maximum and sums relative to it; they meet once, at the end of the row.
#pragma once
#include "common.cuh"

namespace ift {
namespace gpu {

// Rows of the running state, float64; the same order as ift_kernels/backends/contract.py. The sums
// of exponentials leave out the target's column.
enum State : int { kMax, kSum, kTarget, kEZ, kESq, kZSum, kSecond };

// With m = max: sum e^(z-m), sum e^(z-m)·(z-m), sum e^(2(z-m)), sum z, second largest; the columns
// of the maximum and of the first NaN, which is never the maximum here.
struct RowPartial {
  float max, sum, e_z, e_sq, second;
  uint32_t at, nan_at;
  double z_sum;
};

__device__ inline RowPartial no_columns() {
  return {-infinity(), 0.0f, 0.0f, 0.0f, -infinity(), kNowhere, kNowhere, 0.0};
}

// What one thread sees. kMore: everything, else what logprob, lse, entropy and argmax need.
template <class T, bool kPlain, bool kMore>
struct RowUpdate {
  const Chunk& c;
  int target;  // its column, -1 outside
  RowPartial s;

  template <int kCount>
  __device__ void batch(const float (&x)[kCount], int64_t column, int64_t stride) {
    float z[kCount], top = s.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = logit<kPlain>(c, x[i], column + i / kPack<T> * stride + i % kPack<T>);
      if (kMore) {
        s.second = fmaxf(s.second, fminf(top, z[i]));
        s.z_sum += z[i];  // in double: a large common logit would cost a float sum its digits
      }
      top = fmaxf(top, z[i]);  // passes over a NaN, which shows in the sum
    }
    if (top > s.max) {
      if (s.max != -infinity()) {
        const float delta_max = s.max - top, rescale = exp_difference(s.max, top);
        s.e_z = rescale * (s.e_z + delta_max * s.sum);
        s.sum *= rescale;
        if (kMore) s.e_sq *= rescale * rescale;
      }
      s.max = top;
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i)
        if (z[i] == top)
          s.at = static_cast<uint32_t>(column + i / kPack<T> * stride + i % kPack<T>);
    } else if (kCount == 1 && z[0] == s.max && column < s.at) {
      s.at = static_cast<uint32_t>(column);  // one before the packs comes after them
    }
    const float base = s.max == -infinity() ? 0.0f : s.max;
    const int64_t ahead = target - column;
    if (target >= 0 && ahead >= 0 && ahead < (kCount - 1) / kPack<T> * stride + kPack<T>) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (ahead != i / kPack<T> * stride + i % kPack<T>) continue;
        s.sum += 0.0f * exp_of<T>(z[i] - base);  // a NaN is still one of the row
        z[i] = -infinity();
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = z[i] - base;
      const float e = sizeof(T) == 2 ? exp_of<T>(d) : exp_difference(z[i], base);
      s.sum += e;
      s.e_z += e * fmaxf(d, -104.0f);  // e is 0 below, and so must be its product with -inf
      if (kMore) s.e_sq += e * e;
    }
  }
};

// Looks for the first NaN among what one thread has seen: once in a blue moon.
template <class T, bool kPlain>
struct NanSearch {
  const Chunk& c;
  uint32_t at;

  template <int kCount>
  __device__ void batch(const float (&x)[kCount], int64_t column, int64_t stride) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t id = column + i / kPack<T> * stride + i % kPack<T>;
      const float z = logit<kPlain>(c, x[i], id);
      if (z != z && id < at) at = static_cast<uint32_t>(id);
    }
  }
};

// The parts of 32 lanes become one, in every lane.
__device__ inline void merge(RowPartial& s, bool more) {
  const float top = warp_max(s.max);
  const uint32_t at = __reduce_min_sync(kAll, s.max == top ? s.at : kNowhere);
  s.nan_at = __reduce_min_sync(kAll, s.nan_at);
  if (more) s.second = warp_max(s.at == at ? s.second : fmaxf(s.second, s.max));
  const bool none = s.max == -infinity();
  const float delta_max = none ? 0.0f : s.max - top;
  const float rescale = none ? (s.sum == 0.0f ? 0.0f : 1.0f) : exp_difference(s.max, top);
  s.e_z = warp_sum(rescale * (s.e_z + delta_max * s.sum));
  s.sum = warp_sum(rescale * s.sum);
  if (more) {
    s.e_sq = warp_sum(rescale * rescale * s.e_sq);
    s.z_sum = warp_sum(s.z_sum);
  }
  s.max = top;
  s.at = at;
}

struct RunningState {
  const int64_t* target;
  double* state;  // (7, rows) with row stride ld
  int64_t ld;
  int64_t* argmax;
};

// The statistics of a row of this chunk merged into its running state, by one thread.
template <class T, bool kPlain>
__device__ inline void merge_row(const Chunk& c, const RunningState& out, int64_t row,
                                 RowPartial s) {
  double* const at = out.state + row;
  const int64_t ld = out.ld;
  const double nan = static_cast<double>(__uint_as_float(0x7FC00000u));
  if (s.nan_at != kNowhere) {  // a NaN is the maximum, as in torch.argmax
    s.at = s.nan_at;
    s.max = s.sum = s.e_z = s.e_sq = s.second = static_cast<float>(nan);
    s.z_sum = nan;
  }
  const double old = at[kMax * ld], top = s.max;
  const bool is_new_max = top > old || (top != top && old == old);
  const double now = is_new_max ? top : old;
  const double second = fmax(fmax(fmin(old, top), static_cast<double>(s.second)), at[kSecond * ld]);
  at[kSecond * ld] = now != now ? nan : second;
  if (is_new_max) out.argmax[row] = c.offset + s.at;
  // A row of -inf only has no finite reference point.
  const double base = now == -infinity() ? 0.0 : now;
  const double delta_max = old == -infinity() ? 0.0 : old - base;
  const double rescale = old == -infinity() ? 0.0 : exp(delta_max);
  const double delta_chunk = top == -infinity() ? 0.0 : top - base;
  const double grow = exp(delta_chunk), sum = at[kSum * ld];
  at[kEZ * ld] = rescale * (at[kEZ * ld] + delta_max * sum) + grow * (s.e_z + delta_chunk * s.sum);
  at[kESq * ld] = rescale * rescale * at[kESq * ld] + grow * grow * s.e_sq;
  at[kSum * ld] = rescale * sum + grow * s.sum;
  at[kZSum * ld] += s.z_sum;
  at[kMax * ld] = now;
  const int target_column = local_target(c, out.target, row);
  if (target_column >= 0) {
    const T x = (static_cast<const T*>(c.x) + row * c.ld)[target_column];
    at[kTarget * ld] = logit<kPlain>(c, to_float(x), target_column);
  }
}

template <class T, bool kPlain, bool kMore>
__device__ inline RowPartial partial_of(const Chunk& c, int target, int64_t row, int lane,
                                        int lanes, int part, int parts) {
  const Row<T> values(c, row);
  RowUpdate<T, kPlain, kMore> f{c, target, no_columns()};
  walk<T>(values, lane, lanes, part, parts, f);
  if (f.s.sum != f.s.sum) {
    NanSearch<T, kPlain> search{c, kNowhere};
    walk<T>(values, lane, lanes, part, parts, search);
    f.s.nan_at = search.at;
  }
  merge(f.s, kMore);
  return f.s;
}

// A warp per row.
template <class T, bool kPlain, bool kMore>
__global__ void __launch_bounds__(kThreads) stats_warp_kernel(Chunk c, RunningState out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= c.rows) return;
  const int target = local_target(c, out.target, row);
  const RowPartial s = partial_of<T, kPlain, kMore>(c, target, row, lane, kWarp, 0, 1);
  if (lane == 0) merge_row<T, kPlain>(c, out, row, s);
}

// `parts` blocks per row; with more than one they leave what they have in `partials` (rows, parts).
template <class T, bool kPlain, bool kMore>
__global__ void __launch_bounds__(kThreads)
    stats_block_kernel(Chunk c, RunningState out, int parts, RowPartial* partials) {
  __shared__ RowPartial of_warp[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t row = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int target = local_target(c, out.target, row);
  RowPartial s = partial_of<T, kPlain, kMore>(c, target, row, thread, kThreads, part, parts);
  if (lane == 0) of_warp[warp] = s;
  __syncthreads();
  if (warp != 0) return;
  s = lane < kThreads / kWarp ? of_warp[lane] : no_columns();
  merge(s, kMore);
  if (lane != 0) return;
  if (parts == 1)
    merge_row<T, kPlain>(c, out, row, s);
  else
    partials[row * parts + part] = s;
}

// Puts the parts of a row together, a warp per row; parts <= 32.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    stats_merge_kernel(Chunk c, RunningState out, int parts, const RowPartial* partials) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= c.rows) return;
  RowPartial s = lane < parts ? partials[row * parts + lane] : no_columns();
  merge(s, true);
  if (lane == 0) merge_row<T, kPlain>(c, out, row, s);
}

}  // namespace gpu
}  // namespace ift
