// Quantisation of a matrix in tiles that stay in the cache: scale, round, and write codes or, for the emulated product,
// codes x block scale in bfloat16.
#include "blocks.h"
#include "codes.h"
#include "philox.h"

// random numbers for row r of the tile at the result; rows of x^T are columns here
static void draw(const Job &job, const Philox &philox, const Tile &t, Buffers &b) {
  const int64_t far = apart(job);
  for (int64_t r = 0; r < t.rows; r += job.flipped ? 4 : 1) {
    if (!job.flipped) {
      uniform_row(philox, (t.r + r) * job.C + t.c, t.columns, b.u + r * (far + SLACK));
      continue;
    }
    for (int64_t i = 0; i < t.columns; i += W) {
      vf u[4];
      uniform_columns(philox, (t.c + i) * job.R + t.r + r, job.R, u);
      for (int j = 0; j < 4; j++) store(b.u + (r + j) * far + i, u[j]);
    }
  }
}

// the code of a number q that y was rounded to
template <typename E>
static inline vi code_of(vf q, vf y, bool keeps_sign) {
  vi bits = (q == q ? code<E>(q) : vi{} + (E::M == 1 ? 0 : 127)) & 127;
  return bits | ((keeps_sign ? (vi)y : y == 0 ? vi{} : (vi)y) >> (E::M == 1 ? 28 : 24) & (E::M == 1 ? 8 : 128));
}

// codes of E2M1 down columns, sixteen rows at a time: eight of them make one lane
template <bool RANDOM>
static void round_columns(const Job &job, const Tile &t, Buffers &b) {
  const int64_t far = apart(job);
  const bool keeps_sign = job.scale != TWO_LEVELS;
  uint8_t *out = (uint8_t *)job.out;
  for (int64_t i = 0; i < t.columns; i += W)
    for (int64_t r = 0; r < t.rows; r += 8) {
      vf times = spread(job, b.times, i);
      vi eight{};
      for (int j = 0; j < 8; j++) {
        const int64_t at = (r + j) * far + i;
        vf y = load(b.x + at) * times;
        vf q = RANDOM ? by_chance<E2M1>(y, load(b.u + at)) : nearest<E2M1>(y);
        eight |= code_of<E2M1>(q, y, keeps_sign) << (4 * j);
      }
      for (int c = 0; c < W && i + c < t.columns; c++) {
        int32_t four_bytes = eight[c];
        memcpy(out + ((t.c + i + c) * job.R + t.r + r) / 2, &four_bytes, 4);
      }
    }
}

template <typename E, bool RANDOM>
static void round_tile(const Job &job, const Tile &t, Buffers &b) {
  const int64_t far = apart(job);
  const bool keeps_sign = job.scale != TWO_LEVELS;  // of zeros
  for (int64_t r = 0; r < t.rows; r++) {
    const float *x = b.x + r * far;
    const float *u = job.flipped ? b.u + r * far : b.u + r * (far + SLACK) + ((t.r + r) * job.C + t.c) % 4;
    const float per_row = job.given_per == 1 ? job.given[t.r + r] : 1.0f;
    bf16 *fake = (bf16 *)job.out + (t.r + r) * job.C + t.c;
    over(t.columns, [&](int64_t i, int n) INLINE {
      vf times = spread(job, b.times, i);
      if (job.given_per == 1) times = all(per_row);
      vf y = load(x + i) * times;
      vf q = RANDOM ? by_chance<E>(y, load(u + i)) : nearest<E>(y);
      if (job.fake) {
        put(fake + i, q * spread(job, b.worth, i), n);
        return;
      }
      vb bytes = bytes_of(code_of<E>(q, y, keeps_sign));
      memcpy(b.codes + r * far + i, &bytes, sizeof bytes);
    });
  }
}

typedef uint8_t v16 __attribute__((vector_size(16)));

// bytes first .. first + 7 of a and b in turn
static inline v16 interleaved(v16 a, v16 b, int first) {
#if defined(__clang__)
  v16 v;
  for (int i = 0; i < 8; i++) v[2 * i] = a[first + i], v[2 * i + 1] = b[first + i];
  return v;
#else
  const v16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return __builtin_shuffle(a, b, low + (uint8_t)first);
#endif
}

// sixteen rows of sixteen bytes, turned
static inline void turn(const uint8_t *from, int64_t far, v16 to[16]) {
  for (int i = 0; i < 16; i++) memcpy(to + i, from + i * far, 16);
  for (int step = 0; step < 4; step++) {
    v16 next[16];
    for (int i = 0; i < 8; i++) {
      next[2 * i] = interleaved(to[i], to[i + 8], 0);
      next[2 * i + 1] = interleaved(to[i], to[i + 8], 8);
    }
    memcpy(to, next, sizeof next);
  }
}

