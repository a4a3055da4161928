#include "workers.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace prunus {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A thread's tasks [first, last), both in one word so that owner and thieves agree.
struct alignas(128) Range {
  std::atomic<uint64_t> bounds{0};
  void set(uint32_t first, uint32_t last) { bounds.store((uint64_t)last << 32 | first, std::memory_order_relaxed); }
  bool front(uint32_t& task) {
    uint64_t old = bounds.load(std::memory_order_relaxed);
    while ((uint32_t)old < (uint32_t)(old >> 32))
      if (bounds.compare_exchange_weak(old, old + 1, std::memory_order_relaxed)) {
        task = (uint32_t)old;
        return true;
      }
    return false;
  }
  bool back(uint32_t& task) {
    uint64_t old = bounds.load(std::memory_order_relaxed);
    while ((uint32_t)old < (uint32_t)(old >> 32))
      if (bounds.compare_exchange_weak(old, old - (1ull << 32), std::memory_order_relaxed)) {
        task = (uint32_t)(old >> 32) - 1;
        return true;
      }
    return false;
  }
};

struct Pool {
  std::mutex held;  // by the caller that runs a program
  Range ranges[MOST_THREADS];
  std::thread threads[MOST_THREADS];
  int started = 1;  // the caller counts as thread 0
  // Number of the round above, number of threads in it in the last 8 bits: a thread that comes late must not mistake
  // one round's count for another's.
  alignas(128) std::atomic<uint64_t> round{0};
  alignas(128) std::atomic<int> working{0};
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> sleeping{0};
  bool stop = false;
  Task task = nullptr;
  const void* context = nullptr;

  void work(int me, int count) {
    uint32_t number;
    while (ranges[me].front(number)) task(context, number);
    for (int step = 1; step < count; step++) {
      Range& other = ranges[(me + step) % count];
      while (other.back(number)) task(context, number);
    }
  }

  // `seen`: the last round before this thread was started; it may come up when the next one is already under way.
  void loop(int me, uint64_t seen) {
    for (;;) {
      uint64_t now = seen;
      // Operators follow each other within microseconds, so waiting threads spin for a while before they sleep.
      for (int spin = 0; spin < 4000; spin++) {
        now = round.load(std::memory_order_acquire);
        if (now != seen) break;
        pause();
      }
      if (now == seen) {
        std::unique_lock<std::mutex> lock(sleep);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return stop || round.load() != seen; });
        sleeping.fetch_sub(1);
        if (stop) return;
        now = round.load(std::memory_order_acquire);
      }
      seen = now;
      const int count = (int)(now & 255);
      if (me < count) {
        work(me, count);
        working.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep);
      stop = true;
    }
    wake.notify_all();
    for (int i = 1; i < started; i++) threads[i].join();
  }
};

// A forked child has none of the threads, and locks may be held by ones that are gone, so it gets a new pool; the old
// one is left alone.
std::atomic<Pool*> current{nullptr};
std::mutex making;

struct AtEnd {
  ~AtEnd() { delete current.exchange(nullptr); }
} at_end;

void forget() {
  new (&making) std::mutex;
  current.store(nullptr);
}

Pool* pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found) return found;
  std::lock_guard<std::mutex> lock(making);
  found = current.load(std::memory_order_acquire);
  if (!found) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    (void)registered;
    found = new Pool;
    current.store(found, std::memory_order_release);
  }
  return found;
}

thread_local Pool* mine = nullptr;  // the pool this thread holds

}  // namespace

int acquire_workers(int wanted) {
  if (wanted > MOST_THREADS) wanted = MOST_THREADS;
  if (wanted <= 1) return 1;
  Pool* p = pool();
  if (!p->held.try_lock()) return 1;
  while (p->started < wanted) {
    const int number = p->started;
    try {
      const uint64_t seen = p->round.load();
      p->threads[number] = std::thread([p, number, seen] { p->loop(number, seen); });
    } catch (...) {  // no more threads to be had: fewer do
      break;
    }
    p->started++;
  }
  mine = p;
  return p->started < wanted ? p->started : wanted;
}

void release_workers(int held) {
  if (held <= 1 && !mine) return;
  Pool* p = mine;
  mine = nullptr;
  p->held.unlock();
}

void share(int threads, int64_t count, Task task, const void* context) {
  if (threads <= 1 || count <= 1 || !mine) {
    for (int64_t i = 0; i < count; i++) task(context, i);
    return;
  }
  Pool* p = mine;
  p->task = task;
  p->context = context;
  for (int i = 0; i < threads; i++)
    p->ranges[i].set((uint32_t)(count * i / threads), (uint32_t)(count * (i + 1) / threads));
  p->working.store(threads - 1, std::memory_order_relaxed);
  // A thread says that it sleeps before it looks at the round once more, so none is missed here.
  p->round.store(((p->round.load(std::memory_order_relaxed) >> 8) + 1) << 8 | (uint64_t)threads);
  if (p->sleeping.load() > 0) {
    std::lock_guard<std::mutex> lock(p->sleep);
    p->wake.notify_all();
  }
  p->work(0, threads);
  while (p->working.load(std::memory_order_acquire) > 0) pause();
}

}  // namespace prunus
