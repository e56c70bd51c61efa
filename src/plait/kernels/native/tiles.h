// Small matrix products in registers, for operands in cache: out (rows x columns) += A (rows x k) B (k x columns).
//
// Operands are float32, or bfloat16 where the processor multiplies pairs of those (twice the speed of float32). A word
// of 32 bits holds K = 1 or 2 neighbours along k. A is kept in rows, its words along k; B in words: word row k / K
// holds the neighbours k .. k + K - 1 of every column. Sums are float32. Every extent is padded with zeros: rows to
// ROWS, columns and k to COLS.
#pragma once
#include <vector>

#include "vec.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int ROWS = 4;  // of a tile: the sums and one row of B must fit in the registers
#else
constexpr int ROWS = 8;
#endif
constexpr int COLS = 2 * W;

typedef uint32_t word __attribute__((may_alias));

// what numbers of memory type T are multiplied as
template <typename T>
struct operand_of {
  typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct operand_of<bf16> {
  typedef bf16 type;
};
#endif
template <typename E>
constexpr int K = 4 / sizeof(E);

static inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline vf as_floats(vu v) { return (vf)v; }
static inline vu load_words(const void *p) {
  vu v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store_words(void *p, vu v) { memcpy(p, &v, sizeof v); }
static inline vu widen(vh v) {
#if defined(__AVX512F__)
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#else
  return __builtin_convertvector(v, vu);
#endif
}

static inline vf multiply_add(vf sum, const float *a, vu b) { return sum + *a * as_floats(b); }
#if defined(__AVX512BF16__)
static inline vf multiply_add(vf sum, const bf16 *a, vu b) {
  __m512i pair = _mm512_set1_epi32((int)*(const word *)a);
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)b);
}
#endif

// ROWS x COLS sums
struct Tile {
  vf sums[ROWS][2];

  inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = vf{};
  }
  inline __attribute__((always_inline)) void scale(const float *by) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sums[r][0] *= by[r], sums[r][1] *= by[r];
  }
  // begin with rows of floats times a number
  inline __attribute__((always_inline)) void begin(const float *from, int64_t stride, float by) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      sums[r][0] = by * load(from + r * stride), sums[r][1] = by * load(from + r * stride + W);
  }
  // rows of A from k on, times `words` word rows of B; a_stride in elements, b_stride in words
  template <typename E>
  inline __attribute__((always_inline)) void add(const E *A, int64_t a_stride, const E *B, int64_t b_stride,
                                                 int64_t words) {
    for (int64_t k = 0; k < words; k++) {
      vu left = load_words(B + k * b_stride * K<E>), right = load_words(B + (k * b_stride + W) * K<E>);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        sums[r][0] = multiply_add(sums[r][0], A + r * a_stride + k * K<E>, left);
        sums[r][1] = multiply_add(sums[r][1], A + r * a_stride + k * K<E>, right);
      }
    }
  }
  template <typename E>
  inline __attribute__((always_inline)) void add_rows(const E *from, int64_t stride, float by) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      sums[r][0] += by * load(from + r * stride);
      sums[r][1] += by * load(from + r * stride + W);
    }
  }
  // dot[r] += row r times the row of the same number there
  template <typename E>
  inline __attribute__((always_inline)) void dot_rows(const E *with, int64_t stride, float *dot) const {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      dot[r] += sum(sums[r][0] * load(with + r * stride) + sums[r][1] * load(with + r * stride + W));
  }
  // the first rows and columns to memory that ends there
  template <typename T>
  inline __attribute__((always_inline)) void put(T *to, int64_t stride, int64_t rows, int64_t columns) const {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      if (r >= rows) break;
      for (int v = 0; v < 2; v++)
        if (columns >= (v + 1) * W)
          store(to + r * stride + v * W, sums[r][v]);
        else if (columns > v * W)
          store_some(to + r * stride + v * W, sums[r][v], columns - v * W);
    }
  }
  inline __attribute__((always_inline)) void write(float *to, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) store(to + r * stride, sums[r][0]), store(to + r * stride + W, sums[r][1]);
  }
};

template <typename T, typename E>
static inline void copy(const T *from, E *to) {
  store(to, load(from));
}
template <typename E>
static inline void copy(const E *from, E *to) {
  memcpy((void *)to, from, W * sizeof(E));
}
// rows x columns of strided memory into padded rows of operands
template <typename T, typename E>
static void take_rows(const T *from, int64_t stride, int64_t rows, int64_t columns, E *to, int64_t to_rows,
                      int64_t to_columns) {
  for (int64_t r = 0; r < rows; r++, from += stride, to += to_columns) {
    int64_t c = 0;
    for (; c + W <= columns; c += W) copy(from + c, to + c);
    if (c < columns) store(to + c, load_some(from + c, columns - c)), c += W;
    for (; c < to_columns; c += W) store(to + c, vf{});
  }
  memset((void *)to, 0, (to_rows - rows) * to_columns * sizeof(E));
}

