#include "step_routing.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"
#include "mixture_plan.h"

namespace slm {
namespace {

struct Pick {
  bool sparse;
  int64_t entry, token, k;
  float coef;
  bool operator<(const Pick& other) const {
    return std::tie(sparse, entry, token, k) < std::tie(other.sparse, other.entry, other.token, other.k);
  }
};

// The first of the columns that an entry gets, after those that are taken.
int64_t place_columns(std::vector<int64_t>& columns, int64_t start, int64_t rank) {
  const int64_t size = (rank + 7) / 8 * 8, left = 32 - static_cast<int64_t>(columns.size()) % 32;
  if (size > left && left < 32) columns.resize(columns.size() + left, -1);
  const int64_t first = static_cast<int64_t>(columns.size());
  for (int64_t j = 0; j < size; ++j) columns.push_back(j < rank ? start + j : -1);
  return first;
}

BlockRouting route_block(const Mixture& routing, std::vector<Pick>& picks, int64_t num_tokens) {
  std::sort(picks.begin(), picks.end());
  BlockRouting block;
  block.mixed.assign(num_tokens, 0);
  block.sparse.assign(num_tokens, 0);
  const Pick* last = nullptr;
  for (const Pick& pick : picks) {
    const bool same_entry = last && last->entry == pick.entry && last->sparse == pick.sparse;
    if (same_entry && pick.token == last->token) {  // picked twice
      block.coef.back() += pick.coef;
      continue;
    }
    const int64_t member = static_cast<int64_t>(block.tokens.size()), rank = routing.rank[pick.entry];
    if (!same_entry) {
      const int64_t start = routing.start[pick.entry];
      const int64_t column = pick.sparse ? -1 : place_columns(block.columns, start, rank);
      block.entries.push_back({start, rank, member, member, block.u_size, column});
      block.num_dense += !pick.sparse;
    }
    last = &pick;
    block.entries.back().end = member + 1;
    block.u_size += rank;
    block.tokens.push_back(static_cast<int32_t>(pick.token));
    block.coef.push_back(pick.coef);
    block.adds.push_back(block.mixed[pick.token]);
    block.mixed[pick.token] = 1;
    if (pick.sparse) block.sparse[pick.token] = 1;
  }
  block.columns.resize((block.columns.size() + 31) / 32 * 32, -1);
  return block;
}

}  // namespace

StepRouting::StepRouting(const Mixture& routing)
    : num_tokens(routing.num_tokens), total_rank(routing.total_rank) {
  validate(routing, -1);
  if (!routing.cu_seqlens && (routing.num_rows ? num_tokens % routing.num_rows : num_tokens))
    throw std::invalid_argument(std::to_string(num_tokens) + " tokens cannot be shared out equally among " +
                                std::to_string(routing.num_rows) + " rows");
  std::vector<Pick> picks;
  int64_t row = 0;
  for (int64_t begin = 0; begin < num_tokens; begin += kMostTokens) {
    const int64_t end = std::min(begin + kMostTokens, num_tokens);
    picks.clear();
    for (int64_t t = begin; t < end; ++t) {
      while (routing.token_begin(row + 1) <= t) ++row;
      const bool sparse = routing.token_begin(row + 1) - routing.token_begin(row) < kDenseRow;
      for (int64_t k = 0; k < routing.top_k; ++k) {
        const int64_t i = row * routing.top_k + k, entry = routing.indices[i];
        if (routing.weights[i] != 0.0f && routing.rank[entry] > 0)
          picks.push_back({sparse, entry, t - begin, k, routing.weights[i] * routing.scaling[entry]});
      }
    }
    blocks.push_back(route_block(routing, picks, end - begin));
  }
}

}  // namespace slm
