// Discounted sums along rows or documents: y[t] = x[t] + gamma * y[t ± 1], a linear recurrence, so
// that spans compose: (f, s) stands for y -> f * y + s, and a block scans the spans of its threads.
//
// Bytes: 2 * values * sizeof(T), and one per value of a mask. Roof: the bandwidth of memory for
// many rows; a block walks each row, so a few very long ones are bound by the latency of its steps.
#pragma once
#include <cub/block/block_scan.cuh>

#include "common.cuh"

namespace ift {
namespace gpu {

struct Span {
  float factor, sum;
};

// Powers of gamma > 0 stop at the smallest normal number instead of underflowing: a distant
// infinity then arrives as in the recurrence, and not as 0 times infinity. Of a distant finite sum
// at most 1.2e-38 of it arrives too much.
constexpr float kMinFactor = 1.17549435e-38f;

// First a, then b.
struct Compose {
  __device__ Span operator()(const Span& a, const Span& b) const {
    return {fmaxf(a.factor * b.factor, kMinFactor), b.factor * a.sum + b.sum};
  }
};

struct ScanRows {
  const uint8_t* mask;     // one byte per value, or null
  const int64_t* offsets;  // row i is [offsets[i], offsets[i + 1]), or null
  int64_t length;          // of every row, where offsets is null
  float gamma;             // at least kMinFactor
  bool left;               // sums over what follows, else over what came before
  bool aligned;            // x and out on 16 bytes, mask on 8
};

// out = mask ⊙ U(mask ⊙ x), a block per row. Threads take packs at multiples of 16 bytes, whatever
// boundary the row begins at, in the order in which the sum runs.
template <class T>
__global__ void __launch_bounds__(kThreads) scan_kernel(const T* x, ScanRows in, T* out) {
  constexpr int kSize = kPack<T>;
  using Scan = cub::BlockScan<Span, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  const int64_t begin = in.offsets ? in.offsets[row] : row * in.length;
  const int64_t end = in.offsets ? in.offsets[row + 1] : begin + in.length;
  const int64_t first = begin / kSize, last = (end + kSize - 1) / kSize;
  const Compose compose{};
  float carry = 0.0f;
  for (int64_t window = 0; window < last - first; window += kThreads) {
    const int64_t step = window + thread;
    const int64_t at = (in.left ? last - 1 - step : first + step) * kSize;
    const bool whole = in.aligned && at >= begin && at + kSize <= end;
    float v[kSize];
    uint32_t on = 0;
    if (whole) {
      unpack<T>(load16(x + at), v);
      on = (1u << kSize) - 1u;
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool inside = at + i >= begin && at + i < end;
        v[i] = inside ? to_float(x[at + i]) : 0.0f;
        on |= inside ? 1u << i : 0u;
      }
    }
    if (in.mask && on) {
      if (whole && kSize == 8) {
        const uint2 bytes = *reinterpret_cast<const uint2*>(in.mask + at);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!((i < 4 ? bytes.x : bytes.y) >> 8 * (i % 4) & 0xFFu)) on &= ~(1u << i);
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          if (on >> i & 1u && !in.mask[at + i]) on &= ~(1u << i);
      }
    }
    // In the order of the sum.
    if (in.left) {
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        const float swapped = v[i];
        v[i] = v[kSize - 1 - i];
        v[kSize - 1 - i] = swapped;
      }
      on = __brev(on) >> (32 - kSize);
    }
    Span mine{1.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kSize; ++i) mine = compose(mine, {in.gamma, on >> i & 1u ? v[i] : 0.0f});
    Span before, all;
    Scan(storage).ExclusiveScan(mine, before, compose, all);
    if (thread == 0) before = {1.0f, 0.0f};  // CUB leaves it undefined
    Span sum = compose({0.0f, carry}, before);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool keep = on >> i & 1u;
      sum = compose(sum, {in.gamma, keep ? v[i] : 0.0f});
      v[i] = keep ? sum.sum : 0.0f;
    }
    carry = compose({0.0f, carry}, all).sum;
    if (in.left) {
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        const float swapped = v[i];
        v[i] = v[kSize - 1 - i];
        v[kSize - 1 - i] = swapped;
      }
    }
    if (whole) {
      store16(out + at, pack<T>(v));
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (at + i >= begin && at + i < end) put(out + at + i, v[i]);
    }
    __syncthreads();  // before the storage of the scan is used again
  }
}

}  // namespace gpu
}  // namespace ift
