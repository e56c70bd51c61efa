// y = W x for a few x at a time: weights as they are stored, read once for as many x as the cache holds, at the speed of memory.
//
// The rows of W stream through one after the other; each meets all x before the next one comes. Weights of 8 and 4 bits
// come in blocks of 64 columns with a scale per group of 32, 64 or 128:
//
//     int8   w = scale * (code - zero),   codes int8 without zeros, uint8 with them
//     int4   byte j of a block holds column j in its low half, column 32 + j in its high half; zero is 8 unless given
//
// Sums of 32 products are scaled, not single weights; the zeros' part is scale * zero * (sum of x over the group).
// Where x may be rounded to bfloat16 (the recipe's own numbers), AVX-512 multiplies bfloat16 in pairs, and codes with x in
// 16-bit steps of each group's largest value, exact in 32 bits. For int4 these steps lie as two planes of bytes, high and
// low, 64 columns each: codes meet four of them an instruction.
#pragma once
#include "crew.h"
#include "vec.h"

enum Format : int64_t { FP32, BF16, INT8, INT4, TERNARY };  // TERNARY: see ternary.h

// every member is eight bytes wide, as Python writes them
struct Matrix {
  const void *codes;       // (N, K) fp32, bf16, int8 or uint8; (N, K / 2) int4
  const uint16_t *scales;  // (N, K / group) float16, or null
  const uint8_t *zeros;    // (N, K / group) or null
  int64_t format, group, N, K;
  int64_t rounds;  // x may be rounded to bfloat16

  int64_t groups() const { return scales ? K / group : 0; }
  int64_t row_bytes() const {
    if (format == TERNARY) return (K + 255) / 256 * 64;
    return format == FP32 ? 4 * K : format == BF16 ? 2 * K : format == INT8 ? K : K / 2;
  }
};

// B inputs, made ready once for all rows
struct Inputs {
  const float *x;  // (B, ld)
  const bf16 *half;      // (B, ld) the same in bfloat16, where `uses_half`
  const int16_t *fixed;  // (B, ld) the same in steps, where `uses_fixed`
  const float *steps;    // (B, ld) the size of a step of each group
  const float *sums;     // (B, ld) sums over groups, where there are zeros or codes around 8
  int64_t B, ld;

