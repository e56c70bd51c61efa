// One token through a whole model: a tape of small operations, run by all threads with a barrier where one must wait.
//
// Python writes the tape once (ops/tape.py): records of 64-bit words. A record's first two say which operation, and
// whether it must wait for what came before; the others are its struct of operations.h. Nobody writes to them: a line
// that one thread writes, others must fetch from its cache, which takes as long as fifty products.
// Threads take work in pieces, so that a disturbed processor does not hold up the others.
#include "operations.h"
#include <sched.h>

#include <atomic>

constexpr int64_t WORDS = 40;  // of a record

enum Code : int64_t { EMBED, LINEAR, CONV, STATE, ANGLES, HEADS, ATTEND, COPY };

struct Record {
  int64_t code, waits;
  int64_t words[WORDS - 2];

  template <typename Op>
  void as(const Work &work) const {
    static_assert(sizeof(Op) <= sizeof words, "a record is too short");
    ((const Op *)words)->run(work);
  }
  void run(const Step &step, const Taken &taken) const {
    const Work work = {taken, step};
    switch (code) {
      case EMBED: return as<Embed>(work);
      case LINEAR: return as<Linear>(work);
      case CONV: return as<Conv>(work);
      case STATE: return as<State>(work);
      case ANGLES: return as<Angles>(work);
      case HEADS: return as<Heads>(work);
      case ATTEND: return as<Attend>(work);
      case COPY: return as<Copy>(work);
    }
  }
};

// where threads meet: how often each has come, on a line of its own
struct alignas(64) Came {
  std::atomic<int64_t> times{0};
};
static void meet(std::vector<Came> &all, const Crew &crew) {
  const int64_t now = all[crew.thread].times.load(std::memory_order_relaxed) + 1;
  all[crew.thread].times.store(now, std::memory_order_release);
  for (int64_t i = 0; i < crew.n_threads; i++)
    for (int tries = 0; all[i].times.load(std::memory_order_acquire) < now; tries++) {
      // a thread that others keep from running must get a processor
      if (tries > 4000) sched_yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
}

static void run(const Record *records, int64_t n, const Step &known) {
  Counters counters(n);
  std::vector<Came> came(Crew::most());
#pragma omp parallel
  {
    Step step = known;
    step.crew = Crew::here();
    for (int64_t i = 0; i < n; i++) {
      if (records[i].waits && step.crew.n_threads > 1) meet(came, step.crew);
      records[i].run(step, counters.of(i));
    }
  }
}

extern "C" void run_tape(const Record *records, int64_t n, int64_t B, const int64_t *ids, const int64_t *positions,
                         const uint8_t *mask, int64_t S) {
  run(records, n, {B, ids, positions, mask, S, {}, nullptr, nullptr, nullptr, 0, nullptr});
}

// sequences that come and go, each with its own length and places
extern "C" void run_rows(const Record *records, int64_t n, int64_t B, const int64_t *ids, const int64_t *positions,
                         const int64_t *slots, const int64_t *lengths, const int32_t *tables, int64_t width) {
  run(records, n, {B, ids, positions, nullptr, 0, {}, slots, lengths, tables, width, nullptr});
}

// several tokens of a sequence in a row, each row's state written into a slot where the next one finds it
extern "C" void run_chain(const Record *records, int64_t n, int64_t B, const int64_t *ids, const int64_t *positions,
                          const int64_t *slots, const int64_t *into, const int64_t *lengths, const int32_t *tables,
                          int64_t width) {
  run(records, n, {B, ids, positions, nullptr, 0, {}, slots, lengths, tables, width, into});
}

// held: whether copies are still their masters rounded, at a few of their places, others at each turn
struct Pair {
  const float *master;
  const bf16 *copy;
  int64_t n;
};
extern "C" void copies_hold(const Pair *pairs, int64_t n, int64_t turn, int64_t *held) {
  constexpr uint64_t PLACES = 4;
  *held = 1;
  for (int64_t i = 0; i < n; i++)
    for (uint64_t p = 0; p < PLACES; p++) {
      // the golden ratio's multiples lie evenly, however many have been taken
      const uint64_t part = (PLACES * (uint64_t)turn + p) * 0x9e3779b97f4a7c15u;
      const int64_t at = (int64_t)((unsigned __int128)part * (uint64_t)pairs[i].n >> 64);
      const float master = pairs[i].master[at];
      bf16 rounded;
      store1(&rounded, master);
      const uint16_t copy = pairs[i].copy[at].bits;
      // what is no number has many forms
      const bool same = master == master ? rounded.bits == copy : (copy & 0x7fff) > 0x7f80;
      if (!same) *held = 0;
    }
}
