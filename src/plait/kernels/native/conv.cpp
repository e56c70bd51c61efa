// Causal depthwise convolution with SiLU, forward and backward, over rows of channels.
//
//   v_t = bias + sum_i w_i x_{t-i}    i = 0 .. reach(t); w_0 meets the current token
//   y_t = silu(v_t), or v_t           g_t = dy_t silu'(v_t), or dy_t
//   dx_s = sum_i w_i g_{s+i}          dw_i = sum_t g_t x_{t-i}
//
// reach(t) is how many tokens before t belong to its document, at most taps - 1. Tokens before the first come from
// `past`, the last taps - 1 inputs of the call before (oldest first), where there is one.
#include <algorithm>
#include <vector>

#include "vec.h"

struct Shape {
  int64_t batch, length, channels, taps, x_batch, x_row;  // x_batch, x_row: strides of x in elements
  bool silu;
};

static int reach(const Shape &s, const bool *starts, bool has_past, int64_t t) {
  int i = 0;
  while (i < s.taps - 1 && !(starts && t - i >= 0 && starts[t - i]) && (t - i - 1 >= 0 || has_past)) i++;
  return i;
}

// where token t of a sequence lies; t may be negative
template <typename T>
static inline const T *row_of(const Shape &s, const T *x, const T *past, int64_t t) {
  return t >= 0 ? x + t * s.x_row : past + (s.taps - 1 + t) * s.channels;
}

constexpr int64_t ROWS = 64;  // tokens of one task

template <typename T>
static inline vf filtered(const T *const *rows, const float *w, const float *bias, int64_t channels, int reached,
                          int64_t c, int n) {
  vf v = bias ? get(bias + c, n) : vf{};
  for (int i = 0; i <= reached; i++) v += get(w + i * channels + c, n) * get(rows[i] + c, n);
  return v;
}

constexpr int MOST_TAPS = 16;

template <typename T>
static void forward(Shape s, const T *x, const T *past, const bool *starts, const float *w, const float *bias, T *y) {
  int64_t blocks = (s.length + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < s.batch * blocks; task++) {
    int64_t b = task / blocks, first = task % blocks * ROWS, last = std::min(first + ROWS, s.length);
    const T *xb = x + b * s.x_batch, *pb = past ? past + b * (s.taps - 1) * s.channels : nullptr;
    for (int64_t t = first; t < last; t++) {
      const T *rows[MOST_TAPS];
      int reached = reach(s, starts ? starts + b * s.length : nullptr, past, t);
      for (int i = 0; i <= reached; i++) rows[i] = row_of(s, xb, pb, t - i);
      T *out = y + (b * s.length + t) * s.channels;
      over(s.channels, [&](int64_t c, int n) INLINE {
        vf v = filtered(rows, w, bias, s.channels, reached, c, n);
        put(out + c, s.silu ? v * sigmoid(v) : v, n);
      });
    }
  }
}

// parts is (threads, taps + 1, channels), zero before: each thread's sums for the taps and the bias. dpast may be null.
// A task walks its tokens forward; dx of a token is complete taps - 1 tokens later, which lie in `ring`. The tokens
// just before and after belong to other tasks: their g is formed here too, but not summed.
template <typename T>
static void backward(Shape s, const T *x, const T *past, const bool *starts, const float *w, const float *bias,
                     const T *dy, T *dx, T *dpast, float *parts, int64_t threads) {
  int64_t blocks = (s.length + ROWS - 1) / ROWS, tasks = s.batch * blocks, C = s.channels;
#pragma omp parallel for schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    std::vector<float> ring(s.taps * C + W);
    std::vector<int> reaches(s.taps);
    float *dw = parts + part * (s.taps + 1) * C, *dbias = dw + s.taps * C;
    for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; task++) {
      int64_t b = task / blocks, first = task % blocks * ROWS, last = std::min(first + ROWS, s.length);
      const T *xb = x + b * s.x_batch, *pb = past ? past + b * (s.taps - 1) * C : nullptr;
      const bool *sb = starts ? starts + b * s.length : nullptr;
      // before the first token of a sequence lie the past's tokens, which get gradients too
      int64_t lowest = first == 0 && dpast ? 1 - s.taps : first;
      for (int64_t t = first; t < last + s.taps - 1; t++) {
        float *g = &ring[t % s.taps * C];
        bool exists = t < s.length, mine = t < last;
        reaches[t % s.taps] = exists ? reach(s, sb, past, t) : -1;
        if (exists) {
          const T *rows[MOST_TAPS];
          int reached = reaches[t % s.taps];
          for (int i = 0; i <= reached; i++) rows[i] = row_of(s, xb, pb, t - i);
          const T *dyt = dy + (b * s.length + t) * C;
          over(C, [&](int64_t c, int n) INLINE {
            vf gv = get(dyt + c, n);
            if (s.silu) {
              vf v = filtered(rows, w, bias, C, reached, c, n), e = sigmoid(v);
              gv *= e * (1.0f + v * (1.0f - e));
            }
            put(g + c, gv, n);
            if (!mine) return;
            put(dbias + c, get(dbias + c, n) + gv, n);
            for (int i = 0; i <= reached; i++)
              put(dw + i * C + c, get(dw + i * C + c, n) + gv * get(rows[i] + c, n), n);
          });
        }
        int64_t done = t - (s.taps - 1);  // nothing later reaches this token
        if (done < lowest || done >= last) continue;
        T *out = done >= 0 ? dx + (b * s.length + done) * C : dpast + (b * (s.taps - 1) + s.taps - 1 + done) * C;
        over(C, [&](int64_t c, int n) INLINE {
          vf d{};
          for (int i = 0; i < s.taps; i++)
            if (int64_t later = done + i; later >= 0 && reaches[later % s.taps] >= i)
              d += get(w + i * C + c, n) * get(&ring[later % s.taps * C] + c, n);
          put(out + c, d, n);
        });
      }
    }
  }
}

// w is (taps, channels), the tap of the current token first; past is (batch, taps - 1, channels) or null
extern "C" void causal_conv(int64_t half, const void *x, const void *past, const void *starts, const float *w,
                            const float *bias, void *y, int64_t batch, int64_t length, int64_t channels, int64_t taps,
                            int64_t x_batch, int64_t x_row, int64_t silu) {
  Shape s{batch, length, channels, taps, x_batch, x_row, silu != 0};
  half ? forward(s, (const bf16 *)x, (const bf16 *)past, (const bool *)starts, w, bias, (bf16 *)y)
       : forward(s, (const float *)x, (const float *)past, (const bool *)starts, w, bias, (float *)y);
}
extern "C" void causal_conv_backward(int64_t half, const void *x, const void *past, const void *starts, const float *w,
                                     const float *bias, const void *dy, void *dx, void *dpast, float *parts,
                                     int64_t batch, int64_t length, int64_t channels, int64_t taps, int64_t x_batch,
                                     int64_t x_row, int64_t silu, int64_t threads) {
  Shape s{batch, length, channels, taps, x_batch, x_row, silu != 0};
  half ? backward(s, (const bf16 *)x, (const bf16 *)past, (const bool *)starts, w, bias, (const bf16 *)dy, (bf16 *)dx,
                  (bf16 *)dpast, parts, threads)
       : backward(s, (const float *)x, (const float *)past, (const bool *)starts, w, bias, (const float *)dy,
                  (float *)dx, (float *)dpast, parts, threads);
}
