// cub::BlockScan by the first thread of the block, with what CUB promises and not more: its storage
// may be used again after a barrier only, and the first output of an exclusive scan is undefined.
#pragma once
#include "emulator.h"

namespace cub {

template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T in[kThreads], out[kThreads], all;
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  template <class Op>
  void ExclusiveScan(T in, T& out, Op op, T& all) {
    storage_.in[threadIdx.x] = in;
    __syncthreads();
    if (threadIdx.x == 0) {
      T sum = in;
      std::memset(static_cast<void*>(&storage_.out[0]), 0xFF, sizeof(T));
      for (int i = 1; i < kThreads; ++i) {
        storage_.out[i] = sum;
        sum = op(sum, storage_.in[i]);
      }
      storage_.all = sum;
    }
    __syncthreads();
    out = storage_.out[threadIdx.x];
    all = storage_.all;
  }

  void ExclusiveSum(T in, T& out, T& all) {
    ExclusiveScan(in, out, [](T a, T b) { return a + b; }, all);
    if (threadIdx.x == 0) out = T{};
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
