// Running row statistics of a chunk of products: one read of the chunk, nothing written to it.
//
// Per block of columns: logits into the first-level cache with their maximum, then the sums
// relative to that, which are added to those of the row in double. Floor: bytes of the chunk over
// memory bandwidth where it comes from memory, about 20 vector instructions per vector of logits
// (most of them exp) where it is in cache.
#include <type_traits>

#include "logits.h"

namespace ift {
namespace IFT_ISA {

// Running statistics of one row; names as in enum State. The sums of exponentials leave out the
// target, which is added in double at the end (operators/linear_stats.py: row_values).
struct RowState {
  double max, sum, e_z, e_sq, z_sum, second;
  int64_t argmax;
};

// Columns that are added up before their sums are: fewer roundings of the largest.
constexpr int kSumGroup = 16 * W;

// A new maximum: what was summed so far is expressed relative to it.
inline void raise(RowState& s, double top) {
  if (s.max != -kInf) {
    double delta_max = s.max - top, rescale = std::exp(delta_max);
    s.e_z = rescale * (s.e_z + delta_max * s.sum);
    s.sum *= rescale;
    s.e_sq *= rescale * rescale;
  }
  s.max = top;
}

// Sums over a block's exponentials relative to `centre`, its largest logit but for the target's.
// Relative to the row's maximum z - m would be rounded by as much as 8 units in the last place of
// the exponential where the maximum is a nearly certain target, 28 above all that is summed.
inline void add(RowState& s, float centre, float sum, float e_z, float e_sq) {
  if (centre == s.max || centre == -kInf) {  // of nothing but -inf, or a NaN
    s.sum += sum;
    s.e_z += e_z;
    s.e_sq += e_sq;
    return;
  }
  const double delta = centre - s.max, rescale = std::exp(delta);
  s.sum += rescale * sum;
  s.e_z += rescale * (e_z + delta * sum);
  s.e_sq += rescale * rescale * e_sq;
}

// `hole`: the target's place in the block, -1 where it is elsewhere.
template <int kTrack>
inline void update_block(RowState& s, float* z, int n, float top, int64_t first_id, int track,
                         int hole) {
  // A NaN is the maximum, as in torch.argmax, and stays it: it makes every sum NaN from here on.
  if (top > s.max || (s.max == -kInf && top == -kInf)) {
    if (track & kTop2) s.second = s.max;
    if (top != -kInf) {
      raise(s, top);
      if (track & kArgmax) {
        int first = 0;
        while (z[first] != top) ++first;
        s.argmax = first_id + first;
      }
    }
  }
  float centre = top;
  const float of_target = hole < 0 ? -kInf : z[hole];
  if (hole >= 0) {
    z[hole] = -kInf;
    if (of_target == top) centre = raw_maximum(z, n);
  }
  const vf m = splat(centre == -kInf ? 0.0f : centre);
  vf sums{}, e_z{}, e_sq{};
  auto one = [&](vf zi, vf& total) {
    vf centred = zi - m;
    vf e = vexp_small(centred);
    total += e;
    if (kTrack & kEntropy) e_z += pick(e == (vf){}, (vf){}, e * centred);
    if (kTrack & kSq) e_sq += e * e;
  };
  for (int first = 0; first < n; first += kSumGroup) {
    const int last = std::min(n, first + kSumGroup);
    vf sum0{}, sum1{};
    int i = first;
    for (; i + 2 * W <= last; i += 2 * W) {
      one(load(z + i), sum0);
      one(load(z + i + W), sum1);
    }
    for (; i < last; i += W) one(load(z + i), sum0);  // the padding is -inf
    sums += sum0 + sum1;
  }
  float total = sum(sums);
  if (!(of_target < kInf)) total = std::numeric_limits<float>::quiet_NaN();
  if (hole >= 0) z[hole] = of_target;
  add(s, centre, total, kTrack & kEntropy ? sum(e_z) : 0.0f, kTrack & kSq ? sum(e_sq) : 0.0f);
  if (kTrack & kMean) {
    // In double: a large common logit would cost a float sum its digits.
    typedef double wide __attribute__((vector_size(W * 8)));
    wide z_sum{};
    int i = 0;
    for (; i + W <= n; i += W) z_sum += __builtin_convertvector(load(z + i), wide);
    for (; i < n; ++i) s.z_sum += z[i];
    for (int lane = 0; lane < W; ++lane) s.z_sum += z_sum[lane];
  }
  if ((track & kTop2) && top > s.second) {
    // The maximum itself counts once: its first occurrence is skipped if it became the argmax here.
    bool skip = top == s.max && s.argmax >= first_id && s.argmax < first_id + n;
    int64_t skipped = skip ? s.argmax - first_id : -1;
    for (int j = 0; j < n; ++j)
      if (j != skipped && z[j] > s.second) s.second = z[j];
  }
  if (total != total && s.max == s.max) {
    for (int j = 0; j < n; ++j)
      if (z[j] != z[j]) {
        s.argmax = first_id + j;
        s.max = s.sum = std::numeric_limits<double>::quiet_NaN();
        break;
      }
  }
}

// Whole blocks of plain logits z = mul * x, mul > 0, for the sums that most calls want: the maximum
// comes from the raw bits, the logits are read twice from the first-level cache and stored nowhere.
// Returns false, with nothing changed, where a NaN or an infinity needs the careful way.
template <bool kWithEntropy, class T>
inline bool update_plain(RowState& s, const T* x, int n, vf mul, int64_t first_id, int track) {
  const float raw = raw_maximum(x, n), top = raw * mul[0];
  if (!(std::fabs(top) < kInf) || s.max != s.max) return false;
  const vf m = splat(top);
  vf sums{}, sum0{}, sum1{}, e_z0{}, e_z1{};
  for (int i = 0; i < n; i += 2 * W) {
    if (i % kSumGroup == 0) {
      sums += sum0 + sum1;
      sum0 = sum1 = (vf){};
    }
    vf z0 = rounded(load(x + i) * mul), z1 = rounded(load(x + i + W) * mul);
    vf c0 = z0 - m, c1 = z1 - m;
    vf e0 = vexp_small(c0), e1 = vexp_small(c1);
    sum0 += e0;
    sum1 += e1;
    if (kWithEntropy) {  // exp is 0 from -87.33 down, and so must be its product with -inf
      e_z0 += e0 * vmax(c0, splat(-100.0f));
      e_z1 += e1 * vmax(c1, splat(-100.0f));
    }
  }
  const float total = sum(sums + (sum0 + sum1));
  if (!(total < kInf)) return false;  // a NaN that the maximum passed over
  if (top > s.max) {
    raise(s, top);
    if (track & kArgmax) {
      int first = 0;
      while (to_float(x[first]) != raw) ++first;
      s.argmax = first_id + first;
    }
  }
  add(s, top, total, kWithEntropy ? sum(e_z0 + e_z1) : 0.0f, 0.0f);
  return true;
}

template <int kTrack, class T, bool kCapped, bool kBiased>
void stats_rows(const Chunk& c, const int64_t* target, double* state, int64_t ld, int64_t* argmax,
                int track) {
  const Transform<kCapped, kBiased> f(c);
  const bool fast =
      !kCapped && !kBiased && !(kTrack & ~kEntropy) && !(track & kTop2) && f.pre[0] > 0;
  each_row<T>(c, [&](int64_t r, const T* row) {
    alignas(64) float z[kBlock + W];
    const int64_t target_column = target[r] - c.offset;
    double* row_state = state + r;
    RowState s{row_state[kMax * ld],
               row_state[kSum * ld],
               row_state[kEZ * ld],
               row_state[kESq * ld],
               row_state[kZSum * ld],
               row_state[kSecond * ld],
               argmax[r]};
    for (int64_t begin = 0; begin < c.cols; begin += kBlock) {
      int n = static_cast<int>(std::min<int64_t>(kBlock, c.cols - begin));
      const int64_t next = begin + kBlock;
      if (next < c.cols)
        prefetch(row + next, std::min<int64_t>(kBlock, c.cols - next) * sizeof(T));
      else if (r + 1 < c.rows)
        prefetch(row + c.ld, std::min<int64_t>(kBlock, c.cols) * sizeof(T));
      const bool has_target = target_column >= begin && target_column < begin + n;
      if (fast && n == kBlock && !has_target &&
          update_plain<(kTrack & kEntropy) != 0>(s, row + begin, n, f.pre, c.offset + begin, track))
        continue;
      float top = read_block(row, c.bias, f, begin, n, z);
      update_block<kTrack>(s, z, n, top, c.offset + begin, track,
                           has_target ? static_cast<int>(target_column - begin) : -1);
    }
    row_state[kMax * ld] = s.max;
    row_state[kSum * ld] = s.sum;
    row_state[kEZ * ld] = s.e_z;
    row_state[kESq * ld] = s.e_sq;
    row_state[kZSum * ld] = s.z_sum;
    row_state[kSecond * ld] = s.second;
    argmax[r] = s.argmax;
    if (target_column >= 0 && target_column < c.cols) {
      vf x = load_part(row + target_column, 1, 0.0f);
      row_state[kTarget * ld] = f.logit(x, kBiased ? splat(c.bias[target_column]) : (vf){})[0];
    }
  });
}

void stats(const Chunk& c, const int64_t* target, double* state, int64_t ld, int64_t* argmax,
           int track) {
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    constexpr bool kC = decltype(capped)::value, kB = decltype(biased)::value;
    // The second largest needs to know where the largest is.
    if (track & kTop2) track |= kArgmax;
    constexpr int kAll = kEntropy | kSq | kMean;
    if (!(track & kAll))
      stats_rows<0, T, kC, kB>(c, target, state, ld, argmax, track);
    else if (!(track & (kSq | kMean)))
      stats_rows<kEntropy, T, kC, kB>(c, target, state, ld, argmax, track);
    else
      stats_rows<kAll, T, kC, kB>(c, target, state, ld, argmax, track);
  });
}

