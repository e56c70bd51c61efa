// What a tape can do: one struct per operation, its members in the order in which Python writes them, eight bytes each.
//
// Threads take work in pieces, each from a share of its own, then from the others'. What is cheap (norms, gates, the
// merging of attention's spans) every thread computes for itself at the start of the linear layer that reads it: one
// barrier less. Activations are float32, (B, width) each.
#pragma once
#include <vector>

#include "attend_pairs.h"
#include "gemv.h"
#include "step.h"
#include "ternary.h"

constexpr int64_t MOST_SPANS = 16;  // of keys, that threads share
constexpr int64_t SPAN = 256;       // keys of a span at least

// what is known when a token comes
struct Step {
  int64_t B;
  const int64_t *ids, *positions;  // (B,)
  const uint8_t *mask;             // (B, S) or null
  int64_t S;                       // keys, the new one included
  Crew crew;
  // of sequences that come and go, else null: which state is a row's, how many keys it has, and their pages (B, width)
  const int64_t *slots, *lengths;
  const int32_t *tables;
  int64_t width;
  // where a row's state goes, null for where it came from; then rows are in the order of time, and one may go on from
  // what another has just written
  const int64_t *into;

  int64_t slot(int64_t b) const { return slots ? slots[b] : b; }
  // rows that a thread must take one after the other
  int64_t chain() const { return into ? B : 1; }
  template <typename T>
  T *state(const T *all, int64_t b, int64_t size, int64_t at, int64_t n) const {
    T *from = (T *)all + slot(b) * size + at;
    if (!into || into[b] == slots[b]) return from;
    return (T *)memcpy((T *)all + into[b] * size + at, from, n * sizeof(T));
  }
  int64_t keys(int64_t b) const { return lengths ? lengths[b] : S; }
  // by a row's own keys alone: its sums do not depend on the others
  int64_t span(int64_t b) const {
    int64_t even = (keys(b) + MOST_SPANS - 1) / MOST_SPANS;
    return even < SPAN ? SPAN : (even + KEYS - 1) / KEYS * KEYS;
  }
  int64_t spans(int64_t b) const { return (keys(b) + span(b) - 1) / span(b); }
  int64_t most_spans() const {
    int64_t most = 0;
    for (int64_t b = 0; b < (lengths ? B : 1); b++) most = spans(b) > most ? spans(b) : most;
    return most;
  }
};

// a thread's own memory, kept between tokens
struct Scratch {
  std::vector<float> x, sums, q;
  std::vector<bf16> half;
  std::vector<int8_t> codes;
  std::vector<Row> rows;
  template <typename T>
  static T *room(std::vector<T> &v, int64_t n) {
    n += LINE / sizeof(T);
    if ((int64_t)v.size() < n) v.resize(n);
    return aligned(v.data());
  }
};
static thread_local Scratch scratch;

// a tensor that the cache may replace: Python follows it from token to token
struct Stored {
  void *data;
  int64_t half, room;  // room: its third size, for keys how many there is room for
};

struct Work {
  Taken taken;
  const Step &step;

  bool item(int64_t n, int64_t &i) const {
    int64_t end;
    return take(taken, n, 1, step.crew, i, end, 1);
  }
  bool part(int64_t n, int64_t least, int64_t &first, int64_t &last) const {
    return take(taken, n, least, step.crew, first, last);
  }
};

// ---- x = rows of the embedding

struct Embed {
  Numbers table;
  float *x;
  int64_t D;

  void run(const Work &work) const {
    for (int64_t b; work.item(work.step.B, b);)
      for (int64_t i = 0; i < D; i++) x[b * D + i] = table.at(work.step.ids[b] * D + i);
  }
};

// ---- y = linear(input) + bias, or y += that

enum Source : int64_t { PLAIN, RELU2, SILU_GATE, RELU2_GATE, MERGE };

// what a linear layer reads: x, activated, gated by z or merged from attention's spans; then a norm in groups
struct Input {
  int64_t source;
  const float *x, *z;
  int64_t ldx, ldz, K;
  int64_t head;  // MERGE: size of a head
  Numbers norm;
  int64_t groups;
  double eps;

