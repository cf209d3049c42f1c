// What every CUDA file needs: CUDA's vocabulary, the element types of maps, checked launches.
#pragma once

// Whoever runs the kernels elsewhere brings CUDA's vocabulary and this macro.
#ifndef METAPOOL_LAUNCH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define METAPOOL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<::metapool::cuda::grid_of(grid), block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../meta_pool.h"
#include "../window.h"

// For what only a kernel can call.
#define METAPOOL_DEVICE __device__ __forceinline__

namespace metapool::cuda {

// Sums run in float, of float64 in double.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

METAPOOL_INLINE float widen(float value) { return value; }
METAPOOL_INLINE double widen(double value) { return value; }
METAPOOL_INLINE float widen(__half value) { return __half2float(value); }
METAPOOL_INLINE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

METAPOOL_INLINE void narrow(float value, float& to) { to = value; }
METAPOOL_INLINE void narrow(double value, double& to) { to = value; }
METAPOOL_INLINE void narrow(float value, __half& to) { to = __float2half_rn(value); }
METAPOOL_INLINE void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// The maximum, or NaN, for which Turing has no instruction.
METAPOOL_INLINE float largest(float left, float right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float top;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(top) : "f"(left), "f"(right));
  return top;
#else
  return right_wins(left, right) ? right : left;
#endif
}

// The minimum, or NaN.
METAPOOL_INLINE float lowest(float left, float right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float bottom;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(bottom) : "f"(left), "f"(right));
  return bottom;
#else
  return right < left || right != right ? right : left;
#endif
}

// The pointer itself. The compiler forgets how it was computed: it would otherwise keep the
// addresses of all loads of an unrolled loop in registers.
template <typename T>
METAPOOL_INLINE T* forget_origin(T* pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// The same for a number that would otherwise be computed anew wherever it is used.
template <typename Number, std::enable_if_t<std::is_integral_v<Number>, int> = 0>
METAPOOL_INLINE Number forget_origin(Number number) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Number) == 2) {
    asm volatile("" : "+h"(number));
  } else {
    asm volatile("" : "+r"(number));
  }
#endif
  return number;
}

// kCount elements at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T items[kCount];
};

// Elements as they come from memory.
template <typename T, int kCount>
struct Packed {
  static constexpr int kBytes = kCount * sizeof(T);
  using Word = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;

  Word words[kBytes / sizeof(Word)];
};

// Begins to load elements, or zeros where there are none. In the compiler's hands the result would
// be selected, and so be waited for, at once.
template <typename T, int kCount>
METAPOOL_INLINE void load_or_zeros(const T* from, bool is_there, Packed<T, kCount>& to) {
#ifdef __CUDA_ARCH__
  constexpr int kBytes = Packed<T, kCount>::kBytes;
  const size_t address = __cvta_generic_to_global(from);
  const int condition = is_there;
  auto& words = to.words;
  if constexpr (kBytes == 2) {
    asm volatile(
        "{ .reg .pred there; setp.ne.s32 there, %2, 0; mov.b16 %0, 0;"
        " @there ld.global.b16 %0, [%1]; }"
        : "=h"(words[0])
        : "l"(address), "r"(condition));
  } else if constexpr (kBytes == 4) {
    asm volatile(
        "{ .reg .pred there; setp.ne.s32 there, %2, 0; mov.b32 %0, 0;"
        " @there ld.global.b32 %0, [%1]; }"
        : "=r"(words[0])
        : "l"(address), "r"(condition));
  } else if constexpr (kBytes == 8) {
    asm volatile(
        "{ .reg .pred there; setp.ne.s32 there, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;"
        " @there ld.global.v2.b32 {%0, %1}, [%2]; }"
        : "=r"(words[0]), "=r"(words[1])
        : "l"(address), "r"(condition));
  } else {
    static_assert(kBytes == 16, "there is no such load");
    asm volatile(
        "{ .reg .pred there; setp.ne.s32 there, %5, 0;"
        " mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        " @there ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(address), "r"(condition));
  }
#else
  to = {};
  if (is_there) std::memcpy(to.words, from, to.kBytes);
#endif
}

// What was loaded as numbers. Words are taken apart here and no earlier: they have to come first.
template <typename T, int kCount>
METAPOOL_INLINE void widen(const Packed<T, kCount>& packed, float (&to)[kCount]) {
  Packed<T, kCount> arrived = packed;
  for (auto& word : arrived.words) word = forget_origin(word);
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount > 1) {
    // The upper half of a float has the same meaning.
    uint32_t halves[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t word = arrived.words[i / 2];
      halves[i] = i % 2 == 0 ? word << 16 : word & 0xffff0000u;
    }
    std::memcpy(to, halves, sizeof(to));
  } else {
    T items[kCount];
    std::memcpy(items, arrived.words, sizeof(items));
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = widen(items[i]);
  }
}

// How the columns of a row lie in memory: read as vectors, one after the other, or apart.
enum class Access { kVector, kDense, kStrided };

template <typename T>
constexpr T kInfinity = static_cast<T>(__builtin_huge_val());

constexpr int64_t ceil_div(int64_t count, int64_t by) { return (count + by - 1) / by; }

constexpr int64_t kMostBlocks = 0x7fffffff;

// A number of blocks, as CUDA takes it.
inline unsigned grid_of(int64_t blocks) {
  if (blocks > kMostBlocks) throw std::runtime_error("meta_pool: the map needs too many blocks");
  return static_cast<unsigned>(blocks);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("meta_pool: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Calls body with a value of the element type.
template <typename Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

}  // namespace metapool::cuda
