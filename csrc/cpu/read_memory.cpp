// The yardstick of the kernels that are bound by memory.
#include <atomic>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace slm {

uint64_t read_memory(const std::vector<std::pair<const void*, int64_t>>& regions, int num_threads) {
  std::atomic<uint64_t> seen{0};
  parallel_region(num_threads, [&](int thread, int threads) {
    uint64_t mine = 0;
    for (const auto& [begin, bytes] : regions) {
      const int64_t pieces = bytes / kReadPiece, first = share_begin(pieces, thread, threads);
      const int64_t count = share_begin(pieces, thread + 1, threads) - first;
      mine |= kernels().read(static_cast<const char*>(begin) + first * kReadPiece, count * kReadPiece);
    }
    seen.fetch_or(mine);
  });
  return seen.load();
}

}  // namespace slm
