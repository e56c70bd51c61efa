// One query row per head against many cached keys and values: a span of keys at memory speed.
//
// The query heads of a group meet each key while it is in the nearest cache; 64 keys at a time give scores, weights
// e^(score - largest so far), and their share of the sum of values. Spans are merged by the largest score of each.
#pragma once
#include "vec.h"

constexpr int KEYS = 64;      // keys at a time
constexpr int QUERIES = 4;    // query heads at a time
constexpr float LOWEST = -1e30f;

// neighbours added: the first half from a, the second from b
static inline vf fold(vf a, vf b) {
  vi even, odd;
  for (int i = 0; i < W; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return pick(a, b, even) + pick(a, b, odd);
}
// lane i becomes the sum of v[i]
static inline vf sums(vf (&v)[W]) {
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// scores[j * Q + a] = query a . key j for n <= KEYS keys; queries (Q, ld) end in zeros up to ld
template <int Q, typename T>
static inline void score(const float *q, int64_t ld, const T *keys, int64_t P, int n, float *scores) {
  constexpr int J = W / Q;  // keys of a tile: one vector of scores
  for (int first = 0; first < n; first += J) {
    vf acc[W] = {};
    int64_t i = 0;
    for (; i + W <= P; i += W)
#pragma GCC unroll 16
      for (int j = 0; j < J; j++) {
        // beyond the last key the tile repeats it
        vf k = load(keys + (first + j < n ? first + j : n - 1) * P + i);
#pragma GCC unroll 4
        for (int a = 0; a < Q; a++) acc[j * Q + a] += k * load(q + a * ld + i);
      }
    for (int j = 0; j < J && i < P; j++) {
      vf k = load_some(keys + (first + j < n ? first + j : n - 1) * P + i, P - i);
      for (int a = 0; a < Q; a++) acc[j * Q + a] += k * load(q + a * ld + i);
    }
    store(scores + first * Q, sums(acc));
  }
}

// out[q] = out[q] * keep[q] + sum over n keys of weights[j * Q + q] * value j, for V vectors of columns
template <int Q, int V, typename T>
static inline void add_values(const float *weights, const float *keep, const T *values, int64_t P, int n,
                              float *out, int64_t ld) {
  vf acc[Q][V];
  for (int a = 0; a < Q; a++)
    for (int i = 0; i < V; i++) acc[a][i] = load(out + a * ld + i * W) * keep[a];
  for (int j = 0; j < n; j++) {
    vf v[V];
    for (int i = 0; i < V; i++) v[i] = load(values + j * P + i * W);
    for (int a = 0; a < Q; a++)
      for (int i = 0; i < V; i++) acc[a][i] += v[i] * weights[j * Q + a];
  }
  for (int a = 0; a < Q; a++)
    for (int i = 0; i < V; i++) store(out + a * ld + i * W, acc[a][i]);
}

// the largest score and the sum of weights of a query so far
struct Seen {
  float largest, total;
};

// Q queries over n <= KEYS keys; mask[j] is 0 at padding
template <int Q, typename T>
static inline void some_keys(const float *q, const T *keys, const T *values, int64_t P, int n, const uint8_t *mask,
                             float *out, int64_t ld, Seen *seen) {
  float scores[Q * KEYS], keep[Q];
  score<Q>(q, ld, keys, P, n, scores);
  for (int j = 0; j < KEYS; j++)
    if (j >= n || (mask && !mask[j]))
      for (int a = 0; a < Q; a++) scores[j * Q + a] = -INFINITY;
  // lane i of a vector belongs to query i % Q
  vf most = all(LOWEST), total = {};
  for (int i = 0; i < Q * KEYS; i += W) most = larger(most, load(scores + i));
  for (int i = 0; i < W; i++) most[i % Q] = most[i] > most[i % Q] ? most[i] : most[i % Q];
  for (int a = 0; a < Q; a++) {
    const float largest = most[a] > seen[a].largest ? most[a] : seen[a].largest;
    keep[a] = exp(all(seen[a].largest - largest))[0];
    seen[a].largest = largest;
  }
  for (int i = 0; i < W; i++) most[i] = seen[i % Q].largest;
  for (int i = 0; i < Q * KEYS; i += W) {
    vf s = load(scores + i);
    vi seen_or_nan = (s > LOWEST) | (s != s);
    vf weight = seen_or_nan ? exp(s - most) : vf{};
    store(scores + i, weight);
    total += weight;
  }
  for (int a = 0; a < Q; a++) {
    float sum = 0;
    for (int i = a; i < W; i += Q) sum += total[i];
    seen[a].total = seen[a].total * keep[a] + sum;
  }
  constexpr int V = W == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + V * W <= P; i += V * W) add_values<Q, V>(scores, keep, values + i, P, n, out + i, ld);
  for (; i + W <= P; i += W) add_values<Q, 1>(scores, keep, values + i, P, n, out + i, ld);
  for (; i < P; i++)
    for (int a = 0; a < Q; a++) {
      float o = out[a * ld + i] * keep[a];
      for (int j = 0; j < n; j++) o += scores[j * Q + a] * load1(values + j * P + i);
      out[a * ld + i] = o;
    }
}

// where the keys of a head lie, or its values: one after the other, or in pages of a multiple of KEYS each
template <typename T>
struct Places {
  T *data;
  int64_t P;
  const int32_t *table;  // the numbers of the pages, or null
  int64_t page, apart;   // keys of a page, and how far pages lie apart

  T *at(int64_t s) const { return table ? data + table[s / page] * apart + s % page * P : data + s * P; }
};

// a group's queries (n_queries, ld) over keys first ... last - 1; out (n_queries, ld) sums, not yet divided by `total`
template <typename T>
static void attend(const float *q, int64_t n_queries, int64_t ld, const Places<T> &keys, const Places<T> &values,
                   int64_t P, int64_t first, int64_t last, const uint8_t *mask, float *out, Seen *seen) {
  memset(out, 0, n_queries * ld * sizeof(float));
  for (int64_t a = 0; a < n_queries; a++) seen[a] = {LOWEST, 0};
  for (int64_t s = first; s < last; s += KEYS) {
    const int n = last - s < KEYS ? last - s : KEYS;
    const uint8_t *m = mask ? mask + s : nullptr;
    int64_t a = 0;
    for (; a + QUERIES <= n_queries; a += QUERIES)
      some_keys<QUERIES>(q + a * ld, keys.at(s), values.at(s), P, n, m, out + a * ld, ld, seen + a);
    for (; a < n_queries; a++)
      some_keys<1>(q + a * ld, keys.at(s), values.at(s), P, n, m, out + a * ld, ld, seen + a);
  }
}
