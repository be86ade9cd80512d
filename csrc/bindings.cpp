// pybind11 module slm_fast._C: pointers and sizes as Python ints, no torch headers. Arguments are checked in
// ops.py, but for those of *_tensors.cpp, which are tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <tuple>

#include "cpu/linear_group.h"
#include "cpu/parallel.h"
#include "cuda_source.h"
#include "mixture_tensors.h"
#include "ops.h"
#include "search_tensors.h"
#include "tensors.h"

namespace py = pybind11;
using slm::DType;
using Ptr = std::uintptr_t;

namespace {

template <typename T>
T* as(Ptr p) {
  return reinterpret_cast<T*>(p);
}

void key_search(Ptr query, Ptr keys, int key_dtype, Ptr bias, Ptr mask, int64_t mask_stride,
                int64_t num_queries, int64_t num_keys, int64_t dim, int64_t top_k, int weighting,
                float temperature, float min_similarity, Ptr indices, Ptr weights, Ptr scores, Ptr codes,
                Ptr bounds, int num_threads) {
  const slm::KeySearch op{as<float>(query),
                          as<void>(keys),
                          static_cast<DType>(key_dtype),
                          as<float>(bias),
                          as<uint8_t>(mask),
                          mask_stride,
                          num_queries,
                          num_keys,
                          dim,
                          top_k,
                          static_cast<slm::Weighting>(weighting),
                          temperature,
                          min_similarity,
                          as<int32_t>(indices),
                          as<float>(weights),
                          as<float>(scores),
                          as<uint8_t>(codes),
                          as<float>(bounds)};
  slm::key_search(op, num_threads);
}

void key_codes(Ptr keys, int key_dtype, int64_t num_keys, int64_t dim, Ptr rows, int64_t num_rows, Ptr codes,
               Ptr bounds, int num_threads) {
  slm::key_codes(as<void>(keys), static_cast<DType>(key_dtype), num_keys, dim, as<int64_t>(rows), num_rows,
                 as<uint8_t>(codes), as<float>(bounds), num_threads);
}

// The arguments of the CUDA search and of its emulation: key_search's, the transform, the plan.
slm::CudaKeySearch cuda_key_search(Ptr query, Ptr keys, int key_dtype, Ptr bias, Ptr mask,
                                   int64_t mask_stride, Ptr shift, int num_groups, int64_t num_queries,
                                   int64_t num_keys, int64_t dim, int64_t top_k, int weighting,
                                   float temperature, float min_similarity, Ptr indices, Ptr weights,
                                   Ptr scores, bool wide, bool staged, int queries, int64_t slices,
                                   int row_size, int64_t shared_bytes, Ptr slice_indices, Ptr slice_scores) {
  return {
      {as<float>(query), as<void>(keys), static_cast<DType>(key_dtype), as<float>(bias), as<uint8_t>(mask),
       mask_stride, num_queries, num_keys, dim, top_k, static_cast<slm::Weighting>(weighting), temperature,
       min_similarity, as<int32_t>(indices), as<float>(weights), as<float>(scores)},
      as<float>(shift),
      num_groups,
      wide,
      staged,
      queries,
      slices,
      row_size,
      shared_bytes,
      as<int32_t>(slice_indices),
      as<float>(slice_scores)};
}

template <class... Args>
void def_cuda_key_search(py::module_& m, slm::CudaKeySearch (*make)(Args...)) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("key_search_emulated", [make](Args... args) { slm::key_search_emulated(make(args...)); }, NoGil());
#ifdef SLM_CUDA_VERSION
  m.def(
      "key_search_cuda",
      [make](int device, Ptr stream, Args... args) {
        slm::key_search_cuda(make(args...), device, as<void>(stream));
      },
      NoGil());
#endif
}

slm::Mixture mixture(int x_dtype, Ptr A, Ptr B, int factor_dtype, Ptr start, Ptr rank, Ptr scaling,
                     int64_t num_entries, int64_t total_rank, Ptr indices, Ptr weights, Ptr cu_seqlens,
                     int64_t num_tokens, int64_t num_rows, int64_t top_k, int64_t in_features,
                     int64_t out_features, int64_t u_stride) {
  return {static_cast<DType>(x_dtype),
          static_cast<DType>(factor_dtype),
          as<void>(A),
          as<void>(B),
          as<int32_t>(start),
          as<int32_t>(rank),
          as<float>(scaling),
          num_entries,
          total_rank,
          as<int32_t>(indices),
          as<float>(weights),
          as<int32_t>(cu_seqlens),
          num_tokens,
          num_rows,
          top_k,
          in_features,
          out_features,
          u_stride};
}

