// Columns of a chunk that are apart from the rest: ids int64 and values float32, (rows, k), the ids
// of a row ascending, negative for none. Without vectors, so for every instruction set the same.
#pragma once
#include <cstdint>

namespace ift {

struct Chunk;

// Moves the products of the selected columns to `values`; `lowest` stays in their place.
void take_selected(const Chunk&, const int64_t* ids, float* values, int64_t k, float lowest);

// Overwrites the selected columns by `values`, in the transposed chunk (cols, transposed_ld >=
// rows) too, unless that is null.
void put_selected(const Chunk&, const int64_t* ids, const float* values, int64_t k,
                  void* transposed, int64_t transposed_ld);

}  // namespace ift
