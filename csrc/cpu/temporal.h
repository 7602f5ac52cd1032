// The temporal residual and its adjoint: see temporal.cpp.
#pragma once
#include <cstdint>

namespace ift {

// The token tensors, each `tokens` long, and what decides which positions are mixed. Every token
// that can be read was checked by the caller to lie inside the table.
struct ResidualTokens {
  const int64_t* ids;
  const int64_t* predicted;
  const int64_t* labels;
  const int64_t* offsets;  // documents + 1 boundaries, or null
  int64_t documents;
  int64_t tokens;
  int64_t row_length;  // the first position of every row is a first position too
  int64_t ignore_index;
};

// out[t] = (1 - lam) · table[ids[t]] + lam · table[mixed_in_id(t)], (tokens, width).
void residual(const void* table, const ResidualTokens& tokens, void* out, int64_t width, double lam,
              int dtype, int threads);

// table_grad (vocabulary, width), every row of it written: the adjoint of `residual` at grad.
void residual_grad(const void* grad, const ResidualTokens& tokens, void* table_grad,
                   int64_t vocabulary, int64_t width, double lam, int dtype, int threads);

}  // namespace ift
