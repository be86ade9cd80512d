// One parallel region a call, in stages that barriers divide: (1) the prologue, shared out by tokens; (2)
// tokens packed for AMX, and the rank-space vectors u = coef A h, shared out by entries; (3) each thread's
// own contiguous rows of the weights, read once for all tokens, with the mixture, bias and residual added to
// the fp32 sums; (4) the rotation. Bytes: the weights, and the factors of each entry that any token picked,
// once for every kMostBlocks * kMostTokens tokens.
//
// The mixture comes in two ways. Sparse, for rows of few tokens: each entry by itself for the tokens that
// picked it, in a buffer that is added at the end. Dense, for long rows where there are tiles: u is a matrix
// of all tokens and columns, 0 where a token has not picked an entry, and the entries' B are further columns
// of the weights.
#include "linear_group.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace slm {
namespace {

// Below this many bytes of weights one thread is done sooner.
constexpr int64_t kSerialBytes = 128 * 1024;
constexpr int64_t kSiluColumns = 512;      // of one part of silu_mul
constexpr int64_t kShrinkRanks = 8;        // of one part of the sparse shrink
constexpr int64_t kMixFloats = 64 * 1024;  // of the mixture's sums, which stay in L2 until the rows are done
constexpr int64_t kMostBlocks = 8;         // of kMostTokens tokens, that share one pass over the weights

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) {
  return static_cast<char*>(base) + elements * size_of(dtype);
}

int64_t tiles_of(const Linear& linear) { return (linear.out_features + kRowsOfTile - 1) / kRowsOfTile; }

