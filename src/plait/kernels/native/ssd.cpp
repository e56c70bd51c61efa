// The state space of Mamba-2, forward: each task walks the chunks of one group's heads with everything in cache.
//
//   y_i = sum_{j <= i} W_ij x_j + in_i S C_i + D x_i          W_ij = exp(a_i - a_j) (C_i . B_j) dt_j
//   S'  = through S + sum_j B_j (weight_j x_j)^T              the names are those of `Steps`
//
// C B^T is formed once for the heads of a group. The state is kept transposed, N x P, in float32; as an operand it is
// written out for the backward pass. In bfloat16 the operands rounded are W, weight x and S.
#include "ssd.h"

namespace {

template <typename T, typename TD>
struct Forward {
  typedef typename operand_of<T>::type E;
  const Shape &s;
  const T *x, *B, *C;
  const TD *dt;
  const float *A, *skip, *bias, *initial;
  const bool *starts, *mask;
  double low, high;
  T *y;
  float *last;
  E *saved;  // (batch, heads, chunks, N, P) or null

  int64_t N, P;  // padded
  E *C_rows, *B_rows, *B_words, *B_turned, *x_rows, *x_words, *x_weighted, *weights, *state_words;
  float *scores, *turned, *states;  // turned: a state as Python has it, P x N

  void run(Task task) {
    N = up_to(s.N, COLS), P = up_to(s.P, COLS);
    int64_t q = up_to(std::min(s.chunk, s.length), COLS), heads = task.last_head - task.first_head;
    Pieces pieces(4 * (4 * q * N + 3 * q * P + 2 * q * q + N * P * (2 + heads)) + 12 * 64);
    C_rows = pieces.take<E>(q * N), B_rows = pieces.take<E>(q * N);
    B_words = pieces.take<E>(q * N), B_turned = pieces.take<E>(q * N);
    x_rows = pieces.take<E>(q * P), x_words = pieces.take<E>(q * P), x_weighted = pieces.take<E>(q * P);
    weights = pieces.take<E>(q * q), scores = pieces.take<float>(q * q);
    state_words = pieces.take<E>(N * P), turned = pieces.take<float>(N * P), states = pieces.take<float>(N * P * heads);
    for (int64_t h = 0; h < heads; h++) begin_state(task.b * s.heads + task.first_head + h, states + h * N * P);
    for (int64_t t = 0; t < s.length; t += s.chunk) chunk(task, t, std::min(s.chunk, s.length - t));
    for (int64_t h = 0; h < heads; h++) end_state(task.b * s.heads + task.first_head + h, states + h * N * P);
  }

  void begin_state(int64_t row, float *S) {
    memset(S, 0, N * P * sizeof(float));
    if (!initial) return;
    take_rows(initial + row * s.P * s.N, s.N, s.P, s.N, turned, P, N);
    transpose((const float *)turned, P, N, S);
  }
  void end_state(int64_t row, const float *S) {
    transpose(S, N, P, turned);
    for (int64_t p = 0; p < s.P; p++) memcpy(last + (row * s.P + p) * s.N, turned + p * N, s.N * sizeof(float));
  }

  void chunk(Task task, int64_t t, int64_t tokens) {
    int64_t b = task.b, q = up_to(tokens, COLS);
    const T *Bs = B + b * s.B[0] + t * s.B[1] + task.g * s.B[2], *Cs = C + b * s.C[0] + t * s.C[1] + task.g * s.C[2];
    take_rows(Cs, s.C[1], tokens, s.N, C_rows, q, N);
    take_rows(Bs, s.B[1], tokens, s.N, B_rows, q, N);
    transpose(B_rows, q, N / K<E>, B_words);
    words_to_rows(B_words, N / K<E>, q, nullptr, B_turned);
    for (int64_t j = 0; j < q; j += COLS)
      for (int64_t i = j; i < q; i += ROWS) {
        Tile tile;
        tile.clear();
        tile.add(C_rows + i * N, N, B_words + j * K<E>, q, N / K<E>);
        tile.write(scores + i * q + j, q);
      }
    const bool *begins = starts ? starts + b * s.length + t : nullptr;
    const bool *valid = mask ? mask + b * s.length + t : nullptr;
    Documents documents(begins, tokens, q);
    int64_t next = std::min(s.chunk, s.length - t - tokens);
    expect(Cs, s.C[1], tokens, tokens + next, s.N), expect(Bs, s.B[1], tokens, tokens + next, s.N);
    for (int64_t h = task.first_head; h < task.last_head; h++) {
      Steps steps;
      steps.set(dt + b * s.dt[0] + t * s.dt[1] + h * s.dt[2], s.dt[1], tokens, q, bias ? bias[h] : 0, A[h], low, high,
                valid, documents);
      head(b, h, t, tokens, q, steps, documents, states + (h - task.first_head) * N * P, t > 0 || initial);
    }
  }

