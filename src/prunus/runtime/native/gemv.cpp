// Linear layers with few rows of x: W lies in groups of 16 rows, the layout is chosen for its pattern of zeros.
//
// Removed weights that a layout has to store are zeros, and zero times infinity is NaN. So the fast kernels multiply
// without looking, and a group that comes out as NaN is computed once more by `exactly`, which skips them.
#include "layers.hpp"
#include "simd.hpp"

namespace prunus {
namespace PRUNUS_ISA {
namespace {

typedef uint16_t Half;  // bfloat16

// Columns of x that one step of a kernel reads divide this; what is beyond the last whole step is read from a copy
// that continues with zeros, since x may not be read past its end.
constexpr int LONGEST_STEP = 256;
constexpr int TOGETHER = 8;  // rows of x that share a pass over the weights of a group while these are in the cache

INLINE float widened(float w) { return w; }
INLINE float widened(Half w) {
  const uint32_t bits = (uint32_t)w << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
// Not only equal to zero: -0 is a weight that was kept.
INLINE bool removed(float w) {
  uint32_t bits;
  memcpy(&bits, &w, 4);
  return bits == 0;
}

INLINE V weights(const float* p) { return load(p); }
INLINE V weights(const Half* p) {
#if defined(__AVX512F__)
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  V v;
  for (int i = 0; i < LANES; i++) v[i] = widened(p[i]);
  return v;
#endif
}

// x, and where to read it: columns from `edge` on are in `tail`.
struct Input {
  const float* x;
  const float* tail;
  int columns, edge;
  inline __attribute__((always_inline)) const float* at(int column, int step) const {
    return column + step <= columns ? x + column : tail + (column - edge);
  }
};

// ---- sums of 16 rows that each have 16 partial sums

INLINE void totals(const float (*rows)[16], float* sums) {
#if defined(__AVX512F__)
  __m512 pair[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m512 a = _mm512_load_ps(rows[2 * i]), b = _mm512_load_ps(rows[2 * i + 1]);
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  _mm512_store_ps(sums, _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)));
#elif defined(__AVX2__)
  for (int i = 0; i < 16; i += 4) {
    __m256 r[4];
    for (int j = 0; j < 4; j++) r[j] = _mm256_add_ps(_mm256_load_ps(rows[i + j]), _mm256_load_ps(rows[i + j] + 8));
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    _mm_store_ps(sums + i, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }
#else
  for (int i = 0; i < 16; i++) {
    V v = load(rows[i]);
    for (int p = 1; p < PARTS; p++) v += load(rows[i] + LANES * p);
    sums[i] = (v[0] + v[1]) + (v[2] + v[3]);
  }
#endif
}

// ---- csr

template <class W, class I>
INLINE float dot(const W* w, const I* column, int64_t count, const float* x) {
  float sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) sum[j] += widened(w[i + j]) * x[column[i + j]];
  for (; i < count; i++) sum[i & 1] += widened(w[i]) * x[column[i]];
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <class W, class I>
void csr(const GemvLayer& s, int group, const Input& in, float* sums) {
  const int64_t* starts = s.starts + 16 * (int64_t)group;
  for (int r = 0; r < 16; r++)
    sums[r] = dot((const W*)s.values + starts[r], (const I*)s.indices + starts[r], starts[r + 1] - starts[r], in.x);
}

// ---- columns16: 16 rows share a column

template <class W, class I>
void columns16(const GemvLayer& s, int group, const Input& in, float* sums) {
  constexpr int SETS = PARTS == 1 ? 4 : PARTS == 2 ? 4 : 2;
  const int64_t count = s.starts[group + 1] - s.starts[group];
  const W* w = (const W*)s.values + 16 * s.starts[group];
  const I* column = (const I*)s.indices + s.starts[group];
  V sum[SETS][PARTS] = {};
  int64_t i = 0;
  for (; i + SETS <= count; i += SETS)
#pragma GCC unroll 4
    for (int j = 0; j < SETS; j++) {
      const V x = broadcast(in.x[column[i + j]]);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) sum[j][p] += x * weights(w + 16 * (i + j) + LANES * p);
    }
  for (; i < count; i++) {
    const V x = broadcast(in.x[column[i]]);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) sum[0][p] += x * weights(w + 16 * i + LANES * p);
  }
  for (int p = 0; p < PARTS; p++) {
    for (int j = 1; j < SETS; j++) sum[0][p] += sum[j][p];
    store(sums + LANES * p, sum[0][p]);
  }
}

// ---- row16: 16 columns of a row

template <class W, class I>
void row16(const GemvLayer& s, int group, const Input& in, float* sums) {
  constexpr int SETS = PARTS == 1 ? 4 : 2;
  const int64_t* starts = s.starts + 16 * (int64_t)group;
  const int cut = s.columns % 16 ? s.columns / 16 : -1;  // the block that x ends in
  alignas(64) float rows[16][16];
  for (int r = 0; r < 16; r++) {
    const W* w = (const W*)s.values + 16 * starts[r];
    const I* block = (const I*)s.indices + starts[r];
    int64_t count = starts[r + 1] - starts[r], i = 0;
    V sum[SETS][PARTS] = {};
    if (count && (int)block[count - 1] == cut) {  // blocks ascend, so it is the last
      count--;
      const float* x = in.at(16 * cut, 16);
      for (int p = 0; p < PARTS; p++) sum[0][p] += weights(w + 16 * count + LANES * p) * load(x + LANES * p);
    }
    for (; i + SETS <= count; i += SETS)
#pragma GCC unroll 4
      for (int j = 0; j < SETS; j++) {
        const float* x = in.x + 16 * (int64_t)block[i + j];
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) sum[j][p] += weights(w + 16 * (i + j) + LANES * p) * load(x + LANES * p);
      }
    for (; i < count; i++) {
      const float* x = in.x + 16 * (int64_t)block[i];
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) sum[0][p] += weights(w + 16 * i + LANES * p) * load(x + LANES * p);
    }
    for (int p = 0; p < PARTS; p++) {
      for (int j = 1; j < SETS; j++) sum[0][p] += sum[j][p];
      store(rows[r] + LANES * p, sum[0][p]);
    }
  }
  totals(rows, sums);
}

