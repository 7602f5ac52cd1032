// The divergence of two heads from their products: one read of both chunks for the sums of a row,
// one read and one write of the student's for the gradient
// (ift_kernels/backends/reference/divergence.py). Floor: bytes of the chunks over memory bandwidth;
// in cache two exponentials per pair of logits, of "jsd" three and a logarithm.
//
// Logits of a block of columns go into the first-level cache as float32, whatever the two dtypes
// and transforms: the formulas are compiled once per kind, not once per pair of types.
#include <type_traits>

#include "logits.h"
#include "transpose.h"

namespace ift {
namespace IFT_ISA {

namespace {

struct Distribution {
  vf top, log_sum;
  vf log_p(const float* z) const { return (load(z) - top) - log_sum; }
};

struct Row {
  Distribution student, teacher;
  float beta, centre, upstream;
  double value,
      centre_sum;  // of the terms so far: the divergence, and what its gradient is centred by
};

// p * x, and 0 where p is: both heads may rule out a token with -inf.
inline vf times(vf p, vf x) { return pick(p == (vf){}, (vf){}, p * x); }

// A block of n columns, n up to whole vectors by -inf; `g` receives the gradient by the logits.
template <int kKind, bool kValue, bool kGradient>
inline void block(const float* z, const float* y, int n, Row& row, float* g) {
  vf of_student{}, of_teacher{};
  const float beta = row.beta, rest = 1.0f - beta;
  for (int i = 0; i < n; i += W) {
    const vf s = row.student.log_p(z + i), t = row.teacher.log_p(y + i);
    vf grad{};
    if constexpr (kKind == kForwardKL) {
      const vf q = vexp_small(t);
      if (kValue) of_student += times(q, t - s);
      if (kGradient) grad = vexp_small(s) - q;
    } else if constexpr (kKind == kReverseKL) {
      const vf p = vexp_small(s), x = s - t;
      if (kValue) of_student += times(p, x);
      if (kGradient) grad = times(p, x - row.centre);
    } else {
      // Relative to the larger of the two, so that the logarithm is of a number in (0, 1].
      const vf d = t - s, p = vexp_small(s);
      const vi mostly_student = d <= 0.0f;
      const vf e = vexp_small(pick(mostly_student, d, -d));
      const vf mix = pick(mostly_student, rest + beta * e, beta + rest * e);
      const vf minus_log = -vlog(mix);
      const vf s_over_m = pick(mostly_student, minus_log, minus_log - d);
      if (kValue) {
        of_student += times(p, s_over_m);
        of_teacher += times(vexp_small(t), pick(mostly_student, d + minus_log, minus_log));
      }
      if (kGradient) grad = times(p, s_over_m - row.centre) * rest;
    }
    if (kGradient) store(g + i, grad * row.upstream);
  }
  if (kValue) {
    const double student_sum = sum(of_student);
    row.centre_sum += student_sum;
    row.value += kKind == kJensenShannon
                     ? (1.0 - double(beta)) * student_sum + double(beta) * double(sum(of_teacher))
                     : student_sum;
  }
}

using Read = void (*)(const Chunk&, int64_t r, int64_t begin, int n, float* z);
using Write = void (*)(const Chunk&, int64_t r, int64_t begin, int n, const float* z, float* g);

template <class T, bool kCapped, bool kBiased>
void read(const Chunk& c, int64_t r, int64_t begin, int n, float* z) {
  const Transform<kCapped, kBiased> f(c);
  read_block(static_cast<const T*>(c.x) + r * c.ld, c.bias, f, begin, n, z);
}

// From the gradient by the logits to that by the products, which it replaces.
template <class T, bool kCapped, bool kBiased>
void write(const Chunk& c, int64_t r, int64_t begin, int n, const float* z, float* g) {
  const Transform<kCapped, kBiased> f(c);
  T* x = static_cast<T*>(c.x) + r * c.ld + begin;
  int i = 0;
  for (; i + W <= n; i += W) store(x + i, load(g + i) * f.slope(load(z + i)));
  if (i < n) store_part(x + i, load(g + i) * f.slope(load(z + i)), n - i);
}

template <class T>
void clear(const Chunk& c, int64_t r) {
  T* x = static_cast<T*>(c.x) + r * c.ld;
  std::fill(x, x + c.cols, from_float<T>(0.0f));
}

struct Access {
  Read read;
  Write write;
  void (*clear)(const Chunk&, int64_t r);
};

Access access(const Chunk& c) {
  Access found{};
  dispatch(c, [&](auto t, auto capped, auto biased) {
    using T = decltype(t);
    constexpr bool kC = decltype(capped)::value, kB = decltype(biased)::value;
    found = {read<T, kC, kB>, write<T, kC, kB>, clear<T>};
  });
  return found;
}

template <int kKind, bool kValue, bool kGradient>
void rows(const Chunk& student, const Chunk& teacher, const DivergenceRows& d) {
  const Access student_access = access(student), teacher_access = access(teacher);
#pragma omp parallel for schedule(static) \
    num_threads(student.threads) if (student.rows > 1 && student.threads > 1)
  for (int64_t r = 0; r < student.rows; ++r) {
    alignas(64) float z[kBlock + W], y[kBlock + W], g[kGradient ? kBlock + W : 1];
    auto norm = [&](int which) { return splat(d.norm[which * d.norm_ld + r]); };
    Row row{{norm(0), norm(1)}, {norm(2), norm(3)}, d.beta, 0.0f, 1.0f, 0.0, 0.0};
    if (kGradient) {
      row.upstream = d.upstream[r];
      row.centre = static_cast<float>(d.centre[r]);
    }
    const bool no_upstream = kGradient && row.upstream == 0.0f;
    if (!no_upstream || kValue) {
      for (int64_t begin = 0; begin < student.cols; begin += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, student.cols - begin));
        student_access.read(student, r, begin, n, z);
        teacher_access.read(teacher, r, begin, n, y);
        block<kKind, kValue, kGradient>(z, y, n, row, g);
        if (kGradient) student_access.write(student, r, begin, n, z, g);
      }
    }
    if (no_upstream) student_access.clear(student, r);  // also where the row has a NaN
    if (kValue) {
      d.value[r] += row.value;
      if (!kGradient && kKind != kForwardKL) d.centre[r] += row.centre_sum;
    }
  }
}

}  // namespace

