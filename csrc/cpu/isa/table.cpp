// The table of this instruction set's epilogues.
#include "../epilogues.h"

namespace ift {
namespace IFT_ISA {

void stats(const Chunk&, const int64_t*, double*, int64_t, int64_t*, int);
void dlogits(const Chunk&, const DlogitsRows&);
void probabilities(const Chunk&, const float*, int64_t);
void top_k(const Chunk&, float*, int64_t*, int64_t);
void gumbel(const Chunk&, uint64_t, const int64_t*, float*, float*, int64_t*);

const Epilogues& table() {
  static const Epilogues epilogues{stats, dlogits, probabilities, top_k, gumbel};
  return epilogues;
}

}  // namespace IFT_ISA
}  // namespace ift
