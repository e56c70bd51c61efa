// Softmax cross-entropy of rows of logits, in place: the logits become the loss's gradient by them.
//
//   loss = log(sum_v e^(l_v - m)) + m - l_target        m = max_v l_v
//   d loss / d l_v = e^(l_v - m) / sum - [v = target]
//
// A row that is left out (target < 0) has no loss and a gradient of zero.
#include <vector>

#include "vec.h"

template <typename T>
static void rows_of(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t V, bool wants_gradient) {
#pragma omp parallel
  {
    std::vector<float> e(V + W);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      T *l = logits + row * V;
      int64_t target = targets[row];
      if (target < 0) {
        losses[row] = 0;
        if (wants_gradient) memset(l, 0, V * sizeof(T));
        continue;
      }
      vf most = all(-INFINITY);
      int64_t whole = V / W * W;
      for (int64_t i = 0; i < whole; i += W) most = larger(most, load(l + i));
      float m = max(most);
      for (int64_t i = whole; i < V; i++) m = std::fmax(m, load1(l + i));  // NaNs come back through exp below
      vf total{};
      over(V, [&](int64_t i, int n) INLINE {
        vf v = exp(get(l + i, n) - m);
        for (int k = n; k < W; k++) v[k] = 0;
        total += v;
        store(&e[i], v);
      });
      float s = sum(total);
      losses[row] = std::log(s) + m - load1(l + target);
      if (!wants_gradient) continue;
      over(V, [&](int64_t i, int n) INLINE { put(l + i, load(&e[i]) * (1.0f / s), n); });
      store1(l + target, e[target] / s - 1.0f);
    }
  }
}

extern "C" void cross_entropy(int64_t half, void *logits, const int64_t *targets, float *losses, int64_t rows,
                              int64_t V, int64_t wants_gradient) {
  half ? rows_of((bf16 *)logits, targets, losses, rows, V, wants_gradient)
       : rows_of((float *)logits, targets, losses, rows, V, wants_gradient);
}
