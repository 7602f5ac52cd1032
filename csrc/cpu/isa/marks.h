// What the epilogues of the active set make of a byte per column.
#pragma once
#include <cstdint>

#include "vec.h"

namespace ift {
namespace IFT_ISA {

// The marked columns among n, in order, into `ids` (n + 1); `tail` (n + W) is -1 where a column is
// not marked, 0 where it is and beyond. Returns how many are marked.
inline int64_t split_marks(const uint8_t* marks, int64_t n, int32_t* ids, int32_t* tail) {
  int64_t marked = 0;
  for (int64_t j = 0; j < n; ++j) {
    tail[j] = marks[j] ? 0 : -1;
    ids[marked] = static_cast<int32_t>(j);
    marked += marks[j];
  }
  for (int64_t j = n; j < n + W; ++j) tail[j] = 0;
  return marked;
}

}  // namespace IFT_ISA
}  // namespace ift
