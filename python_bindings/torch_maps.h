// What the bindings of every device do to tensors of torch (LibTorch stable ABI): check what memory
// safety needs, say where the maps lie, allocate the results. The schemas of the ops are in
// metapool_kernels/ops.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "../csrc/meta_pool.h"
#include "../csrc/window.h"

namespace metapool::binding {

using torch::headeronly::DeviceType;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType map_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "meta_pool: maps should be float32, float64, float16 or bfloat16");
  }
}

inline MapView view(const Tensor& map) {
  return {map.const_data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

inline MutableMapView mutable_view(const Tensor& map) {
  return {map.mutable_data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

inline WeightView weight_view(const Tensor& weights) {
  const int64_t dims = weights.dim();
  const auto stride = [&](int64_t from_last) {
    return dims >= from_last && weights.size(dims - from_last) > 1
               ? weights.stride(dims - from_last)
               : 0;
  };
  return {weights.const_data_ptr(), stride(3), stride(2), stride(1)};
}

inline void check_weights(const Tensor& weights, const Tensor& x, int64_t count) {
  const int64_t dims = weights.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3 && weights.size(dims - 1) == count &&
                      (dims < 2 || weights.size(dims - 2) == x.size(1) ||
                       (dims == 3 && weights.size(1) == 1)) &&
                      (dims < 3 || weights.size(0) == x.size(0)),
                  "meta_pool: weights should have shape (K,), (C, K), (N, 1, K) or (N, C, K)");
  STD_TORCH_CHECK(
      weights.scalar_type() ==
          (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      "meta_pool: weights should have the accumulation dtype");
  STD_TORCH_CHECK(weights.device() == x.device(), "meta_pool: tensors should be on one device");
}

// Without weights poolings are left side by side.
inline Problem make_problem(DeviceType device, const Tensor& x,
                            const std::optional<Tensor>& weights, std::vector<int64_t> candidates,
                            const std::vector<int64_t>& stride, bool count_include_pad) {
  STD_TORCH_CHECK(x.dim() == 4, "meta_pool: x should be 4-D");
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "meta_pool: stride should be a pair of positive numbers");
  STD_TORCH_CHECK(x.device().type() == device, "meta_pool: x should be on the ",
                  device == DeviceType::CPU ? "CPU" : "GPU");
  if (weights.has_value()) check_weights(*weights, x, static_cast<int64_t>(candidates.size()));
  Problem problem;
  problem.form = weights.has_value() ? Form::kMix : Form::kStack;
  problem.n = x.size(0);
  problem.c = x.size(1);
  problem.h = x.size(2);
  problem.w = x.size(3);
  problem.stride_h = stride[0];
  problem.stride_w = stride[1];
  problem.count_include_pad = count_include_pad;
  problem.dtype = map_dtype(x);
  problem.candidates = std::move(candidates);
  return problem;
}

// Channels of what the poolings become.
inline int64_t channels_out(const Problem& problem) {
  const auto count = static_cast<int64_t>(problem.candidates.size());
  return problem.form == Form::kStack ? count * problem.c : problem.c;
}

inline void check_map(const Tensor& map, const Tensor& like, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == like.size(0) && map.size(1) == c &&
                      map.size(2) == h && map.size(3) == w,
                  "meta_pool: a map has the wrong shape");
  STD_TORCH_CHECK(map.scalar_type() == like.scalar_type(),
                  "meta_pool: maps should share one dtype");
  STD_TORCH_CHECK(map.device() == like.device(), "meta_pool: tensors should be on one device");
}

inline Tensor empty(const std::vector<int64_t>& size, ScalarType dtype, const Tensor& where,
                    std::optional<MemoryFormat> format = std::nullopt) {
  return torch::stable::empty(size, dtype, std::nullopt, where.device(), std::nullopt, format);
}

inline Tensor empty_map(const Tensor& like, int64_t c, int64_t h, int64_t w, bool channels_last) {
  return empty({like.size(0), c, h, w}, like.scalar_type(), like,
               channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A checked call and its results, not yet computed.
struct ForwardCall {
  Problem problem;
  ForwardArgs args;
  Tensor out;
};

struct BackwardCall {
  Problem problem;
  BackwardArgs args;
  Tensor grad_x, grad_weights;  // of no element where it is not wanted

  bool wants_any() const { return args.grad_x.data || args.grad_weights; }
};

inline ForwardCall prepare_fwd(DeviceType device, const Tensor& x,
                               const std::optional<Tensor>& weights,
                               const std::optional<Tensor>& values, std::vector<int64_t> candidates,
                               const std::vector<int64_t>& stride, bool count_include_pad,
                               bool channels_last) {
  ForwardCall call;
  call.problem = make_problem(device, x, weights, std::move(candidates), stride, count_include_pad);
  const Problem& problem = call.problem;
  if (values.has_value()) check_map(*values, x, problem.c, problem.h, problem.w);
  call.out = empty_map(x, channels_out(problem), output_size(problem.h, problem.stride_h),
                       output_size(problem.w, problem.stride_w), channels_last);
  call.args.x = view(x);
  call.args.values = values.has_value() ? view(*values) : call.args.x;
  if (weights.has_value()) call.args.weights = weight_view(*weights);
  call.args.out = mutable_view(call.out);
  call.args.out_stride_k = problem.c * call.out.stride(1);
  return call;
}

inline ForwardCall prepare_affine_fwd(DeviceType device, const Tensor& x, const Tensor& weights,
                                      const Tensor& constants, std::vector<int64_t> candidates,
                                      const std::vector<int64_t>& stride, bool count_include_pad,
                                      bool channels_last) {
  ForwardCall call = prepare_fwd(device, x, weights, std::nullopt, std::move(candidates), stride,
                                 count_include_pad, channels_last);
  check_weights(constants, x, 1);
  call.args.constants = weight_view(constants);
  return call;
}

inline ForwardCall prepare_moments(DeviceType device, const Tensor& x,
                                   std::vector<int64_t> candidates,
                                   const std::vector<int64_t>& stride, bool count_include_pad) {
  ForwardCall call;
  call.problem =
      make_problem(device, x, std::nullopt, std::move(candidates), stride, count_include_pad);
  call.problem.form = Form::kMoments;
  const auto count = static_cast<int64_t>(call.problem.candidates.size());
  call.out = empty({x.size(0), x.size(1), count, 2}, ScalarType::Double, x);
  call.args.x = call.args.values = view(x);
  call.args.moments = static_cast<double*>(call.out.mutable_data_ptr());
  return call;
}

inline ForwardCall prepare_products(DeviceType device, const Tensor& grad_out, const Tensor& x,
                                    const Tensor& shifts, std::vector<int64_t> candidates,
                                    const std::vector<int64_t>& stride, bool count_include_pad) {
  ForwardCall call = prepare_moments(device, x, std::move(candidates), stride, count_include_pad);
  const Problem& problem = call.problem;
  check_map(grad_out, x, problem.c, output_size(problem.h, problem.stride_h),
            output_size(problem.w, problem.stride_w));
  check_weights(shifts, x, static_cast<int64_t>(problem.candidates.size()));
  call.args.other = view(grad_out);
  call.args.shifts = weight_view(shifts);
  return call;
}

inline BackwardCall prepare_bwd(DeviceType device, const Tensor& grad_out, const Tensor& x,
                                const std::optional<Tensor>& weights,
                                const std::optional<Tensor>& values,
                                std::vector<int64_t> candidates, const std::vector<int64_t>& stride,
                                bool count_include_pad, bool channels_last,
                                const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, "meta_pool: output_mask should be a pair");
  BackwardCall call;
  call.problem = make_problem(device, x, weights, std::move(candidates), stride, count_include_pad);
  const Problem& problem = call.problem;
  check_map(grad_out, x, channels_out(problem), output_size(problem.h, problem.stride_h),
            output_size(problem.w, problem.stride_w));
  if (values.has_value()) check_map(*values, x, problem.c, problem.h, problem.w);

  BackwardArgs& args = call.args;
  args.grad_out = view(grad_out);
  args.x = view(x);
  args.values = values.has_value() ? view(*values) : args.x;
  if (weights.has_value()) args.weights = weight_view(*weights);
  args.grad_out_stride_k = problem.c * grad_out.stride(1);
  if (output_mask[0]) {
    call.grad_x = empty_map(x, problem.c, problem.h, problem.w, channels_last);
    args.grad_x = mutable_view(call.grad_x);
  } else {
    call.grad_x = empty({0}, x.scalar_type(), x);
  }
  const ScalarType sums = weights.has_value() ? weights->scalar_type() : x.scalar_type();
  if (weights.has_value() && output_mask[1]) {
    const auto sizes = weights->sizes();
    call.grad_weights = empty({sizes.begin(), sizes.end()}, sums, x);
    args.grad_weights = call.grad_weights.mutable_data_ptr();
    const int64_t dims = weights->dim();
    args.grad_weights_per_n = dims == 3;
    args.grad_weights_per_c = dims >= 2 && weights->size(dims - 2) > 1;
  } else {
    call.grad_weights = empty({0}, sums, x);
  }
  return call;
}

inline BackwardCall prepare_affine_bwd(DeviceType device, const Tensor& grad_out, const Tensor& x,
                                       const Tensor& weights, const Tensor& offsets,
                                       const Tensor& slopes, const Tensor& shifts,
                                       std::vector<int64_t> candidates,
                                       const std::vector<int64_t>& stride, bool count_include_pad,
                                       bool channels_last) {
  BackwardCall call = prepare_bwd(device, grad_out, x, weights, std::nullopt, std::move(candidates),
                                  stride, count_include_pad, channels_last, {true, false});
  const auto count = static_cast<int64_t>(call.problem.candidates.size());
  for (const Tensor* terms : {&offsets, &slopes, &shifts}) check_weights(*terms, x, count);
  call.problem.form = Form::kMoments;
  call.args.offsets = weight_view(offsets);
  call.args.slopes = weight_view(slopes);
  call.args.shifts = weight_view(shifts);
  return call;
}

}  // namespace metapool::binding
