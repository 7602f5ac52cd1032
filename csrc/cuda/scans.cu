// Launch of the discounted sums, gamma > 0.
#include "scans.cuh"

#include "launch.h"

namespace ift {
namespace gpu {

void scan(const Queue& queue, int dtype, const void* x, const uint8_t* mask, const int64_t* offsets,
          void* out, int64_t rows, int64_t length, double gamma, bool left) {
  const ScanRows in{mask,   offsets,
                    length, fmaxf(static_cast<float>(gamma), kMinFactor),
                    left,   aligned_to(16, {x, out}) && aligned_to(8, {mask})};
  each_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch(queue, "scan_kernel", scan_kernel<T>, rows, static_cast<const T*>(x), in,
           static_cast<T*>(out));
  });
}

}  // namespace gpu
}  // namespace ift
