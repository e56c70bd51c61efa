// Codes read back: E4M3, E5M2 and pairs of E2M1, times the scales of their blocks, as bfloat16.
#pragma once
#include "blocks.h"

typedef uint64_t vq __attribute__((vector_size(W * 4)));

// the numbers that codes stand for: W of them, the sign in bit 7
template <typename E>
static inline vf numbers(vi code) {
  const vi bits = code & 127;
  vf small = __builtin_convertvector(bits, vf) * (1.0f / (1 << E::M)) * (vf)(vi{} + E::LOWEST);
  vf normal = (vf)((bits << (23 - E::M)) + (E::LOWEST - (1 << 23)));
  vf value = bits >> E::M == 0 ? small : normal;
  if (E::M == 3) value = bits == 127 ? all(__builtin_nanf("")) : value;
  if (E::M == 2) value = bits == 124 ? (vf)(vi{} + EXPONENT) : bits > 124 ? all(__builtin_nanf("")) : value;
  return (vf)((vi)value | (code & 128) << 24);
}

typedef uint8_t vp __attribute__((vector_size(W / 2)));

template <typename E>
static inline vi get_codes(const uint8_t *p) {
  if (E::M == 1) {
#if defined(__AVX512F__)
    vq q = (vq)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
#else
    vp pairs;
    memcpy(&pairs, p, sizeof pairs);
    vq q = __builtin_convertvector(pairs, vq);
#endif
    vi codes = (vi)((q & 15) | (q >> 4) << 32);
    return (codes & 7) | (codes & 8) << 4;
  }
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  vb bytes;
  memcpy(&bytes, p, sizeof bytes);
  return (vi)__builtin_convertvector(bytes, vu);
#endif
}

// what each E4M3 code is worth, filled as the library is loaded
static const struct Worths {
  float of[256];
  Worths() {
    for (int i = 0; i < 256; i++) of[i] = numbers<E4M3>(vi{} + i)[0];
  }
} e4m3_worths;

static inline float worth_of(int64_t scale, const void *scales, int64_t i) {
  if (!scales) return 1.0f;
  if (scale == FLOAT || scale == POWER) return ((const float *)scales)[i];
  const int32_t byte = ((const uint8_t *)scales)[i];
  if (scale == TWO_LEVELS) return e4m3_worths.of[byte];
  int32_t bits = byte == 0 ? 0x400000 : byte == 255 ? 0x7fc00000 : byte << 23;
  float worth;
  memcpy(&worth, &bits, 4);
  return worth;
}

template <typename E>
static void decode(const uint8_t *codes, int64_t R, int64_t C, int64_t block_rows, int64_t block_columns, int64_t scale,
                   const void *scales, bf16 *out) {
  const int64_t per_byte = E::M == 1 ? 2 : 1, n = R * C / block_columns, across = C / block_columns;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const float worth = worth_of(scale, scales, i / across / block_rows * across + i % across);
    const uint8_t *from = codes + i * block_columns / per_byte;
    bf16 *to = out + i * block_columns;
    over(block_columns, [&](int64_t j, int m) INLINE {
      uint8_t end[W] = {};
      if (m < W) memcpy(end, from + j / per_byte, m / per_byte);
      put(to + j, numbers<E>(get_codes<E>(m < W ? end : from + j / per_byte)) * worth, m);
    });
  }
}
