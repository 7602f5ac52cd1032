// Discounted sums along rows: see scans.cpp.
#pragma once
#include <cstdint>

namespace ift {

// out = mask ⊙ U(mask ⊙ x), U[t, j] = gamma^(j - t) for j >= t in the same row; Uᵀ when not `left`.
// x, out: contiguous, `dtype`. mask: one byte per value, or null. Rows are [offsets[i],
// offsets[i+1]), or, where offsets is null, `rows` rows of `length` values.
void scan(const void* x, const uint8_t* mask, const int64_t* offsets, void* out, int64_t rows,
          int64_t length, double gamma, bool left, int dtype, int threads);

}  // namespace ift