// one step of a transposition: the off-diagonal blocks of H x H change places
template <int H>
static inline __attribute__((always_inline)) void swap_blocks(vu (&rows)[W]) {
  vi first, second;
  for (int l = 0; l < W; l++) first[l] = l & H ? W + l - H : l, second[l] = l & H ? W + l : l + H;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & H)) {
      vf a = (vf)rows[i], b = (vf)rows[i + H];
      rows[i] = (vu)pick(a, b, first), rows[i + H] = (vu)pick(a, b, second);
    }
}
// `rows` rows of `words` words become `words` rows of `rows` words: rows of A become B's words, and the other way round
template <typename E>
static void transpose(const E *from, int64_t rows, int64_t words, E *to) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < words; c += W) {
      vu block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) block[i] = load_words((const word *)from + (r + i) * words + c);
      if (W == 16) swap_blocks<W / 2>(block);
      if (W >= 8) swap_blocks<(W >= 8 ? 4 : 1)>(block);
      swap_blocks<2>(block);
      swap_blocks<1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store_words((word *)to + (c + i) * rows + r, block[i]);
    }
}

// one row of words from the rows of K neighbours along k
static inline vu join(vf only) { return (vu)only; }
#if defined(__AVX512BF16__)
static inline vu join(vf even, vf odd) {
  vh low = (vh)_mm512_cvtneps_pbh((__m512)even), high = (vh)_mm512_cvtneps_pbh((__m512)odd);
  return widen(low) | widen(high) << 16;
}
#endif
// (k x columns) in rows, each times its number, become words
template <typename T, typename E>
static void to_words(const T *from, int64_t rows, int64_t columns, const float *scale, E *to) {
  for (int64_t k = 0; k < rows; k += K<E>)
    for (int64_t c = 0; c < columns; c += W) {
      const T *row = from + k * columns + c;
      vu words;
      if constexpr (K<E> == 1)
        words = join(load(row) * scale[k]);
      else
        words = join(load(row) * scale[k], load(row + columns) * scale[k + 1]);
      store_words(to + k * columns + c * K<E>, words);
    }
}
// the same without a scale; floats as words are the rows themselves
static inline const float *to_words(const float *from, int64_t, int64_t, float *) { return from; }
#if defined(__AVX512BF16__)
static inline const bf16 *to_words(const bf16 *from, int64_t rows, int64_t columns, bf16 *to) {
  for (int64_t k = 0; k < rows; k += 2)
    for (int64_t c = 0; c < columns; c += W) {
      vh even, odd;
      memcpy(&even, from + k * columns + c, sizeof even);
      memcpy(&odd, from + (k + 1) * columns + c, sizeof odd);
      store_words(to + k * columns + c * 2, widen(even) | widen(odd) << 16);
    }
  return to;
}
static inline const bf16 *to_words(const float *from, int64_t rows, int64_t columns, bf16 *to) {
  for (int64_t k = 0; k < rows; k += 2)
    for (int64_t c = 0; c < columns; c += W)
      store_words(to + k * columns + c * 2, join(load(from + k * columns + c), load(from + (k + 1) * columns + c)));
  return to;
}
#endif

// (k / K x columns) words, every column times its number, become `k` rows of operands: B's words as another A, turned
static inline void turn_row(const float *from, vf scale, float *to, int64_t) { store(to, load(from) * scale); }
#if defined(__AVX512BF16__)
static inline void turn_row(const bf16 *from, vf scale, bf16 *to, int64_t stride) {
  vu words = load_words(from);
  store(to, as_floats(words << 16) * scale);
  store(to + stride, as_floats(words & 0xffff0000u) * scale);
}
#endif
template <typename E>
static void words_to_rows(const E *from, int64_t words, int64_t columns, const float *scale, E *to) {
  for (int64_t k = 0; k < words; k++)
    for (int64_t c = 0; c < columns; c += W)
      turn_row(from + (k * columns + c) * K<E>, scale ? load(scale + c) : all(1.0f), to + k * K<E> * columns + c,
               columns);
}

// memory that a thread keeps from call to call and hands out in pieces
struct Pieces {
  char *next;

  explicit Pieces(int64_t bytes) {
    static thread_local std::vector<char> memory;
    if ((int64_t)memory.size() < bytes + 64) memory.resize(bytes + 64);
    next = (char *)(((uintptr_t)memory.data() + 63) / 64 * 64);
  }
  template <typename E>
  E *take(int64_t n) {
    E *piece = (E *)next;
    next += up_to(n * sizeof(E), 64);
    return piece;
  }
};
