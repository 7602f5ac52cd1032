// Columns of a chunk that are apart from the rest, some in each row: taken out, and put in. See
// ift_kernels/backends/reference/selected.py. A row's ids ascend, so those in the chunk are found
// by bisection: K * log(K) steps a row at most, whatever the chunk's width.
#include <algorithm>
#include <type_traits>

#include "epilogues.h"
#include "selected.h"

namespace ift {
namespace {

// Calls f(row, T*, place in the row's ids, column) for every selected column.
template <class F>
void each_selected(const Chunk& c, const int64_t* ids, int64_t k, const F& f) {
  const int64_t first = std::max<int64_t>(c.offset, 0), end = c.offset + c.cols;
  dispatch(c.dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows > 1 && c.threads > 1)
    for (int64_t r = 0; r < c.rows; ++r) {
      T* const row = static_cast<T*>(c.x) + r * c.ld;
      const int64_t* const begin = ids + r * k;
      const int64_t* at = std::lower_bound(begin, begin + k, first);
      for (; at < begin + k && *at < end; ++at) f(r, row, r * k + (at - begin), *at - c.offset);
    }
  });
}

}  // namespace

void take_selected(const Chunk& c, const int64_t* ids, float* values, int64_t k, float lowest) {
  each_selected(c, ids, k, [&](int64_t, auto* row, int64_t place, int64_t column) {
    values[place] = to_float(row[column]);
    row[column] = from_float<std::decay_t<decltype(*row)>>(lowest);
  });
}

void put_selected(const Chunk& c, const int64_t* ids, const float* values, int64_t k,
                  void* transposed, int64_t transposed_ld) {
  each_selected(c, ids, k, [&](int64_t r, auto* row, int64_t place, int64_t column) {
    using T = std::decay_t<decltype(*row)>;
    row[column] = from_float<T>(values[place]);
    if (transposed) static_cast<T*>(transposed)[column * transposed_ld + r] = row[column];
  });
}

}  // namespace ift
