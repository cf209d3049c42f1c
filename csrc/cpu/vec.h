// The vocabulary that the kernels are written in: one vector of the widest kind that the
// instruction set has, and what can be done with it. Most of it is GCC's vector extension, which
// Clang shares; what compilers handle badly is spelled out per set.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "plan.h"

// Bodies of loops are handed on as lambdas: left to the compiler, the larger ones become calls,
// and every vector in flight goes through memory.
#define METAPOOL_LAMBDA __attribute__((always_inline))
// Loops that need all registers: next to each other in one function they spill.
#define METAPOOL_NOINLINE __attribute__((noinline))

namespace metapool::cpu::METAPOOL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
constexpr int kVectorLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <int kValue>
using Int = std::integral_constant<int, kValue>;

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

// A vector of the accumulation type, and what comparing two of them gives.
template <typename Acc>
using Vec = typename VectorOf<Acc, kVectorBytes>::type;
template <typename Acc>
using Mask = decltype(Vec<Acc>{} < Vec<Acc>{});

template <typename Acc>
METAPOOL_INLINE Vec<Acc> load(const Acc* from) {
  Vec<Acc> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename Acc>
METAPOOL_INLINE void store(Acc* to, Vec<Acc> vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// The first or the second half of a vector of floats, or a vector of doubles, which has one part.
template <int kPart>
METAPOOL_INLINE Vec<double> widened(Vec<float> vector) {
  struct {
    VectorOf<float, kVectorBytes / 2>::type half[2];
  } parts;
  __builtin_memcpy(&parts, &vector, sizeof(vector));
  return __builtin_convertvector(parts.half[kPart], Vec<double>);
}
template <int kPart>
METAPOOL_INLINE Vec<double> widened(Vec<double> vector) {
  return vector;
}

template <typename Acc>
METAPOOL_INLINE bool any(Mask<Acc> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  int64_t found = 0;
  for (int lane = 0; lane < kVectorLanes<Acc>; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

struct Sum {
  template <typename V>
  METAPOOL_INLINE V operator()(V left, V right) const {
    return left + right;
  }
};

// The maximum where it does not matter which of equal elements it is. Without kNan there are no
// NaN, and it is one instruction.
template <bool kNan>
struct Maximum {
  template <typename V>
  METAPOOL_INLINE V operator()(V left, V right) const {
    if constexpr (kNan) {
      return right_wins(left, right) ? right : left;
    } else {
      return right > left ? right : left;
    }
  }
};

// Which of two floats was chosen, lane by lane: a bit each where there are mask registers.
#if defined(__AVX512F__)
using Choice = __mmask16;
#else
using Choice = Mask<float>;
#endif

METAPOOL_INLINE Choice at_least(Vec<float> left, Vec<float> right) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)left, (__m512)right, _CMP_GE_OQ);
#else
  return left >= right;
#endif
}

METAPOOL_INLINE Vec<float> add_where(Choice choice, Vec<float> acc, Vec<float> values) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_add_ps((__m512)acc, choice, (__m512)acc, (__m512)values);
#elif defined(__aarch64__)
  return (Vec<float>)vbslq_f32((uint32x4_t)choice, (float32x4_t)(acc + values), (float32x4_t)acc);
#else
  return choice ? acc + values : acc;
#endif
}

METAPOOL_INLINE Vec<float> clear_where(Choice choice, Vec<float> values) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_mask_blend_ps(choice, (__m512)values, _mm512_setzero_ps());
#else
  return (Vec<float>)(~choice & (Mask<float>)values);
#endif
}

// Small signed numbers, a byte each in memory and as wide as Acc in a vector.
template <typename Acc>
using Code = Mask<Acc>;

// `first` where it was chosen, else `second`.
METAPOOL_INLINE Code<float> choose(Choice choice, Code<float> first, Code<float> second) {
#if defined(__AVX512F__)
  return (Code<float>)_mm512_mask_blend_epi32(choice, (__m512i)second, (__m512i)first);
#elif defined(__aarch64__)
  return (Code<float>)vbslq_s32((uint32x4_t)choice, (int32x4_t)first, (int32x4_t)second);
#else
  return choice ? first : second;
#endif
}

template <typename Acc>
METAPOOL_INLINE Code<Acc> splat_code(int code) {
  return Code<Acc>{} + code;
}

template <typename Acc>
METAPOOL_INLINE Code<Acc> load_codes(const int8_t* from) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return (Code<Acc>)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
  } else {
    return (Code<Acc>)_mm512_cvtepi8_epi64(_mm_loadu_si64(from));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) {
    return (Code<Acc>)_mm256_cvtepi8_epi32(_mm_loadu_si64(from));
  } else {
    return (Code<Acc>)_mm256_cvtepi8_epi64(_mm_loadu_si32(from));
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(Acc) == 4) {
    int32_t four;
    __builtin_memcpy(&four, from, sizeof(four));
    return (Code<Acc>)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
  } else {
    int16_t two;
    __builtin_memcpy(&two, from, sizeof(two));
    const int16x8_t halves = vmovl_s8(vreinterpret_s8_s16(vdup_n_s16(two)));
    return (Code<Acc>)vmovl_s32(vget_low_s32(vmovl_s16(vget_low_s16(halves))));
  }
#else
  Code<Acc> codes;
  for (int lane = 0; lane < kVectorLanes<Acc>; ++lane) codes[lane] = from[lane];
  return codes;
#endif
}

template <typename Acc>
METAPOOL_INLINE void store_codes(int8_t* to, Code<Acc> codes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)codes));
  } else {
    _mm_storeu_si64(to, _mm512_cvtepi64_epi8((__m512i)codes));
  }
#elif defined(__aarch64__)
  const auto narrow = [](int32x2_t low, int32x2_t high) METAPOOL_LAMBDA {
    const int16x4_t halves = vmovn_s32(vcombine_s32(low, high));
    return vmovn_s16(vcombine_s16(halves, halves));
  };
  if constexpr (sizeof(Acc) == 4) {
    const int32x4_t words = (int32x4_t)codes;
    const int8x8_t four = narrow(vget_low_s32(words), vget_high_s32(words));
    __builtin_memcpy(to, &four, 4);
  } else {
    const int32x2_t words = vmovn_s64((int64x2_t)codes);
    const int8x8_t two = narrow(words, words);
    __builtin_memcpy(to, &two, 2);
  }
#else
  using Narrow = typename VectorOf<int8_t, kVectorLanes<Acc> >::type;
  const Narrow narrow = __builtin_convertvector(codes, Narrow);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
#endif
}

}  // namespace metapool::cpu::METAPOOL_ISA
