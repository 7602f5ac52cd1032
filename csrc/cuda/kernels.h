// The operations of the CUDA backend as the binding sees them. Every pointer is a device address
// owned by the caller, every call returns as soon as its kernels are queued on the caller's stream.
// What each does is documented in ift_kernels/backends/reference/ and at the head of the .cuh
// files.
#pragma once
#include <cstdint>
#include <stdexcept>

namespace ift {
namespace gpu {

// An error of CUDA's runtime; what() has its name, its text and what was being done.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where work goes. `stream` is a cudaStream_t; 0 is the default stream.
struct Queue {
  int device;
  uintptr_t stream;
};

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Parts;
struct ResidualTokens;

// A chunk of raw products and its transform, as ift_kernels/backends/cpu/extension.py describes it.
struct Products {
  void* x;
  int dtype;
  int64_t rows, cols, ld;
  const float* bias;
  float scale, softcap, temperature;
  int64_t offset;
};

// How many blocks share a row, and how many bytes per row they need beside.
int row_parts(const Queue&, int64_t rows, int64_t cols);
int64_t stats_bytes();

void stats(const Queue&, const Products&, const int64_t* target, double* state, int64_t state_ld,
           int64_t* argmax, bool more, void* partials);
void dlogits(const Queue&, const Products&, const int64_t* target, const float* norm,
             int64_t norm_ld, const float* coef, int64_t coef_ld);
void probabilities(const Queue&, const Products&, const float* norm, int64_t norm_ld);
// ids int64 and values float32, (rows, k); ids negative for none.
void take_selected(const Queue&, const Products&, const int64_t* ids, float* values, int64_t k,
                   float lowest);
void put_selected(const Queue&, const Products&, const int64_t* ids, float* values, int64_t k);
// keys: uint64 (rows, row_parts), or null where that is 1.
void gumbel(const Queue&, const Products&, uint64_t seed, const int64_t* row_numbers, float* best,
            float* logit, int64_t* ids, void* keys);
void top_k(const Queue&, const Products&, float* values, int64_t* ids, int64_t k);
int64_t max_top_k();

void active_mask(const Queue&, const Products&, const int64_t* target, const float* level,
                 int64_t block, uint8_t* mask);
void mask_counts(const Queue&, const uint8_t* mask, int64_t blocks, int64_t cols, int64_t bucket,
                 int64_t* counts);
// `x` of the products is a tile of gradients; ends (blocks, buckets), starts (blocks): see `Split`.
void split_active(const Queue&, const Products&, const uint8_t* mask, const int64_t* ends,
                  const int64_t* starts, int64_t block, int64_t bucket, const float* tail_weights,
                  float* tail_gradient, void* active);

void residual(const Queue&, int dtype, const void* table, const ResidualTokens&, void* out,
              int64_t width, double lam);
void residual_keys(const Queue&, const ResidualTokens&, int64_t* keys);
void sum_rows(const Queue&, int dtype, const void* parts, const Parts&, void* out, int64_t rows,
              int64_t width);
void bucket_sums(const Queue&, int dtype, const void* matrix, int64_t rows, int64_t width,
                 int64_t ld, int64_t bucket, const float* tail_weights, float* sums);

// gamma > 0: with 0 it is the identity.
void scan(const Queue&, int dtype, const void* x, const uint8_t* mask, const int64_t* offsets,
          void* out, int64_t rows, int64_t length, double gamma, bool left);

// CUDA's version when this was compiled, as in 13000, and the driver's, 0 where there is none.
int built_with();
int driver_version();

}  // namespace gpu
}  // namespace ift
