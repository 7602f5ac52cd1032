// The active set: which columns of a block of rows matter, their products kept as columns, and the
// gradient of those.
//
// A block is `block` consecutive rows. A stored column is the `block` products of one vocabulary id
// with the rows of one block, in consecutive memory, zeros where the last block ends early. So both
// gradients read it with wide loads: transposed it is an operand of dW as it stands, and dh takes
// the row-major copy that `active_gradient` writes beside it.
//
// Floors: marking reads the chunk once, a compare per vector; collecting reads it once more from
// the second-level cache, an exp per vector; the gradient reads and writes what is stored, twice
// with the copy.
#include <type_traits>

#include "buffer.h"
#include "logits.h"
#include "marks.h"
#include "transpose.h"

namespace ift {
namespace IFT_ISA {

constexpr int kRowGroup = 16;     // rows gathered before they are turned into columns
constexpr int kColumnGroup = 32;  // stored columns that share a cache line of the row-major copy

template <class T, bool kCapped, bool kBiased>
void mark_strip(const Chunk& c, const Transform<kCapped, kBiased>& f, const float* level,
                int64_t first, int64_t last, int64_t begin, int n, uint8_t* marks) {
  alignas(64) int32_t below[kBlock];  // -1 as long as every row is at or below its level
  std::fill(below, below + kBlock, -1);
  auto fold = [&](int i, vf z, vf bar) {
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
    for (; i + W <= n; i += W) fold(i, f.logit(load(x + i), kBiased ? load(b + i) : (vf){}), bar);
    if (i < n) {
      int left = n - i;
      vf bias = kBiased ? load_part(b + i, left, 0.0f) : (vf){};
      fold(i, f.logit(load_part(x + i, left, 0.0f), bias), bar);
    }
  }
  // What a bias of -inf masks out has gradient 0, not the mean of a tail that it has no part in.
  for (int i = 0; i < n; ++i) marks[i] = below[i] == 0 || (kBiased && b[i] == -kInf);
}

// marks (blocks, cols): 1 where a row of the block has a logit that is not <= its level, or its
// target.
void active_marks(const Chunk& c, const int64_t* target, const float* level, int64_t block,
                  uint8_t* marks) {
  const int64_t blocks = (c.rows + block - 1) / block, strips = (c.cols + kBlock - 1) / kBlock;
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    const Transform<decltype(capped)::value, decltype(biased)::value> f(c);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.threads > 1)
    for (int64_t job = 0; job < blocks * strips; ++job) {
      const int64_t b = job / strips, begin = job % strips * kBlock;
      mark_strip<T>(c, f, level, b * block, std::min(c.rows, (b + 1) * block), begin,
                    static_cast<int>(std::min<int64_t>(kBlock, c.cols - begin)),
                    marks + b * c.cols + begin);
    }
  });
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t hit = target[r] - c.offset;
    if (hit >= 0 && hit < c.cols) marks[r / block * c.cols + hit] = 1;
  }
}

// The sums of a row over the columns of a tile that are not marked; `tail` is -1 there, else 0.
template <class T, bool kCapped, bool kBiased>
inline void tail_sums(const T* x, const float* bias, const Transform<kCapped, kBiased>& f,
                      const int32_t* tail, int n, float reference, float* out, int64_t out_ld) {
  vf mass{}, mass_z{}, slopes{};
  const vf ref = splat(reference);
  auto one = [&](int i, vf raw, vf b) {
    vi in;
    std::memcpy(&in, tail + i, sizeof in);
    vf z = f.logit(raw, b), d = z - ref;
    vf e = pick(in, vexp_small(d), (vf){});
    if (kCapped) {
      vf t = z / f.post, s = 1.0f - t * t;
      e = pick(in, e * s, (vf){});
      slopes += pick(in, s, (vf){});
    }
    mass += e;
    mass_z += pick(e == (vf){}, (vf){}, e * d);  // 0 * (-inf) of a masked-out token must stay 0
  };
  int i = 0;
  for (; i + W <= n; i += W) one(i, load(x + i), kBiased ? load(bias + i) : (vf){});
  if (i < n) {
    const int left = n - i;
    one(i, load_part(x + i, left, 0.0f), kBiased ? load_part(bias + i, left, 0.0f) : (vf){});
  }
  out[0] = sum(mass);
  out[out_ld] = sum(mass_z);
  if (kCapped) out[2 * out_ld] = sum(slopes);
}

