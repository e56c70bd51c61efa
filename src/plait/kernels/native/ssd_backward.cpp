// The state space of Mamba-2, backward: chunks in reverse, carrying the gradient of the state after.
//
// With g = dy, V_ij = g_i . x_j and the names of ssd.cpp, for one head:
//
//   dx_j  = sum_i W_ij g_i + weight_j dS' B_j + D g_j
//   dC_i += sum_j W'_ij B_j + in_i S^T g_i              W'_ij = exp(a_i - a_j) dt_j V_ij
//   dB_j += sum_i W'_ij C_i + weight_j dS'^T x_j
//   dS    = through dS' + sum_i in_i g_i C_i^T
//
// and the gradient of the log decays a is what flows out of a token less what flows in. dB and dC are summed over the
// heads of a group before their products with C and B. Everything q x q is kept transposed: rows j, columns i >= j.
#include "ssd.h"

namespace {

// what Python hands over; dB and dC have one row of their batch for each split; dA, dD, dbias one for each batch entry
template <typename T, typename TD>
struct Arrays {
  const T *x, *B, *C, *dy;
  const TD *dt;
  const float *A, *skip, *bias;
  const bool *starts, *mask;
  double low, high;
  const void *saved;
  const float *dlast;
  T *dx, *dB, *dC;
  TD *ddt;
  float *dA, *dskip, *dbias, *dinitial;
};

template <typename T, typename TD>
struct Backward {
  typedef typename operand_of<T>::type E;
  const Shape &s;
  const Arrays<T, TD> &m;
  int64_t N, P, q;  // padded; q of the chunk at hand
  // of the group: rows, words along k = state size, words along k = time
  E *C_rows, *B_rows, *C_columns, *C_words, *B_words, *dscores_rows, *dscores_columns;
  float *scores, *dscores, *turned, *dB, *dC;
  // of the head
  E *x_rows, *g_rows, *g_columns, *g_words, *g_turned, *weights, *S_rows, *S_words, *dS_rows, *dS_words, *dS_columns;
  float *dS_all;
  // <dy, what came from another token of the chunk>, the same by its source (over dt), from itself, from before, and to
  // after
  alignas(64) float row_flow[LONGEST], column_flow[LONGEST], self_flow[LONGEST], in_flow[LONGEST], out_flow[LONGEST];

  void run(Task task) {
    N = up_to(s.N, COLS), P = up_to(s.P, COLS);
    int64_t most = up_to(std::min(s.chunk, s.length), COLS), heads = task.last_head - task.first_head;
    Pieces pieces(4 * (7 * most * N + 6 * most * P + 6 * most * most + N * P * (5 + heads)) + 32 * 64);
    for (E **piece : {&C_rows, &B_rows, &C_columns, &C_words, &B_words}) *piece = pieces.take<E>(most * N);
    for (float **piece : {&dB, &dC}) *piece = pieces.take<float>(most * N);
    for (float **piece : {&scores, &dscores, &turned}) *piece = pieces.take<float>(most * most);
    for (E **piece : {&dscores_rows, &dscores_columns, &weights}) *piece = pieces.take<E>(most * most);
    for (E **piece : {&x_rows, &g_rows, &g_columns, &g_words, &g_turned}) *piece = pieces.take<E>(most * P);
    for (E **piece : {&S_rows, &S_words, &dS_rows, &dS_words, &dS_columns}) *piece = pieces.take<E>(N * P);
    dS_all = pieces.take<float>(N * P * heads);
    for (int64_t h = 0; h < heads; h++) {
      int64_t row = task.b * s.heads + task.first_head + h;
      memset(dS_all + h * N * P, 0, N * P * sizeof(float));
      if (m.dlast) take_rows(m.dlast + row * s.P * s.N, s.N, s.P, s.N, dS_all + h * N * P, P, N);
      m.dA[row] = 0;
      if (m.dskip) m.dskip[row] = 0;
      if (m.dbias) m.dbias[row] = 0;
    }
    for (int64_t t = (s.length - 1) / s.chunk * s.chunk; t >= 0; t -= s.chunk)
      chunk(task, t, std::min(s.chunk, s.length - t));
    if (!m.dinitial) return;  // null where there was no initial state
    for (int64_t h = 0; h < heads; h++) {
      float *to = m.dinitial + (task.b * s.heads + task.first_head + h) * s.P * s.N;
      for (int64_t p = 0; p < s.P; p++) memcpy(to + p * s.N, dS_all + (h * P + p) * N, s.N * sizeof(float));
    }
  }