  vf at(const float *row, const float *gate, int64_t k) const {
    vf v = load(row + k);
    if (source == PLAIN) return v;
    if (source == SILU_GATE) return v * silu(load(gate + k));
    vf r = source == RELU2 ? v : load(gate + k);
    r = r < 0 ? vf{} : r;  // a NaN stays one
    return source == RELU2 ? r * r : r * r * v;
  }
  void merge(const Step &step, int64_t b, float *to) const {
    const int64_t H = K / head, spans = step.spans(b), ld = (head + W - 1) / W * W;
    const Seen *seen = (const Seen *)z + b * H * MOST_SPANS;
    for (int64_t h = 0; h < H; h++, seen += MOST_SPANS) {
      float largest = LOWEST, total = 0, share[MOST_SPANS];
      for (int64_t s = 0; s < spans; s++) largest = seen[s].largest > largest ? seen[s].largest : largest;
      for (int64_t s = 0; s < spans; s++) total += seen[s].total * (share[s] = std::exp(seen[s].largest - largest));
      // a row of padding sees nothing
      for (int64_t s = 0; s < spans; s++) share[s] = total == 0 ? 0 : share[s] / total;
      const float *sums = x + (b * H + h) * MOST_SPANS * ld;
      over(head, [&](int64_t i, int n) INLINE {
        vf v = {};
        for (int64_t s = 0; s < spans; s++) v += share[s] * get(sums + s * ld + i, n);
        put(to + h * head + i, v, n);
      });
    }
  }
  void normalise(float *x) const {
    const int64_t D = K / groups;
    for (int64_t g = 0; g < groups; g++) {
      float *row = x + g * D;
      vf squares = {};
      int64_t i = 0;
      for (; i + W <= D; i += W) squares += load(row + i) * load(row + i);
      float square = sum(squares);
      for (; i < D; i++) square += row[i] * row[i];
      const float scale = 1.0f / std::sqrt(square / D + (float)eps);
      for (i = 0; i + W <= D; i += W) store(row + i, load(row + i) * scale * norm.from(g * D + i));
      for (; i < D; i++) row[i] *= scale * norm.at(g * D + i);
    }
  }
  // one row; `to` has room for a vector beyond K
  void row(const Step &step, int64_t b, float *to) const {
    const float *from = x + b * ldx, *gate = z + b * ldz;
    if (source == MERGE) merge(step, b, to);
    else {
      int64_t k = 0;
      for (; k + W <= K; k += W) store(to + k, at(from, gate, k));
      if (k < K) {
        float last[W] = {}, last_gate[W] = {};
        memcpy(last, from + k, (K - k) * sizeof(float));
        if (z) memcpy(last_gate, gate + k, (K - k) * sizeof(float));
        store_some(to + k, at(last, last_gate, 0), K - k);
      }
    }
    if (groups) normalise(to);
  }
};

struct Linear {
  int64_t same;  // as the operation before reads: it is ready
  Input input;
  Matrix w;
  Numbers bias;
  void *y;
  int64_t ldy, adds, half;

  void run(const Work &work) const {
    const int64_t B = work.step.B, ld = (w.K + 63) / 64 * 64 + 32;
    float *x = Scratch::room(scratch.x, B * ld);
    for (int64_t b = 0; b < B && !same; b++) input.row(work.step, b, x + b * ld);
    const auto out = [&](int64_t b, int64_t n, float value) {
      if (bias) value += bias.at(n);
      if (half) store1((bf16 *)y + b * ldy + n, value);
      else if (adds) ((float *)y)[b * ldy + n] += value;
      else ((float *)y)[b * ldy + n] = value;
    };
    const int64_t least = least_rows(w);
    if (w.format == TERNARY) return ternary(work, x, ld, least, out);
    const Inputs in = prepare(w, x, B, ld, Scratch::room(scratch.half, B * ld), Scratch::room(scratch.sums, B * ld));
    for (int64_t first, last; work.part(w.N, least, first, last);) multiply(w, first, last, in, out);
  }
  // x as int8 codes, which each thread makes for itself
  template <typename Out>
  void ternary(const Work &work, const float *x, int64_t ld, int64_t least, const Out &out) const {
    const int64_t B = work.step.B, width = blocks_of(w.K) * BLOCK_COLUMNS;
    int8_t *codes = Scratch::room(scratch.codes, B * width);
    Row *rows = Scratch::room(scratch.rows, B);
    for (int64_t b = 0; b < B; b++) rows[b] = to_int8(x + b * ld, w.K, codes + b * width);
    for (int64_t first, last; work.part(w.N, least, first, last);)
      ternary_multiply((const uint8_t *)w.codes, (const float *)w.scales, w.K, first, last, codes, rows, B, out);
  }
};

