#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace slm {
namespace {

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

struct Job {
  const std::function<void(int64_t)>* fn;
  int64_t num_chunks;
};

void run_share(const Job& job, int64_t thread, int64_t num_threads) {
  for (int64_t c = job.num_chunks * thread / num_threads; c < job.num_chunks * (thread + 1) / num_threads;
       ++c)
    (*job.fn)(c);
}

void openmp_region(void* data) {
  // The runtime may start fewer threads than asked for, so the shares follow the real number.
  run_share(*static_cast<const Job*>(data), openmp().thread_num(), openmp().num_threads());
}

}  // namespace

const char* thread_pool() { return openmp().usable() ? "gomp" : "std::thread"; }

void parallel_for(int64_t num_chunks, int num_threads, const std::function<void(int64_t)>& fn) {
  const int64_t threads = std::min<int64_t>(num_threads, num_chunks);
  Job job{&fn, num_chunks};
  if (threads <= 1) {
    run_share(job, 0, 1);
  } else if (openmp().usable()) {
    openmp().parallel(openmp_region, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> workers;
    for (int64_t t = 1; t < threads; ++t)
      workers.emplace_back([&job, t, threads] { run_share(job, t, threads); });
    run_share(job, 0, threads);
    for (std::thread& worker : workers) worker.join();
  }
}

}  // namespace slm
