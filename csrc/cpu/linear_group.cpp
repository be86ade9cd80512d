// One parallel region a call, in stages that barriers divide: (1) the prologue, shared out by tokens; (2)
// tokens packed for AMX, and the rank-space vectors u = coef A h, shared out by entries; (3) each thread's own
// contiguous rows of the weights, read once for all tokens, with the mixture, bias and residual added to the
// fp32 sums; (4) the rotation. Bytes: the weights, and the factors of each entry that any token picked, once.
#include "linear_group.h"

#include <algorithm>
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
constexpr int64_t kShrinkRanks = 8;        // of one part of the shrink
constexpr int64_t kMixFloats = 64 * 1024;  // of the mixture's sums, which stay in L2 until the rows are done

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) {
  return static_cast<char*>(base) + elements * size_of(dtype);
}

int64_t tiles_of(const Linear& linear) { return (linear.out_features + kRowsOfTile - 1) / kRowsOfTile; }

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

}  // namespace

// Some ranks of an entry, for all tokens that picked it.
struct ShrinkPart {
  const Linear* linear;
  const PickedEntry* entry;
  int64_t linear_index, begin;
};

// What the calling thread keeps for one group of a call.
struct Workspace {
  Scratch h, h32, packed, u;
  std::vector<ShrinkPart> parts;
};


// One pass of up to kMostTokens tokens; `first` is the call's token that x, x2 and routing begin with.
struct GroupCall {
  const LinearGroup& group;
  const BlockRouting* routing;  // null if no token picks anything here
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
  void* packed = nullptr;
  float* u = nullptr;  // [linears][routing->u_size]
  const std::vector<ShrinkPart>* parts = nullptr;

  bool mixes(const Linear& linear) const { return routing && linear.A; }
  // Factors of another dtype than h's are multiplied in fp32.
  bool shrinks_in_bf16(const Linear& linear) const {
    return h_dtype == DType::bf16 && linear.factor_dtype == DType::bf16;
  }
  float* u_of(int64_t linear) const { return u + linear * routing->u_size; }
  // The rows of A that a part of the shrink reads.
  const char* rows_of(const ShrinkPart& part) const {
    return at(part.linear->A, (part.entry->start + part.begin) * group.in_features_,
              part.linear->factor_dtype);
  }

  void plan(Workspace& space);
  void plan_shrink(std::vector<ShrinkPart>& list);
  // `round`: of the barrier's waits of this thread.
  void work(int thread, int threads, Barrier& barrier, int64_t& round);
  void prologue(int thread, int threads);
  void shrink(int thread, int threads);
  void outputs(int thread, int threads);
  void rotate(int thread, int threads);
  void output_panel(int64_t linear, int64_t begin, int64_t end, const void* next, Scratch& memory);
  void expand(const Linear& linear, const float* linear_u, int64_t begin, int64_t width, int64_t stride,
              float* mix) const;
};

void GroupCall::plan(Workspace& space) {
  const int64_t dim = group.in_features_, n = num_tokens * dim;
  const DType dtype = group.dtype_;
  bool reads_full = h_dtype == DType::f32;
  if (routing) plan_shrink(space.parts);
  for (const Linear& linear : group.linears_)
    reads_full = reads_full || (mixes(linear) && !shrinks_in_bf16(linear));
  const bool keeps_h = h_dtype == dtype;
  h = x;
  if (group.prologue_ != Prologue::none && keeps_h) h = h_out = space.h.at_least<char>(n * size_of(dtype));
  if (reads_full && dtype != DType::f32) h32 = space.h32.at_least<float>(n);
  full = dtype == DType::f32 ? static_cast<const float*>(h) : h32;
  if (!keeps_h) h = h32;
  const int64_t packed_bytes = uses_tiles ? ops.packed_bytes(num_tokens, dim) : 0;
  if (packed_bytes) packed = space.packed.at_least<char>(packed_bytes);
  if (routing) u = space.u.at_least<float>(routing->u_size * static_cast<int64_t>(group.linears_.size()));
}

