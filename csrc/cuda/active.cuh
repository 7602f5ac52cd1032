// The active set: which columns matter to a block of rows; a tile of gradients split into those
// columns, row by row, and of what is left of every row its sum over that of the tail weights. The
// layout is documented in ift_kernels/backends/reference/active.py.
//
// Bytes: the mask reads the tile once; the split reads it once, and what is active again from the
// caches, and writes that. Roof: the bandwidth of memory.
#pragma once
#include <cub/block/block_scan.cuh>

#include "common.cuh"

namespace ift {
namespace gpu {

// Columns that a thread takes together: a pack where rows are aligned, else one.
struct Strips {
  int64_t packs;  // whole packs at the start of every row, 0 where a row is not aligned
  int64_t jobs;   // packs and single columns after them
};

// mask (blocks, cols): 1 where a row of the block has a logit that is not <= its level, or its
// target, or a bias of -inf. A thread owns a pack of columns and goes down the rows of the block.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(Chunk c, Strips strips, const int64_t* target, const float* level, int64_t block,
                uint8_t* mask) {
  constexpr int kSize = kPack<T>;
  const int64_t groups = (strips.jobs + kThreads - 1) / kThreads;
  const int64_t b = blockIdx.x / groups;
  const int64_t job = blockIdx.x % groups * kThreads + threadIdx.x;
  if (job >= strips.jobs) return;
  const int64_t first = b * block, last = first + block < c.rows ? first + block : c.rows;
  uint8_t* const out = mask + b * c.cols;
  const T* const x = static_cast<const T*>(c.x);
  if (job >= strips.packs) {
    const int64_t column = strips.packs * kSize + (job - strips.packs);
    bool active = !kPlain && c.bias && c.bias[column] == -infinity();
    for (int64_t r = first; r < last; ++r)
      active |= !(logit<kPlain>(c, to_float(x[r * c.ld + column]), column) <= level[r]) ||
                local_target(c, target, r) == column;
    out[column] = active;
    return;
  }
  const int64_t column = job * kSize;
  uint32_t bits = 0;
#pragma unroll 4
  for (int64_t r = first; r < last; ++r) {
    float v[kSize];
    unpack<T>(load16(x + r * c.ld + column), v);
    const float bar = level[r];
    const int64_t target_bit = target[r] - c.offset - column;
    if (target_bit >= 0 && target_bit < kSize) bits |= 1u << target_bit;
#pragma unroll
    for (int i = 0; i < kSize; ++i)  // not "greater": a NaN must not be lost
      bits |= !(logit<kPlain>(c, v[i], column + i) <= bar) ? 1u << i : 0u;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!kPlain && c.bias && c.bias[column + i] == -infinity()) bits |= 1u << i;
    out[column + i] = bits >> i & 1u;
  }
}

// counts (blocks, buckets): active columns in each bucket of each block; a warp per count.
static __global__ void __launch_bounds__(kThreads)
    mask_counts_kernel(const uint8_t* mask, int64_t blocks, int64_t cols, int64_t bucket,
                       int64_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t buckets = (cols + bucket - 1) / bucket;
  const int64_t job = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (job >= blocks * buckets) return;
  const int64_t begin = job % buckets * bucket, end = begin + bucket < cols ? begin + bucket : cols;
  const uint8_t* const of = mask + job / buckets * cols;
  int count = 0;
  for (int64_t j = begin + lane; j < end; j += kWarp) count += of[j];
  count = warp_sum(count);
  if (lane == 0) counts[job] = count;
}

constexpr int kStrip = kThreads * 8;  // columns whose mask a block holds at once
constexpr int kSide = 32;             // rows that a block of threads takes together

// The mask of this thread's eight columns of a strip of n, as bits; `valid`: columns that exist.
__device__ inline unsigned eight_of_mask(const uint8_t* mask, int n, unsigned& valid) {
  const int first = static_cast<int>(threadIdx.x) * 8;
  unsigned active = 0;
  valid = 0;
  for (int i = 0; i < 8; ++i) {
    if (first + i >= n) continue;
    valid |= 1u << i;
    active |= mask[first + i] ? 1u << i : 0u;
  }
  return active;
}

// Writes which columns of a thread are active, from place `at` of a list on.
__device__ inline void list_active(unsigned active, int at, uint16_t* ids) {
  for (int i = 0; i < 8; ++i)
    if (active >> i & 1u) ids[at++] = static_cast<uint16_t>(threadIdx.x * 8 + i);
}

// A pack of a strip of n columns, zeros beyond them.
template <class T, int kSize>
__device__ inline void load_strip(const T* x, int at, int n, bool aligned, float (&v)[kSize]) {
  if (aligned && at + kSize <= n) {
    unpack<T>(load16(x + at), v);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = at + i < n ? to_float(x[at + i]) : 0.0f;
  }
}