// columns[k, r] = x[r, ids[k]] for `count` rows, zeros up to `block`; `scratch` holds kRowGroup
// rows of them.
template <class T>
void gather_columns(const T* x, int64_t ld, int64_t count, const int32_t* ids, int64_t a,
                    T* columns, int64_t block, T* scratch) {
  const int64_t width = (a + 31) / 32 * 32;
  for (int64_t r0 = 0; r0 < block; r0 += kRowGroup) {
    for (int64_t i = 0; i < kRowGroup; ++i) {
      T* to = scratch + i * width;
      if (r0 + i < count) {
        const T* from = x + (r0 + i) * ld;
        for (int64_t k = 0; k < a; ++k) to[k] = from[ids[k]];
      } else {
        std::fill(to, to + a, from_float<T>(0.0f));
      }
    }
    if constexpr (sizeof(T) == 2) {
      transpose(reinterpret_cast<const uint16_t*>(scratch), width, kRowGroup, a,
                reinterpret_cast<uint16_t*>(columns) + r0, block);
    } else {
      for (int64_t k = 0; k < a; ++k)
        for (int64_t i = 0; i < kRowGroup; ++i)
          columns[k * block + r0 + i] = scratch[i * width + k];
    }
  }
}

// Stores the marked columns, block after block, ids ascending; and for each row the sums over every
// tile of `tile` columns without them, relative to reference[row]: rows of `sums` (3, tiles, rows)
// are sum e * s, sum e * (z - reference) * s and sum s, where e = exp(z - reference) and s is the
// derivative of the softcap. Without one the last is the number of columns.
void active_collect(const Chunk& c, const uint8_t* marks, const float* reference, int64_t block,
                    int64_t tile, void* store, float* sums, int64_t sums_ld) {
  const int64_t blocks = (c.rows + block - 1) / block, tiles = (c.cols + tile - 1) / tile;
  Buffer<int64_t> starts(blocks * tiles + 1);
  starts[0] = 0;
  for (int64_t job = 0; job < blocks * tiles; ++job) {
    const int64_t begin = job % tiles * tile, end = std::min(c.cols, begin + tile);
    const uint8_t* of = marks + job / tiles * c.cols;
    int64_t count = 0;
    for (int64_t j = begin; j < end; ++j) count += of[j];
    starts[job + 1] = starts[job] + count;
  }
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    constexpr bool kCapped = decltype(capped)::value, kBiased = decltype(biased)::value;
    const Transform<kCapped, kBiased> f(c);
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
      Buffer<int32_t> ids(tile), tail(tile + W);
      Buffer<T> scratch(kRowGroup * (tile + 31));
#pragma omp for schedule(dynamic)
      for (int64_t job = 0; job < blocks * tiles; ++job) {
        const int64_t b = job / tiles, at = job % tiles, first = b * block;
        const int64_t begin = at * tile, n = std::min(c.cols, begin + tile) - begin;
        const int64_t count = std::min(c.rows - first, block);
        const int64_t marked = split_marks(marks + b * c.cols + begin, n, ids.data, tail.data);
        const T* x = static_cast<const T*>(c.x) + first * c.ld + begin;
        for (int64_t r = 0; r < count; ++r) {
          float* out = sums + at * sums_ld + first + r;
          if (r + 1 < count) prefetch(x + (r + 1) * c.ld, n * sizeof(T));
          tail_sums(x + r * c.ld, kBiased ? c.bias + begin : nullptr, f, tail.data,
                    static_cast<int>(n), reference[first + r], out, tiles * sums_ld);
          if (!kCapped) out[2 * tiles * sums_ld] = static_cast<float>(n - marked);
        }
        gather_columns(x, c.ld, count, ids.data, marked,
                       static_cast<T*>(store) + starts[job] * block, block, scratch.data);
      }
    }
  });
}

// What a row of the active set needs: vectors padded to whole blocks, coef 0 in the padding.
template <bool kCapped, bool kBiased>
struct RowVectors {
  const ActiveRows& rows;
  const Transform<kCapped, kBiased>& f;

  vf coef(int which, int64_t r) const { return load(rows.coef + which * rows.coef_ld + r); }

  // The gradient of products `x` of rows [r, r + W) in one column, less `base`; where the column is
  // their target, with `hit` in the one sum: p * one and hit nearly cancel for a sure token.
  template <bool kHit>
  vf gradient(vf x, vf bias, int64_t r, vf base) const {
    const vf z = f.logit(x, bias);
    const vf log_p = (z - load(rows.norm + r)) - load(rows.norm + rows.norm_ld + r);
    const vf p = vexp_small(log_p);
    const vf hit = coef(0, r), one = coef(1, r), per_log_p = coef(2, r), flat = coef(3, r);
    const vf tail = pick((per_log_p == (vf){}) | (p == (vf){}), (vf){}, per_log_p * log_p);
    const vf g = (p * (one + tail) + (kHit ? hit : (vf){}) + flat) * f.slope(z) - base;
    // Rows without any upstream gradient: 0, also where they have a NaN.
    const vf zero{};
    return pick((hit == zero) & (one == zero) & (per_log_p == zero) & (flat == zero), zero, g);
  }
};

