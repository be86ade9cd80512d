#pragma once

#include <cstdint>
#include <functional>

namespace slm {

// Call fn(chunk) for every chunk in 0..num_chunks-1 on at most num_threads threads. Runs on the OpenMP pool
// that torch has loaded, if there is one, so that the two do not fight for the cores. fn must not throw.
void parallel_for(int64_t num_chunks, int num_threads, const std::function<void(int64_t)>& fn);

// "gomp" or "std::thread".
const char* thread_pool();

}  // namespace slm