// ---- Mamba-2: see step.h

struct Conv {
  Stored window;  // (B, D, taps)
  int64_t D, taps;
  float *x;
  int64_t ldx;
  Numbers w, bias;
  int64_t activates;

  void run(const Work &work) const {
    constexpr int64_t PART = 256;
    const int64_t parts = (D + PART - 1) / PART, chain = work.step.chain();
    for (int64_t i; work.item(work.step.B / chain * parts, i);) {
      const int64_t first = i % parts * PART, last = first + PART < D ? first + PART : D;
      for (int64_t b = i / parts * chain, end = b + chain; b < end; b++) {
        if (window.half) step((bf16 *)window.data, work.step, b, first, last);
        else step((float *)window.data, work.step, b, first, last);
      }
    }
  }
  template <typename T>
  void step(T *windows, const Step &step, int64_t b, int64_t first, int64_t last) const {
    T *mine = step.state(windows, b, D * taps, first * taps, (last - first) * taps) - first * taps;
    conv_step(x + b * ldx, x + b * ldx, mine, w, bias, taps, first, last, activates);
  }
};

struct State {
  Stored state;  // (B, H, P, N)
  int64_t H, P, N, G;
  const float *x, *dt;  // rows of [x, B, C] and of dt
  int64_t ld, ld_dt;
  Numbers A, D, dt_bias;
  int64_t is_log;  // A is its magnitude's logarithm
  double low, high;
  float *y;  // (B, H P)

  void run(const Work &work) const {
    const int64_t chain = work.step.chain();
    for (int64_t i; work.item(work.step.B / chain * H, i);)
      for (int64_t b = i / H * chain, end = b + chain; b < end; b++) {
        if (state.half) step((bf16 *)state.data, work.step, b, i % H);
        else step((float *)state.data, work.step, b, i % H);
      }
  }
  template <typename T>
  void step(T *states, const Step &step, int64_t b, int64_t h) const {
    const int64_t g = h / (H / G);
    const float *row = x + b * ld, *Bs = row + H * P + g * N, *Cs = Bs + G * N;
    float d = softplus(dt[b * ld_dt + h] + (dt_bias ? dt_bias.at(h) : 0.0f));
    d = d < (float)low ? (float)low : d > (float)high ? (float)high : d;
    const float decay = std::exp((is_log ? -std::exp(A.at(h)) : A.at(h)) * d), skip = D ? D.at(h) : 0.0f;
    T *mine = step.state(states, b, H * P * N, h * P * N, P * N);
    state_step(mine, row + h * P, d, decay, Bs, Cs, skip, P, N, y + (b * H + h) * P);
  }
};

// ---- attention: see attend.h

struct Angles {  // cosines and sines (B, 2 d / 2) of the new positions
  const float *frequencies;
  float *table;
  int64_t pairs;
  double temperature;

  void run(const Work &work) const {
    for (int64_t b; work.item(work.step.B, b);)
      for (int64_t i = 0; i < pairs; i++) {
        const float angle = (float)work.step.positions[b] * frequencies[i];
        table[b * 2 * pairs + i] = std::cos(angle) * (float)temperature;
        table[(b * 2 + 1) * pairs + i] = std::sin(angle) * (float)temperature;
      }
  }
};

struct KV {
  Stored k, v;  // (B, K, room, P), or (pages, K, room, P)
  int64_t K, P;

  template <typename T>
  Places<T> places(const Stored &t, const Step &step, int64_t b, int64_t head) const {
    T *data = (T *)t.data + head * t.room * P;
    if (step.tables) return {data, P, step.tables + b * step.width, t.room, K * t.room * P};
    return {data + b * K * t.room * P, P, nullptr, 0, 0};
  }
  template <typename T>
  Places<T> keys(const Step &step, int64_t b, int64_t head) const { return places<T>(k, step, b, head); }
  template <typename T>
  Places<T> values(const Step &step, int64_t b, int64_t head) const { return places<T>(v, step, b, head); }
};

struct Heads {  // q and k: norm and rotation, in place; k and v go into the cache
  KV kv;
  float *q, *k, *v;
  int64_t H;
  Numbers q_norm, k_norm;
  double eps;
  const float *angles;  // or null
  int64_t pairs;

