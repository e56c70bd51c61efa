// Attention of one query row per head over bfloat16 keys and values, in products of pairs (AVX-512 BF16).
//
// A vector is four queries of four partial sums: 16 bytes of a key, repeated four times, meet the same 16 bytes of
// four queries. Two keys' values are interleaved, so that one product adds a pair of keys. Queries and weights are
// rounded to bfloat16 (weights before they are summed, so that they still add up to one), scores and sums are float32.
#pragma once
#include "attend.h"
#include "gemv.h"

#if defined(__AVX512BF16__)

constexpr int PAIRED = 32;              // keys at a time
constexpr int64_t MOST_CHANNELS = 256;  // of a head

static inline bool attends_in_pairs(int64_t P) { return P % 32 == 0 && P <= MOST_CHANNELS; }

// scores of four keys: lane 4 a + j is query a . key j, from the keys' partial sums
static inline __m512 scores_of_four(const __m512 *v) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}

// scores[j / 4] of n <= PAIRED keys; beyond the last one it is repeated
template <int C>
static inline void score_pairs(const __m512bh *q, const bf16 *keys, int64_t P, int n, vf *scores) {
  constexpr int J = 4;
  __m512bh mine[C ? C : 1];
  if (C)
    for (int c = 0; c < C; c++) mine[c] = q[c];
  for (int first = 0; first < n; first += J) {
    for (int64_t i = 0; i < J * P; i += 32) ask(keys + first * P + i);
    __m512 acc[J] = {};
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) {
      const bf16 *key = keys + (first + j < n ? first + j : n - 1) * P;
      // key by key, so that memory is read in its order
      auto add = [&](int64_t c, __m512bh queries) {
        const __m512i some = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)key + c));
        acc[j] = _mm512_dpbf16_ps(acc[j], queries, (__m512bh)some);
      };
      if (C)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) add(c, mine[c]);
      else
        for (int64_t c = 0; c < P / 8; c++) add(c, q[c]);
    }
    scores[first / 4] = (vf)scores_of_four(acc);
  }
}

// out[a][...] = out * keep + weights . values, for V times 32 columns; a vector of out holds interleaved columns
template <int V>
static inline void add_pairs(const uint32_t *weights, const float *keep, const bf16 *values, int64_t P, int n,
                             float *out) {
  __m512 acc[4][2 * V];
#pragma GCC unroll 4
  for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * V; i++) acc[a][i] = (__m512)(load(out + a * P + i * W) * keep[a]);
  for (int j = 0; j < n; j += 2) {
    const bf16 *one = values + j * P, *two = j + 1 < n ? one + P : one;
#pragma GCC unroll 2
    for (int i = 0; i < V; i++) ask(one + 32 * i);
#pragma GCC unroll 2
    for (int i = 0; i < V; i++) ask(one + P + 32 * i);
#pragma GCC unroll 2
    for (int i = 0; i < V; i++) {
      const __m512i u = _mm512_loadu_si512(one + 32 * i), v = _mm512_loadu_si512(two + 32 * i);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(u, v), high = (__m512bh)_mm512_unpackhi_epi16(u, v);
#pragma GCC unroll 4
      for (int a = 0; a < 4; a++) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(weights[j / 4 * 8 + 2 * a + j % 4 / 2]);
        acc[a][2 * i] = _mm512_dpbf16_ps(acc[a][2 * i], w, low);
        acc[a][2 * i + 1] = _mm512_dpbf16_ps(acc[a][2 * i + 1], w, high);
      }
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * V; i++) store(out + a * P + i * W, (vf)acc[a][i]);
}

// the largest of each four lanes, in all four
static inline vf largest_of_four(vf v) {
  v = larger(v, (vf)_mm512_permute_ps((__m512)v, 0xb1));
  return larger(v, (vf)_mm512_permute_ps((__m512)v, 0x4e));
}

