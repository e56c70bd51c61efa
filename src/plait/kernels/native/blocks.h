// Tiles of a matrix and the scales of their blocks: read, rotate, find each block's largest magnitude, make its scale.
//
// A tile is as many rows as a block (16 where blocks do not matter). Blocks lie in memory order: quantising x^T along
// its rows is the block (16, 1) here; what is written is then x^T's codes, or the operand in x's own order.
#pragma once
#include "rounding.h"

enum Scale : int64_t { GIVEN = 0, FLOAT = 1, POWER = 2, E8M0 = 3, TWO_LEVELS = 4 };
constexpr float FLOAT_MAX = 0x1.fffffep127f, HALF_MAX = 0x1.fep127f;
constexpr int64_t MOST_ROWS = 128, LONG = 1024, WIDE = 128, ROOM = MOST_ROWS * WIDE, SLACK = 3 * W + 4;

struct Job {
  const void *x;
  int64_t half, R, C;
  const float *signs;  // (16,) of the rotation, or null
  int64_t flipped, block_rows, block_columns, scale;
  const float *given;  // what GIVEN multiplies by; of TWO_LEVELS the tensor's
  int64_t given_per;   // 0: one for the tensor, 1: one for each row, 2: one for each column
  int64_t random, seed;
  int64_t fake;
  void *out;     // bf16 (R, C), or codes: (R, C) bytes or (R, C / 2) pairs, of x^T where flipped
  void *scales;  // of each block, of x^T where flipped: float, E8M0 or E4M3; or null
};

struct Tile {
  int64_t r, c, rows, columns;
};
struct Buffers {
  alignas(64) float x[ROOM + SLACK], u[ROOM + MOST_ROWS * SLACK];
  alignas(64) uint8_t codes[ROOM];
  alignas(64) int32_t amax[LONG + W];
  alignas(64) float times[LONG + W], worth[LONG + W];  // of each block of the tile
};

// rows lie this far apart in the buffers
static inline int64_t apart(const Job &job) { return job.block_rows == 1 ? LONG : WIDE; }

// x as it is quantised: rotated and rounded to its own format again, if at all
template <typename T>
static void read(const Job &job, const Tile &t, Buffers &b) {
  const T *x = (const T *)job.x + t.r * job.C + t.c;
  const int64_t far = apart(job);
  if (job.signs && job.flipped) {
    for (int64_t r = 0; r < t.rows; r += 16)
      over(t.columns, [&](int64_t i, int n) INLINE {
        rotate_columns(x + r * job.C + i, job.C, n, job.signs, b.x + r * far + i, far);
      });
    return;
  }
  for (int64_t r = 0; r < t.rows; r++) {
    over(t.columns, [&](int64_t i, int n) INLINE { store(b.x + r * far + i, get(x + r * job.C + i, n)); });
    for (int64_t i = 0; job.signs && i < t.columns; i += 16) rotate_row<T>(b.x + r * far + i, job.signs);
  }
}

// the largest magnitude of each column, as an integer: in that order a NaN is larger than any number
static inline void column_amax(const Job &job, const Tile &t, Buffers &b) {
  const int64_t far = apart(job);
  for (int64_t i = 0; i < t.columns; i += W) {
    vi m{};
    for (int64_t r = 0; r < t.rows; r++) m = larger(m, (vi)magnitude(load(b.x + r * far + i)));
    store((float *)b.amax + i, (vf)m);
  }
}

static inline int32_t largest(const int32_t *a, int64_t n) {
  int32_t m = 0;
  for (int64_t i = 0; i < n; i++) m = a[i] > m ? a[i] : m;
  return m;
}
template <int N>
static inline void each_largest(const int32_t *a, int64_t blocks, int32_t *out) {
  for (int64_t i = 0; i < blocks; i++) out[i] = largest(a + i * N, N);
}

// y where it is below the limit; a NaN stays one
static inline vf at_most(float limit, vf y) { return y > limit ? all(limit) : y; }