  void chunk(Task task, int64_t t, int64_t tokens) {
    int64_t b = task.b;
    q = up_to(tokens, COLS);
    const T *B = m.B + b * s.B[0] + t * s.B[1] + task.g * s.B[2], *C = m.C + b * s.C[0] + t * s.C[1] + task.g * s.C[2];
    take_rows(C, s.C[1], tokens, s.N, C_rows, q, N);
    take_rows(B, s.B[1], tokens, s.N, B_rows, q, N);
    transpose(C_rows, q, N / K<E>, C_columns);
    for (int64_t i = 0; i < q; i += COLS)
      for (int64_t j = 0; j < i + COLS; j += ROWS) {
        Tile tile;
        tile.clear();
        tile.add(B_rows + j * N, N, C_columns + i * K<E>, q, N / K<E>);
        tile.write(scores + j * q + i, q);
      }
    memset(dB, 0, q * N * sizeof(float)), memset(dC, 0, q * N * sizeof(float));
    memset(dscores, 0, q * q * sizeof(float));
    const E *C_time = to_words((const E *)C_rows, q, N, C_words), *B_time = to_words((const E *)B_rows, q, N, B_words);
    const bool *begins = m.starts ? m.starts + b * s.length + t : nullptr;
    Documents documents(begins, tokens, q);
    for (int64_t h = task.first_head; h < task.last_head; h++) {
      Steps steps;
      steps.set(m.dt + b * s.dt[0] + t * s.dt[1] + h * s.dt[2], s.dt[1], tokens, q, m.bias ? m.bias[h] : 0, m.A[h],
                m.low, m.high, m.mask ? m.mask + b * s.length + t : nullptr, documents);
      head(b, h, t, tokens, steps, documents, dS_all + (h - task.first_head) * N * P, C_time);
    }
    if (t) expect(B, s.B[1], -s.chunk, 0, s.N), expect(C, s.C[1], -s.chunk, 0, s.N);
    scores_back(((task.split * s.batch + b) * s.length + t) * s.groups + task.g, tokens, C_time, B_time);
  }

  void head(int64_t b, int64_t h, int64_t t, int64_t tokens, const Steps &steps, const Documents &documents, float *dS,
            const E *C_time) {
    int64_t chunks = (s.length + s.chunk - 1) / s.chunk, row = b * s.heads + h;
    const T *x = m.x + b * s.x[0] + t * s.x[1] + h * s.x[2], *g = m.dy + b * s.dy[0] + t * s.dy[1] + h * s.dy[2];
    int64_t next = t ? s.chunk : 0;  // tokens of the chunk that comes before, and next
    take_rows(x, s.x[1], tokens, s.P, x_rows, q, P);
    take_rows(g, s.dy[1], tokens, s.P, g_rows, q, P);
    transpose(g_rows, q, P / K<E>, g_columns);
    words_to_rows(g_columns, P / K<E>, q, steps.in, g_turned);
    const E *g_time = to_words((const E *)g_rows, q, P, g_words);
    for (float *flow : {row_flow, in_flow, out_flow}) memset(flow, 0, q * sizeof(float));

    weigh(steps, documents);
    expect(x, s.x[1], -next, 0, s.P);
    bool carries = t > 0 || m.dinitial, continues = t + tokens < s.length || m.dlast;
    float through = 0;
    if (carries) {
      transpose((const E *)m.saved + (row * chunks + t / s.chunk) * N * P, N / K<E>, P, S_rows);
      through = state_back(steps, dS);
    }
    if (continues) outputs_back(steps, dS);
    expect(g, s.dy[1], -next, 0, s.P);
    T *dx = m.dx + ((b * s.length + t) * s.heads + h) * s.P;
    float dD = inputs_back(steps, tokens, g_time, continues, m.skip ? m.skip[h] : 0, dx);
    if (m.dskip) m.dskip[row] += dD;
    if (carries)
      for (int64_t n = 0; n < N; n += COLS)
        for (int64_t p = 0; p < P; p += ROWS) {
          Tile tile;
          tile.begin(dS + p * N + n, N, steps.through);
          tile.add(g_turned + p * q, q, C_time + n * K<E>, N, q / K<E>);
          tile.write(dS + p * N + n, N);
        }
    steps_back(steps, tokens, through, m.A[h], row, m.ddt + (b * s.length + t) * s.heads + h);
  }

