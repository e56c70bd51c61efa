// Random numbers that depend on a key and a counter only: Philox 4x32-10, many counters at once.
//
//   element i takes word i % 4 of counter i / 4;  u = (word >> 8) 2^-24, in [0, 1)
//
// A 32-bit word sits in the low half of a 64-bit lane: one product there gives the high and the low word, and what else
// stands in the high half is never read.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "vec.h"

constexpr int HALF = W / 2;  // 64-bit lanes in a vector
typedef uint64_t vq __attribute__((vector_size(W * 4)));

static inline vq product(vq a, vq b) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

static inline vq exclusive_or(vq a, vq b, vq c) {
#if defined(__AVX512F__)
  return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

struct Philox {
  vq key0[10], key1[10];

  explicit Philox(int64_t seed) {
    uint32_t a = (uint32_t)seed, b = (uint32_t)((uint64_t)seed >> 32);
    for (int i = 0; i < 10; i++, a += 0x9E3779B9u, b += 0xBB67AE85u) key0[i] = vq{} + a, key1[i] = vq{} + b;
  }

  // the four words of each counter
  INLINE inline void words(vq counter, vq &c0, vq &c1, vq &c2, vq &c3) const {
    const vq A = vq{} + 0xD2511F53ull, B = vq{} + 0xCD9E8D57ull;
    c0 = counter, c1 = counter >> 32, c2 = vq{}, c3 = vq{};
    for (int i = 0; i < 10; i++) {
      vq a = product(A, c0), b = product(B, c2);
      c0 = exclusive_or(b >> 32, c1, key0[i]), c1 = b;
      c2 = exclusive_or(a >> 32, c3, key1[i]), c3 = a;
    }
  }
};

// the words of 2 x HALF counters that alternate lane by lane, as numbers in [0, 1)
static inline vf uniform(vq even, vq odd) {
  vu w = (vu)((even & 0xffffffffull) | (odd << 32));
  return __builtin_convertvector((vi)(w >> 8), vf) * 0x1p-24f;
}

static inline vq first_lanes() {
  vq v;
  for (int i = 0; i < HALF; i++) v[i] = i;
  return v;
}

// u of elements [first, first + n), written so that element i stands at out[i - first / 4 * 4]; out has room for
// n + 2 W + 4 numbers
static inline void uniform_row(const Philox &philox, int64_t first, int64_t n, float *out) {
  const vq lanes = first_lanes();
  vi low, high;  // pairs of words, counter by counter
  for (int i = 0; i < W; i += 4)
    for (int j = 0; j < 4; j++) low[i + j] = i / 2 + (j % 2) + (j / 2) * W, high[i + j] = low[i + j] + HALF;
  int64_t counter = first / 4, last = (first + n + 3) / 4;
  for (; counter < last; counter += HALF, out += 2 * W) {
    vq c0, c1, c2, c3;
    philox.words(lanes + (uint64_t)counter, c0, c1, c2, c3);
    vf a = uniform(c0, c1), b = uniform(c2, c3);  // words 0, 1 of each counter; words 2, 3
    store(out, pick(a, b, low));
    store(out + W, pick(a, b, high));
  }
}

// u of elements first + lane * stride + {0, 1, 2, 3} for W lanes, first and stride multiples of 4
static inline void uniform_columns(const Philox &philox, int64_t first, int64_t stride, vf u[4]) {
  const vq even = (first_lanes() * 2) * (uint64_t)(stride / 4) + (uint64_t)(first / 4);
  vq a[4], b[4];
  philox.words(even, a[0], a[1], a[2], a[3]);
  philox.words(even + (uint64_t)(stride / 4), b[0], b[1], b[2], b[3]);
  for (int i = 0; i < 4; i++) u[i] = uniform(a[i], b[i]);
}