  void head(int64_t b, int64_t h, int64_t t, int64_t tokens, int64_t q, const Steps &steps, const Documents &documents,
            float *S, bool carries) {
    take_rows(x + b * s.x[0] + t * s.x[1] + h * s.x[2], s.x[1], tokens, s.P, x_rows, q, P);
    const E *values = to_words(x_rows, q, P, x_words);
    to_words(x_rows, q, P, steps.weight, x_weighted);
    weigh(q, steps, documents);
    const E *before = to_words(S, N, P, state_words);
    if (saved) {
      int64_t chunks = (s.length + s.chunk - 1) / s.chunk;
      memcpy((void *)(saved + ((b * s.heads + h) * chunks + t / s.chunk) * N * P), before, N * P * sizeof(E));
    }
    T *out = y + ((b * s.length + t) * s.heads + h) * s.P;
    int64_t next = std::min(s.chunk, s.length - t - tokens);
    for (int64_t p = 0; p < s.P; p += COLS)
      for (int64_t i = 0; i < tokens; i += ROWS) {
        if (p == 0)
          expect(x + b * s.x[0] + (t + tokens) * s.x[1] + h * s.x[2], s.x[1], i, std::min(i + ROWS, next), s.P);
        Tile tile;
        tile.clear();
        if (carries) {
          tile.add(C_rows + i * N, N, before + p * K<E>, P, N / K<E>);
          tile.scale(steps.in + i);
        }
        tile.add(weights + i * q, q, values + p * K<E>, P, (i + ROWS) / K<E>);
        if (skip) tile.add_rows(x_rows + i * P + p, P, skip[h]);
        tile.put(out + i * s.heads * s.P + p, s.heads * s.P, tokens - i, s.P - p);
      }
    for (int64_t p = 0; p < P; p += COLS)
      for (int64_t n = 0; n < N; n += ROWS) {
        Tile tile;
        tile.begin(S + n * P + p, P, steps.through);
        tile.add(B_turned + n * q, q, x_weighted + p * K<E>, P, q / K<E>);
        tile.write(S + n * P + p, P);
      }
  }

  // W of every row, up to the end of the block on its diagonal
  void weigh(int64_t q, const Steps &steps, const Documents &documents) {
    vf index = lanes(), columns[LONGEST / W] = {};
    for (int64_t first = 0; first < q; first += W) {
      vf middle = all(steps.a[first]), rows = exp(load(steps.a + first) - middle), diagonal = load(steps.a + first);
      for (int64_t j = 0; j < first; j += W) columns[j / W] = exp(middle - load(steps.a + j)) * load(steps.dt + j);
      for (int64_t i = first; i < first + W; i++) {
        const float *score = scores + i * q;
        float since = documents.since[i];
        for (int64_t j = 0; j < first; j += W) {
          vf weight = columns[j / W] * rows[i - first] * load(score + j);
          if (since > j) weight = index + (float)j >= since ? weight : vf{};
          store(weights + i * q + j, weight);
        }
        vf token = index + (float)first, decay = exp(steps.a[i] - diagonal) * load(steps.dt + first);
        store(weights + i * q + first, (token <= (float)i) & (token >= since) ? decay * load(score + first) : vf{});
      }
    }
  }
};

template <typename T, typename TD>
void forward(const Shape &s, const void *x, const void *dt, const float *A, const void *B, const void *C,
             const float *skip, const float *bias, double low, double high, const float *initial, const bool *starts,
             const bool *mask, void *y, float *last, void *saved) {
  typedef Forward<T, TD> F;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < s.batch * s.groups * s.splits; i++) {
    F f{s, (const T *)x, (const T *)B, (const T *)C, (const TD *)dt, A, skip, bias, initial, starts, mask, low, high,
        (T *)y, last, (typename F::E *)saved};
    f.run(Task(s, i));
  }
}

}  // namespace

extern "C" void ssd_forward(int64_t half, int64_t half_dt, const Shape *s, const void *x, const void *dt,
                            const float *A, const void *B, const void *C, const float *D, const float *bias,
                            double low, double high, const float *initial, const bool *starts, const bool *mask,
                            void *y, float *last, void *saved) {
  auto run = half ? (half_dt ? forward<bf16, bf16> : forward<bf16, float>)
                  : (half_dt ? forward<float, bf16> : forward<float, float>);
  run(*s, x, dt, A, B, C, D, bias, low, high, initial, starts, mask, y, last, saved);
}
