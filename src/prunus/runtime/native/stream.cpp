// A stream of weights against lane-blocked activations: one entry is one load of activations and `block` multiply-adds
// into accumulators that stay in registers over the whole sum.
#include "layers.hpp"
#include "simd.hpp"

namespace prunus {
namespace PRUNUS_ISA {
namespace {

template <int B>
struct Entry {
  int32_t offset;
  float w[B];
};
// Two weights share one 16-byte entry.
template <>
struct Entry<1> {
  int32_t o0, o1;
  float w0, w1;
};

template <int B, int T>
INLINE void accumulate(const char* x, const Entry<B>* p, const Entry<B>* end, V (&sum)[B][T]) {
  if constexpr (B == 1) {
    if constexpr (T * LANES <= 32) {
      // Few accumulators would wait for each other, so four sets take turns.
      V second[T], third[T], fourth[T];
      for (int t = 0; t < T; t++) second[t] = third[t] = fourth[t] = V{};
      for (; p + 1 < end; p += 2) {
        const char *q0 = x + p[0].o0, *q1 = x + p[0].o1, *q2 = x + p[1].o0, *q3 = x + p[1].o1;
        const V w0 = broadcast(p[0].w0), w1 = broadcast(p[0].w1), w2 = broadcast(p[1].w0), w3 = broadcast(p[1].w1);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          sum[0][t] += w0 * load(q0 + part(t));
          second[t] += w1 * load(q1 + part(t));
          third[t] += w2 * load(q2 + part(t));
          fourth[t] += w3 * load(q3 + part(t));
        }
      }
      for (; p < end; ++p) {
        const char *q0 = x + p->o0, *q1 = x + p->o1;
        const V w0 = broadcast(p->w0), w1 = broadcast(p->w1);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          sum[0][t] += w0 * load(q0 + part(t));
          second[t] += w1 * load(q1 + part(t));
        }
      }
      for (int t = 0; t < T; t++) sum[0][t] += (second[t] + third[t]) + fourth[t];
      return;
    }
    for (; p < end; ++p) {
      const char *q0 = x + p->o0, *q1 = x + p->o1;
#if defined(__AVX512F__)
      // One broadcast of 8 bytes and two shuffles in registers leave the load ports to the activations.
      long long both;
      memcpy(&both, &p->w0, 8);
      const __m512 pair = (__m512)_mm512_set1_epi64(both);
      const V w0 = (V)_mm512_moveldup_ps(pair), w1 = (V)_mm512_movehdup_ps(pair);
#else
      const V w0 = broadcast(p->w0), w1 = broadcast(p->w1);
#endif
#pragma GCC unroll 28
      for (int t = 0; t < T; t++) sum[0][t] += w0 * load(q0 + part(t));
#pragma GCC unroll 28
      for (int t = 0; t < T; t++) sum[0][t] += w1 * load(q1 + part(t));
    }
  } else {
    for (; p < end; ++p) {
      const char* q = x + p->offset;
      V in[T];
#pragma GCC unroll 28
      for (int t = 0; t < T; t++) in[t] = load(q + part(t));
#pragma GCC unroll 16
      for (int b = 0; b < B; b++) {
        const V w = broadcast(p->w[b]);
#pragma GCC unroll 28
        for (int t = 0; t < T; t++) sum[b][t] += w * in[t];
      }
    }
  }
}

// One tile of T native vectors, row groups [from, to) of one k-block.
template <int B, int T, bool MASKED, bool FIRST, bool LAST, bool RESIDUAL>
__attribute__((noinline)) void k_block(const StreamLayer& s, const Row* rows, const char* x, char* y,
                                       const char* residual, int from, int to, const uint32_t* masks) {
  const Entry<B>* entries = (const Entry<B>*)s.entries;
  const int64_t channel = s.y_channel;
  const float infinity = __builtin_inff();
  const bool clamped = s.activation == RELU || s.activation == RELU6;
  const V lowest = broadcast(clamped ? 0.0f : -infinity), highest = broadcast(s.activation == RELU6 ? 6.0f : infinity);
  for (int i = from; i < to; i++) {
    const Row row = rows[i];
    if (!FIRST && !LAST && row.begin == row.end) continue;
    const int64_t offset = (int64_t)row.group * B * channel;
    char* out = y + offset;
    V sum[B][T];
#pragma GCC unroll 16
    for (int b = 0; b < B; b++) {
      if (FIRST) {
        const V bias = broadcast(s.bias[row.group * B + b]);
#pragma GCC unroll 28
        for (int t = 0; t < T; t++) sum[b][t] = RESIDUAL ? bias + load(residual + offset + b * channel + part(t)) : bias;
      } else {
#pragma GCC unroll 28
        for (int t = 0; t < T; t++) sum[b][t] = load(out + b * channel + part(t));
      }
    }
    accumulate<B, T>(x, entries + row.begin, entries + row.end, sum);
#pragma GCC unroll 16
    for (int b = 0; b < B; b++)
#pragma GCC unroll 28
      for (int t = 0; t < T; t++) {
        char* to_ = out + b * channel + part(t);
        const V v = LAST ? smaller(highest, larger(lowest, sum[b][t])) : sum[b][t];
        if (MASKED)
          store_some(to_, v, masks[t]);
        else
          store(to_, v);
      }
  }
}

template <int B, int T, bool MASKED>
void part_of_tile(const StreamLayer& s, const char* x, char* y, const char* residual, int from, int to,
                  const uint32_t* masks) {
  const Row* rows = s.rows;
  if (s.k_blocks == 1) {
    if (residual)
      k_block<B, T, MASKED, true, true, true>(s, rows, x, y, residual, from, to, masks);
    else
      k_block<B, T, MASKED, true, true, false>(s, rows, x, y, residual, from, to, masks);
    return;
  }
  if (residual)
    k_block<B, T, MASKED, true, false, true>(s, rows, x, y, residual, from, to, masks);
  else
    k_block<B, T, MASKED, true, false, false>(s, rows, x, y, residual, from, to, masks);
  for (int k = 1; k < s.k_blocks - 1; k++) {
    rows += s.groups;
    k_block<B, T, MASKED, false, false, false>(s, rows, x, y, residual, from, to, masks);
  }
  rows += s.groups;
  k_block<B, T, MASKED, false, true, false>(s, rows, x, y, residual, from, to, masks);
}

// A tile of T16 vectors of 16 floats, in parts whose accumulators fit the registers.
template <int B, int T16, bool MASKED, int START = 0>
void tile(const StreamLayer& s, const char* x, char* y, const char* residual, int from, int to, const uint32_t* masks) {
  constexpr int ALL = T16 * PARTS, MOST = ACCUMULATORS / B > 0 ? ACCUMULATORS / B : 1;
  constexpr int COUNT = (ALL + MOST - 1) / MOST, EVEN = (ALL + COUNT - 1) / COUNT;
  constexpr int T = ALL - START < EVEN ? ALL - START : EVEN;
  if constexpr (T > 0) {
    const int64_t shift = part(START);
    part_of_tile<B, T, MASKED>(s, x + shift, y + shift, residual ? residual + shift : residual, from, to, masks + START);
    if constexpr (START + T < ALL) tile<B, T16, MASKED, START + T>(s, x, y, residual, from, to, masks);
  }
}

typedef void (*TileFunction)(const StreamLayer&, const char*, char*, const char*, int, int, const uint32_t*);

template <int B, bool MASKED>
TileFunction of_width(int width) {
  switch (width) {
#define WIDTH(t) \
  case t:        \
    return tile<B, t, MASKED>;
    WIDTH(1) WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8)
#undef WIDTH
  }
  if constexpr (B <= 2) {
    switch (width) {
      case 10: return tile<B, 10, MASKED>;
      case 12: return tile<B, 12, MASKED>;
      case 14: return tile<B, 14, MASKED>;
    }
  }
  return nullptr;
}