void divergence_terms(const Chunk& student, const Chunk& teacher, const DivergenceRows& d) {
  if (d.kind == kForwardKL)
    rows<kForwardKL, true, false>(student, teacher, d);
  else if (d.kind == kReverseKL)
    rows<kReverseKL, true, false>(student, teacher, d);
  else
    rows<kJensenShannon, true, false>(student, teacher, d);
}

void divergence_gradient(const Chunk& student, const Chunk& teacher, const DivergenceRows& d) {
  if (d.kind == kForwardKL && d.value)
    rows<kForwardKL, true, true>(student, teacher, d);
  else if (d.kind == kForwardKL)
    rows<kForwardKL, false, true>(student, teacher, d);
  else if (d.kind == kReverseKL)
    rows<kReverseKL, false, true>(student, teacher, d);
  else
    rows<kJensenShannon, false, true>(student, teacher, d);
}

void transpose_chunk(const Chunk& c, void* out, int64_t out_ld) {
  constexpr int64_t kColumns = 256;  // of 32 rows: in the first-level cache
  constexpr int64_t kRows = 32;      // of 16 bits: a cache line of the result
  const auto* x = static_cast<const uint16_t*>(c.x);
  auto* to = static_cast<uint16_t*>(out);
#pragma omp parallel for schedule(static) \
    num_threads(c.threads) if (c.cols > kColumns && c.threads > 1)
  for (int64_t begin = 0; begin < c.cols; begin += kColumns)
    for (int64_t first = 0; first < c.rows; first += kRows)
      transpose(x + first * c.ld + begin, c.ld, static_cast<int>(std::min(kRows, c.rows - first)),
                std::min(kColumns, c.cols - begin), to + begin * out_ld + first, out_ld);
}

}  // namespace IFT_ISA
}  // namespace ift