// ---- dense: four rows at a time, padded to whole blocks of 16 columns

INLINE int rows_in(const GemvLayer& s, int group) {
  const int left = s.rows - 16 * group;
  return left < 16 ? left : 16;
}

template <class W>
void dense(const GemvLayer& s, int group, const Input& in, float* sums) {
  constexpr int SETS = PARTS == 1 ? 2 : 1;
  const int blocks = (s.columns + 15) / 16, count = rows_in(s, group);
  const int64_t row = 16 * (int64_t)blocks;
  alignas(64) float rows[16][16];
  if (count < 16) memset(rows, 0, sizeof rows);
  for (int r = 0; r < count; r += 4) {
    const W* w = (const W*)s.values + (16 * (int64_t)group + r) * row;
    V sum[SETS][4][PARTS] = {};
    int b = 0;
    for (; b + SETS <= s.columns / 16; b += SETS)
#pragma GCC unroll 2
      for (int j = 0; j < SETS; j++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
          const int64_t k = 16 * (int64_t)(b + j) + LANES * p;
          const V x = load(in.x + k);
#pragma GCC unroll 4
          for (int q = 0; q < 4; q++) sum[j][q][p] += x * weights(w + q * row + k);
        }
    for (; b < blocks; b++) {
      const float* x = in.at(16 * b, 16);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) sum[0][q][p] += load(x + LANES * p) * weights(w + q * row + 16 * b + LANES * p);
    }
    for (int q = 0; q < 4; q++)
      for (int p = 0; p < PARTS; p++) {
        for (int j = 1; j < SETS; j++) sum[0][q][p] += sum[j][q][p];
        store(rows[r + q] + LANES * p, sum[0][q][p]);
      }
  }
  totals(rows, sums);
}

// ---- select: blocks of columns lie in registers, each lane (row) picks what its weights need

