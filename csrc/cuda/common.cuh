// What the kernels share: element types, 16-byte packs, logits, reductions, the walk along a row.
//
// Only device code is in the .cuh files, and nothing of it includes more than CUDA's own type
// headers: so they also compile with NVRTC. The launches are in the .cu files.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ift {
namespace gpu {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr uint32_t kNowhere = 0xFFFFFFFFu;  // no column

// Not a constant: older versions of NVRTC have no name for one.
__device__ inline float infinity() { return __uint_as_float(0x7F800000u); }

struct Bf16 {
  uint16_t raw;
};
struct Fp16 {
  uint16_t raw;
};

// Elements of T in 16 bytes, the widest access of one thread.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// --- conversions, two 16-bit values at a time where the hardware does so -------------------------

template <class T>
struct Pair;  // of 16-bit floats in one word
template <>
struct Pair<Bf16> {
  static __device__ float2 unpack(uint32_t w) {
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u));
  }
  static __device__ uint32_t pack(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Pair<Fp16> {
  static __device__ float2 unpack(uint32_t w) {
    return __half22float2(*reinterpret_cast<const __half2*>(&w));
  }
  static __device__ uint32_t pack(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <class T>
__device__ inline float to_float(T a) {
  return Pair<T>::unpack(a.raw).x;
}
__device__ inline float to_float(float a) { return a; }

template <class T>
__device__ inline void put(T* to, float a) {
  to->raw = static_cast<uint16_t>(Pair<T>::pack(a, 0.0f));
}
__device__ inline void put(float* to, float a) { *to = a; }

template <class T>
__device__ inline void unpack(uint4 raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Pair<T>::unpack(words[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}
template <class T>
__device__ inline void unpack(uint4 raw, float (&v)[4]) {
  v[0] = __uint_as_float(raw.x);
  v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z);
  v[3] = __uint_as_float(raw.w);
}
template <class T>
__device__ inline uint4 pack(const float (&v)[8]) {
  return make_uint4(Pair<T>::pack(v[0], v[1]), Pair<T>::pack(v[2], v[3]), Pair<T>::pack(v[4], v[5]),
                    Pair<T>::pack(v[6], v[7]));
}
template <class T>
__device__ inline uint4 pack(const float (&v)[4]) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                    __float_as_uint(v[3]));
}

template <class T>
__device__ inline uint4 load16(const T* from) {
  return *reinterpret_cast<const uint4*>(from);
}
template <class T>
__device__ inline void store16(T* to, uint4 raw) {
  *reinterpret_cast<uint4*>(to) = raw;
}

// Eight elements of any type, one or two accesses of 16 bytes.
__device__ inline void load8(const float* from, float (&v)[8]) {
  float low[4], high[4];
  unpack<float>(load16(from), low);
  unpack<float>(load16(from + 4), high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = low[i];
    v[4 + i] = high[i];
  }
}
template <class T>
__device__ inline void load8(const T* from, float (&v)[8]) {
  unpack<T>(load16(from), v);
}
__device__ inline void store8(float* to, const float (&v)[8]) {
  store16(to, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                         __float_as_uint(v[3])));
  store16(to + 4, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]),
                             __float_as_uint(v[7])));
}
template <class T>
__device__ inline void store8(T* to, const float (&v)[8]) {
  store16(to, pack<T>(v));
}

// --- logits
// ---------------------------------------------------------------------------------------

// One chunk of raw products (rows, cols), row stride ld, and how they become logits:
//   z = pre * (x + bias)                 without softcap, pre = scale / temperature
//   z = post * tanh(pre * (x + bias))    with softcap, pre = scale / cap, post = cap / temperature
// slope is dz/dx where the softcap is linear: scale / temperature.
struct Chunk {
  void* x;
  int64_t rows, cols, ld;
  const float* bias;  // (cols) or null
  float pre, post, slope;
  bool capped;
  int64_t offset;  // vocabulary id of the first column
};

// kPlain: no bias and no softcap, decided once per launch. Rounded after every step (never fused):
// statistics and gradients must see the same logit.
template <bool kPlain>
__device__ inline float logit(const Chunk& c, float x, int64_t column) {
  if (!kPlain && c.bias) x = __fadd_rn(x, c.bias[column]);
  x = __fmul_rn(x, c.pre);
  if (!kPlain && c.capped) x = __fmul_rn(c.post, tanhf(x));
  return x;
}

