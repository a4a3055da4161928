// A small pool of threads that share the tasks of one operator after the other.
#pragma once
#include <cstdint>

namespace prunus {

typedef void (*Task)(const void* context, int64_t number);

// Threads that may be used at once, at most.
constexpr int MOST_THREADS = 64;

// Hold the pool for a while. Returns how many threads there are, the caller included: 1 if another thread holds it,
// so that concurrent calls run side by side on one thread each instead of waiting.
int acquire_workers(int wanted);
void release_workers(int held);

// Run task(context, 0 .. count - 1) on the held threads. Each starts with its share in order and helps others at the
// end of theirs, so what a thread wrote in one operator tends to be what it reads in the next.
void share(int threads, int64_t count, Task task, const void* context);

}  // namespace prunus
