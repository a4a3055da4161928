// Everything but sums of products: copies between layouts, windows, means, elementwise arithmetic, transposes.
#include "layers.hpp"
#include "simd.hpp"

namespace prunus {
namespace PRUNUS_ISA {
namespace {

// Floats from `step` apart to side by side.
void gather_row(const float* x, float* y, int count, int step) {
  int i = 0;
#if defined(__AVX512F__)
  if (step == 2) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (; i + 17 <= count; i += 16)  // one more, so that the second load stays inside the row
      _mm512_storeu_ps(y + i, _mm512_permutex2var_ps(_mm512_loadu_ps(x + 2 * i), even, _mm512_loadu_ps(x + 2 * i + 16)));
  }
#endif
  for (; i < count; i++) y[i] = x[(int64_t)i * step];
}

// Transposes 16 x 16 floats; rows of x lie x_row bytes apart, rows of y y_row.
void block16(const char* x, int64_t x_row, char* y, int64_t y_row) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(x + i * x_row);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
      r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
    }
  // r[4 g + j] now holds, in 128-bit lane q, column 4 q + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), low2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), high2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_ps(y + j * y_row, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(y + (8 + j) * y_row, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(y + (4 + j) * y_row, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(y + (12 + j) * y_row, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) memcpy(y + j * y_row + 4 * i, x + i * x_row + 4 * j, 4);
#endif
}

}  // namespace

void copy(const CopyLayer& s, int64_t task) {
  const char* x = s.x + task * s.x_plane;
  char* y = s.y + task * s.y_plane;
  const int64_t each = 4 * (int64_t)s.lanes;
  for (int r = 0; r < s.rows; r++) {
    const char* from = x + r * s.x_row;
    char* to = y + r * s.y_row;
    if (s.x_step == each && s.y_step == each)
      memcpy(to, from, (size_t)(each * s.columns));
    else if (s.lanes == 1 && s.y_step == each)
      gather_row((const float*)from, (float*)to, s.columns, (int)(s.x_step / 4));
    else
      for (int c = 0; c < s.columns; c++) memcpy(to + c * s.y_step, from + c * s.x_step, (size_t)each);
  }
}

void window(const WindowLayer& s, int64_t task) {
  const char* plane = s.x + task * s.x_plane;
  char* out = s.y + task * s.y_plane;
  const V scale = broadcast(s.scale);
  for (int i = 0; i < s.tiles; i++)
    for (int t = 0; t < s.widths[i] * PARTS; t++) {
      const char* x = plane + s.x_offsets[i] + part(t);
      V v = load(x + s.offsets[0]);
      if (s.largest)
        for (int k = 1; k < s.taps; k++) {
          // NaN wins from either side, as in torch.
          const V next = load(x + s.offsets[k]);
          const V best = larger(v, next);
          v = (V)(((VI)(v != v) & (VI)v) | (~(VI)(v != v) & (VI)best));
        }
      else {
        for (int k = 1; k < s.taps; k++) v += load(x + s.offsets[k]);
        v *= scale;
      }
      char* y = out + s.y_offsets[i] + part(t);
      if (s.masks)
        store_some(y, v, bits_of(s.masks + 16 * i, t));
      else
        store(y, v);
    }
}

void mean(const MeanLayer& s, int64_t task) {
  const char* plane = s.x + task * s.x_plane;
  char* y = s.y + task * s.y_plane;
  const float scale = 1.0f / ((float)s.rows * (float)s.columns);
  if (s.lanes == 16) {
    V sum[PARTS] = {};
    for (int r = 0; r < s.rows; r++)
      for (int c = 0; c < s.columns; c++)
        for (int t = 0; t < PARTS; t++) sum[t] += load(plane + r * s.x_row + 64 * (int64_t)c + part(t));
    for (int t = 0; t < PARTS; t++) store(y + part(t), sum[t] * broadcast(scale));
    return;
  }
  V sum = {};
  float rest = 0;
  for (int r = 0; r < s.rows; r++) {
    const float* row = (const float*)(plane + r * s.x_row);
    int c = 0;
    for (; c + LANES <= s.columns; c += LANES) sum += load(row + c);
    for (; c < s.columns; c++) rest += row[c];
  }
  for (int i = 0; i < LANES; i++) rest += sum[i];
  *(float*)y = rest * scale;
}

void pointwise(const PointwiseLayer& s, int64_t task) {
  const char* a = s.a + task * s.a_plane;
  const char* b = s.b ? s.b + task * s.b_plane : nullptr;
  char* y = s.y + task * s.y_plane;
  V constant[PARTS] = {};
  if (b && s.per_plane)
    for (int t = 0; t < PARTS; t++) constant[t] = s.lanes == 16 ? load(b + part(t)) : broadcast(*(const float*)b);
  for (int i = 0; i < s.tiles; i++)
    for (int t = 0; t < s.widths[i] * PARTS; t++) {
      const int64_t at = s.offsets[i] + part(t);
      V v = load(a + at);
      if (s.op) {
        const V other = s.per_plane ? constant[t % PARTS] : load(b + at);
        v = s.op == 1 ? v + other : s.op == 2 ? v * other : v - other;
      }
      v = activated(v, s.activation, s.slope);
      if (s.masks)
        store_some(y + at, v, bits_of(s.masks + 16 * i, t));
      else
        store(y + at, v);
    }
}

// A task is a strip of 16 columns of one batch.
void transpose(const TransposeLayer& s, int64_t task) {
  const int64_t strips = (s.columns + 15) / 16, batch = task / strips, c0 = task % strips * 16;
  const char* x = s.x + batch / s.inner * s.x_outer + batch % s.inner * s.x_inner;
  char* y = s.y + batch / s.inner * s.y_outer + batch % s.inner * s.y_inner;
  const int64_t left = s.columns - c0 < 16 ? s.columns - c0 : 16;
  x += s.x_tile ? c0 / s.tile * s.x_tile + c0 % s.tile * 4 : c0 * 4;
  y += c0 * s.y_row;
  for (int64_t r0 = 0; r0 < s.rows; r0 += 16) {
    const int64_t high = s.rows - r0 < 16 ? s.rows - r0 : 16;
    const char* from = x + r0 * s.x_row;
    char* to = y + (s.y_tile ? r0 / s.tile * s.y_tile + r0 % s.tile * 4 : r0 * 4);
    if (left == 16 && high == 16)
      block16(from, s.x_row, to, s.y_row);
    else
      for (int64_t i = 0; i < high; i++)
        for (int64_t j = 0; j < left; j++) memcpy(to + j * s.y_row + 4 * i, from + i * s.x_row + 4 * j, 4);
  }
}

}  // namespace PRUNUS_ISA
}  // namespace prunus
