// One vector type per instruction set, through the compiler's portable vector extensions: the same
// source becomes AVX-512, AVX2, SSE or NEON code. Included only by files that are compiled once per
// instruction set, inside namespace IFT_ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../dtype.h"

// The few places where the portable form costs twice the instructions have an AVX-512 one beside
// it.
#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
// False alarms inside the header of GCC 12.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define IFT_LANES 16
#elif defined(__AVX2__)
#define IFT_LANES 8
#else
#define IFT_LANES 4
#endif

namespace ift {
namespace IFT_ISA {

constexpr int W = IFT_LANES;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

constexpr float kInf = std::numeric_limits<float>::infinity();

inline vf splat(float a) { return a - (vf){}; }
inline vf pick(vi mask, vf a, vf b) { return mask ? a : b; }
#ifdef __AVX512F__
inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#else
inline vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
#endif
// Keeps the compiler from fusing the rounding of v into what follows. Logits must be the same
// rounded number wherever they are formed: statistics relative to one and gradients relative to
// another would leave probabilities that do not sum to 1 by |z| times the rounding unit.
inline vf rounded(vf v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class To, class From>
inline To bits(From a) {
  To b;
  static_assert(sizeof a == sizeof b, "same size");
  std::memcpy(&b, &a, sizeof a);
  return b;
}

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline vf load(const bf16* p) {
#ifdef __AVX512F__
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (vf)_mm512_slli_epi32(wide, 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return bits<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#elif defined(__AVX512F__)
  __m512i w = _mm512_castps_si512((__m512)v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(0x7FFF)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, w, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
#else
  vu u = bits<vu>(v);
  // Round to nearest even; a NaN stays one.
  vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vh h = __builtin_convertvector(bits<vu>(v == v ? bits<vi>(rounded) : bits<vi>(quiet)), vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

inline vf load(const fp16* p) {
#ifdef __AVX512F__
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  vu u = __builtin_convertvector(h, vu);
  vu sign = (u & 0x8000u) << 16;
  // Exponent and mantissa moved into place, then rescaled by 2^112: right for subnormals too.
  vf magnitude = bits<vf>((u & 0x7FFFu) << 13) * splat(bits<float>(0x77800000u));
  vi special = (u & 0x7C00u) == 0x7C00u;  // Inf and NaN keep an exponent of all ones
  vu value = bits<vu>(pick(special, bits<vf>(bits<vu>(magnitude) | 0x7F800000u), magnitude));
  return bits<vf>(value | sign);
#endif
}
inline void store(fp16* p, vf v) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  vu u = bits<vu>(v);
  vu sign = (u >> 16) & 0x8000u;
  vu a = u & 0x7FFFFFFFu;
  // Normal result: rebias and round to nearest even. Subnormal: let a float addition do the
  // rounding.
  vu normal = (a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  vf tiny = bits<vf>(a) + splat(0.5f);
  vu subnormal = bits<vu>(tiny) - 0x3F000000u;
  vu r = bits<vu>(a < 0x38800000u ? bits<vi>(subnormal) : bits<vi>(normal));
  r = bits<vu>(a >= 0x477FF000u ? bits<vi>((vu){} + 0x7C00u) : bits<vi>(r));
  r = bits<vu>(a > 0x7F800000u ? bits<vi>((vu){} + 0x7E00u) : bits<vi>(r));
  vh h = __builtin_convertvector(r | sign, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

// A partial vector: the missing lanes read as `fill`.
template <class T>
inline vf load_part(const T* p, int n, float fill) {
  T buffer[W];
  std::memset(buffer, 0, sizeof buffer);
  std::memcpy(buffer, p, n * sizeof(T));
  vf v = load(buffer);
  for (int i = n; i < W; ++i) v[i] = fill;
  return v;
}
template <class T>
inline void store_part(T* p, vf v, int n) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline float sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
inline float maximum(vf v) {
  float lanes[W];
  store(lanes, v);
  float m = lanes[0];
  for (int i = 1; i < W; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// exp(r) for |r| <= ln(2) / 2: a minimax polynomial, 0.05 units in the last place from it before
// the roundings, of which the last two are nearly all.
inline vf exp_reduced(vf r) {
  vf p = splat(1.381431939e-3f);
  p = p * r + 8.368850686e-3f;
  p = p * r + 4.166840017e-2f;
  p = p * r + 1.666651964e-1f;
  p = p * r + 4.999999404e-1f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// exp to about 1 ulp; 0 below -87.3 (no subnormal results), NaN stays NaN. For x <= 88 only.
inline vf vexp_small(vf x) {
#ifdef __AVX512F__
  // vscalefps multiplies by a power of two in one instruction.
  vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | 8);
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // Not below -87.33 (a NaN is not below): there the result is 0, without subnormals on the way.
  __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.33f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)exp_reduced(r), (__m512)n);
#else
  // Adding 1.5 * 2^23 rounds to an integer in the low bits. Of an x far below it makes no sense,
  // nor does what follows: the result is 0 there.
  vf shifted = x * 1.44269504f + 12582912.0f;
  vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vi k = bits<vi>(shifted) - bits<int32_t>(12582912.0f);
  vf y = exp_reduced(r) * bits<vf>((k + 127) << 23);
  return x < -87.33f ? splat(0.0f) : y;
#endif
}

// The same for any x: +inf above 88.
inline vf vexp(vf x) { return x > 88.0f ? splat(kInf) : vexp_small(x); }

// Natural logarithm of a positive normal number, to about 1 ulp.
inline vf vlog(vf x) {
  vi i = bits<vi>(x);
  vi e = (i - 0x3F3504F3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
  vf m = bits<vf>(i - (e << 23)) - 1.0f;
  vf ef = __builtin_convertvector(e, vf);
  vf m2 = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vf y = p * m * m2 + ef * -2.12194440e-4f - 0.5f * m2;
  return m + y + ef * 0.693359375f;
}

// log(1 + x) for x in (-1, 0]: log of the rounded sum, corrected for what the rounding lost.
inline vf vlog1p(vf x) {
  vf w = 1.0f + x;
  vf d = w - 1.0f;
  vi same = d == (vf){};
  vf ratio = x / pick(same, splat(1.0f), d);
  return pick(same, x, vlog(w) * ratio);
}

inline vf vtanh(vf x) {
  vf a = bits<vf>(bits<vu>(x) & 0x7FFFFFFFu);
  vf s = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  vf small = x + x * s * p;
  vf large = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  large = bits<vf>(bits<vu>(large) | (bits<vu>(x) & 0x80000000u));
  return pick(a < 0.625f, small, large);
}

}  // namespace IFT_ISA
}  // namespace ift
