// Rounding of float32 vectors to the numbers of E4M3, E5M2 and E2M1, to nearest even or by chance; Hadamard on 16.
//
//   step = 2^(max(exponent of y, smallest) - mantissa bits);   nearest: (y + M) - M with M = 1.5 * 2^23 step
//   by chance: t = |y| / step, exact; up where u < t - floor(t)
//
// y is held to the largest number before, NaN stays NaN. A code is a sign bit before the whole number
// q + (steps of the exponent above the smallest) 2^(mantissa bits), q = |number| / step.
#pragma once
#include "vec.h"

template <int M_, int SMALLEST, int LARGEST>
struct Element {
  static constexpr int M = M_;                                  // mantissa bits
  static constexpr int32_t LOWEST = (SMALLEST + 127) << 23;     // exponent of the smallest normal number
  static constexpr float LARGEST_NUMBER = (float)LARGEST;
};
using E4M3 = Element<3, -6, 448>;
using E5M2 = Element<2, -14, 57344>;
using E2M1 = Element<1, 0, 6>;

constexpr int32_t EXPONENT = 0x7f800000, SIGN = (int32_t)0x80000000;

static inline vf magnitude(vf x) { return (vf)((vi)x & ~SIGN); }
static inline vi larger(vi a, vi b) { return a > b ? a : b; }

// held to [-limit, limit]; a NaN stays one
static inline vf held(vf y, float limit) {
#if defined(__AVX512F__)
  // these return the second operand where one is a NaN
  return (vf)_mm512_max_ps((__m512)all(-limit), _mm512_min_ps((__m512)all(limit), (__m512)y));
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)all(-limit), _mm256_min_ps((__m256)all(limit), (__m256)y));
#else
  y = y > limit ? all(limit) : y;
  return y < -limit ? all(-limit) : y;
#endif
}

// the number of E nearest to y, ties to even; its sign may be lost where it is zero
template <typename E>
static inline vf nearest(vf y) {
  y = held(y, E::LARGEST_NUMBER);
  vi exponent = larger((vi)y & EXPONENT, vi{} + E::LOWEST);
  vf shift = (vf)((exponent + ((23 - E::M) << 23)) | 0x400000);
  return (y + shift) - shift;
}

// one of the two neighbours of y, the upper (in magnitude) with the chance of the distance from the lower
template <typename E>
static inline vf by_chance(vf y, vf u) {
  y = held(y, E::LARGEST_NUMBER);
  vi exponent = larger((vi)y & EXPONENT, vi{} + E::LOWEST);
  vf step = (vf)(exponent - (E::M << 23)), per_step = (vf)((254 << 23) - (exponent - (E::M << 23)));
  vf t = magnitude(y) * per_step;
  vf below = __builtin_convertvector(__builtin_convertvector(t, vi), vf);
  vf r = (u < t - below ? below + 1.0f : below) * step;
  r = (vf)((vi)r | ((vi)y & SIGN));
  return y == y ? r : y;
}

// the code of a number of E, without its sign
template <typename E>
static inline vi code(vf number) {
  vi exponent = larger((vi)number & EXPONENT, vi{} + E::LOWEST);
  vi shift = exponent + ((23 - E::M) << 23);
  return ((vi)(magnitude(number) + (vf)shift) - shift) + ((exponent - E::LOWEST) >> (23 - E::M));
}

// the low byte of each lane
typedef uint8_t vb __attribute__((vector_size(W)));
static inline vb bytes_of(vi v) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  // bytes 0, 4, 8, 12 of each half, then the halves side by side
  const __m256i first = _mm256_set1_epi32(0x0c080400);
  const __m256i four = _mm256_shuffle_epi8((__m256i)v, first);
  const int64_t both = (int64_t)(uint32_t)_mm256_extract_epi32(four, 0) | (int64_t)_mm256_extract_epi32(four, 4) << 32;
  vb bytes;
  memcpy(&bytes, &both, sizeof bytes);
  return bytes;
#else
  return __builtin_convertvector((vu)v, vb);
#endif
}

// rounded to T, still float32; by bits, as the processor's own instruction makes subnormal bfloat16 numbers zeros
template <typename T>
static inline vf as(vf v) {
  if (sizeof(T) == 4) return v;
  vu bits = (vu)v;
  return v == v ? (vf)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u) : v;
}

// a rotation, x -> (x signs) H / 4 with H the Sylvester matrix, of sixteen rows of n <= W columns, down each column
template <typename T>
INLINE static inline void rotate_columns(const T *x, int64_t stride, int n, const float *signs, float *y, int64_t far) {
  vf v[16];
  for (int i = 0; i < 16; i++) v[i] = get(x + i * stride, n) * signs[i];
  for (int h = 1; h < 16; h *= 2)
    for (int i = 0; i < 16; i++)
      if (!(i & h)) {
        vf a = v[i], b = v[i + h];
        v[i] = a + b, v[i + h] = a - b;
      }
  for (int i = 0; i < 16; i++) store(y + i * far, as<T>(v[i] * 0.25f));
}

// lanes i and i + H become their sum and difference
template <int H>
static inline void exchange(vf v[16 / W]) {
  if (H >= W) return;
  vi partner;
  vf side;
  for (int i = 0; i < W; i++) partner[i] = i ^ H, side[i] = i & H ? -1.0f : 1.0f;
  for (int j = 0; j < 16 / W; j++) v[j] = v[j] * side + pick(v[j], v[j], partner);
}

// of sixteen numbers side by side
template <typename T>
static inline void rotate_row(float *x, const float *signs) {
  vf v[16 / W];
  for (int j = 0; j < 16 / W; j++) v[j] = load(x + j * W) * load(signs + j * W);
  exchange<1>(v), exchange<2>(v), exchange<4>(v), exchange<8>(v);
  for (int h = 1; h < 16 / W; h *= 2)
    for (int j = 0; j < 16 / W; j++)
      if (!(j & h)) {
        vf a = v[j], b = v[j + h];
        v[j] = a + b, v[j + h] = a - b;
      }
  for (int j = 0; j < 16 / W; j++) store(x + j * W, as<T>(v[j] * 0.25f));
}
