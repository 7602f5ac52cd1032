// One sequential sweep per row, rows in parallel, sums in double: the values of a row are read once
// and written once, so that memory bounds it and a wider sum costs nothing.
#include "scans.h"

#include "dtype.h"

namespace ift {
namespace {

template <class T>
void scan_row(const T* x, const uint8_t* mask, T* out, int64_t begin, int64_t end, double gamma,
              bool left) {
  const int64_t step = left ? -1 : 1;
  const int64_t first = left ? end - 1 : begin;
  double sum = 0.0;
  for (int64_t i = 0, t = first; i < end - begin; ++i, t += step) {
    const bool on = mask == nullptr || mask[t] != 0;
    // Not a product where gamma is 0: that would carry NaN and infinity along.
    sum = gamma == 0.0 ? 0.0 : gamma * sum;
    if (on) sum += static_cast<double>(to_float(x[t]));
    out[t] = from_float<T>(on ? static_cast<float>(sum) : 0.0f);
  }
}

template <class T>
void scan_rows(const T* x, const uint8_t* mask, const int64_t* offsets, T* out, int64_t rows,
               int64_t length, double gamma, bool left, int threads) {
  const int64_t total = offsets ? offsets[rows] : rows * length;
  constexpr int64_t kWorthThreads = 16384;  // below this, waking threads takes longer than the sums
#pragma omp parallel for schedule(dynamic) num_threads(total > kWorthThreads ? threads : 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = offsets ? offsets[row] : row * length;
    const int64_t end = offsets ? offsets[row + 1] : begin + length;
    scan_row(x, mask, out, begin, end, gamma, left);
  }
}

}  // namespace

void scan(const void* x, const uint8_t* mask, const int64_t* offsets, void* out, int64_t rows,
          int64_t length, double gamma, bool left, int dtype, int threads) {
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    scan_rows(static_cast<const T*>(x), mask, offsets, static_cast<T*>(out), rows, length, gamma,
              left, threads);
  });
}

}  // namespace ift
