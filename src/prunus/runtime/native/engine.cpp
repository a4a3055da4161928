// The C interface: which instruction sets there are, memory, and running a list of steps in one call.
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "layers.hpp"
#include "workers.hpp"

namespace prunus {

#if defined(PRUNUS_X86)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

constexpr int MOST_SETS = 3;

// What this processor can run, best first.
int available(const Kernels* sets[MOST_SETS]) {
  int count = 0;
#if defined(PRUNUS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    sets[count++] = &avx512::kernels;
  if (avx2) sets[count++] = &avx2::kernels;
#endif
  sets[count++] = &portable::kernels;
  return count;
}

struct Step {
  int32_t kind;
  int32_t joined;  // whether task i of the next step may follow task i of this one before other tasks are done
  const void* layer;
};


// What `share` carries to the threads: steps whose tasks belong together, one after the other.
struct Call {
  const Kernels* kernels;
  const Step* steps;
  int64_t count;
};

int64_t tasks_of(const Step& step) {
  switch (step.kind) {
    case STREAM: {
      const StreamLayer& s = *(const StreamLayer*)step.layer;
      return (int64_t)s.tiles * s.chunks;
    }
    case COPY: return ((const CopyLayer*)step.layer)->planes;
    case WINDOW: return ((const WindowLayer*)step.layer)->planes;
    case MEAN: return ((const MeanLayer*)step.layer)->planes;
    case POINTWISE: return ((const PointwiseLayer*)step.layer)->planes;
    case GEMV: return ((const GemvLayer*)step.layer)->chunks;
    case TRANSPOSE: {
      const TransposeLayer& s = *(const TransposeLayer*)step.layer;
      return s.outer * s.inner * ((s.columns + 15) / 16);
    }
  }
  return -1;
}

void run_task(const void* context, int64_t number) {
  const Call& call = *(const Call*)context;
  const Kernels& k = *call.kernels;
  for (int64_t i = 0; i < call.count; i++) {
    const void* layer = call.steps[i].layer;
    switch (call.steps[i].kind) {
      case STREAM: k.stream(*(const StreamLayer*)layer, number); break;
      case COPY: k.copy(*(const CopyLayer*)layer, number); break;
      case WINDOW: k.window(*(const WindowLayer*)layer, number); break;
      case MEAN: k.mean(*(const MeanLayer*)layer, number); break;
      case POINTWISE: k.pointwise(*(const PointwiseLayer*)layer, number); break;
      case TRANSPOSE: k.transpose(*(const TransposeLayer*)layer, number); break;
      case GEMV: k.gemv(*(const GemvLayer*)layer, number); break;
    }
  }
}

}  // namespace
}  // namespace prunus

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Raised whenever a structure or the meaning of a field changes.
EXPORT int32_t prunus_interface() { return 2; }

EXPORT int32_t prunus_instruction_sets() {
  const prunus::Kernels* sets[prunus::MOST_SETS];
  return prunus::available(sets);
}

EXPORT const char* prunus_instruction_set(int32_t number) {
  const prunus::Kernels* sets[prunus::MOST_SETS];
  return number >= 0 && number < prunus::available(sets) ? sets[number]->name : nullptr;
}

// Bytes of the structures, by kind, so that the caller can check that it means the same.
EXPORT int64_t prunus_layer_bytes(int32_t kind) {
  switch (kind) {
    case prunus::STREAM: return sizeof(prunus::StreamLayer);
    case prunus::COPY: return sizeof(prunus::CopyLayer);
    case prunus::WINDOW: return sizeof(prunus::WindowLayer);
    case prunus::MEAN: return sizeof(prunus::MeanLayer);
    case prunus::POINTWISE: return sizeof(prunus::PointwiseLayer);
    case prunus::TRANSPOSE: return sizeof(prunus::TransposeLayer);
    case prunus::GEMV: return sizeof(prunus::GemvLayer);
  }
  return -1;
}

// Zeroed memory for activations and weights. Planes that lie far apart would exhaust the first-level TLB with small
// pages, so large pages are asked for. Returns null when there is none.
EXPORT void* prunus_allocate(int64_t bytes) {
  if (bytes <= 0) return nullptr;
  const int64_t large = 2 << 20;
  const int64_t size = (bytes + large - 1) / large * large;
  if (bytes < large / 2) {
    void* small = nullptr;
    if (posix_memalign(&small, 4096, (size_t)bytes)) return nullptr;
    return memset(small, 0, (size_t)bytes);
  }
  void* found = nullptr;
  if (posix_memalign(&found, (size_t)large, (size_t)size)) return nullptr;
#if defined(MADV_HUGEPAGE)
  madvise(found, (size_t)size, MADV_HUGEPAGE);
#endif
  return memset(found, 0, (size_t)size);
}

EXPORT void prunus_release(void* memory) { free(memory); }

// Run steps in order, joined ones task by task, on up to `threads` threads with instruction set number `set`. If `seconds` is not null it gets the
// time of every step. Returns 0, 1 for an unknown set and 2 for an unknown step; nothing has run then.
EXPORT int32_t prunus_run(const prunus::Step* steps, int64_t count, int32_t threads, int32_t set, double* seconds) {
  const prunus::Kernels* sets[prunus::MOST_SETS];
  if (set < 0 || set >= prunus::available(sets)) return 1;
  for (int64_t i = 0; i < count; i++)
    if (steps[i].kind < 0 || steps[i].kind >= prunus::KINDS) return 2;
  const int held = prunus::acquire_workers(threads);
  for (int64_t i = 0; i < count;) {
    const auto start = std::chrono::steady_clock::now();
    int64_t end = i + 1;
    // Times are taken step by step, so nothing is joined then.
    while (!seconds && end < count && steps[end - 1].joined) end++;
    const prunus::Call call{sets[set], steps + i, end - i};
    prunus::share(held, prunus::tasks_of(steps[i]), prunus::run_task, &call);
    if (seconds) seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    i = end;
  }
  prunus::release_workers(held);
  return 0;
}

}  // extern "C"
