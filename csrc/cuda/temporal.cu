// Launches of the row operations: temporal residual, its adjoint, sums of head rows.
#include "temporal.cuh"

#include "launch.h"

namespace ift {
namespace gpu {
namespace {

// Groups of eight elements at the start of every row, none where rows are not on 16 bytes.
int64_t units_of(int64_t width, int64_t ld, std::initializer_list<const void*> addresses) {
  return aligned_to(16, addresses) && ld % 8 == 0 ? width / 8 : 0;
}

}  // namespace

void residual(const Queue& queue, int dtype, const void* table, const ResidualTokens& tokens,
              void* out, int64_t width, double lam) {
  const int64_t units = units_of(width, width, {table, out});
  each_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch(queue, "residual_kernel", residual_kernel<T>, ceil_div(tokens.tokens, kThreads / kWarp),
           static_cast<const T*>(table), tokens, static_cast<T*>(out), width, units,
           static_cast<float>(1.0 - lam), static_cast<float>(lam));
  });
}

void residual_keys(const Queue& queue, const ResidualTokens& tokens, int64_t* keys) {
  launch(queue, "residual_keys_kernel", residual_keys_kernel, ceil_div(tokens.tokens, kThreads),
         tokens, keys);
}

void sum_rows(const Queue& queue, int dtype, const void* parts, const Parts& in, void* out,
              int64_t rows, int64_t width) {
  const int64_t units = units_of(width, width, {parts, out});
  int lanes = kWarp;
  while (lanes < kThreads && lanes * 8 < width) lanes *= 2;
  each_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch(queue, "sum_rows_kernel", sum_rows_kernel<T>, ceil_div(rows, kThreads / lanes),
           static_cast<const T*>(parts), in, static_cast<T*>(out), rows, width, units, lanes);
  });
}

void bucket_sums(const Queue& queue, int dtype, const void* matrix, int64_t rows, int64_t width,
                 int64_t ld, int64_t bucket, const float* tail_weights, float* sums) {
  const int64_t units = units_of(width, ld, {matrix});
  const int64_t jobs = ceil_div(units, kWarp) + ceil_div(width - 8 * units, kWarp);
  each_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch(queue, "bucket_sums_kernel", bucket_sums_kernel<T>, ceil_div(rows, bucket) * jobs,
           static_cast<const T*>(matrix), tail_weights, rows, width, ld, bucket, units, sums);
  });
}

}  // namespace gpu
}  // namespace ift
