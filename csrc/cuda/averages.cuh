// What forward and backward share: the weights of a plane, and averages.
#pragma once

#include "lanes.cuh"

namespace metapool::cuda {

// One over the area of a window.
template <typename A>
METAPOOL_INLINE constexpr A share_of_pixel(int radius) {
  return A(1) / static_cast<A>((2 * radius + 1) * (2 * radius + 1));
}

// The weights of averages, divided by the areas of their windows.
template <typename A>
METAPOOL_INLINE void load_avg_weights(const Weights<A>& weights, const Slots& slots, int64_t n,
                                      int64_t c, A (&divided)[kAvgSlots]) {
#pragma unroll
  for (int r = 0; r < kAvgSlots; ++r) {
    divided[r] = weight_of(weights, slots, r, n, c) * share_of_pixel<A>(r);
  }
}

template <typename A>
METAPOOL_INLINE void load_max_weights(const Weights<A>& weights, const Slots& slots, int64_t n,
                                      int64_t c, A (&of_max)[kMaxSlots]) {
#pragma unroll
  for (int r = 0; r < kMaxSlots; ++r) of_max[r] = weight_of(weights, slots, kAvgSlots + r, n, c);
}

// Sums along a row around a column, of the widths of the averages.
template <int kLength>
METAPOOL_INLINE void sums_around(const float (&row)[kLength], int center,
                                 float (&sums)[kAvgSlots]) {
  sums[0] = row[center];
#pragma unroll
  for (int d = 1; d <= kReach; ++d) sums[d] = sums[d - 1] + (row[center - d] + row[center + d]);
}

// Adds the sums of one row to the seven output rows around it, of which it is in the middle: a row
// at distance d has it in all windows that reach so far.
METAPOOL_INLINE void add_sums(const float (&sums)[kAvgSlots], const float (&weights)[kAvgSlots],
                              const Slots& slots, float (&ready)[2 * kReach + 1]) {
  float share = 0;
#pragma unroll
  for (int d = kReach; d >= 0; --d) {
    if (has_avg(slots, d)) share += weights[d] * sums[d];
    ready[kReach - d] += share;
    if (d > 0) ready[kReach + d] += share;
  }
}

}  // namespace metapool::cuda