// How the slots of a block are packed: index words hold as many indices as fit 32 bits, and blocks with few slots share
// them. Slots beyond SINGLE come in whole words.
constexpr int SINGLE = 12;
constexpr int bits_for(int block) { return block == 32 ? 5 : 6; }
constexpr int per_word(int block) { return 32 / bits_for(block); }
constexpr int blocks_together(int slots) { return slots >= 4 ? 1 : slots >= 2 ? 2 : 4; }
constexpr int words_for(int block, int slots) {
  return (blocks_together(slots) * slots + per_word(block) - 1) / per_word(block);
}
// Values per lane of the blocks that share words; bfloat16 come in pairs.
constexpr int values_for(int slots, bool half) {
  const int count = blocks_together(slots) * slots;
  return half ? (count + 1) / 2 * 2 : count;
}

#if defined(__AVX512F__)
template <int BLOCK>
INLINE V picked(const V* x, __m512i index) {
  // The permutation looks at the last five bits of an index only, so the word needs no masking.
  const __m512 low = _mm512_permutex2var_ps((__m512)x[0], index, (__m512)x[1]);
  if (BLOCK == 32) return (V)low;
  const __m512 high = _mm512_permutex2var_ps((__m512)x[2], index, (__m512)x[3]);
  return (V)_mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
}

// The value of slot i, from pairs {slot 2j in the lower half, slot 2j + 1 in the upper} for bfloat16.
INLINE V slot_value(const float* w, int i) { return load(w + 16 * i); }
INLINE V slot_value(const Half* w, int i) {
  const __m512i both = _mm512_loadu_si512(w + 32 * (i / 2));
  return i % 2 ? (V)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)) : (V)_mm512_slli_epi32(both, 16);
}

// The processor's own prefetching stops at the end of a page, which two streams reach soon.
INLINE void ahead(const void* p) { _mm_prefetch((const char*)p + 2048, _MM_HINT_T0); }