  template <typename T>
  void put(const Step &step, int64_t b, int64_t head, const float *key, const float *value) const {
    T *k = kv.keys<T>(step, b, head).at(step.keys(b) - 1), *v = kv.values<T>(step, b, head).at(step.keys(b) - 1);
    for (int64_t i = 0; i < kv.P; i++) store1(k + i, key[i]), store1(v + i, value[i]);
  }
  void turn(float *x, const Numbers &norm, int64_t b) const {
    if (norm) {
      float square = 0;
      for (int64_t i = 0; i < kv.P; i++) square += x[i] * x[i];
      const float scale = 1.0f / std::sqrt(square / kv.P + (float)eps);
      for (int64_t i = 0; i < kv.P; i++) x[i] *= scale * norm.at(i);
    }
    const float *cosines = angles + b * 2 * pairs, *sines = cosines + pairs;
    for (int64_t i = 0; i < pairs && angles; i++) {
      const float u = x[i], w = x[i + pairs];
      x[i] = u * cosines[i] - w * sines[i];
      x[i + pairs] = w * cosines[i] + u * sines[i];
    }
  }
  void run(const Work &work) const {
    const int64_t each = H + kv.K;
    for (int64_t i; work.item(work.step.B * each, i);) {
      const int64_t b = i / each, h = i % each;
      if (h < H) {
        turn(q + (b * H + h) * kv.P, q_norm, b);
        continue;
      }
      const int64_t head = h - H;
      float *key = k + (b * kv.K + head) * kv.P, *value = v + (b * kv.K + head) * kv.P;
      turn(key, k_norm, b);
      if (kv.k.half) put<bf16>(work.step, b, head, key, value);
      else put<float>(work.step, b, head, key, value);
    }
  }
};

struct Attend {  // one item is a span of keys for the query heads of one key head
  KV kv;
  const float *q;
  int64_t H;
  float *out;  // (B, H, MOST_SPANS, P rounded up)
  Seen *seen;  // (B, H, MOST_SPANS)

  // the queries (group, P) over keys first ... last - 1; sums (group, ld)
  template <typename T>
  void span(const float *queries, const Places<T> &keys, const Places<T> &values, int64_t first, int64_t last,
            const uint8_t *mask, float *sums, int64_t ld, Seen *some) const {
    const int64_t group = H / kv.K, P = kv.P;
    const float scale = 1.0f / std::sqrt((float)P);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
      if (attends_in_pairs(P))
        return attend_pairs(queries, group, scale, keys, values, P, first, last, mask, sums, some);
#endif
    float *scaled = Scratch::room(scratch.q, group * ld);
    memset(scaled, 0, group * ld * sizeof(float));
    for (int64_t a = 0; a < group; a++)
      for (int64_t p = 0; p < P; p++) scaled[a * ld + p] = queries[a * P + p] * scale;
    attend(scaled, group, ld, keys, values, P, first, last, mask, sums, some);
  }
  template <typename T>
  void run_on(const Work &work) const {
    const Step &step = work.step;
    const int64_t spans = step.most_spans(), group = H / kv.K, P = kv.P, ld = (P + W - 1) / W * W;
    std::vector<Seen> some(group);
    std::vector<float> sums(group * ld);
    for (int64_t i; work.item(step.B * kv.K * spans, i);) {
      const int64_t s = i % spans, head = i / spans % kv.K, b = i / spans / kv.K;
      const int64_t each = step.span(b), first = s * each;
      const int64_t last = first + each < step.keys(b) ? first + each : step.keys(b);
      if (first >= last) continue;
      const uint8_t *mask = step.mask ? step.mask + b * step.S : nullptr;
      const Places<T> keys = kv.keys<T>(step, b, head), values = kv.values<T>(step, b, head);
      span(q + (b * H + head * group) * P, keys, values, first, last, mask, sums.data(), ld, some.data());
      for (int64_t a = 0; a < group; a++) {
        const int64_t at = (b * H + head * group + a) * MOST_SPANS + s;
        memcpy(out + at * ld, sums.data() + a * ld, P * sizeof(float));
        seen[at] = some[a];
      }
    }
  }
  void run(const Work &work) const { kv.k.half ? run_on<bf16>(work) : run_on<float>(work); }
};

struct Copy {  // y = what a linear layer would read
  Input input;
  float *y;

  void run(const Work &work) const {
    for (int64_t b; work.item(work.step.B, b);) {
      Scratch::room(scratch.x, input.K + W);
      input.row(work.step, b, scratch.x.data());
      memcpy(y + b * input.K, scratch.x.data(), input.K * sizeof(float));
    }
  }
};
