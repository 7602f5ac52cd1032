// CUDA's language and runtime on the CPU, as far as csrc/cuda uses them, so that its kernels run
// where there is no GPU. Blocks run one after another, shuffled, the threads of a block as
// coroutines: each runs to its next barrier or warp operation before another does, in an order that
// `emulated_order` turns around. A missing barrier therefore shows in one of the two orders. Shared memory is full of NaN when a block begins.
//
// Stricter than a GPU: a barrier or a warp operation that some threads have left for good ends the
// program. Not emulated: timing, memory order between blocks, the rounding of approximate
// instructions.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_ = 1) : x(x_) {}
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum Wait { kReady, kBlock, kLanes, kDone };

struct Thread {
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Wait wait = kDone;
  bool started = false;
  unsigned operations = 0;  // of its warp, so far
};

struct Block {
  std::vector<Thread> threads;
  std::vector<uint64_t> slots;  // (2, threads): what lanes show each other, this time and last time
  std::function<void()> body;
  jmp_buf scheduler;
  ucontext_t back;
  int count = 0, current = 0;
};

inline Block block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

inline void pause(Wait wait) {
  Thread& me = block.threads[block.current];
  me.wait = wait;
  if (_setjmp(me.at) == 0) _longjmp(block.scheduler, 1);
}

// One block's body after another: to begin a coroutine anew would take two system calls.
inline void main_of_thread() {
  for (;;) {
    block.body();
    pause(kDone);
  }
}

}  // namespace emulator

struct Coordinate {
  unsigned x, y, z;
};
inline Coordinate threadIdx{}, blockIdx{};

namespace emulator {

inline void resume(int thread) {
  Thread& next = block.threads[thread];
  block.current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  next.wait = kReady;
  if (_setjmp(block.scheduler) != 0) return;
  if (next.started) _longjmp(next.at, 1);
  next.started = true;
  getcontext(&next.start);
  next.start.uc_stack.ss_sp = next.stack.get();
  next.start.uc_stack.ss_size = kStack;
  next.start.uc_link = nullptr;
  makecontext(&next.start, main_of_thread, 0);
  setcontext(&next.start);
}

// Lets those go on that have all arrived; true if the block has ended.
inline bool release() {
  int done = 0, at_block = 0;
  for (int first = 0; first < block.count; first += kWarp) {
    int waiting = 0, gone = 0;
    const int last = first + kWarp < block.count ? first + kWarp : block.count;
    for (int t = first; t < last; ++t) {
      waiting += block.threads[t].wait == kLanes;
      gone += block.threads[t].wait == kDone;
      at_block += block.threads[t].wait == kBlock;
    }
    done += gone;
    if (waiting == 0) continue;
    if (waiting != last - first) fail("a warp operation without all of its 32 lanes");
    for (int t = first; t < last; ++t) block.threads[t].wait = kReady;
  }
  if (done == block.count) return true;
  if (at_block == block.count)
    for (int t = 0; t < block.count; ++t) block.threads[t].wait = kReady;
  else if (at_block > 0 && done > 0)
    fail("__syncthreads() after some threads have returned");
  return false;
}

// Every `__shared__` variable: its address and size, as `emulated_shared` was given them.
inline std::vector<std::pair<void*, size_t>> shared_memory;

inline bool reverse = false;
inline std::mt19937 generator(0);

// Blocks of a launch in the order in which they run, another one each time.
inline std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), generator);
  return order;
}

inline void run_block(int threads, const std::function<void()>& body) {
  if (static_cast<int>(block.threads.size()) < threads) {
    block.threads = std::vector<Thread>(threads);
    block.slots.assign(2 * threads, 0);
  }
  // All bits set: a NaN in every floating type, -1 in integers.
  for (const auto& [address, bytes] : shared_memory) std::memset(address, 0xFF, bytes);
  block.count = threads;
  block.body = body;
  for (int t = 0; t < threads; ++t) {
    block.threads[t].wait = kReady;
    block.threads[t].operations = 0;
  }
  do {
    for (int i = 0; i < threads; ++i) {
      const int t = reverse ? threads - 1 - i : i;
      if (block.threads[t].wait == kReady) resume(t);
    }
  } while (!release());
}

// What lane `lane` of this warp shows, with this lane showing `mine`. Two sets of slots: whoever is
// one operation ahead must not overwrite what others still read.
template <class F>
auto exchange(uint64_t mine, const F& read) {
  Thread& me = block.threads[block.current];
  const int first = block.current / kWarp * kWarp;
  uint64_t* const slots =
      block.slots.data() + (me.operations++ % 2) * (block.slots.size() / 2) + first;
  slots[block.current - first] = mine;
  pause(kLanes);
  return read(slots, block.current - first);
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"), used)) inline void emulated_shared(void* address,
                                                                                    size_t bytes) {
  emulator::shared_memory.emplace_back(address, bytes);
}

// The order of threads from now on, and the seed of that of blocks.
extern "C" __attribute__((visibility("default"), used)) inline void emulated_order(int reverse,
                                                                                   unsigned seed) {
  emulator::reverse = reverse != 0;
  emulator::generator.seed(seed);
}

inline void __syncthreads() { emulator::pause(emulator::kBlock); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a word or two");
  if (mask != 0xFFFFFFFFu) emulator::fail("only whole warps are emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulator::exchange(bits, [&](const uint64_t* s, int lane) { return s[lane ^ with]; });
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  if (mask != 0xFFFFFFFFu) emulator::fail("only whole warps are emulated");
  return emulator::exchange(value, [](const uint64_t* s, int) {
    uint64_t least = s[0];
    for (int i = 1; i < emulator::kWarp; ++i) least = s[i] < least ? s[i] : least;
    return static_cast<unsigned>(least);
  });
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float a) { return expf(a); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline unsigned __brev(unsigned a) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (a >> i & 1u) << (31 - i);
  return out;
}
inline float __uint_as_float(unsigned a) {
  float out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}
inline unsigned __float_as_uint(float a) {
  unsigned out;
  std::memcpy(&out, &a, sizeof out);
  return out;
}
