// Token choice over a chunk of products: the k best logits, and a Gumbel-max draw. One read each.
//
// Both look at a block's maximum first: a block that cannot change a row's result is passed over,
// so that on a peaked distribution nearly no random numbers are drawn.
#include <type_traits>

#include "logits.h"

namespace ift {
namespace IFT_ISA {

void top_k(const Chunk& c, float* values, int64_t* ids, int64_t k) {
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    const Transform<decltype(capped)::value, decltype(biased)::value> f(c);
    each_row<T>(c, [&](int64_t r, const T* row) {
      alignas(64) float z[kBlock + W];
      float* v = values + r * k;
      int64_t* id = ids + r * k;
      for (int64_t begin = 0; begin < c.cols; begin += kBlock) {
        int n = static_cast<int>(std::min<int64_t>(kBlock, c.cols - begin));
        float top = read_block(row, c.bias, f, begin, n, z);
        // Strictly greater: of two equal logits the lower id, which came first, stays ahead. -inf
        // counts until k tokens are seen (ids start at -1).
        if (!(top > v[k - 1]) && id[k - 1] >= 0) continue;
        for (int j = 0; j < n; ++j) {
          if (!(z[j] > v[k - 1]) && id[k - 1] >= 0) continue;
          int64_t slot = 0;  // the first that is beaten, by bisection
          for (int64_t count = k - 1; count > 0;) {
            const int64_t half = count / 2, at = slot + half;
            const bool beaten = z[j] > v[at] || id[at] < 0;
            if (!beaten) slot = at + 1;
            count = beaten ? half : count - half - 1;
          }
          std::copy_backward(v + slot, v + k - 1, v + k);
          std::copy_backward(id + slot, id + k - 1, id + k);
          v[slot] = z[j];
          id[slot] = c.offset + begin + j;
        }
      }
    });
  });
}

// Philox4x32-10 for 4 * W consecutive vocabulary ids, the first a multiple of 4.
inline void philox(uint64_t seed, uint64_t row, uint64_t first_id, uint32_t* words) {
  uint32_t c0[W], c1[W], c2[W], c3[W];
  for (int i = 0; i < W; ++i) {
    c0[i] = static_cast<uint32_t>(first_id / 4 + i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < W; ++i) {
      uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < W; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

void gumbel(const Chunk& c, uint64_t seed, const int64_t* row_numbers, float* best, float* logit,
            int64_t* ids) {
  // -log(-log1p(-u)) of the smallest u, 2^-33, and a little more for rounding.
  constexpr float kMostNoise = 22.9f;
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    const Transform<decltype(capped)::value, decltype(biased)::value> f(c);
    each_row<T>(c, [&](int64_t r, const T* row) {
      alignas(64) float z[kBlock + W];
      alignas(64) uint32_t words[4 * W];
      for (int64_t begin = 0; begin < c.cols; begin += kBlock) {
        int n = static_cast<int>(std::min<int64_t>(kBlock, c.cols - begin));
        float top = read_block(row, c.bias, f, begin, n, z);
        bool nan = false;
        for (int j = 0; j < n; ++j) nan |= z[j] != z[j];
        if (top + kMostNoise < best[r] && !nan) continue;
        int64_t id = c.offset + begin;
        int64_t word_at = id & ~int64_t{3};
        for (; word_at < id + n; word_at += 4 * W) {
          philox(seed, static_cast<uint64_t>(row_numbers[r]), word_at, words);
          for (int part = 0; part < 4; ++part) {
            vu raw;
            std::memcpy(&raw, words + part * W, sizeof raw);
            // Exact halves of a 32-bit word, rounded once to float.
            vf u = (__builtin_convertvector(raw, vf) + 0.5f) * 2.3283064365386963e-10f;
            u = u > 1.0f - 5.9604644775390625e-8f ? splat(1.0f - 5.9604644775390625e-8f) : u;
            vf noise = -vlog(-vlog1p(-u));
            for (int i = 0; i < W; ++i) {
              int64_t j = word_at + part * W + i - id;
              if (j < 0 || j >= n) continue;
              float score = z[j] + noise[i];
              if (score > best[r] || (score != score && best[r] == best[r])) {
                best[r] = score;
                logit[r] = z[j];
                ids[r] = id + j;
              }
            }
          }
        }
      }
    });
  });
}

}  // namespace IFT_ISA
}  // namespace ift
