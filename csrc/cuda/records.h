// Records that both the binding and the kernels know.
#pragma once
#include <cstdint>

namespace ift {
namespace gpu {

// The token tensors, each `tokens` long, and what decides which positions are mixed.
struct ResidualTokens {
  const int64_t* ids;
  const int64_t* predicted;
  const int64_t* labels;
  const int64_t* offsets;  // documents + 1 boundaries, or null
  int64_t documents;
  int64_t tokens;
  int64_t row_length;  // the first position of every row is a first position too
  int64_t ignore_index;
  int64_t vocabulary;
};

// Which part the i-th entry of a sorted list is, and its weight. keys null: part order[i], weight
// 1; else the first `tokens` entries are those of the tokens themselves, the others what is mixed
// in.
struct Parts {
  const int64_t* order;
  const int64_t* first;  // (rows + 1): the entries of row v are [first[v], first[v + 1])
  const int64_t* keys;
  int64_t tokens, vocabulary;
  float keep, share;
};

}  // namespace gpu
}  // namespace ift
