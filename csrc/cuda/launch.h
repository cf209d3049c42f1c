// What the CUDA kernels do for a caller that has a device: plain structs and a stream in. Needs no
// header of CUDA.
#pragma once

#include <cstdint>

#include "../meta_pool.h"

namespace metapool::cuda {

// A cudaStream_t. Everything is launched on it; nothing waits for the device.
using Stream = void*;

// These throw std::invalid_argument before anything is launched, and std::runtime_error with CUDA's
// own words where it refuses a launch. Pointers are those of the current device. The results are
// the same bits from run to run. `scratch` is device memory of as many bytes as fwd_scratch_bytes
// or bwd_scratch_bytes says, aligned to 256.
int64_t fwd_scratch_bytes(const Problem& problem, const ForwardArgs& args);
void launch_meta_pool_fwd(const Problem& problem, const ForwardArgs& args, void* scratch,
                          Stream stream);

int64_t bwd_scratch_bytes(const Problem& problem, const BackwardArgs& args);
void launch_meta_pool_bwd(const Problem& problem, const BackwardArgs& args, void* scratch,
                          Stream stream);

}  // namespace metapool::cuda
