// Launches of the active set: mask, counts, split.
#include "active.cuh"

#include "launch.h"

namespace ift {
namespace gpu {

void active_mask(const Queue& queue, const Products& p, const int64_t* target, const float* level,
                 int64_t block, uint8_t* mask) {
  const Chunk c = chunk_of(p);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    const bool aligned = aligned_to(16, {p.x}) && p.ld % kPack<T> == 0;
    Strips strips{aligned ? p.cols / kPack<T> : 0, 0};
    strips.jobs = strips.packs + (p.cols - strips.packs * kPack<T>);
    launch(queue, "mask_kernel", mask_kernel<T, decltype(plain)::value>,
           ceil_div(p.rows, block) * ceil_div(strips.jobs, kThreads), c, strips, target, level,
           block, mask);
  });
}

void mask_counts(const Queue& queue, const uint8_t* mask, int64_t blocks, int64_t cols,
                 int64_t bucket, int64_t* counts) {
  launch(queue, "mask_counts_kernel", mask_counts_kernel,
         ceil_div(blocks * ceil_div(cols, bucket), kThreads / kWarp), mask, blocks, cols, bucket,
         counts);
}

void split_active(const Queue& queue, const Products& p, const uint8_t* mask, const int64_t* ends,
                  const int64_t* starts, int64_t block, int64_t bucket, const float* tail_weights,
                  float* tail_gradient, void* active) {
  const Chunk c = chunk_of(p);
  each_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = aligned_to(16, {p.x}) && p.ld % kPack<T> == 0 && bucket % kPack<T> == 0;
    const Split in{mask, ends, starts, block, bucket, tail_weights, tail_gradient, aligned};
    launch(queue, "split_active_kernel", split_active_kernel<T>,
           ceil_div(p.rows, kSide) * ceil_div(p.cols, bucket), c, in, static_cast<T*>(active));
  });
}

}  // namespace gpu
}  // namespace ift
