// Work in phases: a thread takes an item of a phase only when the one before is done.

#pragma once

#include <vector>

#include "kernels.h"

namespace layercomb {

struct Phase {
  int64_t n;                          // items, which may be done in any order
  std::function<void(int64_t)> work;  // does one
};

// Waits a moment, longer each time: first without giving way, since the other thread is nearly done
// as a rule, and then giving way, since it may have no core.
inline void Wait(int64_t& n) {
  constexpr int64_t kSpins = 2000;
  if (++n > kSpins) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Does the phases one after the other, on n_threads at most. Whoever is free takes the next item, so a
// thread that has no core holds up nothing but the item that it has begun.
inline void InPhases(const Pool& pool, int64_t n_threads, const std::vector<Phase>& phases) {
  struct Shared {
    std::vector<int64_t> starts{0};  // the number of the first item of each phase, and of all items
    alignas(64) std::atomic<int64_t> taken{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  // Shared, since a task may start when all has been done; then it does not touch `phases`.
  const auto shared = std::make_shared<Shared>();
  for (const Phase& phase : phases) shared->starts.push_back(shared->starts.back() + phase.n);
  const auto run = [shared, &phases] {
    const std::vector<int64_t>& starts = shared->starts;
    const int64_t n = starts.back();
    int64_t phase = 0, waited = 0;
    for (int64_t i; (i = shared->taken.load()) < n;) {
      while (i >= starts[phase + 1]) ++phase;
      if (shared->done.load() < starts[phase]) {
        Wait(waited);
      } else if (shared->taken.compare_exchange_weak(i, i + 1)) {
        phases[phase].work(i - starts[phase]);
        shared->done.fetch_add(1);
        waited = 0;
      }
    }
  };
  for (int64_t i = 1; i < n_threads; ++i) pool.schedule([run] { run(); });
  run();
  for (int64_t waited = 0; shared->done.load() < shared->starts.back();) Wait(waited);
}

}  // namespace layercomb
