// y = W x with weights of two bits and activations of eight: whole numbers inside, one product with floats at the end.
//
// 256 columns of a row lie in 64 bytes: byte j holds columns j, 64 + j, 128 + j and 192 + j from its low bits up, each
// as its value + 1. Unsigned codes 0, 1, 2 meet signed activations, which is what the processors' dot products take;
// the sum of the activations is subtracted at the end. Sums are whole, so their order does not matter.
//
// x becomes round(x s), s = 127 / max |x|, half to even, per row: the very codes of training.
#pragma once
#include "gemv.h"

constexpr int64_t BLOCK_COLUMNS = 256, BLOCK_BYTES = 64;
constexpr float LEAST = 1e-5f;  // as the largest |x| of a row

static inline int64_t blocks_of(int64_t K) { return (K + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS; }

// ---- the target's dot product: each 32-bit lane takes four products of unsigned and signed bytes
//
// field<P> are the codes in bits 2 P and above; masked<P> where they are, 4^P times as large where unsigned bytes allow
// it, which a sum's shift by settled<P> undoes: one operation less for each 64 weights.

#if defined(__AVX512VNNI__)
typedef __m512i bytes;
static inline bytes load_bytes(const void *p) { return _mm512_loadu_si512(p); }
static inline void store_bytes(void *p, bytes v) { _mm512_storeu_si512(p, v); }
static inline bytes dot(bytes acc, bytes u, bytes s) { return _mm512_dpbusd_epi32(acc, u, s); }
template <int P>
static inline bytes field(bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 2 * P), _mm512_set1_epi8(3)); }
template <int P>
static inline bytes masked(bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8((char)(3 << 2 * P))); }
template <int P>
static inline bytes settled(bytes acc) { return _mm512_srai_epi32(acc, 2 * P); }
static inline int32_t whole_sum(bytes v) { return _mm512_reduce_add_epi32(v); }
static inline vi nearest(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }
#elif defined(__AVX2__)
typedef __m256i bytes;
static inline bytes load_bytes(const void *p) { return _mm256_loadu_si256((const bytes *)p); }
static inline void store_bytes(void *p, bytes v) { _mm256_storeu_si256((bytes *)p, v); }
static inline bytes dot(bytes acc, bytes u, bytes s) {
  // pairs of masked codes reach 2 * 128 * 127, just below saturation
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
template <int P>
static inline bytes field(bytes v) { return _mm256_and_si256(_mm256_srli_epi16(v, 2 * P), _mm256_set1_epi8(3)); }
template <int P>
static inline bytes masked(bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8((char)(3 << 2 * P))); }
template <int P>
static inline bytes settled(bytes acc) { return _mm256_srai_epi32(acc, 2 * P); }
static inline int32_t whole_sum(bytes v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline vi nearest(vf v) { return (vi)_mm256_cvtps_epi32((__m256)v); }
#elif defined(__ARM_NEON)
#include <arm_neon.h>
typedef int32x4_t bytes;
static inline bytes load_bytes(const void *p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)p)); }
static inline void store_bytes(void *p, bytes v) { vst1q_u8((uint8_t *)p, vreinterpretq_u8_s32(v)); }
static inline bytes dot(bytes acc, bytes u, bytes s) {
  const int8x16_t a = vreinterpretq_s8_s32(u), b = vreinterpretq_s8_s32(s);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(acc, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  return vpadalq_s16(acc, vmlal_s8(low, vget_high_s8(a), vget_high_s8(b)));
#endif
}
template <int P>
static inline bytes field(bytes v) {
  const uint8x16_t u = vreinterpretq_u8_s32(v);
  return vreinterpretq_s32_u8(vandq_u8(P ? vshrq_n_u8(u, P ? 2 * P : 1) : u, vdupq_n_u8(3)));
}
template <int P>
static inline bytes masked(bytes v) {
  return field<P>(v);
}
template <int P>
static inline bytes settled(bytes acc) {
  return acc;
}
static inline int32_t whole_sum(bytes v) { return vaddvq_s32(v); }
static inline vi nearest(vf v) { return (vi)vcvtnq_s32_f32((float32x4_t)v); }
#endif

constexpr int LANE = sizeof(bytes);  // bytes of a vector

// ---- activations

// a number that no compiler fuses with what follows: it rounds as PyTorch does
static inline float alone(float x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// a row's scale, and what its sums need afterwards
struct Row {
  float step;     // 1 / s; not a number where one of x is none
  int32_t total;  // sum of the codes
};

// x (K) as codes, with zeros up to the end of the last block
static inline Row to_int8(const float *x, int64_t K, int8_t *codes) {
  vf most = {}, seen = {};
  over(K, [&](int64_t i, int n) INLINE {
    const vf v = get(x + i, n);
    most = larger(most, larger(v, -v));
    seen += v * 0.0f;
  });
  const float largest = max(most);
  // as PyTorch divides a number by a tensor: by a product with the reciprocal
  const float s = alone(1.0f / (largest < LEAST ? LEAST : largest)) * 127.0f;
  vi total = {};
  over(K, [&](int64_t i, int n) INLINE {
    const vi code = nearest(get(x + i, n) * s);
    total += code;
    const vc small = __builtin_convertvector(code, vc);
    memcpy(codes + i, &small, n);
  });
  memset(codes + K, 0, blocks_of(K) * BLOCK_COLUMNS - K);
  int32_t sum_of_codes = 0;
  for (int i = 0; i < W; i++) sum_of_codes += total[i];
  return {1.0f / s + sum(seen), sum_of_codes};
}

// ---- one row of weights times B inputs

template <int B>
static inline void ternary_row(const uint8_t *w, int64_t blocks, const int8_t *x, int64_t ld, int32_t (&y)[B]) {
  bytes acc[B][4] = {};
  for (int64_t k = 0; k < blocks; k++, w += BLOCK_BYTES, x += BLOCK_COLUMNS) {
    ask(w);
#pragma GCC unroll 4
    for (int h = 0; h < BLOCK_BYTES; h += LANE) {
      const bytes v = load_bytes(w + h);
      const bytes codes[4] = {masked<0>(v), masked<1>(v), masked<2>(v), masked<3>(v)};
#pragma GCC unroll 4
      for (int p = 0; p < 4; p++)
        for (int b = 0; b < B; b++) acc[b][p] = dot(acc[b][p], codes[p], load_bytes(x + b * ld + 64 * p + h));
    }
  }
  for (int b = 0; b < B; b++) {
    const vi low = (vi)settled<0>(acc[b][0]) + (vi)settled<1>(acc[b][1]);
    const vi high = (vi)settled<2>(acc[b][2]) + (vi)settled<3>(acc[b][3]);
    y[b] = whole_sum((bytes)(low + high));
  }
}
static inline float result(int32_t sum, const Row &row, float scale) {
  return alone((float)(sum - row.total) * (scale * row.step));
}

// rows first ... last - 1 of W (N, K) times few inputs: out(b, n, value) takes each result
template <typename Out>
static inline void ternary_multiply(const uint8_t *w, const float *scales, int64_t K, int64_t first, int64_t last,
                                    const int8_t *x, const Row *rows, int64_t B, const Out &out) {
  const int64_t blocks = blocks_of(K), ld = blocks * BLOCK_COLUMNS;
  for (int64_t n = first; n < last; n++) {
    const uint8_t *p = w + n * blocks * BLOCK_BYTES;
    int64_t b = 0;
    for (; b + 4 <= B; b += 4) {
      int32_t y[4];
      ternary_row<4>(p, blocks, x + b * ld, ld, y);
      for (int i = 0; i < 4; i++) out(b + i, n, result(y[i], rows[b + i], scales[n]));
    }
    for (; b < B; b++) {
      int32_t y[1];
      ternary_row<1>(p, blocks, x + b * ld, ld, y);
      out(b, n, result(y[0], rows[b], scales[n]));
    }
  }
}
