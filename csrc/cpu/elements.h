// The element types of maps, and how they become the accumulation type and are rounded back.
#pragma once

#include "vec.h"

namespace metapool::cpu::METAPOOL_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
METAPOOL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

METAPOOL_INLINE float widen(float value) { return value; }
METAPOOL_INLINE double widen(double value) { return value; }
METAPOOL_INLINE float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
METAPOOL_INLINE float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  const uint32_t normal = (rest << 13) + 0x38000000u;  // rebias the exponent from 15 to 127
  const uint32_t infinite = 0x7f800000u;
  const uint32_t nan = (rest << 13) | 0x7fc00000u;
  const uint32_t subnormal =
      bit_cast<uint32_t>(static_cast<float>(static_cast<int>(rest)) * 0x1p-24f);
  uint32_t result = rest >= 0x0400u ? normal : subnormal;
  result = rest >= 0x7c00u ? infinite : result;
  result = rest > 0x7c00u ? nan : result;
  return bit_cast<float>(sign | result);
}

// Rounds to nearest, ties to even, as the hardware does: NaN keeps its sign and what fits of it.
METAPOOL_INLINE void narrow(float value, float& to) { to = value; }
METAPOOL_INLINE void narrow(double value, double& to) { to = value; }
METAPOOL_INLINE void narrow(float value, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? bits >> 16 | 0x40u : rounded);
}
METAPOOL_INLINE void narrow(float value, Half& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  // Adding one half lines the sum's last bit up with the smallest subnormal, 2^-24.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  uint32_t result = rest < 0x38800000u ? subnormal : normal;
  result = rest >= 0x477ff000u ? 0x7c00u : result;
  result = rest > 0x7f800000u ? (rest >> 13 & 0x3ffu) | 0x7e00u : result;
  to.bits = static_cast<uint16_t>(sign | result);
}

// A vector's worth of elements at once; the same bits as one by one.
METAPOOL_INLINE Vec<float> widen_vector(const float* from) { return load(from); }
METAPOOL_INLINE Vec<double> widen_vector(const double* from) { return load(from); }
METAPOOL_INLINE void narrow_vector(Vec<float> vector, float* to) { store(to, vector); }
METAPOOL_INLINE void narrow_vector(Vec<double> vector, double* to) { store(to, vector); }

#if defined(__AVX512F__)

METAPOOL_INLINE Vec<float> widen_vector(const Half* from) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
METAPOOL_INLINE void narrow_vector(Vec<float> vector, Half* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT));
}
METAPOOL_INLINE Vec<float> widen_vector(const BFloat16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return (Vec<float>)_mm512_slli_epi32(bits, 16);
}

#elif defined(__AVX2__)

METAPOOL_INLINE Vec<float> widen_vector(const Half* from) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
METAPOOL_INLINE void narrow_vector(Vec<float> vector, Half* to) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT));
}
METAPOOL_INLINE Vec<float> widen_vector(const BFloat16* from) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return (Vec<float>)_mm256_slli_epi32(bits, 16);
}

#else

template <typename T>
METAPOOL_INLINE Vec<float> widen_vector(const T* from) {
  float values[kVectorLanes<float>];
  for (int lane = 0; lane < kVectorLanes<float>; ++lane) values[lane] = widen(from[lane]);
  return load(values);
}
METAPOOL_INLINE void narrow_vector(Vec<float> vector, Half* to) {
  for (int lane = 0; lane < kVectorLanes<float>; ++lane) narrow(vector[lane], to[lane]);
}

#endif

METAPOOL_INLINE void narrow_vector(Vec<float> vector, BFloat16* to) {
  using Bits = typename VectorOf<uint32_t, kVectorBytes>::type;
  using Narrow = typename VectorOf<uint16_t, kVectorBytes / 2>::type;
  const Bits bits = (Bits)vector;
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Bits nan = bits >> 16 | 0x40u;
  const Narrow result = __builtin_convertvector(vector != vector ? nan : rounded, Narrow);
  __builtin_memcpy(to, &result, sizeof(result));
}

// Four elements: what they are in memory, and how they become the accumulation type and back.
template <typename T>
using Four =
    typename VectorOf<std::conditional_t<sizeof(T) == 2, uint16_t, T>, 4 * sizeof(T)>::type;

template <typename T>
METAPOOL_INLINE Four<T> load_four(const T* from) {
  Four<T> four;
  __builtin_memcpy(&four, from, sizeof(four));
  return four;
}
template <typename T, typename F>
METAPOOL_INLINE void store_four(T* to, F four) {
  static_assert(sizeof(four) == 4 * sizeof(T));
  __builtin_memcpy(static_cast<void*>(to), &four, sizeof(four));
}

template <typename T, typename Acc>
METAPOOL_INLINE Four<Acc> widen_four(Four<T> four) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return four;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return (Four<float>)(__builtin_convertvector(four, Four<uint32_t>) << 16);
  } else {
#if defined(__AVX2__)
    return (Four<float>)_mm_cvtph_ps(_mm_cvtsi64_si128(bit_cast<int64_t>(four)));
#else
    Four<float> wide;
    for (int i = 0; i < 4; ++i) wide[i] = widen(Half{four[i]});
    return wide;
#endif
  }
}

template <typename T, typename Acc>
METAPOOL_INLINE Four<T> narrow_four(Four<Acc> four) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return four;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Four<uint32_t> bits = (Four<uint32_t>)four;
    const Four<uint32_t> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Four<uint32_t> nan = bits >> 16 | 0x40u;
    return __builtin_convertvector(four != four ? nan : rounded, Four<uint16_t>);
  } else {
#if defined(__AVX2__)
    return bit_cast<Four<T>>(
        _mm_cvtsi128_si64(_mm_cvtps_ph((__m128)four, _MM_FROUND_TO_NEAREST_INT)));
#else
    Four<uint16_t> narrowed;
    for (int i = 0; i < 4; ++i) {
      Half half;
      narrow(four[i], half);
      narrowed[i] = half.bits;
    }
    return narrowed;
#endif
  }
}

// Calls body(pointer) with `data` as a pointer to the element type of `dtype`. The accumulation
// type fixes which types are possible.
template <typename Acc, typename Body>
METAPOOL_INLINE void with_elements(DType dtype, const void* data, Body body) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    body(static_cast<const double*>(data));
  } else if (dtype == DType::kFloat32) {
    body(static_cast<const float*>(data));
  } else if (dtype == DType::kFloat16) {
    body(static_cast<const Half*>(data));
  } else {
    body(static_cast<const BFloat16*>(data));
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
