// A tile of gradients taken apart, for a gradient of hidden from the columns that matter to a block
// of rows: those columns row by row, and of what is left of every row its sum over that of the
// profile. The layout is told in ift_kernels/backends/reference_active.py.
//
// Bytes: the tile is read once, what is marked read again from the caches and written. Roof: the
// bandwidth of memory.
#pragma once
#include "active.cuh"

namespace ift {
namespace gpu {

constexpr int kPadding = 32;  // the marked columns of a block are rounded up to this
static_assert(kPadding <= kWarp, "zeros are written by one access of a warp");

struct Apart {
  const uint8_t* marks;   // (blocks, cols)
  const int64_t* ends;    // (blocks, tiles): marked columns of the block up to the end of a tile
  const int64_t* starts;  // (blocks): where a block begins in what is written
  int64_t block, tile;
  const float* profile;  // (cols)
  float* mean;           // (tiles, rows)
  bool aligned;
};

// The sum of a row over the columns of a strip in `tail`, as it is in `tail_sums`, by a warp.
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

// A block per tile of kSide rows, which are of one block of rows.
template <class T>
__global__ void __launch_bounds__(kThreads) active_rows_kernel(Chunk c, Apart in, T* active) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ uint8_t tail[kThreads];
  __shared__ uint16_t ids[kStrip];
  __shared__ float means[kSide], spreads[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t tiles = (c.cols + in.tile - 1) / in.tile;
  const int64_t t = blockIdx.x % tiles, first = blockIdx.x / tiles * kSide, b = first / in.block;
  const int rows = static_cast<int>(c.rows - first < kSide ? c.rows - first : kSide);
  const int64_t origin = t * in.tile;
  const int64_t end = origin + in.tile < c.cols ? origin + in.tile : c.cols;
  const int64_t* const ends = in.ends + b * tiles;
  const int64_t before = t > 0 ? ends[t - 1] : 0;
  const uint8_t* const marks = in.marks + b * c.cols;
  const T* const x = static_cast<const T*>(c.x) + first * c.ld;

  float spread = 0.0f;  // of the tail's profile, the part of this thread
  for (int64_t begin = origin; begin < end; begin += kStrip) {
    const int n = static_cast<int>(end - begin < kStrip ? end - begin : kStrip);
    unsigned valid;
    const unsigned marked = eight_marks(marks + begin, n, valid);
    tail[thread] = static_cast<uint8_t>(valid & ~marked);
    __syncthreads();
    for (int i = thread; i < n; i += kThreads)
      if (tail[i / 8] >> i % 8 & 1u) spread += in.profile[begin + i];
    for (int r = warp; r < rows; r += kThreads / kWarp) {
      const float sum = tail_sum(x + r * c.ld + begin, n, in.aligned, tail, lane);
      if (lane == 0) means[r] = begin == origin ? sum : means[r] + sum;
    }
    __syncthreads();  // or the next strip would overwrite what a slow warp still reads
  }
  spread = warp_sum(spread);
  if (lane == 0) spreads[warp] = spread;
  __syncthreads();
  if (thread < rows) {
    spread = 0.0f;
    for (int w = 0; w < kThreads / kWarp; ++w) spread += spreads[w];
    means[thread] = spread == 0.0f ? 0.0f : means[thread] / spread;
    in.mean[t * c.rows + first + thread] = means[thread];
  }
  __syncthreads();

  const int64_t width = (ends[tiles - 1] + kPadding - 1) / kPadding * kPadding;
  T* const out = active + in.starts[b] + (first - b * in.block) * width;
  int64_t slot = before;
  for (int64_t begin = origin; begin < end && slot < ends[t]; begin += kStrip) {
    const int n = static_cast<int>(end - begin < kStrip ? end - begin : kStrip);
    unsigned valid;
    const unsigned marked = eight_marks(marks + begin, n, valid);
    int at, count;
    Scan(scan).ExclusiveSum(__popc(marked), at, count);
    list_marks(marked, at, ids);
    __syncthreads();
    for (int r = warp; r < rows; r += kThreads / kWarp) {
      const T* const from = x + r * c.ld + begin;
      T* const to = out + r * width + slot;
      const float u = means[r];
      for (int k = lane; k < count; k += kWarp)
        put(to + k, to_float(from[ids[k]]) - u * in.profile[begin + ids[k]]);
    }
    slot += count;
    __syncthreads();  // the same for ids
  }
  if (t < tiles - 1 || ends[t] + lane >= width) return;
  for (int r = warp; r < rows; r += kThreads / kWarp) put(out + r * width + ends[t] + lane, 0.0f);
}

}  // namespace gpu
}  // namespace ift