// The derivative of the softcap at logit z, 1 without one.
template <bool kPlain>
__device__ inline float cap_slope(const Chunk& c, float z) {
  if (kPlain || !c.capped) return 1.0f;
  const float t = z / c.post;
  return 1.0f - t * t;
}

// Products of 16 bits carry an error of 2^-9 or 2^-12: two ulp more in exp do not show.
template <class T>
__device__ inline float exp_of(float x) {
  return sizeof(T) == 2 ? __expf(x) : expf(x);
}

// exp(z - m). A difference of -28 is rounded by as much as 8 units in the last place of the result:
// what is lost comes back.
__device__ inline float exp_difference(float z, float m) {
  const float d = z - m, back = d - z, lost = (z - (d - back)) - (m + back);
  const float e = expf(d);
  return e + e * fmaxf(lost, -1.0f);  // a NaN, of an infinite z, is -1
}

// The column of a row's target in this chunk, -1 outside.
__device__ inline int local_target(const Chunk& c, const int64_t* target, int64_t row) {
  const int64_t column = target[row] - c.offset;
  return column >= 0 && column < c.cols ? static_cast<int>(column) : -1;
}

// Larger key: larger value, then lower column; NaN above all, both zeros the same.
__device__ inline uint64_t order_key(float value, uint32_t column) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (value != value) ordered = 0xFFFFFFFFu;
  return static_cast<uint64_t>(ordered) << 32 | (kNowhere - column);
}
__device__ inline uint32_t key_column(uint64_t key) {
  return kNowhere - static_cast<uint32_t>(key);
}

// --- reductions: all 32 lanes take part and receive the result -----------------------------------

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    v = fmaxf(v, __shfl_xor_sync(kAll, v, distance));
  return v;
}
template <class V>
__device__ inline V warp_sum(V v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    v += __shfl_xor_sync(kAll, v, distance);
  return v;
}
__device__ inline uint64_t warp_max(uint64_t v) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kAll, static_cast<unsigned long long>(v), distance);
    v = other > v ? other : v;
  }
  return v;
}

// --- walking along a row
// --------------------------------------------------------------------------

// A row cut into what lies before the first 16-byte boundary, packs, and the rest.
template <class T>
struct Row {
  T* x;
  int64_t lead, packs, cols;

  __device__ Row(const Chunk& c, int64_t row) : cols(c.cols) {
    x = static_cast<T*>(c.x) + row * c.ld;
    const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(T)) % kPack<T>;
    lead = off ? kPack<T> - off : 0;
    lead = lead < cols ? lead : cols;
    packs = (cols - lead) / kPack<T>;
  }
  // The first column of a pack.
  __device__ int64_t column(int64_t pack) const { return lead + pack * kPack<T>; }
  // Columns outside the packs, fewer than 2 * kPack, and the i-th of them.
  __device__ int loose() const { return static_cast<int>(cols - packs * kPack<T>); }
  __device__ int64_t loose_column(int i) const { return i < lead ? i : packs * kPack<T> + i; }
};

// Calls f.batch(values, column, stride) with every product of part `part` of `parts` of a row;
// value i belongs to column + i / kPack * stride + i % kPack, in ascending order. `lane` of `lanes`
// threads. 16 values come at once, so that several loads are on their way.
template <class T, class F>
__device__ inline void walk(const Row<T>& row, int lane, int lanes, int part, int parts, F& f) {
  constexpr int kSize = kPack<T>, kBatch = 16 / kSize;
  const int64_t per_part = (row.packs + parts - 1) / parts;
  const int64_t first = part * per_part;
  const int64_t last = first + per_part < row.packs ? first + per_part : row.packs;
  int64_t pack = first + lane;
  for (; pack + (kBatch - 1) * lanes < last; pack += kBatch * lanes) {
    uint4 raw[kBatch];
    float values[16];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) raw[i] = load16(row.x + row.column(pack + i * lanes));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float some[kSize];
      unpack<T>(raw[i], some);
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[i * kSize + j] = some[j];
    }
    f.batch(values, row.column(pack), static_cast<int64_t>(lanes) * kSize);
  }
  for (; pack < last; pack += lanes) {
    float some[kSize];
    unpack<T>(load16(row.x + row.column(pack)), some);
    f.batch(some, row.column(pack), 0);
  }
  if (part != 0) return;
  for (int i = lane; i < row.loose(); i += lanes) {
    const int64_t column = row.loose_column(i);
    float one[1] = {to_float(row.x[column])};
    f.batch(one, column, 0);
  }
}

}  // namespace gpu
}  // namespace ift
