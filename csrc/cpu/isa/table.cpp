// The table of this instruction set's epilogues.
#include "../epilogues.h"

namespace ift {
namespace IFT_ISA {

void stats(const Chunk&, const int64_t*, double*, int64_t, int64_t*, int);
void exponentials(const Chunk&, const int64_t*, double*, int64_t, float*, float*, int64_t);
void dlogits(const Chunk&, const DlogitsRows&);
void probabilities(const Chunk&, const float*, int64_t);
void top_k(const Chunk&, float*, int64_t*, int64_t);
void gumbel(const Chunk&, uint64_t, const int64_t*, float*, float*, int64_t*);
void active_mask(const Chunk&, const int64_t*, const float*, int64_t, uint8_t*);
bool split_active(const Chunk&, const uint8_t*, int64_t, int64_t, const float*, float*, void*,
                  int64_t);
void bucket_sums(int, const void*, int64_t, int64_t, int64_t, int64_t, const float*, float*, int);
void divergence_terms(const Chunk&, const Chunk&, const DivergenceRows&);
void divergence_gradient(const Chunk&, const Chunk&, const DivergenceRows&);
void transpose_chunk(const Chunk&, void*, int64_t);

const Epilogues& table() {
  static const Epilogues epilogues{stats,
                                   exponentials,
                                   dlogits,
                                   probabilities,
                                   top_k,
                                   gumbel,
                                   active_mask,
                                   split_active,
                                   bucket_sums,
                                   divergence_terms,
                                   divergence_gradient,
                                   transpose_chunk};
  return epilogues;
}

}  // namespace IFT_ISA
}  // namespace ift
