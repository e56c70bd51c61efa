// RMS norms, plain and gated, forward and backward: each row is read once and stays in cache while it is used.
//
//   r = 1 / sqrt(mean(u^2) + eps)     u = x, or x * silu(z) when gated; the mean runs over one group of n channels
//   y = w u r                         h = dy w
//   du = r h - u r^3 mean(u h)        dw = sum over rows of dy u r
//   dx = du silu(z)                   dz = du x silu'(z)
#include <vector>

#include "vec.h"

static inline float inverse_rms(float squares, int64_t n, double eps) {
  return 1.0f / std::sqrt(squares / (float)n + (float)eps);
}

// x and z may be slices of wider rows, hence their row strides; y is contiguous; r has one number per group
template <typename T, bool GATED>
static void forward(const T *x, int64_t x_stride, const T *z, int64_t z_stride, const float *w, T *y, float *r,
                    int64_t rows, int64_t groups, int64_t n, double eps) {
#pragma omp parallel
  {
    std::vector<float> u(n + W);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t g = 0; g < groups; g++) {
        const T *xg = x + row * x_stride + g * n, *zg = z + row * z_stride + g * n;
        vf squares{};
        over(n, [&](int64_t i, int k) INLINE {
          vf v = get(xg + i, k);
          if (GATED) {
            vf zi = get(zg + i, k);
            v *= zi * sigmoid(zi);
          }
          squares += v * v;
          store(&u[i], v);
        });
        float scale = inverse_rms(sum(squares), n, eps);
        r[row * groups + g] = scale;
        T *yg = y + (row * groups + g) * n;
        over(n, [&](int64_t i, int k) INLINE { put(yg + i, load(&u[i]) * scale * get(w + g * n + i, k), k); });
      }
  }
}

// dw_parts is (threads, groups * n), zero before: each thread adds its rows to its own part, for sums that repeat
template <typename T, bool GATED>
static void backward(const T *x, int64_t x_stride, const T *z, int64_t z_stride, const float *w, const float *r,
                     const T *dy, T *dx, T *dz, float *dw_parts, int64_t rows, int64_t groups, int64_t n,
                     int64_t threads) {
#pragma omp parallel for schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    std::vector<float> u(n + W), h(n + W);
    float *dw = dw_parts + part * groups * n;
    for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; row++)
      for (int64_t g = 0; g < groups; g++) {
        const T *xg = x + row * x_stride + g * n, *zg = z + row * z_stride + g * n;
        int64_t at = (row * groups + g) * n;
        float scale = r[row * groups + g];
        vf product{};
        over(n, [&](int64_t i, int k) INLINE {
          vf v = get(xg + i, k), d = get(dy + at + i, k);
          if (GATED) {
            vf zi = get(zg + i, k);
            v *= zi * sigmoid(zi);
          }
          vf hi = d * get(w + g * n + i, k);
          product += v * hi;
          put(dw + g * n + i, get(dw + g * n + i, k) + d * v * scale, k);
          store(&u[i], v);
          store(&h[i], hi);
        });
        float slope = -scale * scale * scale * sum(product) / (float)n;
        over(n, [&](int64_t i, int k) INLINE {
          vf du = load(&h[i]) * scale + load(&u[i]) * slope;
          if (GATED) {
            vf zi = get(zg + i, k), s = sigmoid(zi);
            put(dz + at + i, du * get(xg + i, k) * s * (1.0f + zi * (1.0f - s)), k);
            du *= zi * s;
          }
          put(dx + at + i, du, k);
        });
      }
  }
}

extern "C" void rms_norm(int64_t half, const void *x, const float *w, void *y, float *r, int64_t rows, int64_t n,
                         double eps) {
  half ? forward<bf16, false>((const bf16 *)x, n, (const bf16 *)x, n, w, (bf16 *)y, r, rows, 1, n, eps)
       : forward<float, false>((const float *)x, n, (const float *)x, n, w, (float *)y, r, rows, 1, n, eps);
}
extern "C" void rms_norm_backward(int64_t half, const void *x, const float *w, const float *r, const void *dy, void *dx,
                                  float *dw_parts, int64_t rows, int64_t n, int64_t threads) {
  half ? backward<bf16, false>((const bf16 *)x, n, (const bf16 *)x, n, w, r, (const bf16 *)dy, (bf16 *)dx, nullptr,
                               dw_parts, rows, 1, n, threads)
       : backward<float, false>((const float *)x, n, (const float *)x, n, w, r, (const float *)dy, (float *)dx, nullptr,
                                dw_parts, rows, 1, n, threads);
}
extern "C" void gated_rms_norm(int64_t half, const void *x, int64_t x_stride, const void *z, int64_t z_stride,
                               const float *w, void *y, float *r, int64_t rows, int64_t groups, int64_t n, double eps) {
  half ? forward<bf16, true>((const bf16 *)x, x_stride, (const bf16 *)z, z_stride, w, (bf16 *)y, r, rows, groups, n,
                             eps)
       : forward<float, true>((const float *)x, x_stride, (const float *)z, z_stride, w, (float *)y, r, rows, groups, n,
                              eps);
}
extern "C" void gated_rms_norm_backward(int64_t half, const void *x, int64_t x_stride, const void *z, int64_t z_stride,
                                        const float *w, const float *r, const void *dy, void *dx, void *dz,
                                        float *dw_parts, int64_t rows, int64_t groups, int64_t n, int64_t threads) {
  half ? backward<bf16, true>((const bf16 *)x, x_stride, (const bf16 *)z, z_stride, w, r, (const bf16 *)dy, (bf16 *)dx,
                              (bf16 *)dz, dw_parts, rows, groups, n, threads)
       : backward<float, true>((const float *)x, x_stride, (const float *)z, z_stride, w, r, (const float *)dy,
                               (float *)dx, (float *)dz, dw_parts, rows, groups, n, threads);
}