// Stored products overwritten by their gradient less base[tile of the column, row] *
// profile[column]; the gradient of the target is in it. `pairs` (count, 2): block and column of
// each stored column. Those of a block may stand in several runs, tile after tile. `row_major`, if
// not null, receives each block as (block, its columns, run after run, zeros up to a multiple of
// 32), one after another.
void active_gradient(const Chunk& c, const ActiveRows& rows, const int64_t* pairs, int64_t count,
                     int64_t block, int64_t tile, void* row_major) {
  struct Run {
    int64_t number, first, end;  // stored columns [first, end) of this block
    int64_t at, ld, zeros;       // where in row_major; columns of zeros that follow
  };
  auto ends = [&](int64_t j) { return j + 1 == count || pairs[2 * j] != pairs[2 * j + 2]; };
  int64_t stored = 0;
  for (int64_t j = 0; j < count; ++j) stored += ends(j);
  Buffer<Run> runs(stored);
  struct Block {
    int64_t columns, at, last;  // its stored columns, where in row_major, its last run
  };
  Buffer<Block> blocks((c.rows + block - 1) / block);
  for (int64_t b = 0; b * block < c.rows; ++b) blocks[b] = {0, 0, -1};
  for (int64_t j = 0, s = 0, first = 0; j < count; ++j) {
    if (!ends(j)) continue;
    Block& of = blocks[pairs[2 * j]];
    runs[s] = {pairs[2 * j], first, j + 1, of.columns, 0, 0};
    of.columns += j + 1 - first;
    of.last = s++;
    first = j + 1;
  }
  auto padded = [](int64_t columns) {
    return (columns + kColumnGroup - 1) / kColumnGroup * kColumnGroup;
  };
  for (int64_t b = 0, written = 0; b * block < c.rows; ++b) {
    blocks[b].at = written;
    written += padded(blocks[b].columns) * block;
  }
  int64_t groups = 0;
  for (int64_t s = 0; s < stored; ++s) {
    const Block& of = blocks[runs[s].number];
    runs[s].at += of.at;
    runs[s].ld = padded(of.columns);
    runs[s].zeros = of.last == s ? runs[s].ld - of.columns : 0;
    groups += padded(runs[s].end - runs[s].first) / kColumnGroup;
  }
  struct Group {
    int64_t in, first;
  };
  Buffer<Group> group_of(groups);
  groups = 0;
  for (int64_t s = 0; s < stored; ++s)
    for (int64_t j = runs[s].first; j < runs[s].end; j += kColumnGroup) group_of[groups++] = {s, j};
  struct Hit {
    int64_t column, copy;
    float gradient;
  };
  Buffer<Hit> hits(c.rows);
  for (int64_t r = 0; r < c.rows; ++r) hits[r].column = -1;

  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    constexpr bool kBiased = decltype(biased)::value;
    const Transform<decltype(capped)::value, kBiased> f(c);
    const RowVectors<decltype(capped)::value, kBiased> of{rows, f};
    T* const x = static_cast<T*>(c.x);
    T* const copy = static_cast<T*>(row_major);
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
      // Targets first, while the products are there, and kept in float32 until the end.
#pragma omp for schedule(static)
      for (int64_t s = 0; s < stored; ++s) {
        const Run& in = runs[s];
        const int64_t top = in.number * block;
        for (int64_t r = top; r < std::min(c.rows, top + block); ++r) {
          const int64_t wanted = rows.target[r] - c.offset;
          int64_t low = in.first, high = in.end;
          while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (pairs[2 * middle + 1] < wanted)
              low = middle + 1;
            else
              high = middle;
          }
          if (low == in.end || pairs[2 * low + 1] != wanted) continue;
          const int64_t lane = (r - top) % W, from = r - lane;
          const vf bias = kBiased ? splat(c.bias[wanted]) : (vf){};
          const vf tail =
              load(rows.base + wanted / tile * rows.base_ld + from) * splat(rows.profile[wanted]);
          const vf g =
              of.template gradient<true>(load(x + low * block + from - top), bias, from, tail);
          hits[r] = {low, in.at + (r - top) * in.ld + (low - in.first), g[lane]};
        }
      }
