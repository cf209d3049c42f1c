// Forward of square windows of 3, 5 and 7 at stride 1: an input row comes, is combined along the
// row for all windows at once, and gives its share to the seven output rows around it. Rows beyond
// the map give nothing, and pass quickly.
#pragma once

#include "outcomes.cuh"

namespace metapool::cuda {

constexpr int kForwardThreads = 128;
// Rows that are loaded before they are needed: memory takes longer than a row.
constexpr int kForwardAhead = 2;

// Poolings that stay apart take more registers for each column of a lane.
template <Outcome kOutcome>
constexpr int kForwardColumns = kOutcome == Outcome::kMix ? 4 : 2;

// Blocks that a processor holds at once: with more the compiler would run out of registers.
template <bool kAvg, bool kMax, Outcome kOutcome>
constexpr int kForwardBlocks = kMax ? (kAvg && kOutcome == Outcome::kMix ? 2 : 3) : 4;

template <typename T, bool kAvg, bool kMax, int kColumns, Access kAccess, Outcome kOutcome>
__global__ void __launch_bounds__(kForwardThreads, (kForwardBlocks<kAvg, kMax, kOutcome>))
    streamed_fwd_kernel(const __grid_constant__ Sizes sizes, const __grid_constant__ Cut cut,
                        Map<const T> x, Weights<float> weights, Weights<float> constants,
                        Map<T> out, const __grid_constant__ Slots slots,
                        const __grid_constant__ Apart<T> apart) {
  constexpr int kWidth = kColumns + 2 * kReach;
  using Raw = RawRow<T, kColumns, kReach, kAccess>;
  const Lane lane = lane_of(sizes, cut);
  Poolings<T, kOutcome, kColumns, kAccess> poolings;
  poolings.begin(weights, constants, slots, lane);
  const int64_t column = lane.group * kColumns;
  const T* const source = x.plane(lane.n, lane.c) + column * x.stride_w;
  T* const target = out.plane(lane.n, lane.c) + column * out.stride_w;
  const unsigned inside = columns_inside<kColumns, kReach>(lane, sizes.w);
  MaxRings rings[kColumns];
#pragma unroll
  for (int v = 0; v < kColumns; ++v) clear(rings[v]);

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
    poolings.take_maxima(slots, v, tops);
  };
  const auto take_row = [&](int t) {
    float row[kWidth];
    widen_row(ahead[0], row);
#pragma unroll
    for (int i = 0; i + 1 < kForwardAhead; ++i) ahead[i] = ahead[i + 1];
    load_next(t + kForwardAhead, ahead[kForwardAhead - 1]);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      poolings.next_row(v);
      if constexpr (kAvg) {
        float sums[kAvgSlots];
        sums_around(row, kReach + v, sums);
        poolings.take_sums(slots, v, sums);
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
      poolings.next_row(v);
      if constexpr (kAvg) poolings.take_no_sums(slots, v);
      if constexpr (kMax) combine(v, {-kInfinity<float>, -kInfinity<float>, -kInfinity<float>});
    }
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
      poolings.give(out, apart, slots, lane, target, inside, t + u);
    }
  }
#pragma unroll 1
  for (; t < last; ++t) {
    take_row(t);
    poolings.give(out, apart, slots, lane, target, inside, t);
  }
#pragma unroll
  for (int u = 0; u < kReach; ++u) {
    if (t + u >= end) return;
    take_nothing();
    poolings.give(out, apart, slots, lane, target, inside, t + u);
  }
}

}  // namespace metapool::cuda