void mixture_forward(Ptr x, Ptr y, int x_dtype, Ptr A, Ptr B, int factor_dtype, Ptr start, Ptr rank,
                     Ptr scaling, int64_t num_entries, int64_t total_rank, Ptr indices, Ptr weights,
                     Ptr cu_seqlens, int64_t num_tokens, int64_t num_rows, int64_t top_k, int64_t in_features,
                     int64_t out_features, Ptr u, int64_t u_stride, int num_threads) {
  slm::mixture_forward(
      mixture(x_dtype, A, B, factor_dtype, start, rank, scaling, num_entries, total_rank, indices, weights,
              cu_seqlens, num_tokens, num_rows, top_k, in_features, out_features, u_stride),
      as<void>(x), as<void>(y), as<float>(u), num_threads);
}

void mixture_backward(Ptr dy, Ptr x, Ptr u, int x_dtype, Ptr A, Ptr B, int factor_dtype, Ptr start, Ptr rank,
                      Ptr scaling, int64_t num_entries, int64_t total_rank, Ptr indices, Ptr weights,
                      Ptr cu_seqlens, int64_t num_tokens, int64_t num_rows, int64_t top_k,
                      int64_t in_features, int64_t out_features, int64_t u_stride, Ptr dx, Ptr dA, Ptr dB,
                      int64_t owned_begin, int64_t owned_end, Ptr dw, int num_threads) {
  slm::mixture_backward(
      mixture(x_dtype, A, B, factor_dtype, start, rank, scaling, num_entries, total_rank, indices, weights,
              cu_seqlens, num_tokens, num_rows, top_k, in_features, out_features, u_stride),
      as<void>(dy), as<void>(x), as<float>(u), as<void>(dx), as<float>(dA), as<float>(dB), owned_begin,
      owned_end, as<float>(dw), num_threads);
}

slm::StepRouting step_routing(Ptr start, Ptr rank, Ptr scaling, int64_t num_entries, int64_t total_rank,
                              Ptr indices, Ptr weights, Ptr cu_seqlens, int64_t num_tokens, int64_t num_rows,
                              int64_t top_k) {
  return slm::StepRouting(mixture(0, 0, 0, 0, start, rank, scaling, num_entries, total_rank, indices, weights,
                                  cu_seqlens, num_tokens, num_rows, top_k, 0, 0, 0));
}

// weight, bias, out_features, A, B, factor_dtype, total_rank
using LinearArgs = std::tuple<Ptr, Ptr, int64_t, Ptr, Ptr, int, int64_t>;

slm::LinearGroup linear_group(int dtype, int64_t in_features, int prologue, float eps, Ptr norm_weight,
                              const std::vector<LinearArgs>& linears) {
  std::vector<slm::Linear> list;
  for (const auto& [weight, bias, out_features, A, B, factor_dtype, total_rank] : linears)
    list.push_back({as<void>(weight), as<void>(bias), out_features, as<void>(A), as<void>(B),
                    static_cast<DType>(factor_dtype), total_rank});
  return slm::LinearGroup(static_cast<DType>(dtype), in_features, static_cast<slm::Prologue>(prologue), eps,
                          as<void>(norm_weight), std::move(list));
}

// cos, sin, num_angles, head_size, num_linears
using RotationArgs = std::tuple<Ptr, Ptr, int64_t, int64_t, int64_t>;

void linear_group_forward(const slm::LinearGroup& group, Ptr x, Ptr x2, int64_t num_tokens,
                          const std::vector<Ptr>& out, Ptr residual, const slm::StepRouting* routing,
                          const std::optional<RotationArgs>& rotation, int num_threads) {
  std::vector<void*> pointers;
  for (const Ptr p : out) pointers.push_back(as<void>(p));
  slm::Rotation turned{};
  if (rotation) {
    const auto& [cos, sin, num_angles, head_size, num_linears] = *rotation;
    turned = {as<void>(cos), as<void>(sin), num_angles, head_size, num_linears};
  }
  group.forward(as<void>(x), as<void>(x2), num_tokens, pointers, as<void>(residual), routing,
                rotation ? &turned : nullptr, num_threads);
}

void forward_tail(const slm::LinearGroup& out, const slm::LinearGroup& gate_up, const slm::LinearGroup& down,
                  Ptr attended, Ptr residual, int64_t num_tokens, Ptr y, const slm::StepRouting* routing,
                  int num_threads) {
  slm::forward_tail(out, gate_up, down, as<void>(attended), as<void>(residual), num_tokens, as<void>(y),
                    routing, num_threads);
}

