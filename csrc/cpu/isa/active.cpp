// The active set: which columns matter to a block of rows; a tile of gradients split into those
// columns, row by row, and the sum of the rest of every row; weighted sums of head rows.
//
// Floors: the mask reads the tile once, a compare per vector; the split reads it once, an addition
// per vector, and what is active again from the first-level cache.
#include <type_traits>

#include "buffer.h"
#include "logits.h"

namespace ift {
namespace IFT_ISA {

constexpr int64_t kWidth = 32;  // the active columns of a block are rounded up to this

template <class T, bool kCapped, bool kBiased>
void mask_strip(const Chunk& c, const Transform<kCapped, kBiased>& f, const float* level,
                int64_t first, int64_t last, int64_t begin, int n, uint8_t* mask) {
  alignas(64) int32_t below[kBlock];  // -1 as long as every row is at or below its level
  std::fill(below, below + kBlock, -1);
  auto update = [&](int i, vf z, vf bar) {
    vi so_far;
    std::memcpy(&so_far, below + i, sizeof so_far);
    so_far &= z <= bar;  // false for a NaN, which must not be lost
    std::memcpy(below + i, &so_far, sizeof so_far);
  };
  const float* b = kBiased ? c.bias + begin : nullptr;
  for (int64_t r = first; r < last; ++r) {
    const T* x = static_cast<const T*>(c.x) + r * c.ld + begin;
    if (r + 1 < last) prefetch(x + c.ld, n * sizeof(T));
    const vf bar = splat(level[r]);
    int i = 0;
    for (; i + W <= n; i += W) update(i, f.logit(load(x + i), kBiased ? load(b + i) : (vf){}), bar);
    if (i < n) {
      int left = n - i;
      vf bias = kBiased ? load_part(b + i, left, 0.0f) : (vf){};
      update(i, f.logit(load_part(x + i, left, 0.0f), bias), bar);
    }
  }
  // What a bias of -inf masks out has gradient 0 and no part in a tail.
  for (int i = 0; i < n; ++i) mask[i] = below[i] == 0 || (kBiased && b[i] == -kInf);
}

// mask (blocks, cols): 1 where a row of the block has a logit that is not <= its level, or its
// target.
void active_mask(const Chunk& c, const int64_t* target, const float* level, int64_t block,
                 uint8_t* mask) {
  const int64_t blocks = (c.rows + block - 1) / block, strips = (c.cols + kBlock - 1) / kBlock;
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    const Transform<decltype(capped)::value, decltype(biased)::value> f(c);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
    for (int64_t job = 0; job < blocks * strips; ++job) {
      const int64_t b = job / strips, begin = job % strips * kBlock;
      mask_strip<T>(c, f, level, b * block, std::min(c.rows, (b + 1) * block), begin,
                    static_cast<int>(std::min<int64_t>(kBlock, c.cols - begin)),
                    mask + b * c.cols + begin);
    }
  });
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t target_column = target[r] - c.offset;
    if (target_column >= 0 && target_column < c.cols) mask[r / block * c.cols + target_column] = 1;
  }
}

// The active columns among n, in order, into `ids` (n + 1); `tail` (n + W) is -1 where a column is
// not active, 0 where it is and beyond. Returns how many are active.
inline int64_t split_mask(const uint8_t* mask, int64_t n, int32_t* ids, int32_t* tail) {
  int64_t active = 0;
  for (int64_t j = 0; j < n; ++j) {
    tail[j] = mask[j] ? 0 : -1;
    ids[active] = static_cast<int32_t>(j);
    active += mask[j];
  }
  for (int64_t j = n; j < n + W; ++j) tail[j] = 0;
  return active;
}

