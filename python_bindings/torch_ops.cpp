// The CPU kernels of the registered ops, through the LibTorch stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "torch_maps.h"

namespace {

using metapool::binding::DeviceType;
using metapool::binding::Tensor;

void parallel_for(int64_t count, int64_t grain, const metapool::RangeBody& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

Tensor meta_pool_fwd(const Tensor& x, const std::optional<Tensor>& weights,
                     const std::optional<Tensor>& values, std::vector<int64_t> candidates,
                     std::vector<int64_t> stride, bool count_include_pad, bool channels_last) {
  const auto call =
      metapool::binding::prepare_fwd(DeviceType::CPU, x, weights, values, std::move(candidates),
                                     stride, count_include_pad, channels_last);
  metapool::meta_pool_fwd(call.problem, call.args, parallel_for);
  return call.out;
}

std::tuple<Tensor, Tensor> meta_pool_bwd(const Tensor& grad_out, const Tensor& x,
                                         const std::optional<Tensor>& weights,
                                         const std::optional<Tensor>& values,
                                         std::vector<int64_t> candidates,
                                         std::vector<int64_t> stride, bool count_include_pad,
                                         bool channels_last, std::vector<bool> output_mask) {
  const auto call = metapool::binding::prepare_bwd(DeviceType::CPU, grad_out, x, weights, values,
                                                   std::move(candidates), stride, count_include_pad,
                                                   channels_last, output_mask);
  if (call.wants_any()) metapool::meta_pool_bwd(call.problem, call.args, parallel_for);
  return {call.grad_x, call.grad_weights};
}

Tensor meta_pool_moments(const Tensor& x, std::vector<int64_t> candidates,
                         std::vector<int64_t> stride, bool count_include_pad,
                         bool /*channels_last*/) {
  const auto call = metapool::binding::prepare_moments(DeviceType::CPU, x, std::move(candidates),
                                                       stride, count_include_pad);
  metapool::meta_pool_fwd(call.problem, call.args, parallel_for);
  return call.out;
}

Tensor meta_pool_products(const Tensor& grad_out, const Tensor& x, const Tensor& shifts,
                          std::vector<int64_t> candidates, std::vector<int64_t> stride,
                          bool count_include_pad, bool /*channels_last*/) {
  const auto call = metapool::binding::prepare_products(
      DeviceType::CPU, grad_out, x, shifts, std::move(candidates), stride, count_include_pad);
  metapool::meta_pool_fwd(call.problem, call.args, parallel_for);
  return call.out;
}

Tensor meta_pool_affine_fwd(const Tensor& x, const Tensor& weights, const Tensor& constants,
                            std::vector<int64_t> candidates, std::vector<int64_t> stride,
                            bool count_include_pad, bool channels_last) {
  const auto call = metapool::binding::prepare_affine_fwd(DeviceType::CPU, x, weights, constants,
                                                          std::move(candidates), stride,
                                                          count_include_pad, channels_last);
  metapool::meta_pool_fwd(call.problem, call.args, parallel_for);
  return call.out;
}

Tensor meta_pool_affine_bwd(const Tensor& grad_out, const Tensor& x, const Tensor& weights,
                            const Tensor& offsets, const Tensor& slopes, const Tensor& shifts,
                            std::vector<int64_t> candidates, std::vector<int64_t> stride,
                            bool count_include_pad, bool channels_last) {
  const auto call = metapool::binding::prepare_affine_bwd(
      DeviceType::CPU, grad_out, x, weights, offsets, slopes, shifts, std::move(candidates), stride,
      count_include_pad, channels_last);
  metapool::meta_pool_bwd(call.problem, call.args, parallel_for);
  return call.grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metapool_kernels, CPU, library) {
  library.impl("meta_pool_fwd", TORCH_BOX(&meta_pool_fwd));
  library.impl("meta_pool_bwd", TORCH_BOX(&meta_pool_bwd));
  library.impl("meta_pool_moments", TORCH_BOX(&meta_pool_moments));
  library.impl("meta_pool_products", TORCH_BOX(&meta_pool_products));
  library.impl("meta_pool_affine_fwd", TORCH_BOX(&meta_pool_affine_fwd));
  library.impl("meta_pool_affine_bwd", TORCH_BOX(&meta_pool_affine_bwd));
}