  // n of them from b on
  Inputs from(int64_t b, int64_t n) const {
    const auto on = [&](auto *p) { return p ? p + b * ld : p; };
    return {on(x), on(half), on(fixed), on(steps), on(sums), n, ld};
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
static inline bool uses_half(const Matrix &w) { return w.rounds && w.format == BF16 && w.K % 32 == 0; }
static inline bool uses_fixed(const Matrix &w) { return w.rounds && (w.format == INT8 || w.format == INT4); }
#else
static inline bool uses_half(const Matrix &) { return false; }
static inline bool uses_fixed(const Matrix &) { return false; }
#endif

constexpr int MOST_GROUPS = 1024;      // K / group at most
constexpr int64_t AHEAD = 4096;        // bytes from what is read to what is asked for

constexpr int64_t LINE = 64;  // of the cache: a vector that straddles two takes two loads
template <typename T>
static inline T *aligned(T *p) {
  return (T *)(((uintptr_t)p + LINE - 1) / LINE * LINE);
}

template <int U>
static inline float total(const vf (&v)[U]) {
  vf s = v[0];
  for (int i = 1; i < U; i++) s += v[i];
  return sum(s);
}
// into the second cache: the nearest one has too few places for what is on its way
static inline void ask(const void *p) { __builtin_prefetch((const char *)p + AHEAD, 0, 2); }

static inline float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
#if defined(__aarch64__)
  __fp16 f;
#else
  _Float16 f;
#endif
  memcpy(&f, &h, 2);
  return f;
#endif
}
static inline void widen(const uint16_t *h, float *f, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(f + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(h + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#endif
  for (; i < n; i++) f[i] = from_half(h[i]);
}

// ---- codes to floats: W codes of a block of 64 columns, from its half h (columns 32 h + i W ...)

typedef uint8_t vb __attribute__((vector_size(W)));
typedef int8_t vc __attribute__((vector_size(W)));

#if defined(__AVX512F__)
static inline vi whole(const int8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vi whole(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vf floats(vi v) { return (vf)_mm512_cvtepi32_ps((__m512i)v); }
#elif defined(__AVX2__)
static inline vi whole(const int8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline vi whole(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline vf floats(vi v) { return (vf)_mm256_cvtepi32_ps((__m256i)v); }
#else
template <typename V>
static inline vi whole_of(const void *p) {
  V c;
  memcpy(&c, p, W);
  return __builtin_convertvector(c, vi);
}
static inline vi whole(const int8_t *p) { return whole_of<vc>(p); }
static inline vi whole(const uint8_t *p) { return whole_of<vb>(p); }
static inline vf floats(vi v) { return __builtin_convertvector(v, vf); }
#endif

struct Int8 {
  static constexpr int BLOCK = 64;  // bytes of 64 columns
  static vf get(const uint8_t *p, int h, int i) { return floats(whole((const int8_t *)p + 32 * h + i * W)); }
};
struct UInt8 {  // around 128, to keep the zeros' part small
  static constexpr int BLOCK = 64;
  static vf get(const uint8_t *p, int h, int i) { return floats(whole(p + 32 * h + i * W) - 128); }
};
struct Int4 {  // around 8
  static constexpr int BLOCK = 32;
  static vf get(const uint8_t *p, int h, int i) {
    vi v = whole(p + i * W);
    if (h) v = v >> 4;
#if defined(__AVX512F__)
    // the permutation reads the low four bits only: a table lookup
    const vf table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (vf)_mm512_permutexvar_ps((__m512i)v, (__m512)table);
#else
    return floats((v & 15) - 8);
#endif
  }
};

// ---- one row times B inputs: y[b]. A row is read from its first byte to its last, and so is the next: one stream

// sums kept apart, to hide the latency of an addition; as many for any B: a row's bits do not depend on its neighbours
constexpr int LANES_APART = 4;

template <int B, typename T>
static inline void plain(const T *w, int64_t K, const float *x, int64_t ld, float (&y)[B]) {
  constexpr int U = LANES_APART;
  vf acc[B][U] = {};
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) {
    for (int i = 0; i < 64 * (int)sizeof(T); i += 64) ask((const char *)(w + k) + i);
#pragma GCC unroll 16
    for (int i = 0; i < 64 / W; i++)
      for (int b = 0; b < B; b++) acc[b][i % U] += load(w + k + i * W) * load(x + b * ld + k + i * W);
  }
  for (; k < K; k += W)
    for (int b = 0; b < B; b++) {
      const int n = K - k < W ? K - k : W;
      acc[b][0] += load_some(w + k, n) * load_some(x + b * ld + k, n);
    }
  for (int b = 0; b < B; b++) y[b] = total(acc[b]);
}

template <int B, typename Code>
static inline void blocks(const uint8_t *w, int64_t K, const float *scales, int shift, const float *x, int64_t ld,
                          float (&y)[B]) {
  vf acc[B][2] = {};
  for (int64_t k = 0; k < K; k += 64, w += Code::BLOCK) {
    ask(w);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      vf part[B] = {};
#pragma GCC unroll 8
      for (int i = 0; i < 32 / W; i++)
        for (int b = 0; b < B; b++) part[b] += Code::get(w, h, i) * load(x + b * ld + k + 32 * h + i * W);
      const vf scale = all(scales[(k + 32 * h) >> shift]);
      for (int b = 0; b < B; b++) acc[b][h] += part[b] * scale;
    }
  }
  for (int b = 0; b < B; b++) y[b] = total(acc[b]);
}

#if defined(__AVX512BF16__)
static inline __m512bh pairs(const void *p) { return (__m512bh)_mm512_loadu_si512(p); }

// parts P of two vectors in the first half of one, parts Q in the other, added up
template <int P, int Q>
static inline vf quarters(vf a, vf b) {
  return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, P) + (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, Q);
}
template <int P, int Q>
static inline vf lanes(vf a, vf b) {
  return (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, P) + (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, Q);
}
// lane i is what v[i] adds up to, in the order of `sum`: three instructions for each where that takes nine
static inline vf sums(const vf *v) {
  vf two[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) two[i] = quarters<0x44, 0xee>(v[i % 4 + i / 4 * 8], v[i % 4 + i / 4 * 8 + 4]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) four[i] = quarters<0x88, 0xdd>(two[i], two[i + 4]);
  return lanes<0x88, 0xdd>(lanes<0x44, 0xee>(four[0], four[1]), lanes<0x44, 0xee>(four[2], four[3]));
}

// R rows times C x: y[c][r]. Each vector that is read meets several others, and each product has one sum over the whole
// row: its bits are the same in any tile. On the way the rows from `next` on are asked for: all at once would hold up the
// products
template <int R, int C>
static inline void tile(const bf16 *w, int64_t K, const bf16 *x, int64_t ld, const bf16 *next, float (&y)[4][R]) {
  vf acc[C][R] = {};
  for (int64_t k = 0; k < K; k += 32) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) __builtin_prefetch(next + r * K + k, 0, 2);
    __m512bh rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) rows[r] = pairs(w + r * K + k);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const __m512bh v = pairs(x + c * ld + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[c][r] = (vf)_mm512_dpbf16_ps((__m512)acc[c][r], rows[r], v);
    }
  }
  if constexpr (R * C == 16) {
    const vf all = sums(acc[0]);
    memcpy(y, &all, sizeof all);
  } else {
    for (int c = 0; c < C; c++)
      for (int r = 0; r < R; r++) y[c][r] = sum(acc[c][r]);
  }
}

// R rows from n on times all x
template <int R, typename Out>
static inline void tiles(const Matrix &w, int64_t n, const Inputs &in, const Out &out) {
  constexpr decltype(&tile<R, 4>) WORK[4] = {tile<R, 1>, tile<R, 2>, tile<R, 3>, tile<R, 4>};
  const bf16 *p = (const bf16 *)w.codes + n * w.K, *next = R == 1 ? p + AHEAD / 2 : p + R * w.K;
  for (int64_t b = 0; b < in.B; b += 4) {
    const int C = in.B - b < 4 ? in.B - b : 4;
    float y[4][R];
    WORK[C - 1](p, w.K, in.half + b * in.ld, in.ld, next, y);
    for (int c = 0; c < C; c++)
      for (int r = 0; r < R; r++) out(b + c, n + r, y[c][r]);
  }
}

// codes as 16-bit numbers, those with zeros around 128
template <bool ZEROS>
static inline __m512i words(const uint8_t *p) {
  const __m256i v = _mm256_loadu_si256((const __m256i *)p);
  return ZEROS ? _mm512_sub_epi16(_mm512_cvtepu8_epi16(v), _mm512_set1_epi16(128)) : _mm512_cvtepi8_epi16(v);
}

// sums of a group: 64 products a lane of at most 2^7 2^15, well inside 32 bits
template <int B, bool ZEROS>
static inline void int8_fixed(const uint8_t *w, int64_t K, int64_t group, const float *scales, const int16_t *x,
                              const float *steps, int64_t ld, float (&y)[B]) {
  vf acc[B] = {};
  for (int64_t k = 0, g = 0; k < K; k += group, g++) {
    __m512i part[B] = {};
    for (int64_t i = k; i < k + group; i += 32) {
      ask(w + i);
      const __m512i codes = words<ZEROS>(w + i);
      for (int b = 0; b < B; b++)
        part[b] = _mm512_dpwssd_epi32(part[b], codes, _mm512_loadu_si512(x + b * ld + i));
    }
    for (int b = 0; b < B; b++) acc[b] += (vf)_mm512_cvtepi32_ps(part[b]) * (scales[g] * steps[b * ld + g]);
  }
  for (int b = 0; b < B; b++) y[b] = sum(acc[b]);
}

// x in steps, whole, or in two planes of bytes; what is no number makes its group's step none
template <bool PLANES>
static inline void to_fixed(const float *x, int64_t K, int64_t group, int16_t *fixed, float *steps, float *sums) {
  constexpr float MOST = PLANES ? 127 * 256 + 127 : 32767;
  for (int64_t k = 0, g = 0; k < K; k += group, g++) {
    vf most = {}, seen = {};
    for (int64_t i = k; i < k + group; i += W) {
      const vf v = load(x + i);
      most = larger(most, larger(v, -v));
      seen += v * 0.0f;
    }
    const float largest = max(most);
    steps[g] = largest / MOST + sum(seen);
    const float inverse = largest > 0 ? MOST / largest : 0;
    __m512i whole = {};
    for (int64_t i = k; i < k + group; i += W) {
      const __m512i v = _mm512_cvtps_epi32((__m512)(load(x + i) * inverse));
      if (PLANES) {
        int8_t *high = (int8_t *)(fixed + (i & ~63)) + (i & 63);
        // v = 256 high + low, both with a sign
        const __m512i rounded = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i *)high, _mm512_cvtepi32_epi8(rounded));
        _mm_storeu_si128((__m128i *)(high + 64), _mm512_cvtepi32_epi8(v));
        whole = _mm512_add_epi32(whole, v);
      } else {
        _mm256_storeu_si256((__m256i *)(fixed + i), _mm512_cvtepi32_epi16(v));
      }
    }
    if (PLANES) sums[g] = (float)_mm512_reduce_add_epi32(whole) * steps[g];
  }
}

