// The CPU kernels of the registered ops, through the LibTorch stable ABI: check what memory safety
// needs, allocate, call. The schemas are in metapool_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../csrc/meta_pool.h"
#include "../csrc/window.h"

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

metapool::DType map_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return metapool::DType::kFloat32;
    case ScalarType::Double:
      return metapool::DType::kFloat64;
    case ScalarType::Half:
      return metapool::DType::kFloat16;
    case ScalarType::BFloat16:
      return metapool::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "meta_pool: maps should be float32, float64, float16 or bfloat16");
  }
}

metapool::MapView view(const Tensor& map) {
  return {map.const_data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

metapool::MutableMapView mutable_view(const Tensor& map) {
  return {map.mutable_data_ptr(), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

metapool::WeightView weight_view(const Tensor& weights) {
  const int64_t dims = weights.dim();
  const auto stride = [&](int64_t from_last) {
    return dims >= from_last && weights.size(dims - from_last) > 1
               ? weights.stride(dims - from_last)
               : 0;
  };
  return {weights.const_data_ptr(), stride(3), stride(2), stride(1)};
}

metapool::Problem make_problem(const Tensor& x, const Tensor& weights,
                               std::vector<int64_t> candidates, const std::vector<int64_t>& stride,
                               bool count_include_pad) {
  STD_TORCH_CHECK(x.dim() == 4, "meta_pool: x should be 4-D");
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                  "meta_pool: stride should be a pair of positive numbers");
  const int64_t dims = weights.dim();
  const auto count = static_cast<int64_t>(candidates.size());
  STD_TORCH_CHECK(dims >= 1 && dims <= 3 && weights.size(dims - 1) == count &&
                      (dims < 2 || weights.size(dims - 2) == x.size(1) ||
                       (dims == 3 && weights.size(1) == 1)) &&
                      (dims < 3 || weights.size(0) == x.size(0)),
                  "meta_pool: weights should have shape (K,), (C, K), (N, 1, K) or (N, C, K)");
  STD_TORCH_CHECK(
      weights.scalar_type() ==
          (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      "meta_pool: weights should have the accumulation dtype");
  STD_TORCH_CHECK(x.is_cpu() && weights.is_cpu(), "meta_pool: tensors should be on the CPU");
  metapool::Problem problem;
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

void check_map(const Tensor& map, const Tensor& like, int64_t h, int64_t w) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == like.size(0) && map.size(1) == like.size(1) &&
                      map.size(2) == h && map.size(3) == w,
                  "meta_pool: a map has the wrong shape");
  STD_TORCH_CHECK(map.scalar_type() == like.scalar_type() && map.is_cpu(),
                  "meta_pool: maps should share one dtype and be on the CPU");
}

Tensor empty_map(const Tensor& like, int64_t h, int64_t w, bool channels_last) {
  const std::vector<int64_t> size = {like.size(0), like.size(1), h, w};
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

void parallel_for(int64_t count, int64_t grain, const metapool::RangeBody& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

Tensor meta_pool_fwd(const Tensor& x, const Tensor& weights, const std::optional<Tensor>& values,
                     std::vector<int64_t> candidates, std::vector<int64_t> stride,
                     bool count_include_pad, bool channels_last) {
  const metapool::Problem problem =
      make_problem(x, weights, std::move(candidates), stride, count_include_pad);
  if (values.has_value()) check_map(*values, x, problem.h, problem.w);
  const Tensor out = empty_map(x, metapool::output_size(problem.h, problem.stride_h),
                               metapool::output_size(problem.w, problem.stride_w), channels_last);
  metapool::ForwardArgs args;
  args.x = view(x);
  args.values = values.has_value() ? view(*values) : args.x;
  args.weights = weight_view(weights);
  args.out = mutable_view(out);
  metapool::meta_pool_fwd(problem, args, parallel_for);
  return out;
}

std::tuple<Tensor, Tensor> meta_pool_bwd(const Tensor& grad_out, const Tensor& x,
                                         const Tensor& weights, const std::optional<Tensor>& values,
                                         std::vector<int64_t> candidates,
                                         std::vector<int64_t> stride, bool count_include_pad,
                                         bool channels_last, std::vector<bool> output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, "meta_pool: output_mask should be a pair");
  const metapool::Problem problem =
      make_problem(x, weights, std::move(candidates), stride, count_include_pad);
  check_map(grad_out, x, metapool::output_size(problem.h, problem.stride_h),
            metapool::output_size(problem.w, problem.stride_w));
  if (values.has_value()) check_map(*values, x, problem.h, problem.w);

  const std::vector<int64_t> nothing = {0};
  Tensor grad_x, grad_weights;
  metapool::BackwardArgs args;
  args.grad_out = view(grad_out);
  args.x = view(x);
  args.values = values.has_value() ? view(*values) : args.x;
  args.weights = weight_view(weights);
  if (output_mask[0]) {
    grad_x = empty_map(x, problem.h, problem.w, channels_last);
    args.grad_x = mutable_view(grad_x);
  } else {
    grad_x = torch::stable::empty(nothing, x.scalar_type());
  }
  if (output_mask[1]) {
    grad_weights = torch::stable::empty(weights.sizes(), weights.scalar_type());
    args.grad_weights = grad_weights.mutable_data_ptr();
    const int64_t dims = weights.dim();
    args.grad_weights_per_n = dims == 3;
    args.grad_weights_per_c = dims >= 2 && weights.size(dims - 2) > 1;
  } else {
    grad_weights = torch::stable::empty(nothing, weights.scalar_type());
  }
  if (output_mask[0] || output_mask[1]) metapool::meta_pool_bwd(problem, args, parallel_for);
  return {grad_x, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metapool_kernels, CPU, library) {
  library.impl("meta_pool_fwd", TORCH_BOX(&meta_pool_fwd));
  library.impl("meta_pool_bwd", TORCH_BOX(&meta_pool_bwd));
}