// tail_gradient (buckets, rows): the sum of each row over the columns of a bucket that are not
// active, over that of their tail weights; 0 without any. active: each block's active columns less
// their weight times that, as (block, their number rounded up), zeros beyond, one block after
// another. False, with nothing written, if that is more than `capacity` elements.
bool split_active(const Chunk& c, const uint8_t* mask, int64_t block, int64_t bucket,
                  const float* tail_weights, float* tail_gradient, void* active, int64_t capacity) {
  const int64_t blocks = (c.rows + block - 1) / block, buckets = (c.cols + bucket - 1) / bucket;
  struct Block {
    int64_t start, width;
  };
  Buffer<Block> of_block(blocks);
  Buffer<int64_t> before(blocks * buckets);  // active columns of the block before this bucket
  int64_t needed = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t count = 0;
    for (int64_t bucket_id = 0; bucket_id < buckets; ++bucket_id) {
      before[b * buckets + bucket_id] = count;
      const uint8_t* of = mask + b * c.cols + bucket_id * bucket;
      for (int64_t j = 0; j < std::min(bucket, c.cols - bucket_id * bucket); ++j) count += of[j];
    }
    const int64_t width = (count + kWidth - 1) / kWidth * kWidth;
    of_block[b] = {needed, width};
    needed += block * width;
  }
  if (needed > capacity) return false;

  ift::dispatch(c.dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
      Buffer<int32_t> ids(bucket), tail(bucket + W);
      Buffer<float> values(bucket + W);
#pragma omp for schedule(dynamic)
      for (int64_t job = 0; job < blocks * buckets; ++job) {
        const int64_t b = job / buckets, bucket_id = job % buckets, first = b * block;
        const int64_t begin = bucket_id * bucket, n = std::min(c.cols, begin + bucket) - begin;
        const int64_t count = std::min(c.rows - first, block), width = of_block[b].width;
        const int64_t active_count = split_mask(mask + b * c.cols + begin, n, ids.data, tail.data);
        float weight = 0.0f;
        for (int64_t j = 0; j < n; ++j) weight += tail[j] ? tail_weights[begin + j] : 0.0f;
        for (int64_t r = 0; r < count; ++r) {
          const T* x = static_cast<const T*>(c.x) + (first + r) * c.ld + begin;
          if (r + 1 < count) prefetch(x + c.ld, n * sizeof(T));
          vf total0{}, total1{};
          auto one = [&](int64_t i, vf value, vf& total) {
            vi in;
            std::memcpy(&in, tail.data + i, sizeof in);
            total += pick(in, value, (vf){});
          };
          int64_t i = 0;
          for (; i + 2 * W <= n; i += 2 * W) {
            one(i, load(x + i), total0);
            one(i + W, load(x + i + W), total1);
          }
          for (; i < n; i += W) {
            const int left = static_cast<int>(std::min<int64_t>(n - i, W));
            one(i, load_part(x + i, left, 0.0f), total0);
          }
          // Not 0 * a sum, which may be a NaN.
          const float u = weight == 0.0f ? 0.0f : sum(total0 + total1) / weight;
          tail_gradient[bucket_id * c.rows + first + r] = u;
          for (int64_t k = 0; k < active_count; ++k)
            values[k] = to_float(x[ids[k]]) - u * tail_weights[begin + ids[k]];
          T* out = static_cast<T*>(active) + of_block[b].start + r * width + before[job];
          int64_t k = 0;
          for (; k + W <= active_count; k += W) store(out + k, load(values.data + k));
          if (k < active_count)
            store_part(out + k, load(values.data + k), static_cast<int>(active_count - k));
          if (bucket_id == buckets - 1)
            std::fill(out + active_count, out + width - before[job], from_float<T>(0.0f));
        }
      }
    }
  });
  return true;
}

// Calls f(j, W) for every whole vector of a row and f(j, rest) for what is left; get and put take
// the second as the number of elements, a constant for whole vectors.
template <class F>
inline void each_vector(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + W <= width; j += W) f(j, std::integral_constant<int, W>{});
  if (j < width) f(j, static_cast<int>(width - j));
}
template <class T>
inline vf get(const T* x, int64_t j, std::integral_constant<int, W>) {
  return load(x + j);
}
template <class T>
inline vf get(const T* x, int64_t j, int n) {
  return load_part(x + j, n, 0.0f);
}
template <class T>
inline void put(T* x, int64_t j, std::integral_constant<int, W>, vf v) {
  store(x + j, v);
}
template <class T>
inline void put(T* x, int64_t j, int n, vf v) {
  store_part(x + j, v, n);
}

// sums[t] = the sum of tail_weights[v] * row v over rows [t * bucket, (t + 1) * bucket) of a
// (count, width) matrix, in float32.
void bucket_sums(int dtype, const void* matrix, int64_t count, int64_t width, int64_t ld,
                 int64_t bucket, const float* tail_weights, float* sums, int threads) {
  const int64_t buckets = (count + bucket - 1) / bucket;
  // Whole rows stream best; slices of them only where there are too few buckets for the threads.
  const int64_t slice = buckets >= 4 * threads ? width : 16 * W,
                parts = (width + slice - 1) / slice;
  ift::dispatch(dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < buckets * parts; ++job) {
      const int64_t first = job / parts * bucket, begin = job % parts * slice;
      const int64_t n = std::min(slice, width - begin);
      float* total = sums + job / parts * width + begin;
      std::fill(total, total + n, 0.0f);
      for (int64_t v = first; v < std::min(count, first + bucket); ++v) {
        const T* row = static_cast<const T*>(matrix) + v * ld + begin;
        const vf share = splat(tail_weights[v]);
        each_vector(n, [&](int64_t j, auto k) {
          put(total, j, k, get(total, j, k) + get(row, j, k) * share);
        });
      }
    }
  });
}

}  // namespace IFT_ISA
}  // namespace ift