template <int BLOCK, int SLOTS, class W>
void slots(const W* w, const int32_t* words, const Input& in, int, float* sums) {
  constexpr int TOGETHER_ = blocks_together(SLOTS), STEP = BLOCK * TOGETHER_, PER = per_word(BLOCK);
  V sum[4] = {};
  for (int column = 0; column < in.columns; column += STEP) {
    const float* x = in.at(column, STEP);
    __m512i index{};
#pragma GCC unroll 4
    for (int b = 0; b < TOGETHER_; b++) {
      V table[BLOCK / 16];
#pragma GCC unroll 4
      for (int i = 0; i < BLOCK / 16; i++) table[i] = load(x + BLOCK * b + 16 * i);
#pragma GCC unroll 12
      for (int i = 0; i < SLOTS; i++) {
        const int slot = b * SLOTS + i;
        if (slot % PER == 0) {
          index = _mm512_loadu_si512(words + 16 * (slot / PER));
          ahead(words + 16 * (slot / PER));
        }
        if (sizeof(W) == 4 || slot % 2 == 0) ahead(w + 16 * slot);
        const __m512i q = slot % PER ? _mm512_srli_epi32(index, bits_for(BLOCK) * (slot % PER)) : index;
        sum[slot % 4] += picked<BLOCK>(table, q) * slot_value(w, slot);
      }
    }
    w += 16 * values_for(SLOTS, sizeof(W) == 2);
    words += 16 * words_for(BLOCK, SLOTS);
  }
  store(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <int BLOCK, class W>
void many_slots(const W* w, const int32_t* words, const Input& in, int slots, float* sums) {
  constexpr int PER = per_word(BLOCK);
  const int64_t values = 16 * values_for(slots, sizeof(W) == 2);
  V sum[4] = {};
  for (int column = 0; column < in.columns; column += BLOCK, w += values) {
    const float* x = in.at(column, BLOCK);
    V table[BLOCK / 16];
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK / 16; i++) table[i] = load(x + 16 * i);
    int first = 0;
    for (; first + 2 * PER <= slots; first += 2 * PER, words += 32) {
      const __m512i one = _mm512_loadu_si512(words), two = _mm512_loadu_si512(words + 16);
#pragma GCC unroll 12
      for (int i = 0; i < 2 * PER; i++) {
        const __m512i q = _mm512_srli_epi32(i < PER ? one : two, bits_for(BLOCK) * (i % PER));
        sum[i % 4] += picked<BLOCK>(table, q) * slot_value(w + 16 * (int64_t)first, i);
      }
    }
    if (first < slots) {
      const __m512i one = _mm512_loadu_si512(words);
      words += 16;
#pragma GCC unroll 6
      for (int i = 0; i < PER; i++)
        sum[i % 4] += picked<BLOCK>(table, _mm512_srli_epi32(one, bits_for(BLOCK) * i)) *
                      slot_value(w + 16 * (int64_t)first, i);
    }
  }
  store(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <int BLOCK, class W>
using Slots = void (*)(const W*, const int32_t*, const Input&, int, float*);

template <int BLOCK, class W>
INLINE Slots<BLOCK, W> slots_for(int count) {
  switch (count) {
#define CASE(n) case n: return slots<BLOCK, n, W>;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    default: return many_slots<BLOCK, W>;
  }
}

template <int BLOCK, class W, class I>
void select(const GemvLayer& s, int group, const Input& in, float* sums) {
  const int count = s.slots[group];
  if (count)
    slots_for<BLOCK, W>(count)((const W*)s.values + 16 * s.starts[group],
                               (const int32_t*)s.indices + 16 * s.words[group], in, count, sums);
  else
    memset(sums, 0, 64);
  const int64_t* starts = s.rest_starts + 16 * (int64_t)group;
  if (starts[0] == starts[16]) return;
  for (int r = 0; r < 16; r++) {
    const W* w = (const W*)s.rest_values;
    const I* column = (const I*)s.rest_columns;
    float one = sums[r], two = 0;
    int64_t i = starts[r];
    for (; i + 2 <= starts[r + 1]; i += 2) {
      one += widened(w[i]) * in.x[column[i]];
      two += widened(w[i + 1]) * in.x[column[i + 1]];
    }
    if (i < starts[r + 1]) one += widened(w[i]) * in.x[column[i]];
    sums[r] = one + two;
  }
}

// ---- bitmask: 16 bits say which of 16 columns are stored

// GCC would fold the load into vexpandps, which takes microcode on some processors.
INLINE V in_register(V v) {
  asm("" : "+v"(v));
  return v;
}

template <class W>
void bitmask(const GemvLayer& s, int group, const Input& in, float* sums) {
  const int blocks = (s.columns + 15) / 16, count = rows_in(s, group);
  alignas(64) float rows[16][16];
  if (count < 16) memset(rows, 0, sizeof rows);
  for (int r = 0; r < count; r += 4) {
    const uint16_t* masks = (const uint16_t*)s.indices + (16 * (int64_t)group + r) * blocks;
    const W* w[4];
    V sum[4] = {};
    for (int q = 0; q < 4; q++) w[q] = (const W*)s.values + s.starts[16 * (int64_t)group + r + q];
    for (int b = 0; b < blocks; b++) {
      const V x = load(in.at(16 * b, 16));
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        uint32_t mask = masks[q * (int64_t)blocks + b];
        asm("" : "+r"(mask));  // keeps popcnt to 32 bits: that of 16 waits for its former result
        sum[q] += x * (V)_mm512_maskz_expand_ps((__mmask16)mask, (__m512)in_register(weights(w[q])));
        w[q] += __builtin_popcount(mask);
      }
    }
    for (int q = 0; q < 4; q++) store(rows[r + q], sum[q]);
  }
  totals(rows, sums);
}
#endif

// ---- nm: one or two of every four columns, a lane's two-bit indices in words of 16 slots

#if defined(__AVX2__)
INLINE V quad(const float* x) {
#if defined(__AVX512F__)
  return (V)_mm512_broadcast_f32x4(_mm_loadu_ps(x));
#else
  return (V)_mm256_broadcast_ps((const __m128*)x);
#endif
}
INLINE V picked_of_four(V x, VI index) {
#if defined(__AVX512F__)
  return (V)_mm512_permutevar_ps((__m512)x, (__m512i)index);
#else
  return (V)_mm256_permutevar_ps((__m256)x, (__m256i)index);
#endif
}

template <int N, class W>
void nm(const GemvLayer& s, int group, const Input& in, float* sums) {
  constexpr int STEP = 64 / N, SETS = PARTS == 1 ? 4 : 2;  // columns of a word
  const int64_t steps = (s.columns + STEP - 1) / STEP;
  const W* w = (const W*)s.values + 256 * steps * group;
  const int32_t* words = (const int32_t*)s.indices + 16 * steps * group;
  V sum[SETS][PARTS] = {};
  for (int64_t step = 0; step < steps; step++, w += 256, words += 16) {
    const float* x = in.at(STEP * (int)step, STEP);
    VI index[PARTS];
    for (int p = 0; p < PARTS; p++) memcpy(&index[p], words + LANES * p, sizeof(VI));
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const V four = quad(x + 4 * (i / N));
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; p++)
        sum[i % SETS][p] += picked_of_four(four, index[p] >> (2 * i)) * weights(w + 16 * i + LANES * p);
    }
  }
  for (int p = 0; p < PARTS; p++) {
    for (int j = 1; j < SETS; j++) sum[0][p] += sum[j][p];
    store(sums + LANES * p, sum[0][p]);
  }
}
#endif

