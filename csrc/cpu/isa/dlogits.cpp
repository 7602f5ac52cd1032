// Products overwritten by their gradient, or by probabilities: one read and one write of the chunk.
//
//   log p = z - norm[0] - norm[1],  p = exp(log p)
//   dx = dz/dx * (c_target * (1[j = target] - p) + p * (c_prob + c_plogp * log p) + c_uniform)
// (ift_kernels/backends/reference/: dlogits_), where 1 - p of the target is -expm1(log p). Floor as
// for the statistics, plus the write.
//
// On request the gradient is also written transposed, because the head gradient is dx^T @ h and
// vendor GEMMs on 16-bit matrices are two to three times slower when their first operand is
// transposed.
#include <type_traits>

#include "logits.h"
#include "transpose.h"

namespace ift {
namespace IFT_ISA {

constexpr int kRowGroup = 32;      // rows that share a cache line of the transposed chunk
constexpr int kColumnBlock = 256;  // columns of a row group that stay in the first-level cache

// Applies g(logit) to columns [begin, end) of a row, in place.
template <class T, bool kCapped, bool kBiased, class G>
inline void rewrite(T* x, const Chunk& c, const Transform<kCapped, kBiased>& transform,
                    int64_t begin, int64_t end, const G& g) {
  const Transform<kCapped, kBiased> f = transform;  // what is stored to x cannot change a copy
  auto one = [&](int64_t at) {
    store(x + at, g(f.logit(load(x + at), kBiased ? load(c.bias + at) : (vf){})));
  };
  int64_t j = begin;
  for (; j + 2 * W <= end; j += 2 * W) {
    one(j);
    one(j + W);
  }
  if (j + W <= end) {
    one(j);
    j += W;
  }
  if (j < end) {
    int left = static_cast<int>(end - j);
    vf b = kBiased ? load_part(c.bias + j, left, 0.0f) : (vf){};
    vf z = f.logit(load_part(x + j, left, 0.0f), b);
    store_part(x + j, g(z), left);
  }
}

template <class T, bool kCapped, bool kBiased>
void gradient_block(T* x, const Chunk& c, const Transform<kCapped, kBiased>& f, int64_t r,
                    const DlogitsRows& rows, int64_t begin, int64_t end) {
  const vf top = splat(rows.norm[r]), log_sum = splat(rows.norm[rows.norm_ld + r]);
  const float c_target = rows.coef[r], c_prob = rows.coef[rows.coef_ld + r],
              c_plogp = rows.coef[2 * rows.coef_ld + r];
  const vf c_other = splat(c_prob - c_target), c_uniform = splat(rows.coef[3 * rows.coef_ld + r]);
  const vf slope = f.slope((vf){}), sloped_other = c_other * slope,
           sloped_uniform = c_uniform * slope;
  if (c_target == 0.0f && c_plogp == 0.0f && c_prob == 0.0f && c_uniform[0] == 0.0f) {
    std::fill(x + begin, x + end, from_float<T>(0.0f));  // also where the row has a NaN
    return;
  }
  auto plain = [&](vf z) {
    vf p = vexp_small((z - top) - log_sum);
    return kCapped ? (p * c_other + c_uniform) * f.slope(z) : p * sloped_other + sloped_uniform;
  };
  auto with_entropy = [&](vf z) {
    vf log_p = (z - top) - log_sum;
    vf p = vexp_small(log_p);
    // 0 * (-inf) of a masked-out token must stay 0.
    vf tail = p == (vf){} ? (vf){} : c_plogp * log_p;
    return (p * (c_other + tail) + c_uniform) * f.slope(z);
  };
  const int64_t target_column = rows.target[r] - c.offset;
  const bool inside = target_column >= begin && target_column < end;
  float target_gradient = 0.0f;
  if (inside) {  // in float32, before the row is rounded to T
    vf z = f.logit(load_part(x + target_column, 1, 0.0f),
                   kBiased ? splat(c.bias[target_column]) : (vf){});
    const double log_p = static_cast<double>(((z - top) - log_sum)[0]), p = std::exp(log_p);
    const double tail = c_plogp == 0.0f || p == 0.0 ? 0.0 : c_plogp * log_p;
    const double sum = p * (c_prob + tail) - c_target * std::expm1(log_p) + c_uniform[0];
    target_gradient = static_cast<float>(sum * static_cast<double>(f.slope(z)[0]));
  }
  if (c_plogp == 0.0f)
    rewrite(x, c, f, begin, end, plain);
  else
    rewrite(x, c, f, begin, end, with_entropy);
  if (inside) store_part(x + target_column, splat(target_gradient), 1);
}

void dlogits(const Chunk& c, const DlogitsRows& rows) {
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    const Transform<decltype(capped)::value, decltype(biased)::value> f(c);
    if constexpr (sizeof(T) == 2) {
      if (rows.transposed) {
        auto* out = static_cast<uint16_t*>(rows.transposed);
        const int64_t groups = (c.rows + kRowGroup - 1) / kRowGroup;
        const int64_t blocks = (c.cols + kColumnBlock - 1) / kColumnBlock;
        // Few rows: their columns are split among the threads as well.
        const int64_t spans = groups < 4 * c.threads ? std::min<int64_t>(c.threads, blocks) : 1;
        const int64_t parts = groups * spans;
#pragma omp parallel for schedule(static) num_threads(c.threads) if (parts > 1 && c.threads > 1)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = part / spans * kRowGroup, span = part % spans;
          const int count = static_cast<int>(std::min<int64_t>(kRowGroup, c.rows - first));
          T* x = static_cast<T*>(c.x) + first * c.ld;
          for (int64_t block = blocks * span / spans; block < blocks * (span + 1) / spans;
               ++block) {
            const int64_t begin = block * kColumnBlock;
            const int64_t end = std::min<int64_t>(begin + kColumnBlock, c.cols);
            for (int i = 0; i < count; ++i) {
              // The lines that the transpose writes, far apart, a share with each row: waiting for
              // them, one after another, would cost as much as the gradient itself.
              for (int64_t j = begin + i; j < end; j += kRowGroup)
                __builtin_prefetch(out + j * rows.transposed_ld + first, 1, 2);
              gradient_block(x + i * c.ld, c, f, first + i, rows, begin, end);
            }
            transpose(reinterpret_cast<const uint16_t*>(x) + begin, c.ld, count, end - begin,
                      out + begin * rows.transposed_ld + first, rows.transposed_ld);
          }
        }
        return;
      }
    }
    each_row<T>(c, [&](int64_t r, T* x) { gradient_block(x, c, f, r, rows, 0, c.cols); });
  });
}

void probabilities(const Chunk& c, const float* norm, int64_t norm_ld) {
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    const Transform<decltype(capped)::value, decltype(biased)::value> f(c);
    each_row<T>(c, [&](int64_t r, T* x) {
      const vf top = splat(norm[r]), log_sum = splat(norm[norm_ld + r]);
      rewrite(x, c, f, 0, c.cols, [&](vf z) { return vexp_small((z - top) - log_sum); });
    });
  });
}

}  // namespace IFT_ISA
}  // namespace ift