template <bool MASKED>
TileFunction of_block(int block, int width) {
  switch (block) {
    case 1: return of_width<1, MASKED>(width);
    case 2: return of_width<2, MASKED>(width);
    case 4: return of_width<4, MASKED>(width);
    case 8: return of_width<8, MASKED>(width);
    case 16: return of_width<16, MASKED>(width);
  }
  return nullptr;
}

// Activations that are no clamp run over what was just written, while it is in the first-level cache.
void activate(const StreamLayer& s, char* y, int from, int to, int width, const uint32_t* masks) {
  const Row* rows = s.rows;
  for (int i = from; i < to; i++)
    for (int b = 0; b < s.block; b++) {
      char* out = y + ((int64_t)rows[i].group * s.block + b) * s.y_channel;
      for (int t = 0; t < width * PARTS; t++) {
        const V v = activated(load(out + part(t)), s.activation, s.slope);
        if (s.masks)
          store_some(out + part(t), v, masks[t]);
        else
          store(out + part(t), v);
      }
    }
}

}  // namespace

void stream(const StreamLayer& s, int64_t task) {
  const int64_t number = task / s.chunks;
  const int chunk = (int)(task % s.chunks), width = s.widths[number];
  uint32_t masks[16 * PARTS];
  if (s.masks)
    for (int t = 0; t < width * PARTS; t++) masks[t] = bits_of(s.masks + number * 16, t);
  const TileFunction function = s.masks ? of_block<true>(s.block, width) : of_block<false>(s.block, width);
  const char* x = s.x + s.x_offsets[number];
  char* y = s.y + s.y_offsets[number];
  const char* residual = s.residual ? s.residual + s.y_offsets[number] : nullptr;
  function(s, x, y, residual, s.chunk[chunk], s.chunk[chunk + 1], masks);
  if (s.activation > RELU6) activate(s, y, s.chunk[chunk], s.chunk[chunk + 1], width, masks);
}

}  // namespace PRUNUS_ISA
}  // namespace prunus
