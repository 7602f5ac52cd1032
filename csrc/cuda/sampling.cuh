// Token choice over a chunk of products: a Gumbel-max draw, and the k best logits.
//
// Bytes: rows * cols * sizeof(T), k times that for the k best, of which only the first reading
// comes from memory. Roof: the bandwidth of memory where distributions are peaked: a batch that
// cannot beat what a thread has seen draws no random numbers. Flat ones are bound by the generator,
// about 25 instructions per value.
#pragma once
#include "common.cuh"

namespace ift {
namespace gpu {

// -log(-log1p(-u)) of the smallest u, 2^-33, and a little more for rounding.
constexpr float kMostNoise = 22.9f;

// Philox4x32-10 (Salmon et al., SC 2011): counter (id / 4, row low, row high, 0), key the seed;
// word id % 4 is the id's. As in ift_kernels/backends/reference/.
__device__ inline uint4 philox(uint64_t seed, uint64_t row, uint32_t group) {
  uint32_t c0 = group, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32);
  uint32_t c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = __umulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = __umulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ inline float gumbel_noise(uint4 words, int which) {
  const uint32_t word =
      which == 0 ? words.x : (which == 1 ? words.y : (which == 2 ? words.z : words.w));
  const float u = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
  return -logf(-log1pf(-fminf(u, 1.0f - 5.9604644775390625e-8f)));
}

template <class T, bool kPlain>
struct Draw {
  const Chunk& c;
  uint64_t seed, row_number;
  float bar;  // the best score so far
  uint64_t key;

  template <int kCount>
  __device__ void batch(const float (&x)[kCount], int64_t column, int64_t stride) {
    float z[kCount], top = -infinity();
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = logit<kPlain>(c, x[i], column + i / kPack<T> * stride + i % kPack<T>);
      top = fmaxf(top, z[i]);
      nan |= z[i] != z[i];
    }
    if (top + kMostNoise < bar && !nan) return;
    uint4 words{};
    uint32_t group = kNowhere;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t local = column + i / kPack<T> * stride + i % kPack<T>, id = c.offset + local;
      if (static_cast<uint32_t>(id / 4) != group) {
        group = static_cast<uint32_t>(id / 4);
        words = philox(seed, row_number, group);
      }
      const float score = z[i] + gumbel_noise(words, static_cast<int>(id % 4));
      const uint64_t mine = order_key(score, static_cast<uint32_t>(local));
      if (mine > key) {
        key = mine;
        bar = fmaxf(bar, score);
      }
    }
  }
};

struct Drawn {
  uint64_t seed;
  const int64_t* row_numbers;
  float *best, *logit;
  int64_t* ids;
};

// The winner of this chunk against that of the chunks before, by one thread.
template <class T, bool kPlain>
__device__ inline void merge_draw(const Chunk& c, const Drawn& out, int64_t row, uint64_t key) {
  if (key == 0) return;
  const uint32_t column = key_column(key);
  const float z =
      logit<kPlain>(c, to_float((static_cast<const T*>(c.x) + row * c.ld)[column]), column);
  const int64_t id = c.offset + column;
  const uint4 words =
      philox(out.seed, static_cast<uint64_t>(out.row_numbers[row]), static_cast<uint32_t>(id / 4));
  const float score = z + gumbel_noise(words, static_cast<int>(id % 4)), best = out.best[row];
  if (!(score > best) && !(score != score && best == best)) return;
  out.best[row] = score;
  out.logit[row] = z;
  out.ids[row] = id;
}

// `parts` blocks per row; with more than one they leave their winners in `keys` (rows, parts).
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    gumbel_kernel(Chunk c, Drawn out, int parts, uint64_t* keys) {
  __shared__ uint64_t of_warp[kThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t row = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  Draw<T, kPlain> f{c, out.seed, static_cast<uint64_t>(out.row_numbers[row]), out.best[row], 0};
  walk<T>(Row<T>(c, row), thread, kThreads, part, parts, f);
  uint64_t key = warp_max(f.key);
  if (lane == 0) of_warp[warp] = key;
  __syncthreads();
  if (warp != 0) return;
  key = warp_max(lane < kThreads / kWarp ? of_warp[lane] : uint64_t{0});
  if (lane != 0) return;
  if (parts == 1)
    merge_draw<T, kPlain>(c, out, row, key);
  else
    keys[row * parts + part] = key;
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    gumbel_merge_kernel(Chunk c, Drawn out, int parts, const uint64_t* keys) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= c.rows) return;
  const uint64_t key = warp_max(lane < parts ? keys[row * parts + lane] : uint64_t{0});
  if (lane == 0) merge_draw<T, kPlain>(c, out, row, key);
}

// The largest key below `bound`.
template <class T, bool kPlain>
struct BestBelow {
  const Chunk& c;
  uint64_t bound, key;

  template <int kCount>
  __device__ void batch(const float (&x)[kCount], int64_t column, int64_t stride) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t local = column + i / kPack<T> * stride + i % kPack<T>;
      const uint64_t mine = order_key(logit<kPlain>(c, x[i], local), static_cast<uint32_t>(local));
      if (mine < bound && mine > key) key = mine;
    }
  }
};

constexpr int kMaxTopK = 16;

// A block per row: k times the best of what is left, then merged with values and ids (rows, k) of
// the chunks before, which are ahead where values are equal.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    top_k_kernel(Chunk c, float* values, int64_t* ids, int k) {
  __shared__ uint64_t of_warp[kThreads / kWarp];
  __shared__ float found[kMaxTopK], merged[kMaxTopK];
  __shared__ int64_t found_ids[kMaxTopK], merged_ids[kMaxTopK];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t r = blockIdx.x;
  const Row<T> row(c, r);
  uint64_t bound = ~uint64_t{0};
  for (int i = 0; i < k; ++i) {
    BestBelow<T, kPlain> f{c, bound, 0};
    walk<T>(row, thread, kThreads, 0, 1, f);
    const uint64_t mine = warp_max(f.key);
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    bound = of_warp[0];
    for (int w = 1; w < kThreads / kWarp; ++w) bound = bound > of_warp[w] ? bound : of_warp[w];
    __syncthreads();  // or the next round would overwrite what a slow warp still reads
    if (thread == 0) {
      const uint32_t column = key_column(bound);
      found[i] = bound ? logit<kPlain>(c, to_float(row.x[column]), column) : -infinity();
      found_ids[i] = bound ? c.offset + column : -1;
    }
  }
  if (thread != 0) return;
  float* const value = values + r * k;
  int64_t* const id = ids + r * k;
  for (int i = 0, ours = 0, theirs = 0; i < k; ++i) {
    // Placeholders (id -1) lose against everything.
    const bool newer = id[theirs] < 0 || (found_ids[ours] >= 0 &&
                                          order_key(found[ours], 0) > order_key(value[theirs], 0));
    merged[i] = newer ? found[ours] : value[theirs];
    merged_ids[i] = newer ? found_ids[ours] : id[theirs];
    newer ? ++ours : ++theirs;
  }
  for (int i = 0; i < k; ++i) {
    value[i] = merged[i];
    id[i] = merged_ids[i];
  }
}

}  // namespace gpu
}  // namespace ift
