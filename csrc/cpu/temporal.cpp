// Shift, mask, gather and lerp in one pass over the tokens; and its adjoint, a scatter that is
// turned into a gather (tokens sorted by vocabulary row), so that each row is summed in fp32 by one
// thread, in the order of the tokens, and rounded once: no atomics, no fp32 copy of the table.
#include "temporal.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dtype.h"

namespace ift {
namespace {

int64_t mixed_in_id(const ResidualTokens& in, int64_t t) {
  const bool first =
      t % in.row_length == 0 ||
      (in.offsets && std::binary_search(in.offsets, in.offsets + in.documents + 1, t));
  return first || in.labels[t] == in.ignore_index ? in.ids[t] : in.predicted[t - 1];
}

template <class T>
void mix(const T* table, const ResidualTokens& in, T* out, int64_t width, double lam, int threads) {
  const float keep = static_cast<float>(1.0 - lam), share = static_cast<float>(lam);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t other_id = mixed_in_id(in, t);
    const T* token_row = table + in.ids[t] * width;
    T* to = out + t * width;
    if (other_id == in.ids[t]) {  // bit for bit, whatever lam is
      std::memcpy(to, token_row, static_cast<size_t>(width) * sizeof(T));
      continue;
    }
    const T* mixed_row = table + other_id * width;
    for (int64_t e = 0; e < width; ++e)
      to[e] = from_float<T>(keep * to_float(token_row[e]) + share * to_float(mixed_row[e]));
  }
}

struct Part {
  int64_t token;
  float share;
};

// The parts that make up each vocabulary row: those of row v are parts[start[v]] to
// parts[start[v+1]].
void sort_parts(const ResidualTokens& in, int64_t vocabulary, double lam,
                std::vector<int64_t>& start, std::vector<Part>& parts) {
  const float keep = static_cast<float>(1.0 - lam), share = static_cast<float>(lam);
  start.assign(static_cast<size_t>(vocabulary) + 1, 0);
  int64_t count = 0;
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t mixed_id = mixed_in_id(in, t);
    ++start[in.ids[t] + 1], ++count;
    if (mixed_id != in.ids[t]) ++start[mixed_id + 1], ++count;
  }
  for (int64_t v = 0; v < vocabulary; ++v) start[v + 1] += start[v];
  parts.resize(static_cast<size_t>(count));
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t t = 0; t < in.tokens; ++t) {
    const int64_t mixed_id = mixed_in_id(in, t);
    const bool unmixed = mixed_id == in.ids[t];
    parts[next[in.ids[t]]++] = {t, unmixed ? 1.0f : keep};
    if (!unmixed) parts[next[mixed_id]++] = {t, share};
  }
}

template <class T>
void unmix(const T* grad, const ResidualTokens& in, T* table_grad, int64_t vocabulary,
           int64_t width, double lam, int threads) {
  std::vector<int64_t> start;
  std::vector<Part> parts;
  sort_parts(in, vocabulary, lam, start, parts);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sum(static_cast<size_t>(width));
#pragma omp for schedule(dynamic, 256)
    for (int64_t v = 0; v < vocabulary; ++v) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t i = start[v]; i < start[v + 1]; ++i) {
        const T* from = grad + parts[i].token * width;
        const float share = parts[i].share;
        for (int64_t e = 0; e < width; ++e) sum[e] += share * to_float(from[e]);
      }
      for (int64_t e = 0; e < width; ++e) table_grad[v * width + e] = from_float<T>(sum[e]);
    }
  }
}

}  // namespace

void residual(const void* table, const ResidualTokens& tokens, void* out, int64_t width, double lam,
              int dtype, int threads) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    mix(static_cast<const T*>(table), tokens, static_cast<T*>(out), width, lam, threads);
  });
}

void residual_grad(const void* grad, const ResidualTokens& tokens, void* table_grad,
                   int64_t vocabulary, int64_t width, double lam, int dtype, int threads) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    unmix(static_cast<const T*>(grad), tokens, static_cast<T*>(table_grad), vocabulary, width, lam,
          threads);
  });
}

}  // namespace ift
