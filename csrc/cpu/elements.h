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

// As many elements as a vector of the accumulation type has, four at least, as they are in memory.
template <typename Acc>
constexpr int kAtOnce = kVectorLanes<Acc> < 4 ? 4 : kVectorLanes<Acc>;
template <typename T, int kCount>
using Raw = typename VectorOf<std::conditional_t<sizeof(T) == 2, uint16_t, T>,
                              kCount* static_cast<int>(sizeof(T))>::type;
template <typename T, typename Acc>
using RawVector = Raw<T, kAtOnce<Acc> >;

template <typename T, int kCount>
METAPOOL_INLINE Raw<T, kCount> load_raw(const T* from) {
  Raw<T, kCount> raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return raw;
}
template <typename T, typename R>
METAPOOL_INLINE void store_raw(T* to, R raw) {
  __builtin_memcpy(static_cast<void*>(to), &raw, sizeof(raw));
}

// The same bits as one by one.
template <typename T, typename Acc>
METAPOOL_INLINE RawVector<Acc, Acc> widen_vector(RawVector<T, Acc> raw) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return raw;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__aarch64__)
    return (Vec<float>)vshll_n_u16((uint16x4_t)raw, 16);
#else
    using Bits = typename VectorOf<uint32_t, kVectorBytes>::type;
    return (Vec<float>)(__builtin_convertvector(raw, Bits) << 16);
#endif
  } else {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps((__m256i)raw);
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)raw);
#elif defined(__aarch64__)
    return (Vec<float>)vcvt_f32_f16((float16x4_t)raw);
#else
    Vec<float> wide;
    for (int i = 0; i < kAtOnce<Acc>; ++i) wide[i] = widen(Half{raw[i]});
    return wide;
#endif
  }
}

template <typename T, typename Acc>
METAPOOL_INLINE RawVector<T, Acc> narrow_vector(RawVector<Acc, Acc> vector) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return vector;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Bits = typename VectorOf<uint32_t, kVectorBytes>::type;
    const Bits bits = (Bits)vector;
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const Bits nan = bits >> 16 | 0x40u;
    const Bits halves = vector != vector ? nan : rounded;
#if defined(__aarch64__)
    return (RawVector<T, Acc>)vmovn_u32((uint32x4_t)halves);
#else
    return __builtin_convertvector(halves, RawVector<T, Acc>);
#endif
  } else {
#if defined(__AVX512F__)
    return (RawVector<T, Acc>)_mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
    return (RawVector<T, Acc>)_mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (RawVector<T, Acc>)vcvt_f16_f32((float32x4_t)vector);
#else
    RawVector<T, Acc> narrowed;
    for (int i = 0; i < kAtOnce<Acc>; ++i) {
      Half half;
      narrow(vector[i], half);
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