constexpr int kPadding = 32;  // the active columns of a block are rounded up to this
static_assert(kPadding <= kWarp, "zeros are written by one access of a warp");

struct Split {
  const uint8_t* mask;  // (blocks, cols)
  const int64_t* ends;  // (blocks, buckets): active columns of the block up to the end of a bucket
  const int64_t* starts;  // (blocks): where a block begins in what is written
  int64_t block, bucket;
  const float* tail_weights;  // (cols)
  float* tail_gradient;       // (buckets, rows)
  bool aligned;
};

// The sum of a row over the columns of a strip in `tail`, by a warp.
template <class T>
__device__ inline float tail_sum(const T* x, int n, bool aligned, const uint8_t* tail, int lane) {
  constexpr int kSize = kPack<T>;
  float sum = 0.0f;
#pragma unroll 4
  for (int at = lane * kSize; at < n; at += kWarp * kSize) {
    const unsigned in = tail[at / 8] >> at % 8;
    float v[kSize];
    load_strip(x, at, n, aligned, v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += in >> i & 1u ? v[i] : 0.0f;
  }
  return warp_sum(sum);
}

// A block per bucket of kSide rows, which are of one block of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) split_active_kernel(Chunk c, Split in, T* active) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ uint8_t tail[kThreads];
  __shared__ uint16_t ids[kStrip];
  __shared__ float gradients[kSide], weights[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t buckets = (c.cols + in.bucket - 1) / in.bucket;
  const int64_t t = blockIdx.x % buckets, first = blockIdx.x / buckets * kSide,
                b = first / in.block;
  const int rows = static_cast<int>(c.rows - first < kSide ? c.rows - first : kSide);
  const int64_t origin = t * in.bucket;
  const int64_t end = origin + in.bucket < c.cols ? origin + in.bucket : c.cols;
  const int64_t* const ends = in.ends + b * buckets;
  const int64_t before = t > 0 ? ends[t - 1] : 0;
  const uint8_t* const mask = in.mask + b * c.cols;
  const T* const x = static_cast<const T*>(c.x) + first * c.ld;

  float weight = 0.0f;  // of the tail, the part of this thread
  for (int64_t begin = origin; begin < end; begin += kStrip) {
    const int n = static_cast<int>(end - begin < kStrip ? end - begin : kStrip);
    unsigned valid;
    const unsigned bits = eight_of_mask(mask + begin, n, valid);
    tail[thread] = static_cast<uint8_t>(valid & ~bits);
    __syncthreads();
    for (int i = thread; i < n; i += kThreads)
      if (tail[i / 8] >> i % 8 & 1u) weight += in.tail_weights[begin + i];
    for (int r = warp; r < rows; r += kThreads / kWarp) {
      const float sum = tail_sum(x + r * c.ld + begin, n, in.aligned, tail, lane);
      if (lane == 0) gradients[r] = begin == origin ? sum : gradients[r] + sum;
    }
    __syncthreads();  // or the next strip would overwrite what a slow warp still reads
  }
  weight = warp_sum(weight);
  if (lane == 0) weights[warp] = weight;
  __syncthreads();
  if (thread < rows) {
    weight = 0.0f;
    for (int w = 0; w < kThreads / kWarp; ++w) weight += weights[w];
    gradients[thread] = weight == 0.0f ? 0.0f : gradients[thread] / weight;
    in.tail_gradient[t * c.rows + first + thread] = gradients[thread];
  }
  __syncthreads();

  const int64_t width = (ends[buckets - 1] + kPadding - 1) / kPadding * kPadding;
  T* const out = active + in.starts[b] + (first - b * in.block) * width;
  int64_t slot = before;
  for (int64_t begin = origin; begin < end && slot < ends[t]; begin += kStrip) {
    const int n = static_cast<int>(end - begin < kStrip ? end - begin : kStrip);
    unsigned valid;
    const unsigned bits = eight_of_mask(mask + begin, n, valid);
    int at, count;
    Scan(scan).ExclusiveSum(__popc(bits), at, count);
    list_active(bits, at, ids);
    __syncthreads();
    for (int r = warp; r < rows; r += kThreads / kWarp) {
      const T* const from = x + r * c.ld + begin;
      T* const to = out + r * width + slot;
      const float u = gradients[r];
      for (int k = lane; k < count; k += kWarp)
        put(to + k, to_float(from[ids[k]]) - u * in.tail_weights[begin + ids[k]]);
    }
    slot += count;
    __syncthreads();  // the same for ids
  }
  if (t < buckets - 1 || ends[t] + lane >= width) return;
  for (int r = warp; r < rows; r += kThreads / kWarp) put(out + r * width + ends[t] + lane, 0.0f);
}

}  // namespace gpu
}  // namespace ift
