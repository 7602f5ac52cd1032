// Columns of a chunk that are apart from the rest, some in each row: taken out, and put in.
//
// Bytes: 8 for every id, and for the ids in the chunk a scattered access to a product and one of 4
// bytes. Roof: the bandwidth of memory, of which that is little beside the chunk.
#pragma once
#include "common.cuh"

namespace ift {
namespace gpu {

struct Selected {
  const int64_t* ids;  // (rows, k), negative for none
  float* values;       // (rows, k)
  int64_t k;

  // The column in the chunk of what is at `place`, -1 if it is not there.
  __device__ int64_t column(const Chunk& c, int64_t place) const {
    if (place >= c.rows * k || ids[place] < 0) return -1;
    const int64_t local = ids[place] - c.offset;
    return local >= 0 && local < c.cols ? local : -1;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    take_selected_kernel(Chunk c, Selected s, float lowest) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t column = s.column(c, place);
  if (column < 0) return;
  T* const x = static_cast<T*>(c.x) + place / s.k * c.ld + column;
  s.values[place] = to_float(*x);
  put(x, lowest);
}

template <class T>
__global__ void __launch_bounds__(kThreads) put_selected_kernel(Chunk c, Selected s) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t column = s.column(c, place);
  if (column < 0) return;
  put(static_cast<T*>(c.x) + place / s.k * c.ld + column, s.values[place]);
}

}  // namespace gpu
}  // namespace ift