// from the block's largest magnitude: what its numbers are multiplied by before rounding, and what a code is worth
template <typename E>
static inline void scale_of(const Job &job, vf amax, vf &times, vf &worth) {
  const vi bits = (vi)amax;
  const vf nan = all(__builtin_nanf(""));
  if (job.scale == TWO_LEVELS) {
    const float G = *job.given, sixth = G * (float)(1.0 / 6.0), rest = 1.0f / G;
    worth = nearest<E4M3>(at_most(448.0f, amax * sixth));
    times = at_most(FLOAT_MAX, 1.0f / (worth * rest));
  } else if (job.scale == E8M0) {
    vi share = (vi)(amax / E::LARGEST_NUMBER);
    // a subnormal share is at most 2^-127 up to half of its bits; a comparison that holds is -1
    vi up = (share >> 23) - ((share & 0x7fffff) > (share >> 23 == 0 ? vi{} + 0x400000 : vi{}));
    worth = (vf)(up == 0 ? vi{} + 0x400000 : up << 23);
    times = up == 0 ? all(1.0f) : (vf)((254 << 23) - (up << 23));
    worth = bits < EXPONENT ? worth : nan, times = bits < EXPONENT ? times : nan;
  } else {
    times = at_most(job.half ? HALF_MAX : FLOAT_MAX, E::LARGEST_NUMBER / amax);
    times = bits == 0 ? all(1.0f) : times;
    if (job.scale == POWER) times = (vf)((vi)times & EXPONENT);
    times = bits < EXPONENT ? times : nan;
    worth = 1.0f / times;
  }
}

template <typename E>
static void make_scales(const Job &job, const Tile &t, Buffers &b) {
  const int64_t n = t.columns, wide = job.block_columns, blocks = n / wide;
  if (job.scale == GIVEN) {
    for (int64_t i = 0; i < n; i++) b.times[i] = job.given[job.given_per == 2 ? t.c + i : 0], b.worth[i] = 1.0f;
    return;
  }
  column_amax(job, t, b);
  if (wide == 16) each_largest<16>(b.amax, blocks, b.amax);
  else if (wide == 32) each_largest<32>(b.amax, blocks, b.amax);
  else if (wide > 1) for (int64_t i = 0; i < blocks; i++) b.amax[i] = largest(b.amax + i * wide, wide);
  for (int64_t i = 0; i < blocks; i += W) {
    vf times, worth;
    scale_of<E>(job, load((float *)b.amax + i), times, worth);
    store(b.worth + i, worth), store(b.times + i, times);
  }
}

// times or worth of the W columns from i on
static inline vf spread(const Job &job, const float *of_blocks, int64_t i) {
  return job.block_columns == 1 ? load(of_blocks + i) : all(of_blocks[i >> __builtin_ctzll(job.block_columns)]);
}

// the scales of a tile's blocks, at their places
static void write_scales(const Job &job, const Tile &t, const Buffers &b) {
  if (!job.scales) return;
  const int64_t down = t.r / job.block_rows, right = t.c / job.block_columns, blocks = t.columns / job.block_columns;
  const int64_t all_down = job.R / job.block_rows, all_right = job.C / job.block_columns;
  const int64_t first = job.flipped ? right * all_down + down : down * all_right + right;
  const int64_t step = job.flipped ? all_down : 1;
  uint8_t *bytes = (uint8_t *)job.scales + first;
  for (int64_t i = 0; i < blocks; i += W) {
    vf worth = load(b.worth + i);
    vi as_code = job.scale == E8M0 ? (vi)worth >> 23 : code<E4M3>(worth);
    as_code = worth == worth ? as_code : vi{} + (job.scale == E8M0 ? 255 : 127);
    for (int j = 0; j < W && i + j < blocks; j++) {
      if (job.scale == FLOAT || job.scale == POWER) ((float *)job.scales)[first + (i + j) * step] = worth[j];
      else bytes[(i + j) * step] = (uint8_t)as_code[j];
    }
  }
}
