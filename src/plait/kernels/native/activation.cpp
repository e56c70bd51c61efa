// Squared ReLU, y = max(x, 0)^2, and its gradient, dx = 2 max(x, 0) dy: one pass over memory each.
#include "vec.h"

static inline vf positive(vf x) { return x < 0 ? vf{} : x; }  // a NaN stays one

template <typename T>
static void forward(const T *x, T *y, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n / W; i++) {
    vf r = positive(load(x + i * W));
    store(y + i * W, r * r);
  }
  if (int64_t done = n / W * W; done < n) {
    vf r = positive(load_some(x + done, n - done));
    store_some(y + done, r * r, n - done);
  }
}

template <typename T>
static void backward(const T *x, const T *dy, T *dx, int64_t n) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n / W; i++)
    store(dx + i * W, 2.0f * positive(load(x + i * W)) * load(dy + i * W));
  if (int64_t done = n / W * W; done < n)
    store_some(dx + done, 2.0f * positive(load_some(x + done, n - done)) * load_some(dy + done, n - done), n - done);
}

extern "C" void squared_relu(int64_t half, const void *x, void *y, int64_t n) {
  half ? forward((const bf16 *)x, (bf16 *)y, n) : forward((const float *)x, (float *)y, n);
}
extern "C" void squared_relu_backward(int64_t half, const void *x, const void *dy, void *dx, int64_t n) {
  half ? backward((const bf16 *)x, (const bf16 *)dy, (bf16 *)dx, n)
       : backward((const float *)x, (const float *)dy, (float *)dx, n);
}
