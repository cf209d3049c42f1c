// Maxima of 16-bit maps: a value and its place in one number. The largest number is the maximum,
// and of equal values the first, so windows may be put together from parts in any order. NaN has no
// order: a block that has met one runs again, without keys.
#pragma once

#include "backward_shared.cuh"
#include "maxima.cuh"

namespace metapool::cuda {

METAPOOL_INLINE float float_of(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

METAPOOL_INLINE int bits_of(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The upper half is the value in the order of integers; the lower half the place, of which the
// later is the smaller: in its lowest bits that within a round of rows, above them the round,
// counted down. Made by shifts, and, or and exclusive or alone: next to others ptxas has had wrong
// code.
template <typename T>
struct Key {
  static constexpr int kPlaceBits = 7, kPlaceMask = (1 << kPlaceBits) - 1;
  static constexpr int kValueMask = static_cast<int>(0xffff0000), kSigns = 0x7fff0000;
  static constexpr int kMostRounds = 1 << (16 - kPlaceBits);

  int number;

  // Below everything on the map.
  static METAPOOL_INLINE constexpr Key beyond() { return {INT32_MIN}; }

  // The key of a value, without a place; -0 equals 0. That of NaN, which a GPU makes of ones alone,
  // has none either: places have to lie in the sums until the block runs again.
  static METAPOOL_DEVICE Key of(float value) {
    const float sum = __fadd_rn(value, 0.0f);
    int bits = bits_of(sum) & kValueMask;
    if constexpr (std::is_same_v<T, __half>) {
      const __half narrowed = __float2half_rn(sum);
      uint16_t half;
      std::memcpy(&half, &narrowed, sizeof(half));
      bits = static_cast<int>(static_cast<uint32_t>(half) << 16);
    }
    return {bits ^ (bits >> 31 & kSigns)};
  }

  static METAPOOL_INLINE int bits_of_round(int round) {
    return (kMostRounds - 1 - round) << kPlaceBits;
  }

  METAPOOL_INLINE float value() const {
    const int bits = (number ^ (number >> 31 & kSigns)) & kValueMask;
    if constexpr (std::is_same_v<T, __half>) {
      const uint16_t half = static_cast<uint16_t>(static_cast<uint32_t>(bits) >> 16);
      __half narrowed;
      std::memcpy(&narrowed, &half, sizeof(half));
      return widen(narrowed);
    }
    return float_of(bits);
  }

  METAPOOL_INLINE int place() const { return (number & kPlaceMask) * kLaneStride; }
};

METAPOOL_INLINE int largest(int a, int b, int c) {
  const int ab = a > b ? a : b;
  return ab > c ? ab : c;
}

template <bool kCareful, typename T>
METAPOOL_INLINE void widen_window(Key<T>& top, const Key<T>& before, bool, const Key<T>& after) {
  top.number = largest(before.number, top.number, after.number);
}

template <bool kCareful, typename T, int kRows>
METAPOOL_INLINE Key<T> top_of(const Key<T> (&rows)[kRows], int) {
  int top = rows[0].number;
#pragma unroll
  for (int i = 1; i < kRows; i += 2) top = largest(top, rows[i].number, rows[i + 1].number);
  return {top};
}

}  // namespace metapool::cuda