// ---- every layout, one weight after the other

// add(row of the group, column, weight) for all stored weights of a group.
template <class W, class I, class F>
INLINE void each(const GemvLayer& s, int group, F add) {
  const W* w = (const W*)s.values;
  const I* columns = (const I*)s.indices;
  const int64_t row = 16 * (int64_t)group;
  const int blocks = (s.columns + 15) / 16;
  switch (s.kernel) {
    case GEMV_CSR:
      for (int r = 0; r < 16; r++)
        for (int64_t i = s.starts[row + r]; i < s.starts[row + r + 1]; i++) add(r, columns[i], w[i]);
      break;
    case GEMV_COLUMNS16:
      for (int64_t i = s.starts[group]; i < s.starts[group + 1]; i++)
        for (int r = 0; r < 16; r++) add(r, columns[i], w[16 * i + r]);
      break;
    case GEMV_ROW16:
      for (int r = 0; r < 16; r++)
        for (int64_t i = s.starts[row + r]; i < s.starts[row + r + 1]; i++)
          for (int k = 0; k < 16; k++) add(r, 16 * (int)columns[i] + k, w[16 * i + k]);
      break;
    case GEMV_DENSE:
      for (int r = 0; r < rows_in(s, group); r++)
        for (int k = 0; k < s.columns; k++) add(r, k, w[(row + r) * 16 * blocks + k]);
      break;
    case GEMV_BITMASK:
      for (int r = 0; r < rows_in(s, group); r++) {
        int64_t i = s.starts[row + r];
        for (int k = 0; k < s.columns; k++)
          if (((const uint16_t*)s.indices)[(row + r) * blocks + k / 16] >> (k % 16) & 1) add(r, k, w[i++]);
      }
      break;
    case GEMV_NM: {
      const int step = 64 / s.block;
      const int64_t steps = (s.columns + step - 1) / step;
      const uint32_t* words = (const uint32_t*)s.indices + 16 * steps * group;
      for (int64_t i = 0; i < 16 * steps; i++)
        for (int r = 0; r < 16; r++) {
          const int local = words[i / 16 * 16 + r] >> (2 * (i % 16)) & 3;
          add(r, (int)(i / s.block) * 4 + local, w[(16 * steps * group + i) * 16 + r]);
        }
      break;
    }
    case GEMV_SELECT: {
      const int count = s.slots[group], bits = bits_for(s.block), per = per_word(s.block);
      if (count) {
        const int together = blocks_together(count), step = together * s.block;
        const uint32_t* words = (const uint32_t*)s.indices + 16 * s.words[group];
        const W* value = w + 16 * s.starts[group];
        for (int column = 0; column < s.columns; column += step) {
          for (int i = 0; i < together * count; i++)
            for (int r = 0; r < 16; r++) {
              const int local = words[i / per * 16 + r] >> (bits * (i % per)) & (s.block - 1);
              const W v = sizeof(W) == 2 ? value[i / 2 * 32 + 2 * r + i % 2] : value[16 * i + r];
              add(r, column + i / count * s.block + local, v);
            }
          words += 16 * words_for(s.block, count);
          value += 16 * values_for(count, sizeof(W) == 2);
        }
      }
      for (int r = 0; r < 16; r++)
        for (int64_t i = s.rest_starts[row + r]; i < s.rest_starts[row + r + 1]; i++)
          add(r, ((const I*)s.rest_columns)[i], ((const W*)s.rest_values)[i]);
      break;
    }
  }
}

