// The CUDA kernels of the registered ops, through the LibTorch stable ABI. With METAPOOL_CUDA_HOST
// the kernels were compiled for the CPU and take its tensors; that is for tests.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../csrc/cuda/launch.h"
#include "torch_maps.h"

#ifndef METAPOOL_CUDA_HOST
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using metapool::binding::DeviceType;
using metapool::binding::ScalarType;
using metapool::binding::Tensor;
using metapool::cuda::Stream;

#ifdef METAPOOL_CUDA_HOST
#define METAPOOL_DISPATCH_KEY CPU
constexpr DeviceType kDevice = DeviceType::CPU;

// Where the kernels of a call run.
struct Place {
  explicit Place(const Tensor&) {}
  Stream stream = nullptr;
};
#else
#define METAPOOL_DISPATCH_KEY CUDA
constexpr DeviceType kDevice = DeviceType::CUDA;

using GetStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Found at run time, so that the library loads under a torch without CUDA too. The libraries of
// torch are not in the global scope, hence the name; who has a tensor on a GPU has loaded them.
GetStream find_get_stream() {
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const symbol = dlsym(library ? library : RTLD_DEFAULT, name);
  STD_TORCH_CHECK(symbol, "meta_pool: ", name, " was not found: is torch built with CUDA?");
  return reinterpret_cast<GetStream>(symbol);
}

Stream current_stream(int32_t device_index) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return stream;
}

// Where the kernels of a call run: the device of a tensor, current while this lives, and the
// stream that is current there.
struct Place {
  explicit Place(const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;
};
#endif

// Runs a checked call, and hands its result over.
Tensor run(const metapool::binding::ForwardCall& call, const Tensor& x) {
  const Place place(x);
  const int64_t bytes = metapool::cuda::fwd_scratch_bytes(call.problem, call.args);
  // Given back as soon as the launch returns: whoever gets it next comes later on this stream.
  Tensor scratch;
  if (bytes > 0) scratch = metapool::binding::empty({bytes}, ScalarType::Byte, x);
  metapool::cuda::launch_meta_pool_fwd(
      call.problem, call.args, bytes > 0 ? scratch.mutable_data_ptr() : nullptr, place.stream);
  return call.out;
}

void run(const metapool::binding::BackwardCall& call, const Tensor& x) {
  const Place place(x);
  const int64_t bytes = metapool::cuda::bwd_scratch_bytes(call.problem, call.args);
  // Given back as soon as the launch returns: whoever gets it next comes later on this stream.
  const Tensor scratch = metapool::binding::empty({bytes}, ScalarType::Byte, x);
  metapool::cuda::launch_meta_pool_bwd(call.problem, call.args, scratch.mutable_data_ptr(),
                                       place.stream);
}

Tensor meta_pool_fwd(const Tensor& x, const std::optional<Tensor>& weights,
                     const std::optional<Tensor>& values, std::vector<int64_t> candidates,
                     std::vector<int64_t> stride, bool count_include_pad, bool channels_last) {
  return run(metapool::binding::prepare_fwd(kDevice, x, weights, values, std::move(candidates),
                                            stride, count_include_pad, channels_last),
             x);
}

std::tuple<Tensor, Tensor> meta_pool_bwd(const Tensor& grad_out, const Tensor& x,
                                         const std::optional<Tensor>& weights,
                                         const std::optional<Tensor>& values,
                                         std::vector<int64_t> candidates,
                                         std::vector<int64_t> stride, bool count_include_pad,
                                         bool channels_last, std::vector<bool> output_mask) {
  const auto call =
      metapool::binding::prepare_bwd(kDevice, grad_out, x, weights, values, std::move(candidates),
                                     stride, count_include_pad, channels_last, output_mask);
  if (call.wants_any()) run(call, x);
  return {call.grad_x, call.grad_weights};
}

Tensor meta_pool_moments(const Tensor& x, std::vector<int64_t> candidates,
                         std::vector<int64_t> stride, bool count_include_pad, bool) {
  return run(metapool::binding::prepare_moments(kDevice, x, std::move(candidates), stride,
                                                count_include_pad),
             x);
}

Tensor meta_pool_products(const Tensor& grad_out, const Tensor& x, const Tensor& shifts,
                          std::vector<int64_t> candidates, std::vector<int64_t> stride,
                          bool count_include_pad, bool) {
  return run(metapool::binding::prepare_products(kDevice, grad_out, x, shifts,
                                                 std::move(candidates), stride, count_include_pad),
             x);
}

Tensor meta_pool_affine_fwd(const Tensor& x, const Tensor& weights, const Tensor& constants,
                            std::vector<int64_t> candidates, std::vector<int64_t> stride,
                            bool count_include_pad, bool channels_last) {
  return run(
      metapool::binding::prepare_affine_fwd(kDevice, x, weights, constants, std::move(candidates),
                                            stride, count_include_pad, channels_last),
      x);
}

Tensor meta_pool_affine_bwd(const Tensor& grad_out, const Tensor& x, const Tensor& weights,
                            const Tensor& offsets, const Tensor& slopes, const Tensor& shifts,
                            std::vector<int64_t> candidates, std::vector<int64_t> stride,
                            bool count_include_pad, bool channels_last) {
  const auto call = metapool::binding::prepare_affine_bwd(kDevice, grad_out, x, weights, offsets,
                                                          slopes, shifts, std::move(candidates),
                                                          stride, count_include_pad, channels_last);
  run(call, x);
  return call.grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(metapool_kernels, METAPOOL_DISPATCH_KEY, library) {
  library.impl("cuda_meta_pool_fwd", TORCH_BOX(&meta_pool_fwd));
  library.impl("cuda_meta_pool_bwd", TORCH_BOX(&meta_pool_bwd));
  library.impl("cuda_meta_pool_moments", TORCH_BOX(&meta_pool_moments));
  library.impl("cuda_meta_pool_products", TORCH_BOX(&meta_pool_products));
  library.impl("cuda_meta_pool_affine_fwd", TORCH_BOX(&meta_pool_affine_fwd));
  library.impl("cuda_meta_pool_affine_bwd", TORCH_BOX(&meta_pool_affine_bwd));
}
