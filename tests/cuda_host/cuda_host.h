// Runs CUDA kernels on the CPU, for tests where there is no GPU; build.py shows how to compile
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runner.h"
#include "vocabulary.h"

namespace cuda_host {

constexpr int64_t kSharedUnasked = 48 * 1024;

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What CUDA says of a launch before it starts.
inline cudaError_t refusal(const void* kernel, int64_t grid, int64_t block, int64_t shared) {
  if (grid < 1 || grid > 0x7fffffff || block < 1 || block > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const auto asked = runner.shared_asked.find(kernel);
  const int64_t most = asked == runner.shared_asked.end() ? kSharedUnasked : asked->second;
  return shared < 0 || shared > std::max(most, kSharedUnasked) ? cudaErrorInvalidValue
                                                               : cudaSuccess;
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t grid, int64_t block,
            int64_t shared, cudaStream_t, Args&&... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "CUDA takes 4 KiB of arguments");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "arguments are copied as bytes");
  const std::lock_guard<std::mutex> lock(runner.mutex);
  const void* const key = reinterpret_cast<const void*>(kernel);
  if (note(refusal(key, grid, block, shared)) != cudaSuccess) return;
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  runner.run(name, static_cast<unsigned>(grid), static_cast<unsigned>(block), shared,
             [&] { std::apply(kernel, params); });
}

}  // namespace cuda_host

// A failed check inside a kernel throws std::runtime_error here, on the launcher's stack.
#define METAPOOL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_host::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::runner.wait({file, line}, 0);
}

inline int __syncthreads_or(int value, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return cuda_host::runner.wait({file, line}, value);
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_host::shared_most());
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > cuda_host::shared_most()) return cuda_host::note(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(cuda_host::runner.mutex);
  cuda_host::runner.shared_asked[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
