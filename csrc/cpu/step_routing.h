#pragma once

#include <cstdint>
#include <vector>

#include "../ops.h"

namespace slm {

// One entry of the pool and the tokens of a block that picked it with a weight other than 0, its members.
struct PickedEntry {
  int64_t start, rank;  // slab rows
  int64_t begin, end;   // members
  int64_t u_begin;      // member m's rank-space vector is u[u_begin + (m - begin) * rank ..]
  int64_t column;       // of the dense rank-space matrix, or -1
};

// The mixture of up to kMostTokens tokens. A token adds its entries in ascending order, whatever the others
// pick. Entries of tokens whose row has kDenseRow tokens and more come first, and their ranks have columns of
// a dense matrix too: whole multiples of 8, none across a multiple of 32 that it does not begin at, so that
// tile products of a token's columns add up alike wherever they are.
struct BlockRouting {
  std::vector<PickedEntry> entries;
  std::vector<int32_t> tokens;   // of each member, from the block's first
  std::vector<float> coef;       // weight * scaling
  std::vector<uint8_t> adds;     // 0 for the first pick of a token
  std::vector<uint8_t> mixed;    // [tokens of the block] whether it has any pick
  std::vector<uint8_t> sparse;   // [tokens of the block] whether it has picks without columns
  std::vector<int64_t> columns;  // slab row of each dense column, or -1; a multiple of 32 of them
  int64_t num_dense = 0;         // entries with columns
  int64_t u_size = 0;
};

// A step's mixture, checked and sorted once for all linears. Copies what it reads.
class StepRouting {
 public:
  // Of `routing`, the slabs and features are not looked at. Throws std::invalid_argument on indices outside
  // the pool, entries outside the slab, and tokens that cannot be shared out among the rows.
  explicit StepRouting(const Mixture& routing);

  int64_t num_tokens, total_rank;
  std::vector<BlockRouting> blocks;  // one per kMostTokens tokens
};

}  // namespace slm
