// The active set: marking columns of a block of rows, keeping them as columns, their gradient. What
// is stored, and in which order, is told in ift_kernels/backends/reference_active.py.
//
// Bytes: marking reads the chunk once; collecting reads it once (the rows of a tile stay in the
// second-level cache for the gather) and writes what is marked; the gradient reads and writes what
// is stored. Roof of all three: the bandwidth of memory.
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

// marks (blocks, cols): 1 where a row of the block has a logit that is not <= its level, or its
// target, or a bias of -inf. A thread owns a pack of columns and goes down the rows of the block.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    marks_kernel(Chunk c, Strips strips, const int64_t* target, const float* level, int64_t block,
                 uint8_t* marks) {
  constexpr int kSize = kPack<T>;
  const int64_t groups = (strips.jobs + kThreads - 1) / kThreads;
  const int64_t b = blockIdx.x / groups;
  const int64_t job = blockIdx.x % groups * kThreads + threadIdx.x;
  if (job >= strips.jobs) return;
  const int64_t first = b * block, last = first + block < c.rows ? first + block : c.rows;
  uint8_t* const out = marks + b * c.cols;
  const T* const x = static_cast<const T*>(c.x);
  if (job >= strips.packs) {
    const int64_t column = strips.packs * kSize + (job - strips.packs);
    bool marked = !kPlain && c.bias && c.bias[column] == -infinity();
    for (int64_t r = first; r < last; ++r)
      marked |= !(logit<kPlain>(c, to_float(x[r * c.ld + column]), column) <= level[r]) ||
                local_target(c, target, r) == column;
    out[column] = marked;
    return;
  }
  const int64_t column = job * kSize;
  uint32_t bits = 0;
#pragma unroll 4
  for (int64_t r = first; r < last; ++r) {
    float v[kSize];
    unpack<T>(load16(x + r * c.ld + column), v);
    const float bar = level[r];
    const int64_t hit = target[r] - c.offset - column;
    if (hit >= 0 && hit < kSize) bits |= 1u << hit;
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

// counts (blocks, tiles): marks in each tile of each block; a warp per count.
static __global__ void __launch_bounds__(kThreads)
    mark_counts_kernel(const uint8_t* marks, int64_t blocks, int64_t cols, int64_t tile,
                       int64_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t tiles = (cols + tile - 1) / tile;
  const int64_t job = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (job >= blocks * tiles) return;
  const int64_t begin = job % tiles * tile, end = begin + tile < cols ? begin + tile : cols;
  const uint8_t* const of = marks + job / tiles * cols;
  int count = 0;
  for (int64_t j = begin + lane; j < end; j += kWarp) count += of[j];
  count = warp_sum(count);
  if (lane == 0) counts[job] = count;
}

constexpr int kStrip = kThreads * 8;  // columns whose marks a block holds at once
constexpr int kSide = 32;             // of the squares in which columns are transposed

// The marks of this thread's eight columns of a strip of n, as bits; `valid`: columns that exist.
__device__ inline unsigned eight_marks(const uint8_t* marks, int n, unsigned& valid) {
  const int first = static_cast<int>(threadIdx.x) * 8;
  unsigned marked = 0;
  valid = 0;
  for (int i = 0; i < 8; ++i) {
    if (first + i >= n) continue;
    valid |= 1u << i;
    marked |= marks[first + i] ? 1u << i : 0u;
  }
  return marked;
}

// Writes which of its columns a thread has marked, from place `at` of a list on.
__device__ inline void list_marks(unsigned marked, int at, uint16_t* ids) {
  for (int i = 0; i < 8; ++i)
    if (marked >> i & 1u) ids[at++] = static_cast<uint16_t>(threadIdx.x * 8 + i);
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

// What collecting needs beside the chunk. starts (blocks, tiles): where the columns of a tile
// begin.
struct Collect {
  const uint8_t* marks;
  const int64_t* starts;
  const float* reference;
  int64_t block, tile;
  float* sums;  // (3, tiles, rows)
  bool aligned;
};

// The sums of a row over the unmarked columns of a strip, by a warp. tail[i]: bit j for column
// 8 * i + j.
template <class T, bool kPlain>
__device__ inline void tail_sums(const Chunk& c, const T* x, int64_t begin, int n, bool aligned,
                                 const uint8_t* tail, float reference, int lane, float (&out)[3]) {
  constexpr int kSize = kPack<T>;
  out[0] = out[1] = out[2] = 0.0f;
  for (int at = lane * kSize; at < n; at += kWarp * kSize) {
    const unsigned in = tail[at / 8] >> at % 8;
    float v[kSize];
    load_strip(x, at, n, aligned, v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (!(in >> i & 1u)) continue;
      const float z = logit<kPlain>(c, v[i], begin + at + i), d = z - reference;
      const float s = cap_slope<kPlain>(c, z), e = exp_of<T>(d) * s;
      out[0] += e;
      out[1] += e == 0.0f ? 0.0f : e * d;  // 0 * (-inf) of a masked-out token must stay 0
      out[2] += s;
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) out[i] = warp_sum(out[i]);
}

// A block per tile of each block of rows.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads) collect_kernel(Chunk c, Collect in, T* store) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ uint8_t tail[kThreads];
  __shared__ uint16_t ids[kStrip];
  __shared__ T square[kSide][kSide + 2];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t tiles = (c.cols + in.tile - 1) / in.tile;
  const int64_t b = blockIdx.x / tiles, t = blockIdx.x % tiles;
  const int64_t first = b * in.block;
  const int64_t rows = c.rows - first < in.block ? c.rows - first : in.block;
  const int64_t end = (t + 1) * in.tile < c.cols ? (t + 1) * in.tile : c.cols;
  int64_t start = in.starts[blockIdx.x];
  for (int64_t begin = t * in.tile; begin < end; begin += kStrip) {
    const int n = static_cast<int>(end - begin < kStrip ? end - begin : kStrip);
    unsigned valid;
    const unsigned marked = eight_marks(in.marks + b * c.cols + begin, n, valid);
    int before, count;
    Scan(scan).ExclusiveSum(__popc(marked), before, count);
    tail[thread] = static_cast<uint8_t>(valid & ~marked);
    list_marks(marked, before, ids);
    __syncthreads();

    const T* const x = static_cast<const T*>(c.x) + first * c.ld + begin;
    for (int64_t r = warp; r < rows; r += kThreads / kWarp) {
      float part[3];
      tail_sums<T, kPlain>(c, x + r * c.ld, begin, n, in.aligned, tail, in.reference[first + r],
                           lane, part);
      if (lane != 0) continue;
      float* const out = in.sums + t * c.rows + first + r;
      for (int i = 0; i < 3; ++i) {
        float* const sum = out + i * tiles * c.rows;
        *sum = begin == t * in.tile ? part[i] : *sum + part[i];
      }
    }

    for (int k0 = 0; k0 < count; k0 += kSide) {
      for (int64_t r0 = 0; r0 < in.block; r0 += kSide) {
        for (int r = warp; r < kSide; r += kThreads / kWarp) {
          T value{};  // zeros where the last block ends early
          if (r0 + r < rows && k0 + lane < count) value = x[(r0 + r) * c.ld + ids[k0 + lane]];
          square[r][lane] = value;
        }
        __syncthreads();
        for (int k = warp; k < kSide && k0 + k < count; k += kThreads / kWarp)
          store[(start + k0 + k) * in.block + r0 + lane] = square[lane][k];
        __syncthreads();  // or the next square would overwrite what a slow warp still reads
      }
    }
    start += count;
    __syncthreads();  // the same for ids and tail
  }
}

// What the gradient needs of each row, all in whole blocks, coef 0 in the padding.
struct ActiveRows {
  const int64_t* target;
  const float* norm;
  int64_t norm_ld;
  const float* coef;
  int64_t coef_ld;
  const float* base;  // (tiles, rows)
  int64_t base_ld;
  const float* profile;  // per column
};

constexpr int kColumnsPerBlock = 256;

// A pack's worth of consecutive values of a vector per row; `at` is a multiple of the pack.
template <int kSize>
__device__ inline void load_rows(const float* from, int64_t at, bool aligned, float (&v)[kSize]) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + at + i);
      v[i] = four.x;
      v[i + 1] = four.y;
      v[i + 2] = four.z;
      v[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = from[at + i];
  }
}

// Stored products (count, block) overwritten by their gradient less base[tile, row] times
// profile[column]. `across` threads stand side by side along a column, each with a pack of rows
// whose vectors it keeps in registers while it goes from column to column of the same block.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    active_gradient_kernel(Chunk c, ActiveRows rows, const int64_t* pairs, int64_t count,
                           int64_t block, int64_t tile, int across, bool aligned, int64_t slices) {
  constexpr int kSize = kPack<T>;
  const int side = static_cast<int>(threadIdx.x) % across;
  const int64_t slice = blockIdx.x % slices;
  const int64_t within = (slice * across + side) * kSize;
  const int step = kThreads / across;
  if (within >= block || static_cast<int>(threadIdx.x) / across >= step) return;
  const int64_t first = blockIdx.x / slices * kColumnsPerBlock;
  const int64_t last = first + kColumnsPerBlock < count ? first + kColumnsPerBlock : count;
  T* const store = static_cast<T*>(c.x);
  int64_t number = -1, of_tile = -1;
  float top[kSize], log_sum[kSize], hit[kSize], one[kSize], per_log_p[kSize], flat[kSize];
  float base[kSize];
  int at[kSize];
  for (int64_t k = first + threadIdx.x / across; k < last; k += step) {
    const int64_t column = pairs[2 * k + 1], r0 = pairs[2 * k] * block + within;
    if (pairs[2 * k] != number) {
      number = pairs[2 * k];
      of_tile = -1;
      load_rows(rows.norm, r0, aligned, top);
      load_rows(rows.norm + rows.norm_ld, r0, aligned, log_sum);
      load_rows(rows.coef, r0, aligned, hit);
      load_rows(rows.coef + rows.coef_ld, r0, aligned, one);
      load_rows(rows.coef + 2 * rows.coef_ld, r0, aligned, per_log_p);
      load_rows(rows.coef + 3 * rows.coef_ld, r0, aligned, flat);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        at[i] = r0 + i < c.rows ? local_target(c, rows.target, r0 + i) : -1;
    }
    if (column / tile != of_tile) {
      of_tile = column / tile;
      load_rows(rows.base + of_tile * rows.base_ld, r0, aligned, base);
    }
    T* const here = store + k * block + within;
    const float of_base = rows.profile[column];
    float v[kSize];
    unpack<T>(load16(here), v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float z = logit<kPlain>(c, v[i], column);
      const float log_p = (z - top[i]) - log_sum[i], p = exp_of<T>(log_p);
      const float tail = per_log_p[i] == 0.0f || p == 0.0f ? 0.0f : per_log_p[i] * log_p;
      // One sum before the slope: p * one and hit nearly cancel for a sure token.
      const float sum = p * (one[i] + tail) + (at[i] == column ? hit[i] : 0.0f) + flat[i];
      const bool dead = hit[i] == 0.0f && one[i] == 0.0f && per_log_p[i] == 0.0f && flat[i] == 0.0f;
      v[i] = dead ? 0.0f : sum * (c.slope * cap_slope<kPlain>(c, z)) - base[i] * of_base;
    }
    store16(here, pack<T>(v));
  }
}

}  // namespace gpu
}  // namespace ift
