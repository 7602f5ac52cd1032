// Launches of the epilogues over one chunk: statistics, gradients, token choice.
#include <algorithm>

#include "sampling.cuh"
#include "dlogits.cuh"
#include "launch.h"
#include "statistics.cuh"

namespace ift {
namespace gpu {
namespace {

constexpr int64_t kRowsPerBlock = kThreads / kWarp;  // with a warp per row
constexpr int64_t kShortRow = 2048;                  // columns: up to here a warp per row
constexpr int64_t kMinPart = 1024;                   // columns: less is not worth a block

}  // namespace

int64_t stats_bytes() { return sizeof(RowPartial); }
int64_t max_top_k() { return kMaxTopK; }

// Two blocks per multiprocessor hide the latency of memory; few rows are cut until there are so
// many.
int row_parts(const Queue& queue, int64_t rows, int64_t cols) {
  if (rows == 0 || cols <= kShortRow) return 1;
  const DeviceGuard guard(queue.device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, queue.device),
        "asking for the number of multiprocessors");
  const int64_t wanted = ceil_div(2 * static_cast<int64_t>(processors), rows);
  return static_cast<int>(
      std::max<int64_t>(1, std::min({wanted, cols / kMinPart, int64_t{kWarp}})));
}

void stats(const Queue& queue, const Products& p, const int64_t* target, double* state,
           int64_t state_ld, int64_t* argmax, bool more, void* partials) {
  const Chunk c = chunk_of(p);
  const RunningState out{target, state, state_ld, argmax};
  auto* const between = static_cast<RowPartial*>(partials);
  const int parts = row_parts(queue, p.rows, p.cols);
  const int64_t warps = ceil_div(p.rows, kRowsPerBlock);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    constexpr bool kPlain = decltype(plain)::value;
    auto run = [&](auto all) {
      constexpr bool kMore = decltype(all)::value;
      if (p.cols <= kShortRow)
        launch(queue, "stats_warp_kernel", stats_warp_kernel<T, kPlain, kMore>, warps, c, out);
      else
        launch(queue, "stats_block_kernel", stats_block_kernel<T, kPlain, kMore>, p.rows * parts, c,
               out, parts, between);
    };
    more ? run(Flag<true>{}) : run(Flag<false>{});
    if (parts > 1)
      launch(queue, "stats_merge_kernel", stats_merge_kernel<T, kPlain>, warps, c, out, parts,
             between);
  });
}

void dlogits(const Queue& queue, const Products& p, const int64_t* target, const float* norm,
             int64_t norm_ld, const float* coef, int64_t coef_ld) {
  const Chunk c = chunk_of(p);
  const RowGradient g{target, norm, norm_ld, coef, coef_ld};
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    const int64_t segments = segments_of<T>(p.cols);
    launch(queue, "dlogits_kernel", dlogits_kernel<T, decltype(plain)::value>, p.rows * segments, c,
           g, segments);
  });
}

void probabilities(const Queue& queue, const Products& p, const float* norm, int64_t norm_ld) {
  const Chunk c = chunk_of(p);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    const int64_t segments = segments_of<T>(p.cols);
    launch(queue, "probabilities_kernel", probabilities_kernel<T, decltype(plain)::value>,
           p.rows * segments, c, norm, norm_ld, segments);
  });
}

void gumbel(const Queue& queue, const Products& p, uint64_t seed, const int64_t* row_numbers,
            float* best, float* logit, int64_t* ids, void* keys) {
  const Chunk c = chunk_of(p);
  const Drawn out{seed, row_numbers, best, logit, ids};
  auto* const between = static_cast<uint64_t*>(keys);
  const int parts = row_parts(queue, p.rows, p.cols);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    constexpr bool kPlain = decltype(plain)::value;
    launch(queue, "gumbel_kernel", gumbel_kernel<T, kPlain>, p.rows * parts, c, out, parts,
           between);
    if (parts > 1)
      launch(queue, "gumbel_merge_kernel", gumbel_merge_kernel<T, kPlain>,
             ceil_div(p.rows, kRowsPerBlock), c, out, parts, between);
  });
}

void top_k(const Queue& queue, const Products& p, float* values, int64_t* ids, int64_t k) {
  if (k < 1 || k > kMaxTopK)
    throw CudaError("cudaErrorInvalidValue: k must be in [1, " + std::to_string(kMaxTopK) +
                    "], got " + std::to_string(k));
  const Chunk c = chunk_of(p);
  each_kind(p, [&](auto t, auto plain) {
    using T = decltype(t);
    launch(queue, "top_k_kernel", top_k_kernel<T, decltype(plain)::value>, p.rows, c, values, ids,
           static_cast<int>(k));
  });
}

int built_with() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace gpu
}  // namespace ift
