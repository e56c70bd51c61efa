// A linear layer for a few rows of x: see gemv.h.
#include <algorithm>
#include <vector>

#include "gemv.h"

constexpr int64_t MOST_INPUTS = 1 << 18;  // numbers of x that are worked at a time: half a megabyte in bfloat16

// x as `multiply` takes it, and memory for that
struct Ready {
  std::vector<float> wide, sums;
  std::vector<bf16> low;

  template <typename T>
  Inputs of(const Matrix &w, const T *x, int64_t B) {
    if (sizeof(T) == 2 && uses_half(w)) return {nullptr, (const bf16 *)x, nullptr, nullptr, nullptr, B, w.K};
    const int64_t ld = (w.K + 63) / 64 * 64 + 32, room = B * ld + LINE;
    wide.resize(room), sums.resize(room), low.resize(room);
    float *to = aligned(wide.data());
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < w.K; k++) to[b * ld + k] = load1(x + b * w.K + k);
    return prepare(w, to, B, ld, aligned(low.data()), aligned(sums.data()));
  }
};

// y (B, N) = x (B, K) W^T + bias, in the type of x and y
template <typename T>
static void linear(const Matrix &w, const T *x, int64_t B, const T *bias, T *y) {
  Ready ready;
  const Inputs in = ready.of(w, x, B);
  const int64_t least = least_rows(w);
  // as many x at a time as stay in the second cache
  const int64_t some = std::max<int64_t>(MOST_INPUTS / w.K, 16);
  Counters counters((B + some - 1) / some);
#pragma omp parallel
  {
    const Crew crew = Crew::here();
    for (int64_t b0 = 0; b0 < B; b0 += some) {
      const Inputs mine = in.from(b0, std::min(some, B - b0));
      for (int64_t first, last; take(counters.of(b0 / some), w.N, least, crew, first, last);)
        multiply(w, first, last, mine, [&](int64_t b, int64_t n, float value) {
          store1(y + (b0 + b) * w.N + n, bias ? value + load1(bias + n) : value);
        });
    }
  }
}

extern "C" void gemv(const void *codes, const void *scales, const void *zeros, int64_t format, int64_t group, int64_t N,
                     int64_t K, int64_t rounds, int64_t half, const void *x, int64_t B, const void *bias, void *y) {
  const Matrix w = {codes, (const uint16_t *)scales, (const uint8_t *)zeros, format, group, N, K, rounds};
  half ? linear(w, (const bf16 *)x, B, (const bf16 *)bias, (bf16 *)y)
       : linear(w, (const float *)x, B, (const float *)bias, (float *)y);
}

// a row of codes as numbers
template <typename Code, typename T>
static void row(const Matrix &w, int64_t n, T *y) {
  const uint8_t *p = (const uint8_t *)w.codes + n * w.row_bytes(), *zeros = w.zeros + n * w.groups();
  const int offset = w.format == INT4 ? 8 : 128;
  for (int64_t k = 0; k < w.K; k += 64, p += Code::BLOCK)
    for (int h = 0; h < 2; h++) {
      const int64_t g = (k + 32 * h) / w.group;
      const float scale = from_half(w.scales[n * w.groups() + g]);
      const float zero = w.zeros ? zeros[g] - offset : 0;
      for (int i = 0; i < 32 / W; i++) store(y + k + 32 * h + i * W, (Code::get(p, h, i) - zero) * scale);
    }
}
template <typename T>
static void rows(const Matrix &w, T *y) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < w.N; n++) {
    if (w.format == INT4) row<Int4>(w, n, y + n * w.K);
    else if (w.zeros) row<UInt8>(w, n, y + n * w.K);
    else row<Int8>(w, n, y + n * w.K);
  }
}

// y (N, K) = what the codes stand for
extern "C" void dequantize(const void *codes, const void *scales, const void *zeros, int64_t format, int64_t group,
                           int64_t N, int64_t K, int64_t half, void *y) {
  const Matrix w = {codes, (const uint16_t *)scales, (const uint8_t *)zeros, format, group, N, K, 0};
  half ? rows(w, (bf16 *)y) : rows(w, (float *)y);
}
