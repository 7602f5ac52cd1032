// Element types, their codes (as Python passes them) and scalar conversions.
//
// The functions have internal linkage on purpose: this header is also compiled with wider
// instruction sets, and a shared inline function could be linked from there into code for every
// machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ift {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t raw;
};
struct fp16 {
  uint16_t raw;
};

namespace {

template <class To, class From>
To bit_cast(From a) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To b;
  std::memcpy(&b, &a, sizeof a);
  return b;
}

[[maybe_unused]] inline float to_float(float a) { return a; }
[[maybe_unused]] inline float to_float(bf16 a) {
  return bit_cast<float>(static_cast<uint32_t>(a.raw) << 16);
}
[[maybe_unused]] inline float to_float(fp16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.raw & 0x8000u) << 16, rest = a.raw & 0x7FFFu;
  if (rest >= 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | (rest << 13));
  // 2^112 rebiases the exponent and normalises subnormals in one exact product.
  return bit_cast<float>(sign |
                         bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 5.192296858534828e33f));
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
T from_float(float a);
template <>
[[maybe_unused]] inline float from_float<float>(float a) {
  return a;
}
template <>
[[maybe_unused]] inline bf16 from_float<bf16>(float a) {
  const uint32_t u = bit_cast<uint32_t>(a);
  if (a != a) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
template <>
[[maybe_unused]] inline fp16 from_float<fp16>(float a) {
  const uint32_t u = bit_cast<uint32_t>(a), magnitude = u & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  auto with = [&](uint32_t rest) { return fp16{static_cast<uint16_t>(sign | rest)}; };
  if (magnitude > 0x7F800000u) return with(0x7E00u);
  if (magnitude >= 0x477FF000u) return with(0x7C00u);  // rounds past the largest, 65504
  if (magnitude < 0x38800000u)  // subnormal: a float addition does the rounding
    return with(bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u);
  return with((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13);
}

// Calls f(T{}) for the type of a code; false for an unknown code.
template <class F>
bool dispatch(int dtype, const F& f) {
  if (dtype == kFloat32) return f(float{}), true;
  if (dtype == kBFloat16) return f(bf16{}), true;
  if (dtype == kFloat16) return f(fp16{}), true;
  return false;
}

}  // namespace
}  // namespace ift