// a byte each for 64 columns: codes 0 ... 15, those of the last 32 columns sixteen times as large, as they lie
static inline __m512i nibbles(const uint8_t *p) {
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_and_si512(twice, _mm512_inserti64x4(_mm512_set1_epi8(15), _mm256_set1_epi8((char)0xf0), 1));
}

// codes are taken from 0 up; what lies around 8 comes off at the end, with the sums of x. A group is 2^shift blocks of 64
// columns, or half of one. The bare loop matters: what the core decodes bounds it, not what it multiplies. y[r * B + b] of
// R rows and B x: several rows share what is read of x, and each has a sum of its own, so that none waits for the last
template <int R, int B, bool HALVES>
static inline void int4_fixed(const uint8_t *w, int64_t K, int64_t groups, const float *scales, int shift,
                              const int16_t *x, const float *steps, const float *sums, int64_t ld,
                              float (&y)[R * B]) {
  float sizes[R * B][MOST_GROUPS];
  vf acc[R * B] = {}, rest[R * B] = {};
  for (int64_t g = 0; g < groups; g += W) {
    const __mmask16 some = groups - g < W ? (1 << (groups - g)) - 1 : 0xffff;
    for (int i = 0; i < R * B; i++) {
      const int r = i / B, b = i % B;
      const vf scale = (vf)_mm512_maskz_loadu_ps(some, scales + r * groups + g);
      store(sizes[i] + g, scale * (vf)_mm512_maskz_loadu_ps(some, steps + b * ld + g));
      rest[i] -= 8.0f * scale * (vf)_mm512_maskz_loadu_ps(some, sums + b * ld + g);
    }
  }
  // further ahead than the rows at work
  const int64_t row = K / 2, far = R * row > AHEAD ? R * row : AHEAD, blocks = (uint64_t)K / 64;
  for (int64_t i = 0; i < blocks; i++, w += 32, x += 64) {
    const int64_t g = HALVES ? 2 * i : i >> shift;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      if (i % 2 == 0) __builtin_prefetch(w + r * row + far, 0, 2);
      const __m512i codes = nibbles(w + r * row);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) {
        const int16_t *q = x + b * ld;
        const __m512i high = _mm512_dpbusd_epi32(__m512i{}, codes, _mm512_loadu_si512(q));
        const __m512i whole = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), codes, _mm512_loadu_si512(q + 32));
        const float *mine = sizes[r * B + b] + g;
        vf size = all(mine[0]);
        if (HALVES) size = (vf)_mm512_mask_blend_ps(0xff00, (__m512)size, _mm512_set1_ps(mine[1]));
        acc[r * B + b] += (vf)_mm512_cvtepi32_ps(whole) * size;
      }
    }
  }
  const vf parts = (vf)_mm512_insertf32x8(_mm512_set1_ps(1), _mm256_set1_ps(1.0f / 16), 1);
  for (int i = 0; i < R * B; i++) y[i] = sum(rest[i] + parts * acc[i]);
}

