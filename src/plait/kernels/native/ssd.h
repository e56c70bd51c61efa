// What both passes of the state space share: sizes and strides, the time steps of a chunk and their decays.
#pragma once
#include <algorithm>

#include "tiles.h"

// sizes and strides (in elements, of batch, time and head or group) as Python hands them over
struct Shape {
  int64_t batch, length, heads, P, groups, N, chunk, splits;
  int64_t x[3], dt[3], B[3], C[3], dy[3];
};

// one share of the work: some heads of one group, over all of time
struct Task {
  int64_t b, g, split, first_head, last_head;

  Task(const Shape &s, int64_t index) {
    int64_t per_group = s.heads / s.groups, per_split = per_group / s.splits;
    split = index % s.splits, g = index / s.splits % s.groups, b = index / s.splits / s.groups;
    first_head = g * per_group + split * per_split, last_head = first_head + per_split;
  }
};

constexpr int64_t LONGEST = 128;  // tokens in a chunk

// ln(1 + e^x) with a small relative error also where it is tiny: ln(1 + u) = 2 artanh(u / (2 + u))
static inline vf softplus(vf x) {
  vf u = exp(-larger(x, -x)), s = u / (2.0f + u), t = s * s;
  vf p = all(1.0f / 15);
  p = p * t + 1.0f / 13;
  p = p * t + 1.0f / 11;
  p = p * t + 1.0f / 9;
  p = p * t + 1.0f / 7;
  p = p * t + 1.0f / 5;
  p = p * t + 1.0f / 3;
  return larger(x, vf{}) + 2.0f * (s + s * t * p);
}

static inline vf lanes() {
  vf v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

// where documents begin inside a chunk: token i sees tokens since[i] .. i, token j is seen by j .. until[j]
struct Documents {
  float since[LONGEST], until[LONGEST];
  int64_t first, last;  // tokens before `first` see the state before, tokens from `last` on enter the state after

  Documents(const bool *starts, int64_t tokens, int64_t padded) : first(tokens), last(0) {
    for (int64_t i = 0, begun = 0; i < padded; i++) {
      if (starts && i < tokens && starts[i]) begun = last = i, first = std::min(first, i);
      since[i] = begun;
    }
    for (int64_t j = padded - 1, end = padded - 1; j >= 0; j--) {
      until[j] = end;
      if (starts && j < tokens && starts[j]) end = j - 1;
    }
  }
};

// time steps of one head over a chunk. Beyond its tokens they are zero: time stands still
struct Steps {
  alignas(64) float dt[LONGEST], slope[LONGEST];  // the time step, and its derivative by the raw one
  alignas(64) float a[LONGEST];                   // log decay since the chunk began
  alignas(64) float in[LONGEST], out[LONGEST];    // decay of the state before at token i; of token j at the chunk's end
  alignas(64) float weight[LONGEST];              // out dt
  float through;                                  // decay of the state before at the chunk's end

  template <typename D>
  void set(const D *raw, int64_t stride, int64_t tokens, int64_t padded, float bias, float A, double low, double high,
           const bool *mask, const Documents &documents) {
    for (int64_t t = 0; t < tokens; t++) dt[t] = load1(raw + t * stride) + bias;
    for (int64_t t = tokens; t < padded; t++) dt[t] = 0;
    for (int64_t t = 0; t < padded; t += W) {
      vf u = load(dt + t), step = softplus(u);
      vf held = smaller(larger(step, all(low)), all(high));
      store(slope + t, held == step ? sigmoid(u) : vf{});
      store(dt + t, u == u ? held : u);  // what is no number must show
    }
    float sum = 0;
    for (int64_t t = 0; t < padded; t++) {
      if (t >= tokens || (mask && !mask[t])) dt[t] = slope[t] = 0;
      a[t] = sum += dt[t] * A;
    }
    through = documents.first < tokens ? 0 : std::exp(sum);
    for (int64_t t = 0; t < padded; t += W) {
      vf index = lanes() + (float)t, sums = load(a + t);
      store(in + t, index < (float)documents.first ? exp(sums) : vf{});
      vf left = index >= (float)documents.last ? exp(sum - sums) : vf{};
      store(out + t, left);
      store(weight + t, left * load(dt + t));
    }
  }
};

// exp(a_i - a_j) of a row i against W tokens j, or of a column j against W tokens i, is one factor times W others where
// the W tokens lie wholly on one side: both exponents, from and to the token between, are negative. Only the W x W
// blocks on the diagonal take an exponential for each number.

// ask for rows of memory that will be read soon: they lie too far apart for the processor to guess
template <typename T>
static inline void expect(const T *rows, int64_t stride, int64_t from, int64_t to, int64_t columns) {
  for (int64_t r = from; r < to; r++)
    for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(rows + r * stride + c);
}
