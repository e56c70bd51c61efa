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

// one channel: its window (taps) shifts and takes x in; returns window . w
template <typename T>
static inline float conv_channel(float x, T *window, const Numbers &w, int64_t at, int64_t taps) {
  float sum = 0;
  for (int64_t j = 0; j + 1 < taps; j++) {
    window[j] = window[j + 1];
    sum += load1(window + j) * w.at(at + j);
  }
  store1(window + taps - 1, x);
  return sum + load1(window + taps - 1) * w.at(at + taps - 1);
}

// W channels of four taps: a vector holds the windows of W / 4 channels
template <typename T>
static inline vf conv_four(const float *x, T *window, const Numbers &w, int64_t at) {
  T rounded[W];
  store(rounded, load(x));
  const vf fresh = load(rounded);
  float products[4 * W], y[W];
#pragma GCC unroll 4
  for (int part = 0; part < 4; part++) {
    vi from;  // the next lane of the window, or the channel's new input
    for (int i = 0; i < W; i++) from[i] = i % 4 < 3 ? i + 1 : W + part * (W / 4) + i / 4;
    const vf next = pick(load(window + part * W), fresh, from);
    store(window + part * W, next);
    store(products + part * W, next * w.from(at + part * W));
  }
  for (int i = 0; i < W; i++) {
    const float *p = products + 4 * i;
    y[i] = (p[0] + p[1]) + (p[2] + p[3]);
  }
  return load(y);
}

// channels first ... last - 1 of x (D) become window . w + bias, or its SiLU; the windows (D, taps) take x in
template <typename T>
static inline void conv_step(const float *x, float *y, T *window, const Numbers &w, const Numbers &bias, int64_t taps,
                             int64_t first, int64_t last, bool activates) {
  int64_t c = first;
  for (; c + W <= last && taps == 4; c += W) {
    vf v = conv_four(x + c, window + c * 4, w, c * 4);
    if (bias) v += bias.from(c);
    store(y + c, activates ? silu(v) : v);
  }
  for (; c < last; c++) {
    float v = conv_channel(x[c], window + c * taps, w, c * taps, taps) + (bias ? bias.at(c) : 0.0f);
    y[c] = activates ? silu(all(v))[0] : v;
  }
}

// R rows of one head's state (P, N) and their outputs: S = decay S + (dt x) B^T;  y = S C + D x
template <int R, typename T>
static inline void state_rows(T *state, const float *x, float dt, float decay, const float *B, const float *C, float D,
                              int64_t N, float *y) {
  vf total[R] = {};
  int64_t n = 0;
  for (; n + W <= N; n += W) {
    const vf b = load(B + n), c = load(C + n);
    for (int r = 0; r < R; r++) {
      // left to itself the processor looks too short a way ahead: 27 GB/s for 45
      __builtin_prefetch((const char *)(state + r * N + n) + 4096, 1, 2);
      vf s = load(state + r * N + n) * decay + b * (dt * x[r]);
      store(state + r * N + n, s);
      total[r] += s * c;
    }
  }
  for (int r = 0; r < R; r++) {
    if (n < N) {
      const int left = N - n;
      vf s = load_some(state + r * N + n, left) * decay + load_some(B + n, left) * (dt * x[r]);
      store_some(state + r * N + n, s, left);
      total[r] += s * load_some(C + n, left);
    }
    y[r] = sum(total[r]) + D * x[r];
  }
}

template <typename T>
static inline void state_step(T *state, const float *x, float dt, float decay, const float *B, const float *C, float D,
                              int64_t P, int64_t N, float *y) {
  constexpr int R = 4;
  int64_t p = 0;
  for (; p + R <= P; p += R) state_rows<R>(state + p * N, x + p, dt, decay, B, C, D, N, y + p);
  for (; p < P; p++) state_rows<1>(state + p * N, x + p, dt, decay, B, C, D, N, y + p);
}
