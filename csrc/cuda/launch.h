// Launching: errors as exceptions, the caller's device restored, one typed call for every kernel.
#pragma once
#include <cuda_runtime.h>

#include <initializer_list>
#include <string>

#include "common.cuh"
#include "kernels.h"

namespace ift {
namespace gpu {

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  throw CudaError(std::string(cudaGetErrorName(error)) + " (" + std::to_string(error) +
                  "): " + cudaGetErrorString(error) + ", " + doing);
}

// Work goes to the device of the tensors; the thread's current device is what it was, afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "choosing the device of the tensors");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Queues kernel(args...) in `blocks` blocks of kThreads; nothing where there are none.
template <class... Takes, class... Args>
void launch(const Queue& queue, const char* name, void (*kernel)(Takes...), int64_t blocks,
            Args... args) {
  if (blocks <= 0) return;
  if (blocks > 0x7FFFFFFF)
    throw CudaError(std::string("cudaErrorInvalidConfiguration: ") + name + " needs " +
                    std::to_string(blocks) + " blocks, a grid has 2147483647 at most");
  const DeviceGuard guard(queue.device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = reinterpret_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Takes>(args)...), name);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Chunk chunk_of(const Products& p) {
  if (p.cols >= kNowhere)
    throw CudaError("cudaErrorInvalidValue: a chunk has fewer than 2^32 - 1 columns, got " +
                    std::to_string(p.cols));
  const bool capped = p.softcap != 0.0f;
  return {p.x,
          p.rows,
          p.cols,
          p.ld,
          p.bias,
          capped ? p.scale / p.softcap : p.scale / p.temperature,
          capped ? p.softcap / p.temperature : 1.0f,
          p.scale / p.temperature,
          capped,
          p.offset};
}

// Calls f(T{}) for the type of a code.
template <class F>
void each_dtype(int dtype, const F& f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(Bf16{});
  if (dtype == kFloat16) return f(Fp16{});
  throw CudaError("cudaErrorInvalidValue: unknown dtype code " + std::to_string(dtype));
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Calls f(T{}, Flag<plain>{}) for the products' type and transform.
template <class F>
void each_kind(const Products& p, const F& f) {
  each_dtype(p.dtype, [&](auto t) {
    if (p.bias || p.softcap != 0.0f)
      f(t, Flag<false>{});
    else
      f(t, Flag<true>{});
  });
}

inline bool aligned_to(int64_t bytes, std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes)) return false;
  return true;
}

}  // namespace gpu
}  // namespace ift
