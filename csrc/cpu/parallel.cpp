#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "isa.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace slm {
namespace {

constexpr int kSpins = 2000;  // about 100 us

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  bool usable() const { return parallel && thread_num && num_threads; }
};

#if defined(__linux__)
OpenMP symbols_of(void* handle) {
  OpenMP omp;
  omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(handle, "GOMP_parallel"));
  omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(handle, "omp_get_num_threads"));
  return omp;
}

// A libgomp or libiomp that was loaded without global scope (torch's wheels bundle theirs under a hashed
// name).
int search_loaded_library(dl_phdr_info* info, size_t, void* result) {
  const char* path = info->dlpi_name;
  if (!path || !(std::strstr(path, "libgomp") || std::strstr(path, "libiomp") || std::strstr(path, "libomp")))
    return 0;
  void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  OpenMP omp = symbols_of(handle);
  if (!omp.usable()) return 0;
  *static_cast<OpenMP*>(result) = omp;
  return 1;
}
#endif

OpenMP find_openmp() {
  OpenMP omp;
#if defined(__linux__)
  omp = symbols_of(RTLD_DEFAULT);
  if (!omp.usable()) {
    omp = OpenMP();
    dl_iterate_phdr(search_loaded_library, &omp);
  }
#endif
  return omp;
}

const OpenMP& openmp() {
  static const OpenMP omp = find_openmp();
  return omp;
}

using Region = std::function<void(int, int)>;

void openmp_region(void* data) {
  // The runtime may start fewer threads than asked for, so the shares follow the real number.
  (*static_cast<const Region*>(data))(openmp().thread_num(), openmp().num_threads());
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

const char* thread_pool() { return openmp().usable() ? "gomp" : "std::thread"; }

void parallel_region(int num_threads, const Region& fn) {
  kernels();  // an SLM_FAST_ISA that cannot run is told here: a worker's exception would end the process
  if (num_threads <= 1) {
    fn(0, 1);
  } else if (openmp().usable()) {
    openmp().parallel(openmp_region, const_cast<Region*>(&fn), static_cast<unsigned>(num_threads), 0);
  } else {
    std::vector<std::thread> workers;
    for (int t = 1; t < num_threads; ++t) workers.emplace_back([&fn, t, num_threads] { fn(t, num_threads); });
    fn(0, num_threads);
    for (std::thread& worker : workers) worker.join();
  }
}

void parallel_for(int64_t num_chunks, int num_threads, const std::function<void(int64_t)>& fn) {
  parallel_region(static_cast<int>(std::min<int64_t>(num_threads, num_chunks)), [&](int thread, int threads) {
    const int64_t end = share_begin(num_chunks, thread + 1, threads);
    for (int64_t c = share_begin(num_chunks, thread, threads); c < end; ++c) fn(c);
  });
}

void Barrier::wait(int threads, int64_t& round) {
  const int64_t wanted = ++round * threads;
  arrived_.fetch_add(1, std::memory_order_acq_rel);
  // A thread that lost its core is waited for without keeping the core from it.
  for (int spins = 0; arrived_.load(std::memory_order_acquire) < wanted; ++spins)
    spins < kSpins ? pause() : std::this_thread::yield();
}

}  // namespace slm
