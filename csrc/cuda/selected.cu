// Launches that take columns out of a chunk and put them in.
#include "selected.cuh"
#include "launch.h"

namespace ift {
namespace gpu {

void take_selected(const Queue& queue, const Products& p, const int64_t* ids, float* values,
                   int64_t k, float lowest) {
  const Chunk c = chunk_of(p);
  each_dtype(p.dtype, [&](auto t) {
    launch(queue, "take_selected_kernel", take_selected_kernel<decltype(t)>,
           ceil_div(p.rows * k, kThreads), c, Selected{ids, values, k}, lowest);
  });
}

void put_selected(const Queue& queue, const Products& p, const int64_t* ids, float* values,
                  int64_t k) {
  const Chunk c = chunk_of(p);
  each_dtype(p.dtype, [&](auto t) {
    launch(queue, "put_selected_kernel", put_selected_kernel<decltype(t)>,
           ceil_div(p.rows * k, kThreads), c, Selected{ids, values, k});
  });
}

}  // namespace gpu
}  // namespace ift