// To the nearest bf16, ties to even.
uint16_t bf16_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if (v != v) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Memory on a cache line's boundary that only grows.
class Scratch {
 public:
  template <class T>
  T* at_least(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (bytes > size_) {
      memory_.reset(new char[bytes]);
      size_ = bytes;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

// Up to kMostTokens tokens of a call.
struct Block {
  const BlockRouting* routing;  // null if no token picks anything here
  int64_t first, num_tokens;    // of the call
  char* packed;                 // for AMX
  float* u;                     // [linears][routing->u_size]
  uint16_t* dense;              // [linears][num_tokens][columns] bf16
};

// Some ranks of an entry, for all tokens of a block that picked it.
struct ShrinkPart {
  const Block* block;
  const PickedEntry* entry;
  int64_t linear, begin;  // all ranks if the entry is dense
  bool dense;
};

// What a thread keeps for the output rows it works on.
struct Outputs {
  Scratch mix, more, more_packed;
};

}  // namespace

// What the calling thread keeps for one group of a call.
struct Workspace {
  Scratch h, h32, packed, u, dense;
  std::vector<Block> blocks;
  std::vector<ShrinkPart> parts;
};

// One pass over the weights; x, x2, residual and out begin with the call's token `first`.
struct GroupCall {
  const LinearGroup& group;
  const StepRouting* routing;  // or null
  const void *x, *x2, *residual;
  std::vector<void*> out;
  int64_t first, num_tokens;
  const Rotation* rotation;  // or null

  const LinearKernels& ops = kernels().linear;
  const DType h_dtype = group.dtype_ == DType::bf16 && ops.multiplies_bf16 ? DType::bf16 : DType::f32;
  const bool uses_tiles = h_dtype == DType::bf16 && ops.pack;
  const void* h = nullptr;      // what `rows` reads: x itself, what the prologue wrote, or h32
  void* h_out = nullptr;        // where the prologue writes h; null if it is not asked to
  float* h32 = nullptr;         // the same for h in fp32
  const float* full = nullptr;  // h in fp32, if somebody reads it
  const std::vector<Block>* blocks = nullptr;
  const std::vector<ShrinkPart>* parts = nullptr;
  bool packs = false, shrinks_dense = false;  // whether any block, any part does

  bool mixes(const Linear& linear) const { return routing && linear.A; }
  // Factors of another dtype than h's are multiplied in fp32.
  bool shrinks_in_bf16(const Linear& linear) const {
    return h_dtype == DType::bf16 && linear.factor_dtype == DType::bf16;
  }
  bool has_dense(const Linear& linear) const { return uses_tiles && shrinks_in_bf16(linear); }
  int64_t num_linears() const { return static_cast<int64_t>(group.linears_.size()); }
  const void* h_of(const Block& block) const { return at(h, block.first * group.in_features_, h_dtype); }
  float* u_of(const Block& block, int64_t linear) const { return block.u + linear * block.routing->u_size; }
  uint16_t* dense_of(const Block& block, int64_t linear) const {
    return block.dense + linear * block.num_tokens * static_cast<int64_t>(block.routing->columns.size());
  }
  // The rows of A that a part of the shrink reads.
  const char* rows_of(const ShrinkPart& part) const {
    const Linear& linear = group.linears_[part.linear];
    return at(linear.A, (part.entry->start + part.begin) * group.in_features_, linear.factor_dtype);
  }

  void plan(Workspace& space);
  void plan_blocks(Workspace& space);
  void plan_shrink(const Block& block, std::vector<ShrinkPart>& list);
  // `round`: of the barrier's waits of this thread.
  void work(int thread, int threads, Barrier& barrier, int64_t& round);
  void prologue(int thread, int threads);
  void pack(int thread, int threads);
  void shrink(int thread, int threads);
  void shrink_sparse(const ShrinkPart& part, const void* next);
  void shrink_dense(const ShrinkPart& part);
  void outputs(int thread, int threads);
  void rotate(int thread, int threads);
  void output_panel(const Block& block, int64_t linear, int64_t begin, int64_t end, const void* next,
                    bool same_columns, Outputs& memory);
  void expand(const Block& block, int64_t linear, int64_t first_entry, int64_t begin, int64_t width,
              int64_t stride, float* mix) const;
};

void GroupCall::plan(Workspace& space) {
  const int64_t dim = group.in_features_, n = num_tokens * dim;
  const DType dtype = group.dtype_;
  bool reads_full = h_dtype == DType::f32;
  for (const Linear& linear : group.linears_)
    reads_full = reads_full || (mixes(linear) && !shrinks_in_bf16(linear));
  const bool keeps_h = h_dtype == dtype;
  h = x;
  if (group.prologue_ != Prologue::none && keeps_h) h = h_out = space.h.at_least<char>(n * size_of(dtype));
  if (reads_full && dtype != DType::f32) h32 = space.h32.at_least<float>(n);
  full = dtype == DType::f32 ? static_cast<const float*>(h) : h32;
  if (!keeps_h) h = h32;
  plan_blocks(space);
}

void GroupCall::plan_blocks(Workspace& space) {
  int64_t packed = 0, u = 0, dense = 0;
  space.blocks.clear();
  space.parts.clear();
  for (int64_t begin = 0; begin < num_tokens; begin += kMostTokens) {
    const BlockRouting* found = routing ? &routing->blocks[(first + begin) / kMostTokens] : nullptr;
    if (found && found->entries.empty()) found = nullptr;
    const int64_t count = std::min(kMostTokens, num_tokens - begin);
    space.blocks.push_back({found, begin, count, nullptr, nullptr, nullptr});
    packed += uses_tiles ? ops.packed_bytes(count, group.in_features_) : 0;
    u += found ? found->u_size * num_linears() : 0;
    dense += found ? count * static_cast<int64_t>(found->columns.size()) * num_linears() : 0;
  }
  char* packed_at = packed ? space.packed.at_least<char>(packed) : nullptr;
  float* u_at = space.u.at_least<float>(u);
  uint16_t* dense_at = space.dense.at_least<uint16_t>(dense);
  std::memset(dense_at, 0, static_cast<size_t>(dense) * sizeof *dense_at);
  for (Block& block : space.blocks) {
    const int64_t bytes = packed_at ? ops.packed_bytes(block.num_tokens, group.in_features_) : 0;
    block.packed = bytes ? packed_at : nullptr;
    packs = packs || block.packed;
    packed_at += bytes;
    if (!block.routing) continue;
    block.u = u_at;
    block.dense = dense_at;
    u_at += block.routing->u_size * num_linears();
    dense_at += block.num_tokens * static_cast<int64_t>(block.routing->columns.size()) * num_linears();
    plan_shrink(block, space.parts);
  }
  blocks = &space.blocks;
  parts = &space.parts;
}

void GroupCall::plan_shrink(const Block& block, std::vector<ShrinkPart>& list) {
  for (int64_t i = 0; i < num_linears(); ++i) {
    if (!mixes(group.linears_[i])) continue;
    for (const PickedEntry& entry : block.routing->entries) {
      const bool dense = entry.column >= 0 && has_dense(group.linears_[i]);
      shrinks_dense = shrinks_dense || dense;
      for (int64_t j = 0; j < entry.rank; j += dense ? entry.rank : kShrinkRanks)
        list.push_back({&block, &entry, i, j, dense});
    }
  }
}

void GroupCall::prologue(int thread, int threads) {
  const int64_t dim = group.in_features_;
  const int dtype = static_cast<int>(group.dtype_);
  const int64_t parts = group.prologue_ == Prologue::silu_mul ? (dim + kSiluColumns - 1) / kSiluColumns : 1;
  const int64_t columns = parts == 1 ? dim : kSiluColumns;
  const int64_t end = share_begin(num_tokens * parts, thread + 1, threads);
  for (int64_t i = share_begin(num_tokens * parts, thread, threads); i < end; ++i) {
    const int64_t column = i % parts * columns, n = std::min(columns, dim - column);
    const int64_t begin = i / parts * dim + column;
    const void* in = at(x, begin, group.dtype_);
    void* const to = h_out ? at(h_out, begin, group.dtype_) : nullptr;
    float* const to32 = h32 ? h32 + begin : nullptr;
    if (group.prologue_ == Prologue::none) ops.widen(in, dtype, n, to32);
    if (group.prologue_ == Prologue::rms_norm)
      ops.rms_norm(in, group.norm_weight_, dtype, group.eps_, n, to, to32);
    if (group.prologue_ == Prologue::silu_mul)
      ops.silu_mul(in, at(x2, begin, group.dtype_), dtype, n, to, to32);
  }
}

void GroupCall::pack(int thread, int threads) {
  const int64_t parts = ops.packed_parts(group.in_features_);
  for (const Block& block : *blocks)
    if (block.packed)
      ops.pack(h_of(block), block.num_tokens, group.in_features_, share_begin(parts, thread, threads),
               share_begin(parts, thread + 1, threads), block.packed);
}

void GroupCall::shrink(int thread, int threads) {
  const int64_t count = static_cast<int64_t>(parts->size()), end = share_begin(count, thread + 1, threads);
  for (int64_t i = share_begin(count, thread, threads); i < end; ++i) {
    const ShrinkPart& part = (*parts)[i];
    if (part.dense) {
      shrink_dense(part);
      continue;
    }
    const ShrinkPart* after = i + 1 < end ? &part + 1 : nullptr;
    const bool follows =
        after && group.linears_[after->linear].factor_dtype == group.linears_[part.linear].factor_dtype;
    shrink_sparse(part, follows ? rows_of(*after) : nullptr);
  }
}

void GroupCall::shrink_sparse(const ShrinkPart& part, const void* next) {
  const PickedEntry& entry = *part.entry;
  const BlockRouting& of = *part.block->routing;
  const Linear& linear = group.linears_[part.linear];
  const bool bf16 = shrinks_in_bf16(linear);
  const void* from = bf16 ? h_of(*part.block) : full + part.block->first * group.in_features_;
  ops.shrink(from, bf16 ? 1 : 0, of.tokens.data() + entry.begin, of.coef.data() + entry.begin,
             entry.end - entry.begin, rows_of(part), static_cast<int>(linear.factor_dtype),
             std::min(kShrinkRanks, entry.rank - part.begin), entry.rank, group.in_features_, next,
             u_of(*part.block, part.linear) + entry.u_begin + part.begin);
}

// All tokens of the block, of which the members' vectors are kept.
void GroupCall::shrink_dense(const ShrinkPart& part) {
  alignas(64) float acc[kMostTokens * kRowsOfBlock];
  const Block& block = *part.block;
  const PickedEntry& entry = *part.entry;
  const int64_t dim = group.in_features_, columns = static_cast<int64_t>(block.routing->columns.size());
  uint16_t* const to = dense_of(block, part.linear) + entry.column;
  for (int64_t j = 0; j < entry.rank; j += kRowsOfBlock) {
    const int64_t num_j = std::min(kRowsOfBlock, entry.rank - j);
    const char* const from = rows_of(part) + j * dim * size_of(DType::bf16);
    ops.rows(from, 1, num_j, h_of(block), 1, block.packed, block.num_tokens, dim, nullptr, nullptr, 0, from,
             acc);
    for (int64_t m = entry.begin; m < entry.end; ++m) {
      const int64_t token = block.routing->tokens[m];
      for (int64_t i = 0; i < num_j; ++i)
        to[token * columns + j + i] = bf16_of(block.routing->coef[m] * acc[token * kRowsOfBlock + i]);
    }
  }
}

// From `first_entry` on.
void GroupCall::expand(const Block& block, int64_t index, int64_t first_entry, int64_t begin, int64_t width,
                       int64_t stride, float* mix) const {
  const Linear& linear = group.linears_[index];
  const BlockRouting& of = *block.routing;
  const auto columns_of = [&](const PickedEntry& entry) {
    return at(linear.B, entry.start * linear.out_features + begin, linear.factor_dtype);
  };
  for (size_t i = static_cast<size_t>(first_entry); i < of.entries.size(); ++i) {
    const PickedEntry& entry = of.entries[i];
    const void* next = i + 1 < of.entries.size() ? columns_of(of.entries[i + 1]) : nullptr;
    ops.expand(u_of(block, index) + entry.u_begin, entry.rank, of.tokens.data() + entry.begin,
               of.adds.data() + entry.begin, entry.end - entry.begin, columns_of(entry),
               static_cast<int>(linear.factor_dtype), linear.out_features, width, next, mix, stride);
  }
}

// Columns of one output: enough of them to read B in long runs, few enough that their mixture stays in L2.
// `same_columns`: the block before had the same dense columns, and `memory.more` has their tiles.
void GroupCall::output_panel(const Block& block, int64_t index, int64_t begin, int64_t end, const void* next,
                             bool same_columns, Outputs& memory) {
  alignas(64) float acc[kMostTokens * kRowsOfBlock];
  const Linear& linear = group.linears_[index];
  const DType dtype = group.dtype_;
  const int64_t dim = group.in_features_, out_features = linear.out_features, count = block.num_tokens;
  const bool mixed = block.routing && linear.A,
             dense = mixed && has_dense(linear) && block.routing->num_dense;
  const int64_t first_sparse = dense ? block.routing->num_dense : 0;
  const bool sparse = mixed && first_sparse < static_cast<int64_t>(block.routing->entries.size());
  const int64_t mix_stride = (end - begin + kRowsOfBlock - 1) / kRowsOfBlock * kRowsOfBlock;
  float* const mix = sparse ? memory.mix.at_least<float>(count * mix_stride) : nullptr;
  if (mix) expand(block, index, first_sparse, begin, end - begin, mix_stride, mix);
  const uint8_t* const adds = !sparse ? nullptr
                              : dense ? block.routing->sparse.data()
                                      : block.routing->mixed.data();
  const int64_t columns = dense ? static_cast<int64_t>(block.routing->columns.size()) : 0,
                num_more = columns / 32;
  uint16_t* const more = memory.more.at_least<uint16_t>(kRowsOfBlock * columns);
  char* const more_packed = memory.more_packed.at_least<char>((kMostTokens + 16) * 2 * columns);
  if (dense) ops.pack(dense_of(block, index), count, columns, 0, num_more, more_packed);
  for (int64_t r = begin; r < end; r += kRowsOfBlock) {
    const int64_t num_r = std::min(kRowsOfBlock, end - r), offset = block.first * out_features + r;
    if (dense && !same_columns)
      ops.augment(linear.B, out_features, block.routing->columns.data(), columns, r, num_r, more);
    ops.rows(at(linear.weight, r * dim, dtype), static_cast<int>(dtype), num_r, h_of(block),
             static_cast<int>(h_dtype), block.packed, count, dim, more, more_packed, num_more,
             r + num_r < end ? at(linear.weight, (r + num_r) * dim, dtype) : next, acc);
    ops.finish(acc, count, num_r, linear.bias ? at(linear.bias, r, dtype) : nullptr, adds,
               mix ? mix + (r - begin) : nullptr, mix_stride,
               residual ? at(residual, offset, dtype) : nullptr, static_cast<int>(dtype), out_features,
               at(out[index], offset, dtype));
  }
}

void GroupCall::outputs(int thread, int threads) {
  thread_local Outputs memory;
  const int64_t first_tile = share_begin(group.num_tiles_, thread, threads);
  const int64_t last_tile = share_begin(group.num_tiles_, thread + 1, threads);
  // Several blocks share a panel of one pass over the rows, which stays in L2.
  const int64_t floats = blocks->size() > 1 ? 0 : kMixFloats / num_tokens;
  const int64_t panel = std::max<int64_t>(floats / kRowsOfBlock, 1) * kRowsOfBlock;
  int64_t tile = 0;  // of the linear's first row
  for (int64_t i = 0; i < num_linears(); ++i) {
    const Linear& linear = group.linears_[i];
    const int64_t begin = std::max<int64_t>(first_tile - tile, 0) * kRowsOfTile;
    const int64_t end = std::min((last_tile - tile) * kRowsOfTile, linear.out_features);
    tile += tiles_of(linear);
    const void* after = tile < last_tile ? group.linears_[i + 1].weight : nullptr;
    for (int64_t p = begin; p < end; p += panel) {
      const int64_t panel_end = std::min(p + panel, end);
      const Block* before = nullptr;
      for (const Block& block : *blocks) {
        const void* next = &block != &blocks->back() ? at(linear.weight, p * group.in_features_, group.dtype_)
                           : panel_end < end ? at(linear.weight, panel_end * group.in_features_, group.dtype_)
                                             : after;
        const bool same =
            before && before->routing && block.routing && before->routing->columns == block.routing->columns;
        output_panel(block, i, p, panel_end, next, same, memory);
        before = &block;
      }
    }
  }
}

void GroupCall::rotate(int thread, int threads) {
  const int64_t size = rotation->head_size, end = share_begin(num_tokens, thread + 1, threads);
  for (int64_t t = share_begin(num_tokens, thread, threads); t < end; ++t) {
    const int64_t angle = (first + t) % rotation->num_angles * size;
    for (int64_t i = 0; i < rotation->num_linears; ++i) {
      const int64_t features = group.linears_[i].out_features;
      for (int64_t c = 0; c < features; c += size)
        ops.rotate(at(out[i], t * features + c, group.dtype_), at(rotation->cos, angle, group.dtype_),
                   at(rotation->sin, angle, group.dtype_), static_cast<int>(group.dtype_), size);
    }
  }
}

void GroupCall::work(int thread, int threads, Barrier& barrier, int64_t& round) {
  if (h_out || h32) {
    prologue(thread, threads);
    barrier.wait(threads, round);
  }
  if (packs) pack(thread, threads);
  if (packs && shrinks_dense) barrier.wait(threads, round);
  if (uses_tiles) ops.enter(std::min(num_tokens, kMostTokens));
  if (!parts->empty()) shrink(thread, threads);
  if (packs || !parts->empty()) barrier.wait(threads, round);
  outputs(thread, threads);
  if (uses_tiles) ops.leave();
  if (rotation) {
    barrier.wait(threads, round);
    rotate(thread, threads);
  }
}

LinearGroup::LinearGroup(DType dtype, int64_t in_features, Prologue prologue, float eps,
                         const void* norm_weight, std::vector<Linear> linears)
    : dtype_(dtype),
      in_features_(in_features),
      prologue_(prologue),
      eps_(eps),
      norm_weight_(norm_weight),
      linears_(std::move(linears)) {
  for (const Linear& linear : linears_) {
    num_tiles_ += tiles_of(linear);
    weight_bytes_ += linear.out_features * in_features * size_of(dtype);
  }
}

void LinearGroup::check(const std::vector<void*>& out, const void* residual, int64_t num_tokens,
                        const StepRouting* routing, const Rotation* rotation) const {
  const auto fail = [](const std::string& message) { throw std::invalid_argument(message); };
  if (out.size() != linears_.size())
    fail("out must have one pointer for each of the " + std::to_string(linears_.size()) + " linears, got " +
         std::to_string(out.size()));
  if (residual && linears_.size() != 1)
    fail("residual goes with one linear, the group has " + std::to_string(linears_.size()));
  for (int64_t i = 0; rotation && i < rotation->num_linears; ++i)
    if (i >= static_cast<int64_t>(linears_.size()) || linears_[i].out_features % rotation->head_size)
      fail("rotated outputs must be whole heads of " + std::to_string(rotation->head_size) + " features");
  if (!routing) return;
  if (routing->num_tokens != num_tokens)
    fail("routing was made for " + std::to_string(routing->num_tokens) + " tokens, got " +
         std::to_string(num_tokens));
  for (const Linear& linear : linears_)
    if (linear.A && routing->total_rank > linear.total_rank)
      fail("routing was made for slabs of " + std::to_string(routing->total_rank) + " rows, got " +
           std::to_string(linear.total_rank));
}

GroupCall LinearGroup::call(const void* x, const void* x2, int64_t first, int64_t num_tokens,
                            std::vector<void*> out, const void* residual, const StepRouting* routing,
                            const Rotation* rotation) const {
  return {*this, routing, x, x2, residual, std::move(out), first, num_tokens, rotation};
}

void LinearGroup::forward(const void* x, const void* x2, int64_t num_tokens, const std::vector<void*>& out,
                          const void* residual, const StepRouting* routing, const Rotation* rotation,
                          int num_threads) const {
  thread_local Workspace space;
  check(out, residual, num_tokens, routing, rotation);
  const int threads = weight_bytes_ < kSerialBytes ? 1 : num_threads;
  for (int64_t first = 0, count; first < num_tokens; first += count) {
    count = pass_tokens(num_tokens - first);
    std::vector<void*> to;
    for (size_t i = 0; i < out.size(); ++i)
      to.push_back(at(out[i], first * linears_[i].out_features, dtype_));
    GroupCall one =
        call(at(x, first * in_features_, dtype_), x2 ? at(x2, first * in_features_, dtype_) : nullptr, first,
             count, std::move(to),
             residual ? at(residual, first * linears_[0].out_features, dtype_) : nullptr, routing, rotation);
    one.plan(space);
    Barrier barrier;
    parallel_region(threads, [&](int thread, int of) {
      int64_t round = 0;
      one.work(thread, of, barrier, round);
    });
  }
}

// Tokens of the next pass over the weights. All of its blocks have the same tiles, so a rest goes by itself.
int64_t LinearGroup::pass_tokens(int64_t left) {
  return left < kMostTokens ? left : std::min(left / kMostTokens, kMostBlocks) * kMostTokens;
}

void forward_tail(const LinearGroup& out, const LinearGroup& gate_up, const LinearGroup& down,
                  const void* attended, const void* residual, int64_t num_tokens, void* y,
                  const StepRouting* routing, int num_threads) {
  thread_local Workspace spaces[3];
  thread_local Scratch memory[3];
  if (out.linears_.size() != 1 || gate_up.linears_.size() != 2 || down.linears_.size() != 1 ||
      out.linears_[0].out_features != gate_up.in_features_ ||
      down.in_features_ != gate_up.linears_[0].out_features ||
      down.in_features_ != gate_up.linears_[1].out_features ||
      down.linears_[0].out_features != gate_up.in_features_ || out.dtype_ != gate_up.dtype_ ||
      out.dtype_ != down.dtype_)
    throw std::invalid_argument("out, gate_up and down do not follow one another");
  const DType dtype = out.dtype_;
  const int64_t hidden = gate_up.in_features_, wide = down.in_features_;
  const int64_t most = std::min(num_tokens, kMostBlocks * kMostTokens);
  void* const x = memory[0].at_least<char>(most * hidden * size_of(dtype));
  void* const gate = memory[1].at_least<char>(most * wide * size_of(dtype));
  void* const up = memory[2].at_least<char>(most * wide * size_of(dtype));
  out.check({x}, residual, num_tokens, routing, nullptr);
  gate_up.check({gate, up}, nullptr, num_tokens, routing, nullptr);
  down.check({y}, x, num_tokens, routing, nullptr);
  for (int64_t first = 0, count; first < num_tokens; first += count) {
    count = LinearGroup::pass_tokens(num_tokens - first);
    GroupCall calls[] = {
        out.call(at(attended, first * out.in_features_, dtype), nullptr, first, count, {x},
                 at(residual, first * hidden, dtype), routing, nullptr),
        gate_up.call(x, nullptr, first, count, {gate, up}, nullptr, routing, nullptr),
        down.call(gate, up, first, count, {at(y, first * hidden, dtype)}, x, routing, nullptr)};
    for (int i = 0; i < 3; ++i) calls[i].plan(spaces[i]);
    Barrier barrier;
    parallel_region(num_threads, [&](int thread, int of) {
      int64_t round = 0;
      for (int i = 0; i < 3; ++i) {
        if (i) barrier.wait(of, round);
        calls[i].work(thread, of, barrier, round);
      }
    });
  }
}

}  // namespace slm
