// Quantisation of a matrix in tiles that stay in the cache: read, rotate, find each block's largest magnitude, make
// its scale, round, and write codes or, for the emulated product, codes x block scale in bfloat16.
//
// A tile is as many rows as a block (16 where blocks do not matter). Blocks lie in memory order: quantising x^T along
// its rows is the block (16, 1) here; what is written is then x^T's codes, or the operand in x's own order.
#include "philox.h"
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
  alignas(64) float scale[LONG + W], times[LONG + W], worth[LONG + W];
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
    store(b.scale + i, worth), store(b.times + i, times);
  }
  if (wide == 1) {
    memcpy(b.worth, b.scale, n * sizeof(float));
    return;
  }
  // backwards, so that no multiplier is overwritten before it was spread
  for (int64_t i = blocks; i--;) {
    const float times = b.times[i], worth = b.scale[i];
    for (int64_t j = 0; j < wide; j++) b.times[i * wide + j] = times, b.worth[i * wide + j] = worth;
  }
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
    vf worth = load(b.scale + i);
    vi as_code = job.scale == E8M0 ? (vi)worth >> 23 : code<E4M3>(worth);
    as_code = worth == worth ? as_code : vi{} + (job.scale == E8M0 ? 255 : 127);
    for (int j = 0; j < W && i + j < blocks; j++) {
      if (job.scale == FLOAT || job.scale == POWER) ((float *)job.scales)[first + (i + j) * step] = worth[j];
      else bytes[(i + j) * step] = (uint8_t)as_code[j];
    }
  }
}

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
      vf times = load(b.times + i);
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
      vf times = load(b.times + i);
      if (job.given_per == 1) times = all(per_row);
      vf y = load(x + i) * times;
      vf q = RANDOM ? by_chance<E>(y, load(u + i)) : nearest<E>(y);
      if (job.fake) {
        put(fake + i, q * load(b.worth + i), n);
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

template <typename T, typename E>
static void quantise(const Job &job) {
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

// the numbers that codes stand for: W of them, the sign in bit 7
template <typename E>
static inline vf numbers(vi code) {
  const vi bits = code & 127;
  vf small = __builtin_convertvector(bits, vf) * (1.0f / (1 << E::M)) * (vf)(vi{} + E::LOWEST);
  vf normal = (vf)((bits << (23 - E::M)) + (E::LOWEST - (1 << 23)));
  vf value = bits >> E::M == 0 ? small : normal;
  if (E::M == 3) value = bits == 127 ? all(__builtin_nanf("")) : value;
  if (E::M == 2) value = bits == 124 ? (vf)(vi{} + EXPONENT) : bits > 124 ? all(__builtin_nanf("")) : value;
  return (vf)((vi)value | (code & 128) << 24);
}

typedef uint8_t vp __attribute__((vector_size(HALF)));

template <typename E>
static inline vi get_codes(const uint8_t *p) {
  if (E::M == 1) {
#if defined(__AVX512F__)
    vq q = (vq)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
#else
    vp pairs;
    memcpy(&pairs, p, sizeof pairs);
    vq q = __builtin_convertvector(pairs, vq);
#endif
    vi codes = (vi)((q & 15) | (q >> 4) << 32);
    return (codes & 7) | (codes & 8) << 4;
  }
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  vb bytes;
  memcpy(&bytes, p, sizeof bytes);
  return (vi)__builtin_convertvector(bytes, vu);
#endif
}

// what each E4M3 code is worth, filled as the library is loaded
static const struct Worths {
  float of[256];
  Worths() {
    for (int i = 0; i < 256; i++) of[i] = numbers<E4M3>(vi{} + i)[0];
  }
} e4m3_worths;

static inline float worth_of(int64_t scale, const void *scales, int64_t i) {
  if (!scales) return 1.0f;
  if (scale == FLOAT || scale == POWER) return ((const float *)scales)[i];
  const int32_t byte = ((const uint8_t *)scales)[i];
  if (scale == TWO_LEVELS) return e4m3_worths.of[byte];
  int32_t bits = byte == 0 ? 0x400000 : byte == 255 ? 0x7fc00000 : byte << 23;
  float worth;
  memcpy(&worth, &bits, 4);
  return worth;
}

template <typename E>
static void decode(const uint8_t *codes, int64_t R, int64_t C, int64_t block_rows, int64_t block_columns, int64_t scale,
                   const void *scales, bf16 *out) {
  const int64_t per_byte = E::M == 1 ? 2 : 1, n = R * C / block_columns, across = C / block_columns;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const float worth = worth_of(scale, scales, i / across / block_rows * across + i % across);
    const uint8_t *from = codes + i * block_columns / per_byte;
    bf16 *to = out + i * block_columns;
    over(block_columns, [&](int64_t j, int m) INLINE {
      uint8_t end[W] = {};
      if (m < W) memcpy(end, from + j / per_byte, m / per_byte);
      put(to + j, numbers<E>(get_codes<E>(m < W ? end : from + j / per_byte)) * worth, m);
    });
  }
}

// codes (R, C) of an element (pairs of E2M1) x the scales of their blocks, or x 1 without scales, as bf16
extern "C" void decode(int64_t element, const uint8_t *codes, int64_t R, int64_t C, int64_t block_rows,
                       int64_t block_columns, int64_t scale, const void *scales, bf16 *out) {
  auto f = element == 0 ? decode<E4M3> : element == 1 ? decode<E5M2> : decode<E2M1>;
  f(codes, R, C, block_rows, block_columns, scale, scales, out);
}
