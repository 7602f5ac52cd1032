// Which instruction set to use, decided once per process.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "epilogues.h"

namespace ift {

namespace base {
const Epilogues& table();
}
#ifdef IFT_ISA_AVX2
namespace avx2 {
const Epilogues& table();
}
#endif
#ifdef IFT_ISA_AVX512
namespace avx512 {
const Epilogues& table();
}
#endif
#ifdef IFT_ISA_AVX512BF16
namespace avx512bf16 {
const Epilogues& table();
}
#endif

namespace {

struct Selected {
  const char* name;
  const Epilogues* table;
};

Selected select_isa() {
  const char* forced = std::getenv("IFT_CPU_ISA");
  auto wanted = [&](const char* name) { return !forced || std::strcmp(forced, name) == 0; };
#ifdef IFT_ISA_AVX512
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef IFT_ISA_AVX512BF16
  if (wanted("avx512bf16") && has_avx512 && __builtin_cpu_supports("avx512bf16"))
    return {"avx512bf16", &avx512bf16::table()};
#endif
  if (wanted("avx512") && has_avx512) return {"avx512", &avx512::table()};
#endif
#ifdef IFT_ISA_AVX2
  if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {"avx2", &avx2::table()};
#endif
  if (wanted("base")) return {"base", &base::table()};
  throw std::runtime_error(
      std::string("IFT_CPU_ISA: expected an instruction set that was built and "
                  "that this machine has (avx512bf16, avx512, avx2, base), got '") +
      forced + "'");
}

const Selected& selected() {
  static const Selected chosen = select_isa();
  return chosen;
}

}  // namespace

const Epilogues& epilogues() { return *selected().table; }
const char* isa_name() { return selected().name; }

}  // namespace ift
