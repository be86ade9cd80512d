#include "step_routing.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "mixture_plan.h"

namespace slm {
namespace {

struct Pick {
  int64_t entry, token, k;
  float coef;
  bool operator<(const Pick& other) const {
    if (entry != other.entry) return entry < other.entry;
    return token != other.token ? token < other.token : k < other.k;
  }
};

BlockRouting route_block(const Mixture& routing, std::vector<Pick>& picks, int64_t num_tokens) {
  std::sort(picks.begin(), picks.end());
  BlockRouting block;
  block.mixed.assign(num_tokens, 0);
  int64_t last_entry = -1, last_token = -1;
  for (const Pick& pick : picks) {
    if (pick.entry == last_entry && pick.token == last_token) {  // picked twice
      block.coef.back() += pick.coef;
      continue;
    }
    const int64_t member = static_cast<int64_t>(block.tokens.size()), rank = routing.rank[pick.entry];
    if (pick.entry != last_entry)
      block.entries.push_back({routing.start[pick.entry], rank, member, member, block.u_size});
    last_entry = pick.entry;
    last_token = pick.token;
    block.entries.back().end = member + 1;
    block.u_size += rank;
    block.tokens.push_back(static_cast<int32_t>(pick.token));
    block.coef.push_back(pick.coef);
    block.adds.push_back(block.mixed[pick.token]);
    block.mixed[pick.token] = 1;
  }
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
      for (int64_t k = 0; k < routing.top_k; ++k) {
        const int64_t i = row * routing.top_k + k, entry = routing.indices[i];
        if (routing.weights[i] != 0.0f && routing.rank[entry] > 0)
          picks.push_back({entry, t - begin, k, routing.weights[i] * routing.scaling[entry]});
      }
    }
    blocks.push_back(route_block(routing, picks, end - begin));
  }
}

}  // namespace slm
