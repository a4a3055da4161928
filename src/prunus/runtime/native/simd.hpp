// One vector type per instruction set. Every file that includes this one is compiled once per set, each time in a
// namespace of its own, and uses no inline function of the standard library: the linker would keep a single copy of
// those, perhaps the one that an older processor cannot run.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define PRUNUS_ISA avx512
#define PRUNUS_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define PRUNUS_ISA avx2
#define PRUNUS_BYTES 32
#else
#define PRUNUS_ISA portable
#define PRUNUS_BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))

namespace prunus {
namespace PRUNUS_ISA {

typedef float V __attribute__((vector_size(PRUNUS_BYTES), aligned(PRUNUS_BYTES)));
typedef float VU __attribute__((vector_size(PRUNUS_BYTES), aligned(4)));
typedef int32_t VI __attribute__((vector_size(PRUNUS_BYTES), aligned(PRUNUS_BYTES)));

constexpr int LANES = PRUNUS_BYTES / 4;
constexpr int PARTS = 16 / LANES;  // native vectors in the 16 floats that all tables count in
// Accumulators that fit the register file beside weights and activations.
#if defined(__AVX512F__)
constexpr int ACCUMULATORS = 28;
#elif defined(__AVX2__)
constexpr int ACCUMULATORS = 14;
#elif defined(__aarch64__)
constexpr int ACCUMULATORS = 24;
#else
constexpr int ACCUMULATORS = 12;
#endif

INLINE V load(const void* p) { return *(const VU*)p; }
INLINE void store(void* p, V v) { *(VU*)p = v; }

#if defined(__AVX512F__)
INLINE V broadcast(float f) { return (V)_mm512_set1_ps(f); }
// Of two numbers one of which is NaN, these return the second, so that NaN passes through a clamp.
INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE void store_some(void* p, V v, uint32_t bits) { _mm512_mask_storeu_ps(p, (__mmask16)bits, (__m512)v); }
#elif defined(__AVX2__)
INLINE V broadcast(float f) { return (V)_mm256_set1_ps(f); }
INLINE V larger(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE V smaller(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE void store_some(void* p, V v, uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), bit);
  _mm256_maskstore_ps((float*)p, _mm256_cmpeq_epi32(set, bit), (__m256)v);
}
#else
INLINE V broadcast(float f) { return V{f, f, f, f}; }
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V smaller(V a, V b) { return a < b ? a : b; }
INLINE void store_some(void* p, V v, uint32_t bits) {
  for (int i = 0; i < LANES; i++)
    if (bits >> i & 1) memcpy((char*)p + 4 * i, (const char*)&v + 4 * i, 4);
}
#endif

// Byte offset of native vector t of a tile.
INLINE int64_t part(int t) { return (int64_t)PRUNUS_BYTES * t; }
// Bits of native vector t out of the masks of 16 floats each.
INLINE uint32_t bits_of(const uint16_t* masks, int t) {
  return (masks[t / PARTS] >> (LANES * (t % PARTS))) & ((1u << LANES) - 1);
}

// exp to 2 ulp or so: 2^n times a polynomial on [-ln2/2, ln2/2]; NaN stays, large arguments saturate.
INLINE V exponential(V x) {
  const V clamped = smaller(broadcast(88.3762626647949f), larger(broadcast(-87.3365447504f), x));
  const V scaled = clamped * broadcast(1.44269504088896341f);
  const V magic = broadcast(12582912.0f);  // adding it rounds to the nearest integer
  const V n = (scaled + magic) - magic;
  V r = clamped - n * broadcast(0.693359375f);
  r = r + n * broadcast(2.12194440e-4f);
  V p = broadcast(1.9875691500e-4f);
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * r * r + r + broadcast(1.0f);
  const VI exponent = (__builtin_convertvector(n, VI) + 127) << 23;
  return p * (V)exponent;
}

INLINE V sigmoid(V x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }

INLINE V absolute(V x) { return (V)((VI)x & 0x7fffffff); }
INLINE V with_sign_of(V magnitude, V x) { return (V)((VI)magnitude | ((VI)x & (int32_t)0x80000000)); }

// Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
INLINE V error_function(V x) {
  const V a = absolute(x);
  const V t = broadcast(1.0f) / (broadcast(1.0f) + broadcast(0.3275911f) * a);
  V p = broadcast(1.061405429f);
  p = p * t + broadcast(-1.453152027f);
  p = p * t + broadcast(1.421413741f);
  p = p * t + broadcast(-0.284496736f);
  p = p * t + broadcast(0.254829592f);
  return with_sign_of(broadcast(1.0f) - p * t * exponential(-a * a), x);
}

INLINE V hyperbolic_tangent(V x) {
  const V a = absolute(x);
  const V e = exponential(broadcast(-2.0f) * a);
  return with_sign_of((broadcast(1.0f) - e) / (broadcast(1.0f) + e), x);
}

// Numbers of activations; Python knows them by the same order (runtime/layers.py).
enum Activation { NONE, RELU, RELU6, HARDSWISH, HARDSIGMOID, SILU, GELU, GELU_TANH, SIGMOID, TANH, LEAKY_RELU };

INLINE V activated(V x, int kind, float slope) {
  const V zero = broadcast(0.0f), one = broadcast(1.0f);
  switch (kind) {
    case RELU: return larger(zero, x);
    case RELU6: return smaller(broadcast(6.0f), larger(zero, x));
    case HARDSWISH: return x * smaller(broadcast(6.0f), larger(zero, x + broadcast(3.0f))) / broadcast(6.0f);
    case HARDSIGMOID: return smaller(broadcast(6.0f), larger(zero, x + broadcast(3.0f))) / broadcast(6.0f);
    case SILU: return x * sigmoid(x);
    case GELU: return broadcast(0.5f) * x * (one + error_function(x * broadcast(0.70710678118654752f)));
    case GELU_TANH: {
      const V inner = broadcast(0.79788456080286536f) * (x + broadcast(0.044715f) * x * x * x);
      return broadcast(0.5f) * x * (one + hyperbolic_tangent(inner));
    }
    case SIGMOID: return sigmoid(x);
    case TANH: return hyperbolic_tangent(x);
    case LEAKY_RELU: return larger(zero, x) + broadcast(slope) * smaller(zero, x);
    default: return x;
  }
}

}  // namespace PRUNUS_ISA
}  // namespace prunus
