// CUDA's words as kernels use them, for g++. One that is missing is a compiler's error.
#pragma once

// The C header: CUDA has these functions outside of std, too.
#include <math.h>

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// This may follow `extern` and also makes a local array outlive a call, which then starts with what
// the last block left. Needs -fno-extern-tls-init: no function is there to initialise it.
#define __shared__ thread_local

#define METAPOOL_HOST_VECTOR2(name, type) \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  constexpr name make_##name(type x, type y) { return name{x, y}; }
#define METAPOOL_HOST_VECTOR4(name, type) \
  struct alignas(16) name {               \
    type x, y, z, w;                      \
  };                                      \
  constexpr name make_##name(type x, type y, type z, type w) { return name{x, y, z, w}; }
METAPOOL_HOST_VECTOR2(float2, float)
METAPOOL_HOST_VECTOR2(double2, double)
METAPOOL_HOST_VECTOR2(int2, int)
METAPOOL_HOST_VECTOR2(uint2, unsigned)
METAPOOL_HOST_VECTOR4(float4, float)
METAPOOL_HOST_VECTOR4(int4, int)
METAPOOL_HOST_VECTOR4(uint4, unsigned)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace cuda_host {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_host

inline int __float_as_int(float value) { return cuda_host::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_host::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return cuda_host::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return cuda_host::bit_cast<float>(bits); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  float result = __uint_as_float((magnitude << 13) + (112u << 23));  // another exponent's bias
  if (magnitude >= 0x7c00u) result = __uint_as_float((magnitude << 13) | 0x7f800000u);
  if (magnitude < 0x0400u) result = static_cast<float>(magnitude) * 0x1p-24f;
  return __uint_as_float(__float_as_uint(result) | sign);
}

// NaN becomes the one that a GPU gives, here and for half and bfloat16.
inline float __fadd_rn(float left, float right) {
  const float sum = left + right;
  return sum == sum ? sum : __uint_as_float(0x7fffffffu);
}

inline __half __float2half_rn(float value) {
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000u;
  const unsigned magnitude = __float_as_uint(value) & 0x7fffffffu;
  unsigned bits = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  if (magnitude >= 0x47800000u) bits = 0x7c00u;
  // The last bit of numbers at 0.5 stands for 2^-24, the smallest half: the sum is rounded to it.
  if (magnitude < 0x38800000u) bits = __float_as_uint(fabsf(value) + 0.5f) - 0x3f000000u;
  if (magnitude > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>(sign | bits)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
