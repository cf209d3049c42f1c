// Forward of square windows of 3, 5 and 7 at stride 1: an input row comes, is combined along the
// row for all windows at once, and gives its share to the seven output rows around it. Rows beyond
// the map give nothing, and pass quickly.
#pragma once

#include "averages.cuh"
#include "maxima.cuh"

namespace metapool::cuda {

constexpr int kForwardThreads = 128;
// Rows that are loaded before they are needed: memory takes longer than a row.
constexpr int kForwardAhead = 2;

// Blocks that a processor holds at once: with more the compiler would run out of registers.
template <bool kAvg, bool kMax>
constexpr int kForwardBlocks = kMax ? (kAvg ? 2 : 3) : 4;

template <typename T, bool kAvg, bool kMax, int kColumns, Access kAccess>
__global__ void __launch_bounds__(kForwardThreads, (kForwardBlocks<kAvg, kMax>))
    streamed_fwd_kernel(const __grid_constant__ Sizes sizes, const __grid_constant__ Cut cut,
                        Map<const T> x, Weights<float> weights, Map<T> out,
                        const __grid_constant__ Slots slots) {
  constexpr int kWidth = kColumns + 2 * kReach;
  using Raw = RawRow<T, kColumns, kReach, kAccess>;
  const Lane lane = lane_of(sizes, cut);
  float avg_weights[kAvgSlots], max_weights[kMaxSlots];
  load_avg_weights(weights, slots, lane.n, lane.c, avg_weights);
  load_max_weights(weights, slots, lane.n, lane.c, max_weights);
  const float of_none = weight_of(weights, slots, kNoneSlot, lane.n, lane.c) * 0.0f;
  const int64_t column = lane.group * kColumns;
  const T* const source = x.plane(lane.n, lane.c) + column * x.stride_w;
  T* const target = out.plane(lane.n, lane.c) + column * out.stride_w;
  const unsigned inside = columns_inside<kColumns, kReach>(lane, sizes.w);
  float ready[kColumns][2 * kReach + 1];  // the output rows around the last input row
  MaxRings rings[kColumns];
#pragma unroll
  for (int v = 0; v < kColumns; ++v) {
    clear(rings[v]);
    for (float& item : ready[v]) item = of_none;
  }

  const int h = static_cast<int>(sizes.h);
  const int begin = lane.row_begin > kReach ? lane.row_begin - kReach : 0;
  const int end = lane.row_end + kReach;
  const int last = end < h ? end : h;  // rows from here on are beyond the map
  const T* next = source + begin * x.stride_h;
  Raw ahead[kForwardAhead];  // rows on their way
  const auto load_next = [&](int t, Raw& to) {
    load_row(next, x.stride_w, t < last ? inside : 0, to);
    next = forget_origin(next + x.stride_h);
  };
  const auto combine = [&](int v, const float (&along)[kMaxSlots]) {
    float tops[kMaxSlots];
    add_maxima(rings[v], along, tops);
#pragma unroll
    for (int d = 1; d <= kReach; ++d) {
      if (has_max(slots, d)) ready[v][kReach - d] += max_weights[d - 1] * tops[d - 1];
    }
  };
  const auto take_row = [&](int t) {
    float row[kWidth];
    widen_row(ahead[0], row);
#pragma unroll
    for (int i = 0; i + 1 < kForwardAhead; ++i) ahead[i] = ahead[i + 1];
    load_next(t + kForwardAhead, ahead[kForwardAhead - 1]);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      push(ready[v], of_none);
      if constexpr (kAvg) {
        float sums[kAvgSlots];
        sums_around(row, kReach + v, sums);
        add_sums(sums, avg_weights, slots, ready[v]);
      }
    }
    if constexpr (kMax) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (!Raw::is_inside(inside, i)) row[i] = -kInfinity<float>;
      }
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        float along[kMaxSlots];
        maxima_around(row, kReach + v, along);
        combine(v, along);
      }
    }
  };
  const auto take_nothing = [&] {
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      push(ready[v], of_none);
      if constexpr (kMax) combine(v, {-kInfinity<float>, -kInfinity<float>, -kInfinity<float>});
    }
  };
  const auto give_row = [&](int o) {
    if (!lane.is_on_map || o < lane.row_begin) return;
    float columns[kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) columns[v] = ready[v][0];
    store_row<kColumns, kReach, kAccess>(target + o * out.stride_h, out.stride_w, inside, columns);
  };

#pragma unroll
  for (int i = 0; i < kForwardAhead; ++i) load_next(begin + i, ahead[i]);
  int t = begin;
  // So many rows a round that no ring has to be moved; the rest one by one.
  constexpr int kRound = 2 * kReach + 1;
  for (; t + kRound <= last; t += kRound) {
#pragma unroll
    for (int u = 0; u < kRound; ++u) {
      take_row(t + u);
      give_row(t + u - kReach);
    }
  }
#pragma unroll 1
  for (; t < last; ++t) {
    take_row(t);
    give_row(t - kReach);
  }
#pragma unroll
  for (int u = 0; u < kReach; ++u) {
    if (t + u >= end) return;
    take_nothing();
    give_row(t + u - kReach);
  }
}

}  // namespace metapool::cuda
