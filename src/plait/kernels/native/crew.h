// Several threads at one work: who they are, and how they share it out.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <cstdint>
#include <vector>

// who works: one of several threads
struct Crew {
  int64_t n_threads = 1, thread = 0;
  static Crew here() {
#if defined(_OPENMP)
    return {omp_get_num_threads(), omp_get_thread_num()};
#else
    return {};
#endif
  }
  static int64_t most() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
  }
};

// How much of each thread's share of some work has been taken: by itself from the front (low half), by others who have
// finished theirs from the back (high half).
struct Taken {
  uint64_t *ends;
  int64_t apart;  // from one thread's to the next one's
};

// Counters of several pieces of work, one after the other. Each thread has its own on lines that nobody else asks for
// before the end: a line that another one has written takes as long to come as fifty products
struct Counters {
  int64_t apart;
  std::vector<uint64_t> room;

  explicit Counters(int64_t works = 1) : apart(works + 8), room(apart * Crew::most()) {}
  Taken of(int64_t work = 0) { return {room.data() + work, apart}; }
};

// The next of n pieces for this thread, [first, last): whole multiples of `least`, many at first but at most `most` of
// them; false when none are left. Shares lie one after the other: at every token a thread sees the rows and states that
// its own caches know, and yet a disturbed one is helped
static inline bool take(const Taken &taken, int64_t n, int64_t least, const Crew &crew, int64_t &first, int64_t &last,
                        int64_t most = INT64_MAX) {
  const int64_t units = (n + least - 1) / least;
  for (int64_t i = 0; i < crew.n_threads; i++) {
    const int64_t whose = (crew.thread + i) % crew.n_threads;
    const int64_t begin = units * whose / crew.n_threads, end = units * (whose + 1) / crew.n_threads;
    uint64_t *ends = taken.ends + whose * taken.apart, seen = __atomic_load_n(ends, __ATOMIC_RELAXED);
    for (;;) {
      const int64_t front = seen & 0xffffffff, back = seen >> 32, left = end - begin - front - back;
      if (left <= 0) break;
      const int64_t half = (left + 1) / 2, part = half < most ? half : most;
      const int64_t at = i ? end - back - part : begin + front;
      const uint64_t want = seen + ((uint64_t)part << (i ? 32 : 0));
      if (__atomic_compare_exchange_n(ends, &seen, want, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        first = at * least;
        last = (at + part) * least < n ? (at + part) * least : n;
        return true;
      }
    }
  }
  return false;
}