// four queries over keys first ... last - 1
static inline void four_queries(const __m512bh *q, float scale, const Places<bf16> &keys, const Places<bf16> &values,
                                int64_t P, int64_t first, int64_t last, const uint8_t *mask, float *out, Seen *seen) {
  vf largest = all(LOWEST), total = {};
  for (int64_t s = first; s < last; s += PAIRED) {
    const int n = last - s < PAIRED ? last - s : PAIRED;
    vf scores[PAIRED / 4];
    if (P == 64) score_pairs<8>(q, keys.at(s), P, n, scores);
    else score_pairs<0>(q, keys.at(s), P, n, scores);
    const int tiles = (n + 3) / 4;
    vf most = largest;
    for (int t = 0; t < tiles; t++) {
      scores[t] *= scale;
      if (mask || t * 4 + 4 > n)
        for (int j = 0; j < 4; j++)
          if (t * 4 + j >= n || (mask && !mask[s + t * 4 + j]))
            for (int a = 0; a < 4; a++) scores[t][4 * a + j] = -INFINITY;
      most = larger(most, scores[t]);
    }
    most = largest_of_four(most);
    const vf keep = exp(largest - most);
    largest = most, total *= keep;
    __m256i weights[PAIRED / 4];
    for (int t = 0; t < tiles; t++) {
      const vf x = scores[t];
      const vi seen_or_nan = (x > LOWEST) | (x != x);
      const vf w = seen_or_nan ? exp(x - most) : vf{};
      const __m256bh h = _mm512_cvtneps_pbh((__m512)w);
      memcpy(weights + t, &h, sizeof h);
      total += (vf)_mm512_cvtpbh_ps(h);
    }
    const float kept[4] = {keep[0], keep[4], keep[8], keep[12]};
    const bf16 *v = values.at(s);
    int64_t i = 0;
    for (; i + 64 <= P; i += 64) add_pairs<2>((const uint32_t *)weights, kept, v + i, P, n, out + i);
    if (i < P) add_pairs<1>((const uint32_t *)weights, kept, v + i, P, n, out + i);
  }
  for (int a = 0; a < 4; a++)
    seen[a] = {largest[4 * a], total[4 * a] + total[4 * a + 1] + total[4 * a + 2] + total[4 * a + 3]};
}

// as `attend`; queries (n_queries, P) not yet scaled, out (n_queries, P)
static void attend_pairs(const float *q, int64_t n_queries, float scale, const Places<bf16> &keys,
                         const Places<bf16> &values, int64_t P, int64_t first, int64_t last, const uint8_t *mask,
                         float *out, Seen *seen) {
  // column 8 l + c of 32 lies in lane 4 l + c % 4 of the low or the high vector
  const vi near = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
  for (int64_t a = 0; a < n_queries; a += 4) {
    const int64_t some = n_queries - a < 4 ? n_queries - a : 4;
    alignas(64) bf16 packed[4 * MOST_CHANNELS];
    alignas(64) float sums[4 * MOST_CHANNELS] = {};
    Seen four[4];
    for (int64_t i = 0; i < P; i += W)
      for (int64_t b = 0; b < 4; b++) {
        bf16 row[W];
        store(row, b < some ? load(q + (a + b) * P + i) : vf{});
        memcpy(packed + 4 * i + 8 * b, row, 16), memcpy(packed + 4 * i + 32 + 8 * b, row + 8, 16);
      }
    four_queries((const __m512bh *)packed, scale, keys, values, P, first, last, mask, sums, four);
    for (int64_t b = 0; b < some; b++) {
      seen[a + b] = four[b];
      for (int64_t i = 0; i < P; i += 32) {
        const vf low = load(sums + b * P + i), high = load(sums + b * P + i + W);
        store(out + (a + b) * P + i, pick(low, high, near));
        store(out + (a + b) * P + i + W, pick(low, high, near + 8));
      }
    }
  }
}
#endif
