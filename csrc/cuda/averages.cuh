// Averages: sums along rows, and down columns for all windows together or each apart.
#pragma once

#include "lanes.cuh"

namespace metapool::cuda {

// One over the area of a window.
template <typename A>
METAPOOL_INLINE constexpr A share_of_pixel(int radius) {
  return A(1) / static_cast<A>((2 * radius + 1) * (2 * radius + 1));
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

// Sums of windows apart, by their widths: of those that are not complete what they hold so far,
// oldest first.
struct SumRings {
  float windows3[2] = {}, windows5[4] = {}, windows7[6] = {};
};

// Gives the sum of a new row to the windows that hold it, and returns the one that ends with it.
template <int kLength>
METAPOOL_INLINE float complete(float (&windows)[kLength], float sum) {
  const float whole = windows[0] + sum;
#pragma unroll
  for (int i = 0; i + 1 < kLength; ++i) windows[i] = windows[i + 1] + sum;
  windows[kLength - 1] = sum;
  return whole;
}

// Takes the sums along a new row: averages of the windows that end with it, and the pixel itself.
METAPOOL_INLINE void add_apart(SumRings& rings, const float (&sums)[kAvgSlots],
                               float (&averages)[kAvgSlots]) {
  averages[0] = sums[0];
  averages[1] = complete(rings.windows3, sums[1]) * share_of_pixel<float>(1);
  averages[2] = complete(rings.windows5, sums[2]) * share_of_pixel<float>(2);
  averages[3] = complete(rings.windows7, sums[3]) * share_of_pixel<float>(3);
}

}  // namespace metapool::cuda