#pragma omp for schedule(dynamic, 4)
      for (int64_t g = 0; g < groups; ++g) {
        const Run& in = runs[group_of[g].in];
        const int64_t first = group_of[g].first, top = in.number * block;
        const int64_t size = std::min<int64_t>(kColumnGroup, in.end - first);
        T* const columns = x + first * block;
        for (int64_t k = 0; k < size; ++k) {
          const int64_t id = pairs[2 * (first + k) + 1];
          const vf bias = kBiased ? splat(c.bias[id]) : (vf){};
          const float* base = rows.base + id / tile * rows.base_ld + top;
          const vf share = splat(rows.profile[id]);
          T* const column = columns + k * block;
          for (int64_t i = 0; i < block; i += W)
            store(column + i, of.template gradient<false>(load(column + i), bias, top + i,
                                                          load(base + i) * share));
        }
        if constexpr (sizeof(T) == 2) {
          if (!copy) continue;
          T* const out = copy + in.at + (first - in.first);
          transpose(reinterpret_cast<const uint16_t*>(columns), block, static_cast<int>(size),
                    block, reinterpret_cast<uint16_t*>(out), in.ld);
          const int64_t zeros = first + size == in.end ? in.zeros : 0;
          for (int64_t i = 0; i < block; ++i)
            for (int64_t k = size; k < size + zeros; ++k) out[i * in.ld + k] = T{};
        }
      }
#pragma omp for schedule(static)
      for (int64_t r = 0; r < c.rows; ++r) {
        if (hits[r].column < 0) continue;
        const T value = from_float<T>(hits[r].gradient);
        x[hits[r].column * block + r % block] = value;
        if (copy) copy[hits[r].copy] = value;
      }
    }
  });
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

// Rows [0, columns) of a chunk of dW: common[column / tile] * profile[column], plus every part
// whose `at` is that column, plus what is there already if `accumulate`. One thread owns a row and
// writes it once; its parts are added in their order, in float32.
void combine_rows(int dtype, const void* parts, int64_t count, int64_t width, const int64_t* at,
                  const float* common, int64_t tile, const float* profile, int64_t columns,
                  int out_dtype, void* out, bool accumulate, int threads) {
  Buffer<int64_t> first(columns + 1), order(count);  // counting sort by column
  for (int64_t v = 0; v <= columns; ++v) first[v] = 0;
  for (int64_t i = 0; i < count; ++i) ++first[at[i] + 1];
  for (int64_t v = 0; v < columns; ++v) first[v + 1] += first[v];
  {
    Buffer<int64_t> next(columns);
    for (int64_t v = 0; v < columns; ++v) next[v] = first[v];
    for (int64_t i = 0; i < count; ++i) order[next[at[i]]++] = i;
  }
  ift::dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    ift::dispatch(out_dtype, [&](auto o) {
      using O = decltype(o);
      const T* const rows = static_cast<const T*>(parts);
#pragma omp parallel num_threads(threads) if (threads > 1)
      {
        Buffer<float> total(width);  // stays in the first-level cache while parts stream by
#pragma omp for schedule(static)
        for (int64_t v = 0; v < columns; ++v) {
          O* to = static_cast<O*>(out) + v * width;
          const float* base = common + v / tile * width;
          const vf share = splat(profile[v]);
          each_vector(width, [&](int64_t j, auto n) {
            const vf there = accumulate ? get(to, j, n) : (vf){};
            put(total.data, j, n, there + get(base, j, n) * share);
          });
          for (int64_t i = first[v]; i < first[v + 1]; ++i) {
            const T* part = rows + order[i] * width;
            each_vector(width, [&](int64_t j, auto n) {
              put(total.data, j, n, get(total.data, j, n) + get(part, j, n));
            });
          }
          each_vector(width, [&](int64_t j, auto n) { put(to, j, n, get(total.data, j, n)); });
        }
      }
    });
  });
}

// sums[t] = the sum of profile[v] * row v over rows [t * tile, (t + 1) * tile) of a (count, width)
// matrix, in float32.
void tile_sums(int dtype, const void* matrix, int64_t count, int64_t width, int64_t ld,
               int64_t tile, const float* profile, float* sums, int threads) {
  const int64_t tiles = (count + tile - 1) / tile;
  // Whole rows stream best; slices of them only where there are too few tiles for the threads.
  const int64_t slice = tiles >= 4 * threads ? width : 16 * W, parts = (width + slice - 1) / slice;
  ift::dispatch(dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < tiles * parts; ++job) {
      const int64_t first = job / parts * tile, begin = job % parts * slice;
      const int64_t n = std::min(slice, width - begin);
      float* total = sums + job / parts * width + begin;
      std::fill(total, total + n, 0.0f);
      for (int64_t v = first; v < std::min(count, first + tile); ++v) {
        const T* row = static_cast<const T*>(matrix) + v * ld + begin;
        const vf share = splat(profile[v]);
        each_vector(n, [&](int64_t j, auto k) {
          put(total, j, k, get(total, j, k) + get(row, j, k) * share);
        });
      }
    }
  });
}

}  // namespace IFT_ISA
}  // namespace ift