template <int R, int B>
static inline void int4_rows(const Matrix &w, int64_t n, const Inputs &in, int64_t b, const float *scales,
                             float (&y)[R * B]) {
  const auto work = w.group < 64 ? int4_fixed<R, B, true> : int4_fixed<R, B, false>;
  const int shift = w.group < 64 ? 0 : __builtin_ctzll(w.group) - 6;
  const int64_t at = b * in.ld;
  work((const uint8_t *)w.codes + n * w.row_bytes(), w.K, w.groups(), scales, shift, in.fixed + at, in.steps + at,
       in.sums + at, in.ld, y);
}
#endif

template <int B>
static inline void one_row(const Matrix &w, int64_t n, const Inputs &in, int64_t b, const float *scales,
                           float (&y)[B]) {
  const uint8_t *p = (const uint8_t *)w.codes + n * w.row_bytes();
  const float *x = in.x + b * in.ld;
  const int shift = w.scales ? __builtin_ctzll(w.group) : 0;
#if defined(__AVX512BF16__)
  if (in.fixed && w.format == INT4) return int4_rows<1, B>(w, n, in, b, scales, y);
  if (in.fixed) {
    const auto work = w.zeros ? int8_fixed<B, true> : int8_fixed<B, false>;
    return work(p, w.K, w.group, scales, in.fixed + b * in.ld, in.steps + b * in.ld, in.ld, y);
  }
#endif
  if (w.format == FP32) return plain<B>((const float *)p, w.K, x, in.ld, y);
  if (w.format == BF16) return plain<B>((const bf16 *)p, w.K, x, in.ld, y);
  if (w.format == INT4) return blocks<B, Int4>(p, w.K, scales, shift, x, in.ld, y);
  if (w.zeros) return blocks<B, UInt8>(p, w.K, scales, shift, x, in.ld, y);
  return blocks<B, Int8>(p, w.K, scales, shift, x, in.ld, y);
}

