// One token of a Mamba-2 mixer: the convolution's step and the state's, for one sequence.
#pragma once
#include "vec.h"

// numbers of a small parameter, float32 or bfloat16; null is none
struct Numbers {
  const void *data;
  int64_t half;

  float at(int64_t i) const { return half ? load1((const bf16 *)data + i) : ((const float *)data)[i]; }
  vf from(int64_t i) const { return half ? load((const bf16 *)data + i) : load((const float *)data + i); }
  explicit operator bool() const { return data != nullptr; }
};

static inline vf silu(vf x) { return x * sigmoid(x); }
// torch's: the line itself where e^x would drown the one
static inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// channels first ... last - 1 of x become silu(window . w + bias); the windows (D, taps) shift and take x in
template <typename T>
static inline void conv_step(float *x, T *window, const Numbers &w, const Numbers &bias, int64_t taps, int64_t first,
                             int64_t last, bool activates) {
  for (int64_t c = first; c < last; c += W) {
    const int n = last - c < W ? last - c : W;
    float y[W] = {};
    for (int i = 0; i < n; i++) {
      T *row = window + (c + i) * taps;
      const int64_t at = (c + i) * taps;
      float s = bias ? bias.at(c + i) : 0.0f;
      for (int64_t j = 0; j + 1 < taps; j++) {
        row[j] = row[j + 1];
        s += load1(row + j) * w.at(at + j);
      }
      store1(row + taps - 1, x[c + i]);
      y[i] = s + load1(row + taps - 1) * w.at(at + taps - 1);
    }
    vf v = load(y);
    store_some(x + c, activates ? silu(v) : v, n);
  }
}

// rows of one head's state (P, N): S = decay S + (dt x) B^T;  y = S C + D x
template <typename T>
static inline void state_step(T *state, const float *x, float dt, float decay, const float *B, const float *C, float D,
                              int64_t P, int64_t N, float *y) {
  for (int64_t p = 0; p < P; p++) {
    T *row = state + p * N;
    const float added = dt * x[p];
    vf total = {};
    int64_t n = 0;
    for (; n + W <= N; n += W) {
      vf s = load(row + n) * decay + load(B + n) * added;
      store(row + n, s);
      total += s * load(C + n);
    }
    if (n < N) {
      vf s = load_some(row + n, N - n) * decay + load_some(B + n, N - n) * added;
      store_some(row + n, s, N - n);
      total += s * load_some(C + n, N - n);
    }
    y[p] = sum(total) + D * x[p];
  }
}