// The largest of x + bias, NaNs passed over.
template <bool kBiased>
inline float largest(const float* x, const float* bias, int64_t n) {
  vf m0 = splat(-kInf), m1 = m0;
  auto at = [&](int64_t i) { return kBiased ? load(x + i) + load(bias + i) : load(x + i); };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    m0 = vmax(at(i), m0);
    m1 = vmax(at(i + W), m1);
  }
  float top = maximum(vmax(m0, m1));
  for (; i < n; ++i) {
    const float value = kBiased ? x[i] + bias[i] : x[i];
    if (value > top) top = value;
  }
  return top;
}

// By how much a logit may be above the centre: no more than costs half a unit in the last place of
// its exponential. So the centres of most rows stay.
constexpr float kAbove = 2.0f;

template <bool kBiased>
void row_exponentials(const Chunk& c, float* x, int64_t target, double* state, int64_t ld,
                      float* centre, float* total, int64_t width) {
  const Transform<false, kBiased> f(c);  // of this row: what is stored to x cannot change it
  float of_target = -kInf;
  if (target >= 0 && target < c.cols) {
    of_target = f.logit(splat(x[target]), kBiased ? splat(c.bias[target]) : (vf){})[0];
    state[kTarget * ld] = of_target;
    x[target] = -kInf;
  }
  const float top = largest<kBiased>(x, c.bias, c.cols) * f.pre[0];
  if (top > *centre + kAbove) {
    if (*centre != -kInf) {
      const float rescale = std::exp(*centre - top);
      for (int64_t i = 0; i < width; ++i) total[i] *= rescale;
    }
    *centre = top;
  }
  const vf m = splat(*centre == -kInf ? 0.0f : *centre);
  auto exponential = [&](int64_t i) {
    const vf e = vexp_small(f.logit(load(x + i), kBiased ? load(c.bias + i) : (vf){}) - m);
    store(x + i, e);
    return e;
  };
  vf sums{};
  int64_t i = 0;
  while (i + 2 * W <= c.cols) {
    const int64_t end = std::min<int64_t>(i + kSumGroup, c.cols);
    vf sum0{}, sum1{};
    for (; i + 2 * W <= end; i += 2 * W) {
      sum0 += exponential(i);
      sum1 += exponential(i + W);
    }
    sums += sum0 + sum1;
  }
  for (; i < c.cols; i += W) {
    const int left = static_cast<int>(std::min<int64_t>(W, c.cols - i));
    vf z =
        f.logit(load_part(x + i, left, 0.0f), kBiased ? load_part(c.bias + i, left, 0.0f) : (vf){});
    for (int lane = left; lane < W; ++lane) z[lane] = -kInf;
    const vf e = vexp_small(z - m);
    store_part(x + i, e, left);
    sums += e;
  }
  const float e = sum(sums);
  RowState s{state[kMax * ld], state[kSum * ld], 0.0, 0.0, 0.0, 0.0, 0};
  if (const float most = std::max(top, of_target); most > s.max) raise(s, most);
  if (e != e || !(of_target < kInf))
    s.max = s.sum = std::numeric_limits<double>::quiet_NaN();
  else
    add(s, *centre, e, 0.0f, 0.0f);
  state[kMax * ld] = s.max;
  state[kSum * ld] = s.sum;
}

// Products overwritten by x = exp(z - centre), 0 for the target, and the sums that `stats` has of
// them. The gradient of a row is a factor times these, so the exponentials are not formed again.
// The centre is about the row's largest logit so far but for the target's; where it rises, the row
// of `total` (N, width), which is relative to it, is rescaled. Of float32 products without softcap,
// of positive scale. Floor: one read and one write of the chunk, in cache, and about 22 vector
// instructions per vector of it.
void exponentials(const Chunk& c, const int64_t* target, double* state, int64_t ld, float* centre,
                  float* total, int64_t width) {
  dispatch(c, [&](auto t, auto capped, auto biased) {
    if constexpr (std::is_same<decltype(t), float>::value && !decltype(capped)::value) {
      each_row<float>(c, [&](int64_t r, float* x) {
        if (r + 1 < c.rows) prefetch(x + c.ld, std::min<int64_t>(kBlock, c.cols) * sizeof(float));
        row_exponentials<decltype(biased)::value>(c, x, target[r] - c.offset, state + r, ld,
                                                  centre + r, total + r * width, width);
      });
    }
  });
}

}  // namespace IFT_ISA
}  // namespace ift