// n codes as bytes, or two in a byte
template <typename E>
static inline void put_codes(const uint8_t *codes, int64_t n, uint8_t *out) {
  if (E::M != 1) {
    memcpy(out, codes, n);
    return;
  }
  for (int64_t i = 0; i < n / 2; i++) out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

template <typename E>
static void write_codes(const Job &job, const Tile &t, const Buffers &b) {
  const int64_t far = apart(job), per_byte = E::M == 1 ? 2 : 1;
  uint8_t *out = (uint8_t *)job.out;
  if (!job.flipped) {
    for (int64_t r = 0; r < t.rows; r++)
      put_codes<E>(b.codes + r * far, t.columns, out + ((t.r + r) * job.C + t.c) / per_byte);
    return;
  }
  for (int64_t r = 0; r < t.rows; r += 16)
    for (int64_t i = 0; i < t.columns; i += 16) {
      const int64_t rows = t.rows - r < 16 ? t.rows - r : 16, columns = t.columns - i < 16 ? t.columns - i : 16;
      v16 turned[16];
      turn(b.codes + r * far + i, far, turned);
      for (int64_t c = 0; c < columns; c++)
        put_codes<E>((uint8_t *)(turned + c), rows, out + ((t.c + i + c) * job.R + t.r + r) / per_byte);
    }
}

// calls f for every tile, each thread with buffers of its own
template <typename F>
static void over_tiles(const Job &job, F f) {
  const int64_t tall = job.block_rows, wide = apart(job);
  const int64_t across = (job.C + wide - 1) / wide, tiles = (job.R + tall - 1) / tall * across;
#pragma omp parallel
  {
    static thread_local Buffers buffers;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; i++) {
      Tile t{i / across * tall, i % across * wide, tall, wide};
      t.rows = job.R - t.r < tall ? job.R - t.r : tall, t.columns = job.C - t.c < wide ? job.C - t.c : wide;
      f(t, buffers);
    }
  }
}

template <typename T, typename E, bool RANDOM>
static void quantise(const Job &job) {
  const Philox philox(job.seed);
  over_tiles(job, [&](const Tile &t, Buffers &b) {
    read<T>(job, t, b);
    make_scales<E>(job, t, b);
    if (RANDOM) draw(job, philox, t, b);
    write_scales(job, t, b);
    if (E::M == 1 && job.flipped && !job.fake) {
      round_columns<RANDOM>(job, t, b);
      return;
    }
    round_tile<E, RANDOM>(job, t, b);
    if (!job.fake) write_codes<E>(job, t, b);
  });
}

// FP8 under one scale, to nearest: nothing but a pass over memory
template <typename T, typename E>
static void cast(const Job &job) {
  const T *x = (const T *)job.x;
  const int64_t n = job.R * job.C, piece = 1 << 14;
  const float times = *job.given;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < n; first += piece)
    over(n - first < piece ? n - first : piece, [&](int64_t i, int m) INLINE {
      vf y = get(x + first + i, m) * times, q = nearest<E>(y);
      if (job.fake) return put((bf16 *)job.out + first + i, q, m);
      vb bytes = bytes_of(code_of<E>(q, y, true));
      memcpy((uint8_t *)job.out + first + i, &bytes, m);
    });
}

template <typename T, typename E>
static void quantise(const Job &job) {
  if (E::M > 1 && job.scale == GIVEN && !job.given_per && !job.random && !job.signs && (job.fake || !job.flipped))
    return cast<T, E>(job);
  job.random ? quantise<T, E, true>(job) : quantise<T, E, false>(job);
}
template <typename T>
static void quantise(const Job &job, int64_t element) {
  element == 0 ? quantise<T, E4M3>(job) : element == 1 ? quantise<T, E5M2>(job) : quantise<T, E2M1>(job);
}

// element: 0 E4M3, 1 E5M2, 2 E2M1; the others as in Job
extern "C" void quantise(int64_t element, const void *x, int64_t half, int64_t R, int64_t C, const float *signs,
                         int64_t flipped, int64_t block_rows, int64_t block_columns, int64_t scale, const float *given,
                         int64_t given_per, int64_t random, int64_t seed, int64_t fake, void *out, void *scales) {
  const Job job{x,     half,  R,         C,      signs, flipped, block_rows, block_columns,
                scale, given, given_per, random, seed,  fake,    out,        scales};
  half ? quantise<bf16>(job, element) : quantise<float>(job, element);
}

// bits without the sign, as integers that are in the numbers' order, NaN above all
static int32_t amax_of(const float *x, int64_t n) {
  int32_t most = 0;
#pragma omp parallel for schedule(static) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= ~SIGN;
    most = bits > most ? bits : most;
  }
  return most;
}
static int32_t amax_of(const bf16 *x, int64_t n) {
  uint16_t most = 0;
#pragma omp parallel for schedule(static) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    uint16_t bits = x[i].bits & 0x7fff;
    most = bits > most ? bits : most;
  }
  return (int32_t)most << 16;
}
template <typename T>
static int32_t amax_rotated(const Job &job) {
  int32_t most = 0;
  over_tiles(job, [&](const Tile &t, Buffers &b) {
    read<T>(job, t, b);
    column_amax(job, t, b);
    const int32_t here = largest(b.amax, t.columns);
#pragma omp critical(most)
    most = here > most ? here : most;
  });
  return most;
}

// the largest magnitude of x (R, C), or of its rotation along rows, along columns where flipped
extern "C" void amax(const void *x, int64_t half, int64_t R, int64_t C, const float *signs, int64_t flipped,
                     float *out) {
  const Job job{x, half, R, C, signs, flipped, flipped ? 16 : 1, 1};
  int32_t most = signs ? half ? amax_rotated<bf16>(job) : amax_rotated<float>(job)
                       : half ? amax_of((const bf16 *)x, R * C) : amax_of((const float *)x, R * C);
  memcpy(out, &most, 4);
}

// codes (R, C) of an element (pairs of E2M1) x the scales of their blocks, or x 1 without scales, as bf16
extern "C" void decode(int64_t element, const uint8_t *codes, int64_t R, int64_t C, int64_t block_rows,
                       int64_t block_columns, int64_t scale, const void *scales, bf16 *out) {
  auto f = element == 0 ? decode<E4M3> : element == 1 ? decode<E5M2> : decode<E2M1>;
  f(codes, R, C, block_rows, block_columns, scale, scales, out);
}