  // V, and from it W, the gradient of the scores, and what flows between the tokens of the chunk
  void weigh(const Steps &steps, const Documents &documents) {
    vf index = lanes();
    alignas(64) float after[LONGEST], before[LONGEST / W][LONGEST];
    for (int64_t i = 0; i < q; i += W) {
      vf middle = all(steps.a[i]);
      store(after + i, exp(load(steps.a + i) - middle));
      for (int64_t j = 0; j < i; j += W) store(before[i / W] + j, exp(middle - load(steps.a + j)));
    }
    for (int64_t j = 0; j < q; j += ROWS) {
      vf sums[ROWS] = {};
      for (int64_t c = j / COLS * COLS; c < q; c += COLS) {
        Tile tile;
        tile.clear();
        tile.add(x_rows + j * P, P, g_columns + c * K<E>, q, P / K<E>);
#pragma GCC unroll 16
        for (int part = 0; part < 2 * ROWS; part++) {
          int r = part / 2, v = part % 2;
          int64_t row = j + r, i = c + v * W, at = row * q + i;
          if (i + W <= row) continue;
          vf token = index + (float)i, decay;
          if (i > row) {
            decay = load(after + i) * before[i / W][row];
            if (documents.until[row] < i + W - 1) decay = token <= documents.until[row] ? decay : vf{};
          } else {
            decay = exp(load(steps.a + i) - steps.a[row]);
            decay = (token >= (float)row) & (token <= documents.until[row]) ? decay : vf{};
          }
          vf dscore = decay * tile.sums[r][v], score = load(scores + at), flow = dscore * score;
          float dt = steps.dt[row];
          store(weights + at, decay * score * dt);
          store(dscores + at, load(dscores + at) + dscore * dt);
          if (i <= row) {
            self_flow[row] = flow[row - i];  // passes through no decay, and may be far larger than what does
            flow = token == (float)row ? vf{} : flow;
          }
          store(row_flow + i, load(row_flow + i) + flow * dt);
          sums[r] += flow;
        }
      }
      for (int r = 0; r < ROWS; r++) column_flow[j + r] = sum(sums[r]);
    }
  }

  // what the outputs read from the state before: dC, and the flow along all of it, <dS', S>
  float state_back(const Steps &steps, const float *dS) {
    const E *S = to_words((const E *)S_rows, P, N, S_words);
    for (int64_t n = 0; n < N; n += COLS)
      for (int64_t i = 0; i < q; i += ROWS) {
        Tile tile;
        tile.clear();
        tile.add(g_rows + i * P, P, S + n * K<E>, N, P / K<E>);
        tile.scale(steps.in + i);
        tile.dot_rows(C_rows + i * N + n, N, in_flow + i);
        tile.add_rows(dC + i * N + n, N, 1);
        tile.write(dC + i * N + n, N);
      }
    vf dot[2] = {};
    for (int64_t k = 0; k < P * N; k += COLS)
      for (int v = 0; v < 2; v++) dot[v] += load(dS + k + v * W) * load(S_rows + k + v * W);
    return steps.through * sum(dot[0] + dot[1]);
  }

  // what the state after received from the inputs: dB
  void outputs_back(const Steps &steps, const float *dS) {
    take_rows(dS, N, P, N, dS_rows, P, N);
    transpose(dS_rows, P, N / K<E>, dS_columns);
    const E *state = to_words((const E *)dS_rows, P, N, dS_words);
    for (int64_t n = 0; n < N; n += COLS)
      for (int64_t j = 0; j < q; j += ROWS) {
        Tile tile;
        tile.clear();
        tile.add(x_rows + j * P, P, state + n * K<E>, N, P / K<E>);
        tile.scale(steps.weight + j);
        tile.add_rows(dB + j * N + n, N, 1);
        tile.write(dB + j * N + n, N);
      }
  }

