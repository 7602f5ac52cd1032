// Launches of the active set: marks, collection, gradient, rows.
#include "active.cuh"

#include "active_rows.cuh"
#include "launch.h"

namespace ift {
namespace gpu {

void active_marks(const Queue& queue, const Products& p, const int64_t* target, const float* level,
                  int64_t block, uint8_t* marks) {
  const Chunk c = chunk_of(p);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    const bool aligned = aligned_to(16, {p.x}) && p.ld % kPack<T> == 0;
    Strips strips{aligned ? p.cols / kPack<T> : 0, 0};
    strips.jobs = strips.packs + (p.cols - strips.packs * kPack<T>);
    launch(queue, "marks_kernel", marks_kernel<T, decltype(plain)::value>,
           ceil_div(p.rows, block) * ceil_div(strips.jobs, kThreads), c, strips, target, level,
           block, marks);
  });
}

void mark_counts(const Queue& queue, const uint8_t* marks, int64_t blocks, int64_t cols,
                 int64_t tile, int64_t* counts) {
  launch(queue, "mark_counts_kernel", mark_counts_kernel,
         ceil_div(blocks * ceil_div(cols, tile), kThreads / kWarp), marks, blocks, cols, tile,
         counts);
}

void active_collect(const Queue& queue, const Products& p, const uint8_t* marks,
                    const int64_t* starts, const float* reference, int64_t block, int64_t tile,
                    void* store, float* sums) {
  const Chunk c = chunk_of(p);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    const bool aligned = aligned_to(16, {p.x}) && p.ld % kPack<T> == 0 && tile % kPack<T> == 0;
    const Collect in{marks, starts, reference, block, tile, sums, aligned};
    launch(queue, "collect_kernel", collect_kernel<T, decltype(plain)::value>,
           ceil_div(p.rows, block) * ceil_div(p.cols, tile), c, in, static_cast<T*>(store));
  });
}

void active_gradient(const Queue& queue, const Products& p, const int64_t* target,
                     const float* norm, int64_t norm_ld, const float* coef, int64_t coef_ld,
                     const float* base, int64_t base_ld, const float* profile, const int64_t* pairs,
                     int64_t count, int64_t block, int64_t tile) {
  const Chunk c = chunk_of(p);
  const ActiveRows rows{target, norm, norm_ld, coef, coef_ld, base, base_ld, profile};
  const bool aligned = aligned_to(16, {norm, coef, base}) && (norm_ld | coef_ld | base_ld) % 4 == 0;
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    const int64_t packs = block / kPack<T>;
    const int across = static_cast<int>(packs < kThreads ? packs : kThreads);
    const int64_t slices = ceil_div(packs, across);
    launch(queue, "active_gradient_kernel", active_gradient_kernel<T, decltype(plain)::value>,
           ceil_div(count, kColumnsPerBlock) * slices, c, rows, pairs, count, block, tile, across,
           aligned, slices);
  });
}

void active_rows(const Queue& queue, const Products& p, const uint8_t* marks, const int64_t* ends,
                 const int64_t* starts, int64_t block, int64_t tile, const float* profile,
                 float* mean, void* active) {
  const Chunk c = chunk_of(p);
  each_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = aligned_to(16, {p.x}) && p.ld % kPack<T> == 0 && tile % kPack<T> == 0;
    const Apart in{marks, ends, starts, block, tile, profile, mean, aligned};
    launch(queue, "active_rows_kernel", active_rows_kernel<T>,
           ceil_div(p.rows, kSide) * ceil_div(p.cols, tile), c, in, static_cast<T*>(active));
  });
}

}  // namespace gpu
}  // namespace ift
