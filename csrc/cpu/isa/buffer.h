// Work memory of one call.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace ift {
namespace IFT_ISA {

// Not std::vector: its functions are shared between files, and this one is compiled for machines
// that others must not need.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n) : data(static_cast<T*>(std::malloc((n + 1) * sizeof(T)))) {
    if (!data) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace IFT_ISA
}  // namespace ift
