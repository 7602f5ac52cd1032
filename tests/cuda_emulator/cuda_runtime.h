// The runtime's calls that csrc/cuda makes, for two devices that are both this CPU.
#pragma once
#include "emulator.h"

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline thread_local int emulated_device = 0;

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice"
                                         : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                         : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  emulated_device = device;
  return cudaSuccess;
}
// Few, so that rows of a test are shared by several blocks.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// On the device of the last launch, for tests of the guard.
inline int emulated_launch_device = -1;
extern "C" __attribute__((visibility("default"), used)) inline int emulated_last_device() {
  return emulated_launch_device;
}
extern "C" __attribute__((visibility("default"), used)) inline int emulated_current_device() {
  return emulated_device;
}

template <class... Takes, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Takes...),
                               Args&&... args) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  emulated_launch_device = emulated_device;
  for (unsigned b : emulator::block_order(config->gridDim.x)) {
    blockIdx.x = b;
    emulator::run_block(static_cast<int>(config->blockDim.x), [&] { kernel(args...); });
  }
  return cudaSuccess;
}
