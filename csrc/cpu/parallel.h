#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace slm {

// Call fn(chunk) for every chunk in 0..num_chunks-1 on at most num_threads threads. Runs on the OpenMP pool
// that torch has loaded, if there is one, so that the two do not fight for the cores. fn must not throw.
void parallel_for(int64_t num_chunks, int num_threads, const std::function<void(int64_t)>& fn);

// Call fn(thread, threads) once on each of `threads` threads, which are at most num_threads and all run at
// once.
void parallel_region(int num_threads, const std::function<void(int, int)>& fn);

// Where the threads of one region wait for each other. They spin: the waits are shorter than a wake-up.
class Barrier {
 public:
  // `round` counts the caller's own waits, from 0.
  void wait(int threads, int64_t& round);

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
};

// The first of n items that the share of `thread` holds.
inline int64_t share_begin(int64_t n, int thread, int threads) { return n * thread / threads; }

// "gomp" or "std::thread".
const char* thread_pool();

}  // namespace slm
