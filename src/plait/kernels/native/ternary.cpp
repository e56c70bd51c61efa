// A ternary linear layer: see ternary.h for its numbers. Few rows of x stream the weights through once; many meet them
// in tiles of 4 x 4, each group of weights' codes widened to bytes once.
#include <vector>

#include "ternary.h"

constexpr int64_t FEW = 4;       // rows of x that do without tiles
constexpr int64_t TILE = 4;      // rows of x and of W in a tile
constexpr int64_t AT_ONCE = 64;  // rows of x that stay in the cache while all of W passes

// TILE rows of codes as bytes in the order of their columns
static void widen_codes(const uint8_t *w, int64_t n_rows, int64_t blocks, uint8_t *to) {
  for (int64_t i = 0; i < n_rows * blocks; i++, w += BLOCK_BYTES, to += BLOCK_COLUMNS)
    for (int h = 0; h < BLOCK_BYTES; h += LANE) {
      const bytes v = load_bytes(w + h);
      store_bytes(to + h, field<0>(v)), store_bytes(to + 64 + h, field<1>(v));
      store_bytes(to + 128 + h, field<2>(v)), store_bytes(to + 192 + h, field<3>(v));
    }
}

// sums (R, B) of R rows of W and B of x, both with ld columns
template <int R, int B>
static inline void tile(const uint8_t *w, const int8_t *x, int64_t ld, int32_t (&y)[R][B]) {
  bytes acc[R][B] = {};
  for (int64_t k = 0; k < ld; k += LANE) {
    bytes in[B];
    for (int b = 0; b < B; b++) in[b] = load_bytes(x + b * ld + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const bytes codes = load_bytes(w + r * ld + k);
      for (int b = 0; b < B; b++) acc[r][b] = dot(acc[r][b], codes, in[b]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < B; b++) y[r][b] = whole_sum(acc[r][b]);
}

template <int R, typename Out>
static inline void tiles(const uint8_t *w, const float *scales, int64_t n, const int8_t *x, const Row *rows, int64_t B,
                         int64_t ld, const Out &out) {
  int64_t b = 0;
  for (; b + TILE <= B; b += TILE) {
    int32_t y[R][TILE];
    tile<R, TILE>(w, x + b * ld, ld, y);
    for (int i = 0; i < TILE; i++)
      for (int r = 0; r < R; r++) out(b + i, n + r, result(y[r][i], rows[b + i], scales[n + r]));
  }
  for (; b < B; b++) {
    int32_t y[R][1];
    tile<R, 1>(w, x + b * ld, ld, y);
    for (int r = 0; r < R; r++) out(b, n + r, result(y[r][0], rows[b], scales[n + r]));
  }
}

template <typename Out>
static void multiply_many(const uint8_t *w, const float *scales, int64_t K, int64_t first, int64_t last,
                          const int8_t *x, const Row *rows, int64_t B, const Out &out) {
  const int64_t blocks = blocks_of(K), ld = blocks * BLOCK_COLUMNS;
  static thread_local std::vector<uint8_t> room;
  room.resize(TILE * ld + LINE);
  uint8_t *wide = aligned(room.data());
  for (int64_t n = first; n < last;) {
    const int64_t count = n + TILE <= last ? TILE : 1;
    widen_codes(w + n * blocks * BLOCK_BYTES, count, blocks, wide);
    if (count == TILE) tiles<TILE>(wide, scales, n, x, rows, B, ld, out);
    else tiles<1>(wide, scales, n, x, rows, B, ld, out);
    n += count;
  }
}

// y (B, N) = x (B, K) W^T + bias
template <typename T>
static void linear(const uint8_t *w, const float *scales, int64_t N, int64_t K, const T *x, int64_t B,
                   const float *bias, T *y) {
  const int64_t blocks = blocks_of(K), ld = blocks * BLOCK_COLUMNS, passes = (B + AT_ONCE - 1) / AT_ONCE;
  std::vector<int8_t> room(B * ld + LINE);
  int8_t *codes = aligned(room.data());
  std::vector<Row> rows(B);
  Counters counters(passes);
#pragma omp parallel
  {
    const Crew crew = Crew::here();
    std::vector<float> row(K);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
      for (int64_t k = 0; k < K; k++) row[k] = load1(x + b * K + k);
      rows[b] = to_int8(row.data(), K, codes + b * ld);
    }
    const auto out = [&](int64_t b, int64_t n, float value) { store1(y + b * N + n, bias ? value + bias[n] : value); };
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t b = pass * AT_ONCE, count = b + AT_ONCE < B ? AT_ONCE : B - b;
      const auto shifted = [&](int64_t i, int64_t n, float value) { out(b + i, n, value); };
      const int64_t least = count <= FEW ? 16384 / (blocks * BLOCK_BYTES) + 1 : 4 * TILE;
      for (int64_t first, last; take(counters.of(pass), N, least, crew, first, last);)
        if (count <= FEW)
          ternary_multiply(w, scales, K, first, last, codes + b * ld, rows.data() + b, count, shifted);
        else multiply_many(w, scales, K, first, last, codes + b * ld, rows.data() + b, count, shifted);
    }
  }
}

extern "C" void ternary(const void *codes, const void *scales, int64_t N, int64_t K, int64_t half, const void *x,
                        int64_t B, const void *bias, void *y) {
  const uint8_t *w = (const uint8_t *)codes;
  const float *each = (const float *)scales, *added = (const float *)bias;
  half ? linear(w, each, N, K, (const bf16 *)x, B, added, (bf16 *)y)
       : linear(w, each, N, K, (const float *)x, B, added, (float *)y);
}
