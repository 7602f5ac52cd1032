// Transposing a small block of 16-bit elements that is in the first-level cache.
#pragma once
#include "vec.h"

namespace ift {
namespace IFT_ISA {

typedef uint16_t half_row __attribute__((vector_size(16)));
typedef uint16_t two_rows __attribute__((vector_size(32)));

// 16 rows x 8 columns: rows i and i + 8 share a vector, three rounds of in-lane unpacking.
inline void transpose_16x8(const uint16_t* x, int64_t ld, uint16_t* out, int64_t out_ld) {
  two_rows v[8], w[8];
  for (int i = 0; i < 8; ++i) {
    half_row low, high;
    std::memcpy(&low, x + i * ld, sizeof low);
    std::memcpy(&high, x + (i + 8) * ld, sizeof high);
    v[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
#define IFT_LOW16 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27
#define IFT_HIGH16 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31
#define IFT_LOW32 0, 1, 16, 17, 2, 3, 18, 19, 8, 9, 24, 25, 10, 11, 26, 27
#define IFT_HIGH32 4, 5, 20, 21, 6, 7, 22, 23, 12, 13, 28, 29, 14, 15, 30, 31
#define IFT_LOW64 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define IFT_HIGH64 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
  for (int i = 0; i < 4; ++i) {
    w[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], IFT_LOW16);
    w[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], IFT_HIGH16);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = __builtin_shufflevector(w[4 * i + j], w[4 * i + 2 + j], IFT_LOW32);
      v[4 * i + 2 * j + 1] = __builtin_shufflevector(w[4 * i + j], w[4 * i + 2 + j], IFT_HIGH32);
    }
  for (int j = 0; j < 4; ++j) {
    w[2 * j] = __builtin_shufflevector(v[j], v[4 + j], IFT_LOW64);
    w[2 * j + 1] = __builtin_shufflevector(v[j], v[4 + j], IFT_HIGH64);
  }
#undef IFT_LOW16
#undef IFT_HIGH16
#undef IFT_LOW32
#undef IFT_HIGH32
#undef IFT_LOW64
#undef IFT_HIGH64
  for (int j = 0; j < 8; ++j) std::memcpy(out + j * out_ld, &w[j], sizeof w[j]);
}

// out[j, i] = x[i, j] for i < rows, j < columns.
inline void transpose(const uint16_t* x, int64_t ld, int rows, int64_t columns, uint16_t* out,
                      int64_t out_ld) {
  const int64_t whole_columns = columns / 8 * 8;
  const int whole_rows = rows / 16 * 16;
  for (int64_t j = 0; j < whole_columns; j += 8)
    for (int i = 0; i < whole_rows; i += 16)
      transpose_16x8(x + i * ld + j, ld, out + j * out_ld + i, out_ld);
  for (int64_t j = 0; j < columns; ++j)
    for (int i = j < whole_columns ? whole_rows : 0; i < rows; ++i)
      out[j * out_ld + i] = x[i * ld + j];
}

}  // namespace IFT_ISA
}  // namespace ift
