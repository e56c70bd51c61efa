// One query row per head against many cached keys and values: a span of keys at memory speed.
//
// The query heads of a group meet each key while it is in the nearest cache; 64 keys at a time give scores, weights
// e^(score - largest so far), and their share of the sum of values. Spans are merged by the largest score of each.
#pragma once
#include "vec.h"

constexpr int KEYS = 64;      // keys at a time
constexpr int QUERIES = 4;    // query heads at a time
constexpr float LOWEST = -1e30f;

// the sums of W vectors, as one vector: halves of neighbours are added until one lane of each is left
static inline vf sums(vf *v) {
  float flat[W][W];
  for (int i = 0; i < W; i++) store(flat[i], v[i]);
  vf total = {};
  for (int i = 0; i < W; i++) {
    vf column;
    for (int j = 0; j < W; j++) column[j] = flat[j][i];
    total += column;
  }
  return total;
}

// scores[q][j] = query q . key j for n <= KEYS keys; queries (Q, ld) end in zeros up to ld
template <int Q, typename T>
static inline void score(const float *q, int64_t ld, const T *keys, int64_t P, int n, float (*scores)[KEYS]) {
  for (int j = 0; j < n; j++) {
    const T *key = keys + j * P;
    vf acc[Q] = {};
    int64_t i = 0;
    for (; i + W <= P; i += W) {
      vf k = load(key + i);
      for (int a = 0; a < Q; a++) acc[a] += k * load(q + a * ld + i);
    }
    if (i < P) {
      vf k = load_some(key + i, P - i);
      for (int a = 0; a < Q; a++) acc[a] += k * load(q + a * ld + i);
    }
    for (int a = 0; a < Q; a++) scores[a][j] = sum(acc[a]);
  }
}

// out[q] = out[q] * keep[q] + sum over n keys of weights[q][j] * value j, for V vectors of columns
template <int Q, int V, typename T>
static inline void add_values(const float (*weights)[KEYS], const float *keep, const T *values, int64_t P, int n,
                              float *out, int64_t ld) {
  vf acc[Q][V];
  for (int a = 0; a < Q; a++)
    for (int i = 0; i < V; i++) acc[a][i] = load(out + a * ld + i * W) * keep[a];
  for (int j = 0; j < n; j++) {
    vf v[V];
    for (int i = 0; i < V; i++) v[i] = load(values + j * P + i * W);
    for (int a = 0; a < Q; a++)
      for (int i = 0; i < V; i++) acc[a][i] += v[i] * weights[a][j];
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
  float scores[Q][KEYS], keep[Q];
  score<Q>(q, ld, keys, P, n, scores);
  for (int j = n; j < KEYS; j++)
    for (int a = 0; a < Q; a++) scores[a][j] = -INFINITY;
  for (int j = 0; j < n && mask; j++)
    for (int a = 0; a < Q && !mask[j]; a++) scores[a][j] = -INFINITY;
  for (int a = 0; a < Q; a++) {
    vf most = all(seen[a].largest), total = {};
    for (int j = 0; j < KEYS; j += W) most = larger(most, load(scores[a] + j));
    const float largest = max(most);
    for (int j = 0; j < KEYS; j += W) {
      vf s = load(scores[a] + j);
      vf weight = s > LOWEST ? exp(s - largest) : vf{};
      store(scores[a] + j, weight);
      total += weight;
    }
    keep[a] = exp(all(seen[a].largest - largest))[0];
    seen[a] = {largest, seen[a].total * keep[a] + sum(total)};
  }
  constexpr int V = W == 16 ? 4 : 2;
  int64_t i = 0;
  for (; i + V * W <= P; i += V * W) add_values<Q, V>(scores, keep, values + i, P, n, out + i, ld);
  for (; i + W <= P; i += W) add_values<Q, 1>(scores, keep, values + i, P, n, out + i, ld);
  for (; i < P; i++)
    for (int a = 0; a < Q; a++) {
      float o = out[a * ld + i] * keep[a];
      for (int j = 0; j < n; j++) o += scores[a][j] * load1(values + j * P + i);
      out[a * ld + i] = o;
    }
}

// a group's queries (n_queries, ld) over keys first ... last - 1; out (n_queries, ld) sums, not yet divided by `total`
template <typename T>
static void attend(const float *q, int64_t n_queries, int64_t ld, const T *keys, const T *values, int64_t P,
                   int64_t first, int64_t last, const uint8_t *mask, float *out, Seen *seen) {
  memset(out, 0, n_queries * ld * sizeof(float));
  for (int64_t a = 0; a < n_queries; a++) seen[a] = {LOWEST, 0};
  for (int64_t s = first; s < last; s += KEYS) {
    const int n = last - s < KEYS ? last - s : KEYS;
    const uint8_t *m = mask ? mask + s : nullptr;
    int64_t a = 0;
    for (; a + QUERIES <= n_queries; a += QUERIES)
      some_keys<QUERIES>(q + a * ld, keys + s * P, values + s * P, P, n, m, out + a * ld, ld, seen + a);
    for (; a < n_queries; a++)
      some_keys<1>(q + a * ld, keys + s * P, values + s * P, P, n, m, out + a * ld, ld, seen + a);
  }
}