void GroupCall::plan_shrink(std::vector<ShrinkPart>& list) {
  list.clear();
  for (size_t i = 0; i < group.linears_.size(); ++i) {
    if (!mixes(group.linears_[i])) continue;
    for (const PickedEntry& entry : routing->entries)
      for (int64_t j = 0; j < entry.rank; j += kShrinkRanks)
        list.push_back({&group.linears_[i], &entry, static_cast<int64_t>(i), j});
  }
  parts = &list;
  if (list.empty()) routing = nullptr;
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

void GroupCall::shrink(int thread, int threads) {
  const int64_t count = static_cast<int64_t>(parts->size()), end = share_begin(count, thread + 1, threads);
  for (int64_t i = share_begin(count, thread, threads); i < end; ++i) {
    const ShrinkPart& part = (*parts)[i];
    const ShrinkPart* after = i + 1 < end ? &part + 1 : nullptr;
    const bool follows = after && after->linear->factor_dtype == part.linear->factor_dtype;
    const PickedEntry& entry = *part.entry;
    const bool bf16 = shrinks_in_bf16(*part.linear);
    ops.shrink(bf16 ? h : full, bf16 ? 1 : 0, routing->tokens.data() + entry.begin,
               routing->coef.data() + entry.begin, entry.end - entry.begin, rows_of(part),
               static_cast<int>(part.linear->factor_dtype), std::min(kShrinkRanks, entry.rank - part.begin),
               entry.rank, group.in_features_, follows ? rows_of(*after) : nullptr,
               u_of(part.linear_index) + entry.u_begin + part.begin);
  }
}

void GroupCall::expand(const Linear& linear, const float* linear_u, int64_t begin, int64_t width,
                       int64_t stride, float* mix) const {
  const auto columns_of = [&](const PickedEntry& entry) {
    return at(linear.B, entry.start * linear.out_features + begin, linear.factor_dtype);
  };
  for (const PickedEntry& entry : routing->entries) {
    const void* next = &entry != &routing->entries.back() ? columns_of(*(&entry + 1)) : nullptr;
    ops.expand(linear_u + entry.u_begin, entry.rank, routing->tokens.data() + entry.begin,
               routing->adds.data() + entry.begin, entry.end - entry.begin, columns_of(entry),
               static_cast<int>(linear.factor_dtype), linear.out_features, width, next, mix, stride);
  }
}

// Columns of one output: enough of them to read B in long runs, few enough that their mixture stays in L2.
void GroupCall::output_panel(int64_t index, int64_t begin, int64_t end, const void* next, Scratch& memory) {
  alignas(64) float acc[kMostTokens * kRowsOfBlock];
  const Linear& linear = group.linears_[index];
  const DType dtype = group.dtype_;
  const int64_t dim = group.in_features_, out_features = linear.out_features;
  const int64_t mix_stride = (end - begin + kRowsOfBlock - 1) / kRowsOfBlock * kRowsOfBlock;
  float* const mix = mixes(linear) ? memory.at_least<float>(num_tokens * mix_stride) : nullptr;
  if (mix) expand(linear, u_of(index), begin, end - begin, mix_stride, mix);
  for (int64_t r = begin; r < end; r += kRowsOfBlock) {
    const int64_t num_r = std::min(kRowsOfBlock, end - r), offset = first * out_features + r;
    ops.rows(at(linear.weight, r * dim, dtype), static_cast<int>(dtype), num_r, h, static_cast<int>(h_dtype),
             packed, num_tokens, dim, r + num_r < end ? at(linear.weight, (r + num_r) * dim, dtype) : next,
             acc);
    ops.finish(acc, num_tokens, num_r, linear.bias ? at(linear.bias, r, dtype) : nullptr,
               mix ? routing->mixed.data() : nullptr, mix ? mix + (r - begin) : nullptr, mix_stride,
               residual ? at(residual, offset, dtype) : nullptr, static_cast<int>(dtype), out_features,
               at(out[index], offset, dtype));
  }
}

void GroupCall::outputs(int thread, int threads) {
  thread_local Scratch memory;
  const int64_t first_tile = share_begin(group.num_tiles_, thread, threads);
  const int64_t last_tile = share_begin(group.num_tiles_, thread + 1, threads);
  const int64_t panel = std::max<int64_t>(kMixFloats / num_tokens / kRowsOfBlock, 1) * kRowsOfBlock;
  int64_t tile = 0;  // of the linear's first row
  for (size_t i = 0; i < group.linears_.size(); ++i) {
    const Linear& linear = group.linears_[i];
    const int64_t begin = std::max<int64_t>(first_tile - tile, 0) * kRowsOfTile;
    const int64_t end = std::min((last_tile - tile) * kRowsOfTile, linear.out_features);
    tile += tiles_of(linear);
    const void* after = tile < last_tile ? group.linears_[i + 1].weight : nullptr;
    for (int64_t p = begin; p < end; p += panel) {
      const int64_t panel_end = std::min(p + panel, end);
      const void* next =
          panel_end < end ? at(linear.weight, panel_end * group.in_features_, group.dtype_) : after;
      output_panel(static_cast<int64_t>(i), p, panel_end, next, memory);
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
        ops.rotate(at(out[i], (first + t) * features + c, group.dtype_), at(rotation->cos, angle, group.dtype_),
                   at(rotation->sin, angle, group.dtype_), static_cast<int>(group.dtype_), size);
    }
  }
}

void GroupCall::work(int thread, int threads, Barrier& barrier, int64_t& round) {
  if (h_out || h32) {
    prologue(thread, threads);
    barrier.wait(threads, round);
  }
  if (packed) {
    const int64_t parts = ops.packed_parts(group.in_features_);
    ops.pack(h, num_tokens, group.in_features_, share_begin(parts, thread, threads),
             share_begin(parts, thread + 1, threads), packed);
  }
  if (routing) shrink(thread, threads);
  if (packed || routing) barrier.wait(threads, round);
  if (uses_tiles) ops.enter(num_tokens);
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
  const int64_t begin = first * in_features_;
  const BlockRouting* block = routing ? &routing->blocks[first / kMostTokens] : nullptr;
  if (block && block->entries.empty()) block = nullptr;
  return {*this,    block, at(x, begin, dtype_), x2 ? at(x2, begin, dtype_) : nullptr,
          residual, out,   first,                num_tokens,
          rotation};
}

void LinearGroup::forward(const void* x, const void* x2, int64_t num_tokens, const std::vector<void*>& out,
                          const void* residual, const StepRouting* routing, const Rotation* rotation,
                          int num_threads) const {
  thread_local Workspace space;
  check(out, residual, num_tokens, routing, rotation);
  const int threads = weight_bytes_ < kSerialBytes ? 1 : num_threads;
  for (int64_t first = 0; first < num_tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, num_tokens - first);
    GroupCall one = call(x, x2, first, count, out, residual, routing, rotation);
    one.plan(space);
    Barrier barrier;
    parallel_region(threads, [&](int thread, int of) {
      int64_t round = 0;
      one.work(thread, of, barrier, round);
    });
  }
}