uint64_t read_memory(const std::vector<std::pair<Ptr, int64_t>>& regions, int num_threads) {
  std::vector<std::pair<const void*, int64_t>> list;
  for (const auto& [begin, bytes] : regions) list.emplace_back(as<void>(begin), bytes);
  return slm::read_memory(list, num_threads);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = SLM_COMPILER;
#ifdef SLM_CUDA_VERSION
  info["cuda"] = SLM_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["thread_pool"] = slm::thread_pool();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::arg;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("key_search", &key_search, NoGil(), arg("query"), arg("keys"), arg("key_dtype"), arg("bias"),
        arg("mask"), arg("mask_stride"), arg("num_queries"), arg("num_keys"), arg("dim"), arg("top_k"),
        arg("weighting"), arg("temperature"), arg("min_similarity"), arg("indices"), arg("weights"),
        arg("scores"), arg("codes"), arg("bounds"), arg("num_threads"));
  m.def("use_tensors", &slm::use_tensors, arg("type"), arg("num_threads"));
  m.def("search_tensors", &slm::search_tensors, arg("query"), arg("keys"), arg("bias"), arg("mask"),
        arg("shift"), arg("codes"), arg("top_k"), arg("weighting"), arg("temperature"),
        arg("min_similarity"));
  m.def("mixture_tensors", &slm::mixture_tensors, arg("y"), arg("x"), arg("A"), arg("B"), arg("start"),
        arg("rank"), arg("scaling"), arg("indices"), arg("weights"), arg("cu_seqlens"));
  m.def("key_codes", &key_codes, NoGil(), arg("keys"), arg("key_dtype"), arg("num_keys"), arg("dim"),
        arg("rows"), arg("num_rows"), arg("codes"), arg("bounds"), arg("num_threads"));
  def_cuda_key_search(m, &cuda_key_search);
  m.attr("cuda_source") = kCudaSource;
  m.def("mixture_forward", &mixture_forward, NoGil(), arg("x"), arg("y"), arg("x_dtype"), arg("A"), arg("B"),
        arg("factor_dtype"), arg("start"), arg("rank"), arg("scaling"), arg("num_entries"), arg("total_rank"),
        arg("indices"), arg("weights"), arg("cu_seqlens"), arg("num_tokens"), arg("num_rows"), arg("top_k"),
        arg("in_features"), arg("out_features"), arg("u"), arg("u_stride"), arg("num_threads"));
  m.def("mixture_backward", &mixture_backward, NoGil(), arg("dy"), arg("x"), arg("u"), arg("x_dtype"),
        arg("A"), arg("B"), arg("factor_dtype"), arg("start"), arg("rank"), arg("scaling"),
        arg("num_entries"), arg("total_rank"), arg("indices"), arg("weights"), arg("cu_seqlens"),
        arg("num_tokens"), arg("num_rows"), arg("top_k"), arg("in_features"), arg("out_features"),
        arg("u_stride"), arg("dx"), arg("dA"), arg("dB"), arg("owned_begin"), arg("owned_end"), arg("dw"),
        arg("num_threads"));
  py::class_<slm::StepRouting>(m, "StepRouting")
      .def(py::init(&step_routing), NoGil(), arg("start"), arg("rank"), arg("scaling"), arg("num_entries"),
           arg("total_rank"), arg("indices"), arg("weights"), arg("cu_seqlens"), arg("num_tokens"),
           arg("num_rows"), arg("top_k"))
      .def_readonly("num_tokens", &slm::StepRouting::num_tokens);
  py::class_<slm::LinearGroup>(m, "LinearGroup")
      .def(py::init(&linear_group), arg("dtype"), arg("in_features"), arg("prologue"), arg("eps"),
           arg("norm_weight"), arg("linears"))
      .def("forward", &linear_group_forward, NoGil(), arg("x"), arg("x2"), arg("num_tokens"), arg("out"),
           arg("residual"), arg("routing"), arg("rotation"), arg("num_threads"));
  m.def("forward_tail", &forward_tail, NoGil(), arg("out"), arg("gate_up"), arg("down"), arg("attended"),
        arg("residual"), arg("num_tokens"), arg("y"), arg("routing"), arg("num_threads"));
  m.def("read_memory", &read_memory, NoGil(), arg("regions"), arg("num_threads"));
  m.def("getenv", [](const char* name) { return std::getenv(name); }, arg("name"));
  m.def("isa", &slm::isa);
  m.def("isa_supported", &slm::isa_supported);
  m.def("build_info", &build_info);
#ifdef SLM_CUDA_VERSION
  m.attr("has_cuda") = true;
  m.def("cuda_devices", [] {
    py::list devices;
    for (const slm::CudaDevice& d : slm::cuda_devices())
      devices.append(py::make_tuple(d.name, py::make_tuple(d.major, d.minor), d.total_bytes));
    return devices;
  });
#else
  m.attr("has_cuda") = false;
#endif
}