  // dx; returns the gradient of D, and leaves x_j . dS' B_j in out_flow
  float inputs_back(const Steps &steps, int64_t tokens, const E *g_time, bool continues, float skip, T *dx) {
    for (int64_t p = 0; p < P; p += COLS)
      for (int64_t j = 0; j < q; j += ROWS) {
        Tile tile;
        tile.clear();
        if (continues) {
          tile.add(B_rows + j * N, N, dS_columns + p * K<E>, P, N / K<E>);
          tile.dot_rows(x_rows + j * P + p, P, out_flow + j);
          tile.scale(steps.weight + j);
        }
        tile.add(weights + j * q + j, q, g_time + j * P + p * K<E>, P, (q - j) / K<E>);
        if (m.skip) tile.add_rows(g_rows + j * P + p, P, skip);
        tile.put(dx + j * s.heads * s.P + p, s.heads * s.P, tokens - j, s.P - p);
      }
    vf dot[2] = {};
    for (int64_t k = 0; k < q * P; k += COLS)
      for (int v = 0; v < 2; v++) dot[v] += load(x_rows + k + v * W) * load(g_rows + k + v * W);
    return sum(dot[0] + dot[1]);
  }

  // from the flows: gradients of the time steps and of the decay rate
  void steps_back(const Steps &steps, int64_t tokens, float through, float A, int64_t row, TD *ddt) {
    // `cut` is what flows across the cut before token t: past the whole chunk or to later tokens, from earlier ones
    double dA = 0, dbias = 0, earlier[LONGEST], later = through, between = 0;
    double before = 0;
    for (int64_t t = 0; t < tokens; t++) earlier[t] = before, before += steps.weight[t] * out_flow[t];
    for (int64_t t = tokens - 1; t >= 0; t--) {
      later += in_flow[t], between += row_flow[t] - (double)steps.dt[t] * column_flow[t];
      float cut = earlier[t] + between + later;
      float raw = (column_flow[t] + self_flow[t] + steps.out[t] * out_flow[t] + A * cut) * steps.slope[t];
      dA += steps.dt[t] * cut, dbias += raw;
      store1(ddt + t * s.heads, raw);
    }
    m.dA[row] += dA;
    if (m.dbias) m.dbias[row] += dbias;
  }

  // dB and dC of the products inside the chunk, from the gradient of the scores of all heads, and out to memory
  void scores_back(int64_t row, int64_t tokens, const E *C_time, const E *B_time) {
    take_rows(dscores, q, q, q, dscores_columns, q, q);
    transpose((const float *)dscores, q, q, turned);
    take_rows((const float *)turned, q, q, q, dscores_rows, q, q);
    int64_t stride = s.groups * s.N;
    for (int64_t n = 0; n < s.N; n += COLS)
      for (int64_t t = 0; t < tokens; t += ROWS) {
        Tile tile;
        tile.begin(dB + t * N + n, N, 1);
        tile.add(dscores_columns + t * q + t, q, C_time + t * N + n * K<E>, N, (q - t) / K<E>);
        tile.put(m.dB + row * s.N + t * stride + n, stride, tokens - t, s.N - n);
        tile.begin(dC + t * N + n, N, 1);
        tile.add(dscores_rows + t * q, q, B_time + n * K<E>, N, (t + ROWS) / K<E>);
        tile.put(m.dC + row * s.N + t * stride + n, stride, tokens - t, s.N - n);
      }
  }
};

template <typename T, typename TD>
void backward(const Shape &s, const Arrays<T, TD> &arrays) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < s.batch * s.groups * s.splits; i++) {
    Backward<T, TD> pass{s, arrays};
    pass.run(Task(s, i));
  }
}

}  // namespace

extern "C" void ssd_backward(int64_t half, int64_t half_dt, const Shape *s, const void *x, const void *dt,
                             const float *A, const void *B, const void *C, const float *D, const float *bias,
                             double low, double high, const bool *starts, const bool *mask, const void *saved,
                             const void *dy, const float *dlast, void *dx, void *ddt, float *dA, void *dB, void *dC,
                             float *dD, float *dbias, float *dinitial) {
  auto run = [&](auto number, auto step) {
    typedef decltype(number) T;
    typedef decltype(step) TD;
    backward<T, TD>(*s, {(const T *)x, (const T *)B, (const T *)C, (const T *)dy, (const TD *)dt, A, D, bias, starts,
                         mask, low, high, saved, dlast, (T *)dx, (T *)dB, (T *)dC, (TD *)ddt, dA, dD, dbias, dinitial});
  };
  if (half)
    half_dt ? run(bf16{}, bf16{}) : run(bf16{}, float{});
  else
    half_dt ? run(float{}, bf16{}) : run(float{}, float{});
}
