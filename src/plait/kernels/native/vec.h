// Vectors of floats as wide as the processor's registers, over float32 and bfloat16 memory.
//
// Written with the compilers' vector extensions, so that one source serves AVX2, AVX-512 and NEON; intrinsics appear
// only where the compiler would not find the instruction. Half-precision memory is read to float32 and rounded to
// nearest even when written.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of its own intrinsics, which leave unused lanes undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

struct bf16 {
  uint16_t bits;
};
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

static inline vf all(float x) { return x - vf{}; }
static inline vi bits_of(vf x) { return (vi)x; }

static inline vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline vf load(const bf16 *p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline void store(bf16 *p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;  // a NaN must not round to infinity
  vh h = __builtin_convertvector(v == v ? rounded : quiet, vh);
  memcpy(p, &h, sizeof h);
#endif
}

static inline float load1(const float *p) { return *p; }
static inline float load1(const bf16 *p) {
  uint32_t u = (uint32_t)p->bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline void store1(float *p, float v) { *p = v; }
static inline void store1(bf16 *p, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  p->bits = v == v ? (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16) : (uint16_t)((u >> 16) | 0x40);
}

// the last n < W elements of a row; the others are zero
template <typename T>
static inline vf load_some(const T *p, int n) {
  float part[W] = {};
  for (int i = 0; i < n; i++) part[i] = load1(p + i);
  return load(part);
}
template <typename T>
static inline void store_some(T *p, vf v, int n) {
  for (int i = 0; i < n; i++) store1(p + i, v[i]);
}

static inline float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
#endif
}
static inline float max(vf v) {
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
}
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline vf smaller(vf a, vf b) { return a < b ? a : b; }

// e^x to about 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial in r. Arguments are held to [-87, 88]; a NaN
// stays one.
static inline vf exp(vf given) {
  vf x = smaller(larger(given, all(-87.0f)), all(88.0f));
  vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf e = (vf)(bits_of(p) + (bits_of(shifted) << 23));
  return given == given ? e : given;
}
// 1 / x for ordinary x: a division takes as long as ten products
static inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
static inline vf sigmoid(vf x) { return reciprocal(1.0f + exp(-x)); }

// lambdas given to `over` carry it: inlined twice, the first time for whole vectors only
#define INLINE __attribute__((always_inline))

// f(i, n) for each vector of a row of d elements: n is W, or what is left at the end
template <typename F>
static inline void over(int64_t d, F f) {
  int64_t i = 0;
  for (; i + W <= d; i += W) f(i, W);
  if (i < d) f(i, (int)(d - i));
}
// n elements at p: a whole vector, or the end of a row
template <typename T>
static inline vf get(const T *p, int n) {
  return n == W ? load(p) : load_some(p, n);
}
template <typename T>
static inline void put(T *p, vf v, int n) {
  n == W ? store(p, v) : store_some(p, v, n);
}

// lane i is a[index[i]] where the index is below W, else b[index[i] - W]
static inline vf pick(vf a, vf b, vi index) {
#if defined(__clang__)
  vf v;
  for (int i = 0; i < W; i++) v[i] = index[i] < W ? a[index[i]] : b[index[i] - W];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}