// what the zeros take away: sum over groups of scale * zero * (sum of x)
static inline float zeros_part(const Matrix &w, int64_t n, const float *scales, const float *sums) {
  const uint8_t *zeros = w.zeros + n * w.groups();
  const int offset = w.format == INT4 ? 8 : 128;  // the codes are taken around it already
  float total = 0;
  for (int64_t g = 0; g < w.groups(); g++) total += scales[g] * (float)(zeros[g] - offset) * sums[g];
  return total;
}

// rows first ... last - 1: out(b, n, value) takes each result
template <typename Out>
static inline void multiply(const Matrix &w, int64_t first, int64_t last, const Inputs &in, const Out &out) {
  constexpr int SOME = 4;
  float scales[SOME * MOST_GROUPS];
  const int64_t groups = w.groups();
  const auto give = [&](int64_t b, int64_t n, const float *scales, float value) {
    out(b, n, w.zeros ? value - zeros_part(w, n, scales, in.sums + b * in.ld) : value);
  };
  int64_t n = first;
#if defined(__AVX512BF16__)
  // one x alone waits for memory, which one stream of rows uses best
  for (; in.half && in.B > 1 && n + 4 <= last; n += 4) tiles<4>(w, n, in, out);
  for (; in.half && n < last; n++) tiles<1>(w, n, in, out);
  // but codes of four bits take as long to multiply
  for (; in.fixed && w.format == INT4 && in.B < SOME && n + SOME <= last; n += SOME) {
    widen(w.scales + n * groups, scales, SOME * groups);
    for (int64_t b = 0; b < in.B; b++) {
      float y[SOME];
      int4_rows<SOME, 1>(w, n, in, b, scales, y);
      for (int r = 0; r < SOME; r++) give(b, n + r, scales + r * groups, y[r]);
    }
  }
#endif
  for (; n < last; n++) {
    widen(w.scales + n * groups, scales, groups);
    int64_t b = 0;
    for (; b + SOME <= in.B; b += SOME) {
      float y[SOME];
      one_row<SOME>(w, n, in, b, scales, y);
      for (int i = 0; i < SOME; i++) give(b + i, n, scales, y[i]);
    }
    for (; b < in.B; b++) {
      float y[1];
      one_row<1>(w, n, in, b, scales, y);
      give(b, n, scales, y[0]);
    }
  }
}

// the derived forms of x that `multiply` reads; `low` has room for (B, ld) 16-bit numbers, sums for (B, ld)
static inline Inputs prepare(const Matrix &w, const float *x, int64_t B, int64_t ld, void *low, float *sums) {
  bf16 *half = uses_half(w) ? (bf16 *)low : nullptr;
  int16_t *fixed = uses_fixed(w) ? (int16_t *)low : nullptr;
  float *steps = sums + w.groups();  // behind each row's sums
  for (int64_t b = 0; b < B && half; b++) {
    int64_t k = 0;
    for (; k + W <= w.K; k += W) store(half + b * ld + k, load(x + b * ld + k));
    if (k < w.K) store_some(half + b * ld + k, load_some(x + b * ld + k, w.K - k), w.K - k);
  }
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  for (int64_t b = 0; b < B && fixed; b++) {
    const auto write = w.format == INT4 ? to_fixed<true> : to_fixed<false>;
    write(x + b * ld, w.K, w.group, fixed + b * ld, steps + b * ld, sums + b * ld);
  }
#endif
  for (int64_t b = 0; b < B && w.zeros && !(fixed && w.format == INT4); b++)
    for (int64_t g = 0; g < w.groups(); g++) {
      vf total = {};
      for (int64_t k = g * w.group; k < (g + 1) * w.group; k += W) {
        total += load(x + b * ld + k);
      }
      sums[b * ld + g] = sum(total);
    }
  return {x, half, fixed, steps, sums, B, ld};
}

// about 16 KB of weights, in fours, which are worked together
static inline int64_t least_rows(const Matrix &w) {
  const int64_t rows = 16384 / w.row_bytes() / 4 * 4;
  return rows < 4 ? 4 : rows;
}