void forward_tail(const LinearGroup& out, const LinearGroup& gate_up, const LinearGroup& down,
                  const void* attended, const void* residual, int64_t num_tokens, void* y,
                  const StepRouting* routing, int num_threads) {
  thread_local Workspace spaces[3];
  thread_local Scratch memory[3];
  if (out.linears_.size() != 1 || gate_up.linears_.size() != 2 || down.linears_.size() != 1 ||
      out.linears_[0].out_features != gate_up.in_features_ || down.in_features_ != gate_up.linears_[0].out_features ||
      down.in_features_ != gate_up.linears_[1].out_features ||
      down.linears_[0].out_features != gate_up.in_features_ || out.dtype_ != gate_up.dtype_ ||
      out.dtype_ != down.dtype_)
    throw std::invalid_argument("out, gate_up and down do not follow one another");
  const int64_t bytes = size_of(out.dtype_);
  void* const x = memory[0].at_least<char>(num_tokens * gate_up.in_features_ * bytes);
  void* const gate = memory[1].at_least<char>(num_tokens * down.in_features_ * bytes);
  void* const up = memory[2].at_least<char>(num_tokens * down.in_features_ * bytes);
  out.check({x}, residual, num_tokens, routing, nullptr);
  gate_up.check({gate, up}, nullptr, num_tokens, routing, nullptr);
  down.check({y}, x, num_tokens, routing, nullptr);
  for (int64_t first = 0; first < num_tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, num_tokens - first);
    GroupCall calls[] = {out.call(attended, nullptr, first, count, {x}, residual, routing, nullptr),
                         gate_up.call(x, nullptr, first, count, {gate, up}, nullptr, routing, nullptr),
                         down.call(gate, up, first, count, {y}, x, routing, nullptr)};
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
