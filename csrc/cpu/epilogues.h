// The epilogues over one chunk of raw products, as every instruction set offers them.
//
// A product is x = h @ W[chunk].T, row-major (rows, cols) with row stride `ld`, in dtype T. Logits
// are
//   z = mul * (x + bias)                          without softcap, mul = scale / temperature
//   z = post * tanh(pre * (x + bias))             with softcap, pre = scale / cap, post = cap /
//   temperature
// All pointers are caller-owned; nothing is allocated that outlives a call.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace ift {

// Rows of the running state, float64 (kStateRows, N) with row stride `state_ld`.
// The same order as ift_kernels/backends/contract.py; sums of exponentials leave out the target.
enum State : int { kMax, kSum, kTarget, kEZ, kESq, kZSum, kSecond, kStateRows };

enum Track : int { kArgmax = 1, kEntropy = 2, kSq = 4, kMean = 8, kTop2 = 16 };

struct Chunk {
  void* x;
  int dtype;
  int64_t rows, cols, ld;
  const float* bias;  // (cols) or null
  float scale, softcap, temperature;
  int64_t offset;  // vocabulary id of the first column
  int threads;
};

// What the gradient needs to know of each row: norm (2, N) and coef (4, N) as in
// ift_kernels/backends/reference/, and where to write the gradient a second time, transposed
// (cols, transposed_ld >= rows); null for nowhere. Only 16-bit types are written transposed.
struct DlogitsRows {
  const int64_t* target;
  const float* norm;
  int64_t norm_ld;
  const float* coef;
  int64_t coef_ld;
  void* transposed;
  int64_t transposed_ld;
};

// The same order as ift_kernels/backends/contract.py.
enum Divergence : int { kForwardKL, kReverseKL, kJensenShannon };

// What the divergence of two heads needs to know of each row, or adds to it: norm (4, N), the
// student's maximum and log-sum, then the teacher's.
struct DivergenceRows {
  int kind;
  float beta;
  const float* norm;
  int64_t norm_ld;
  double* value;          // summed; for the gradient null, or of kForwardKL
  double* centre;         // summed with the value, read for the gradient; not of kForwardKL
  const float* upstream;  // for the gradient
};

struct Epilogues {
  void (*stats)(const Chunk&, const int64_t* target, double* state, int64_t state_ld,
                int64_t* argmax, int track);
  // In place; centre (N), total (N, width): see isa/statistics.cpp.
  void (*exponentials)(const Chunk&, const int64_t* target, double* state, int64_t state_ld,
                       float* centre, float* total, int64_t width);
  void (*dlogits)(const Chunk&, const DlogitsRows&);
  void (*probabilities)(const Chunk&, const float* norm, int64_t norm_ld);
  // values float32 and ids int64, (N, k) with row stride k, descending.
  void (*top_k)(const Chunk&, float* values, int64_t* ids, int64_t k);
  // best and logit float32 (N), ids int64 (N); `row_numbers` key the generator.
  void (*gumbel)(const Chunk&, uint64_t seed, const int64_t* row_numbers, float* best, float* logit,
                 int64_t* ids);
  // The active set: see isa/active.cpp.
  void (*active_mask)(const Chunk&, const int64_t* target, const float* level, int64_t block,
                      uint8_t* mask);
  bool (*split_active)(const Chunk& gradients, const uint8_t* mask, int64_t block, int64_t bucket,
                       const float* tail_weights, float* tail_gradient, void* active,
                       int64_t capacity);
  void (*bucket_sums)(int dtype, const void* matrix, int64_t count, int64_t width, int64_t ld,
                      int64_t bucket, const float* tail_weights, float* sums, int threads);
  // Two heads at once: see isa/divergence.cpp.
  void (*divergence_terms)(const Chunk& student, const Chunk& teacher, const DivergenceRows&);
  void (*divergence_gradient)(const Chunk& student, const Chunk& teacher, const DivergenceRows&);
  // Of 16-bit elements, to (cols, out_ld >= rows).
  void (*transpose)(const Chunk&, void* out, int64_t out_ld);
};

// The table for the best instruction set of this machine, or the one named by IFT_CPU_ISA.
const Epilogues& epilogues();
const char* isa_name();

}  // namespace ift
