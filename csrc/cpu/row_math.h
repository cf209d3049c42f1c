// Arithmetic on whole rows: sums, weighted sums, dot products and the selection of maxima.
// Every loop runs over contiguous elements and is left to the compiler to vectorise.
#pragma once

#include <cstdint>

#include "plan.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc>
METAPOOL_INLINE void add_row(Acc* __restrict acc, const Acc* __restrict row, int64_t size) {
  for (int64_t e = 0; e < size; ++e) acc[e] += row[e];
}

template <typename Acc>
METAPOOL_INLINE void add_multiple(Acc* __restrict acc, Acc factor, const Acc* __restrict row,
                                  int64_t size) {
  for (int64_t e = 0; e < size; ++e) acc[e] += factor * row[e];
}

template <typename Acc>
METAPOOL_INLINE void copy_row(Acc* __restrict to, const Acc* __restrict from, int64_t size) {
  for (int64_t e = 0; e < size; ++e) to[e] = from[e];
}

template <typename Acc>
METAPOOL_INLINE void zero_row(Acc* __restrict row, int64_t size) {
  for (int64_t e = 0; e < size; ++e) row[e] = 0;
}

// acc += factor * row, with a factor for each lane.
template <int kLanes, typename Acc>
METAPOOL_INLINE void add_weighted(Acc* __restrict acc, const Acc* __restrict factor,
                                  const Acc* __restrict row, int64_t size) {
  if constexpr (kLanes == 1) {
    add_multiple(acc, factor[0], row, size);
  } else {
    for (int64_t e = 0; e < size; e += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) acc[e + lane] += factor[lane] * row[e + lane];
    }
  }
}

// to = scale * from, with a scale for each pixel.
template <int kLanes, typename Acc>
METAPOOL_INLINE void scale_pixels(Acc* __restrict to, const Acc* __restrict scale,
                                  const Acc* __restrict from, int64_t pixels) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (int lane = 0; lane < kLanes; ++lane) {
      to[pixel * kLanes + lane] = scale[pixel] * from[pixel * kLanes + lane];
    }
  }
}

// sums[lane] += scale * <a, b> for each lane. A row is summed in a fixed number of parts, so that
// the order of the additions does not depend on the instruction set; rows add up in double.
template <int kLanes, typename Acc>
METAPOOL_INLINE void add_dot(double* sums, double scale, const Acc* __restrict a,
                             const Acc* __restrict b, int64_t size) {
  constexpr int kParts = 16;
  Acc parts[kParts] = {};
  const int64_t whole = size / kParts * kParts;
  for (int64_t e = 0; e < whole; e += kParts) {
    for (int part = 0; part < kParts; ++part) parts[part] += a[e + part] * b[e + part];
  }
  for (int64_t e = whole; e < size; ++e) parts[e - whole] += a[e] * b[e];
  static_assert(kLanes == 1 || kLanes == kParts);
  for (int part = 0; part < kParts; ++part) {
    sums[kLanes == 1 ? 0 : part] += scale * static_cast<double>(parts[part]);
  }
}

// A row of running maxima: the key that decides, and what goes with it: a code for the position
// of the winner in its window, the winner's element of another map, both, or nothing.
template <typename Acc>
struct Maxima {
  Acc* key;
  Acc* code;
  Acc* value;
};

// Extends the windows of `acc` to the right (kFromRight) or to the left by one more row: `key`,
// known by `code`, with `value` beside it.
template <bool kFromRight, bool kCode, bool kValue, typename Acc>
METAPOOL_INLINE void extend_maxima(const Maxima<Acc>& acc, const Acc* __restrict key, Acc code,
                                   const Acc* __restrict value, int64_t size) {
  Acc* __restrict acc_key = acc.key;
  Acc* __restrict acc_code = acc.code;
  Acc* __restrict acc_value = acc.value;
  for (int64_t e = 0; e < size; ++e) {
    const Acc old_key = acc_key[e];
    const Acc new_key = key[e];
    const bool take = kFromRight ? right_wins(old_key, new_key) : !right_wins(new_key, old_key);
    acc_key[e] = take ? new_key : old_key;
    if constexpr (kCode) acc_code[e] = take ? code : acc_code[e];
    if constexpr (kValue) acc_value[e] = take ? value[e] : acc_value[e];
  }
}

template <bool kCode, bool kValue, typename Acc>
METAPOOL_INLINE void start_maxima(const Maxima<Acc>& acc, const Acc* key, const Acc* value,
                                  int64_t size) {
  copy_row(acc.key, key, size);
  if constexpr (kCode) zero_row(acc.code, size);
  if constexpr (kValue) copy_row(acc.value, value, size);
}

// to += row where the code is `code`.
template <typename Acc>
METAPOOL_INLINE void add_where(Acc* __restrict to, const Acc* __restrict codes, Acc code,
                               const Acc* __restrict row, int64_t size) {
  for (int64_t e = 0; e < size; ++e) to[e] += codes[e] == code ? row[e] : Acc(0);
}

// The same with a factor for each lane.
template <int kLanes, typename Acc>
METAPOOL_INLINE void add_weighted_where(Acc* __restrict to, const Acc* __restrict factor,
                                        const Acc* __restrict codes, Acc code,
                                        const Acc* __restrict row, int64_t size) {
  for (int64_t e = 0; e < size; e += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const Acc weighted = factor[lane] * row[e + lane];
      to[e + lane] += codes[e + lane] == code ? weighted : Acc(0);
    }
  }
}

}  // namespace metapool::cpu::METAPOOL_ISA
