// A tile of gradients taken apart, for a gradient of hidden from the columns that matter to a block
// of rows: those columns row by row, and the sum of what is left of every row, over its profile.
//
// Floor: the tile is read once, an addition per vector, and what is active read again from the
// first-level cache and written.
#include "buffer.h"
#include "logits.h"
#include "marks.h"

namespace ift {
namespace IFT_ISA {

constexpr int64_t kWidth = 32;  // the active columns of a block are rounded up to this

// mean (tiles, rows): the sum of each row over the columns of a tile that are not marked, over that
// of their profile; 0 without any. active: each block's marked columns less their profile times
// that mean, as (block, their number rounded up), zeros beyond, one block after another. False,
// with nothing written, if that is more than `room` elements.
bool active_rows(const Chunk& c, const uint8_t* marks, int64_t block, int64_t tile,
                 const float* profile, float* mean, void* active, int64_t room) {
  const int64_t blocks = (c.rows + block - 1) / block, tiles = (c.cols + tile - 1) / tile;
  struct Block {
    int64_t start, width;
  };
  Buffer<Block> of_block(blocks);
  Buffer<int64_t> before(blocks * tiles);  // marked columns of the block before this tile
  int64_t needed = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t count = 0;
    for (int64_t at = 0; at < tiles; ++at) {
      before[b * tiles + at] = count;
      const uint8_t* of = marks + b * c.cols + at * tile;
      for (int64_t j = 0; j < std::min(tile, c.cols - at * tile); ++j) count += of[j];
    }
    const int64_t width = (count + kWidth - 1) / kWidth * kWidth;
    of_block[b] = {needed, width};
    needed += block * width;
  }
  if (needed > room) return false;

  ift::dispatch(c.dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
    {
      Buffer<int32_t> ids(tile), tail(tile + W);
      Buffer<float> values(tile + W);
#pragma omp for schedule(dynamic)
      for (int64_t job = 0; job < blocks * tiles; ++job) {
        const int64_t b = job / tiles, at = job % tiles, first = b * block;
        const int64_t begin = at * tile, n = std::min(c.cols, begin + tile) - begin;
        const int64_t count = std::min(c.rows - first, block), width = of_block[b].width;
        const int64_t marked = split_marks(marks + b * c.cols + begin, n, ids.data, tail.data);
        float spread = 0.0f;
        for (int64_t j = 0; j < n; ++j) spread += tail[j] ? profile[begin + j] : 0.0f;
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
          const float u = spread == 0.0f ? 0.0f : sum(total0 + total1) / spread;
          mean[at * c.rows + first + r] = u;
          for (int64_t k = 0; k < marked; ++k)
            values[k] = to_float(x[ids[k]]) - u * profile[begin + ids[k]];
          T* out = static_cast<T*>(active) + of_block[b].start + r * width + before[job];
          int64_t k = 0;
          for (; k + W <= marked; k += W) store(out + k, load(values.data + k));
          if (k < marked) store_part(out + k, load(values.data + k), static_cast<int>(marked - k));
          if (at == tiles - 1)
            std::fill(out + marked, out + width - before[job], from_float<T>(0.0f));
        }
      }
    }
  });
  return true;
}

}  // namespace IFT_ISA
}  // namespace ift