template <class W, class I>
void exactly(const GemvLayer& s, int group, const Input& in, float* sums) {
  double sum[16] = {};
  each<W, I>(s, group, [&](int r, int64_t column, W w) {
    const float f = widened(w);
    if (!removed(f)) sum[r] += (double)f * in.x[column];
  });
  for (int r = 0; r < 16; r++) sums[r] = (float)sum[r];
}

typedef void (*Group)(const GemvLayer&, int group, const Input&, float* sums);

template <class W, class I>
Group fast(const GemvLayer& s) {
  switch (s.kernel) {
    case GEMV_CSR: return csr<W, I>;
    case GEMV_COLUMNS16: return columns16<W, I>;
    case GEMV_ROW16: return row16<W, I>;
    case GEMV_DENSE: return dense<W>;
#if defined(__AVX2__)
    case GEMV_NM: return s.block == 1 ? nm<1, W> : nm<2, W>;
#endif
#if defined(__AVX512F__)
    case GEMV_BITMASK: return bitmask<W>;
    case GEMV_SELECT: return s.block == 32 ? select<32, W, I> : select<64, W, I>;
#endif
  }
  return exactly<W, I>;
}

struct Choice {
  Group fast, exact;
};

template <class W>
Choice chosen(const GemvLayer& s) {
  if (s.wide) return {fast<W, int32_t>(s), exactly<W, int32_t>};
  return {fast<W, uint16_t>(s), exactly<W, uint16_t>};
}

INLINE void finish(const GemvLayer& s, int group, int row, const float* sums) {
  const int64_t first = 16 * (int64_t)group;
  float* y = (float*)(s.y + row * s.y_row);
  const float* residual = s.residual ? (const float*)(s.residual + row * s.y_row) : nullptr;
  const int count = rows_in(s, group);
  alignas(64) float v[16];
  memcpy(v, sums, 64);
  if (residual)
    for (int r = 0; r < 16; r++) {
      const int64_t to = s.order ? s.order[first + r] : r < count ? first + r : -1;
      if (to >= 0) v[r] += residual[to];
    }
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; p++)
    store(v + LANES * p, activated(load(v + LANES * p) + load(s.bias + first + LANES * p), s.activation, s.slope));
  if (!s.order) {
    memcpy(y + first, v, count == 16 ? 64 : 4 * count);
    return;
  }
  for (int r = 0; r < 16; r++)
    if (s.order[first + r] >= 0) y[s.order[first + r]] = v[r];
}

}  // namespace

void gemv(const GemvLayer& s, int64_t task) {
  const Choice kernel = s.half ? chosen<Half>(s) : chosen<float>(s);
  const int edge = s.columns / LONGEST_STEP * LONGEST_STEP;
  alignas(64) float tails[TOGETHER][LONGEST_STEP];
  alignas(64) float sums[16];
  for (int from = 0; from < s.batch; from += TOGETHER) {
    const int to = from + TOGETHER < s.batch ? from + TOGETHER : s.batch;
    if (edge < s.columns)
      for (int b = from; b < to; b++) {
        float* tail = tails[b - from];
        memcpy(tail, (const float*)(s.x + b * s.x_row) + edge, 4 * (s.columns - edge));
        memset(tail + (s.columns - edge), 0, 4 * (LONGEST_STEP - (s.columns - edge)));
      }
    for (int group = s.chunk[task]; group < s.chunk[task + 1]; group++)
      for (int b = from; b < to; b++) {
        const Input in{(const float*)(s.x + b * s.x_row), tails[b - from], s.columns, edge};
        kernel.fast(s, group, in, sums);
        bool lost = false;
        for (int r = 0; r < 16; r++) lost |= sums[r] != sums[r];
        if (lost) kernel.exact(s, group, in, sums);
        finish(s, group, b, sums);
      }
  }
}

}  // namespace PRUNUS_ISA
}  // namespace prunus
