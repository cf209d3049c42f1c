// Forward of square windows of 3, 5 and 7 at stride 1: an input row comes, is combined along the
// row for all windows at once, and gives its share to the seven output rows around it. Rows beyond
// the map give nothing, and pass quickly.
#pragma once

#include "streamed_moments.cuh"

namespace metapool::cuda {

// Poolings that stay apart take more registers for each column of a lane.
template <Outcome kOutcome>
constexpr int kForwardColumns = kOutcome == Outcome::kMix ? 4 : 2;

// Bytes of shared memory.
template <Outcome kOutcome>
constexpr int kForwardShared =
    kOutcome < Outcome::kMoments ? 0
                                 : 2 * kSlots * kForwardThreads * static_cast<int>(sizeof(double));

// Blocks that a processor holds at once: with more the compiler would run out of registers.
template <bool kAvg, bool kMax, Outcome kOutcome>
constexpr int kForwardBlocks =
    kOutcome == Outcome::kProducts || (kAvg && kMax && kOutcome != Outcome::kStack) ? 2
    : kMax || kOutcome == Outcome::kMoments                                         ? 3
                                                                                    : 4;

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
  const auto take_other = [&](int t) {
    if constexpr (kOutcome == Outcome::kProducts) {
      poolings.other.take(apart.other, t + kForwardAhead < last, inside);
    }
  };
  const auto take_row = [&](int t) {
    take_other(t);
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
  const auto take_nothing = [&](int t) {
    take_other(t);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      poolings.next_row(v);
      if constexpr (kAvg) poolings.take_no_sums(slots, v);
      if constexpr (kMax) combine(v, {-kInfinity<float>, -kInfinity<float>, -kInfinity<float>});
    }
  };

#pragma unroll
  for (int i = 0; i < kForwardAhead; ++i) load_next(begin + i, ahead[i]);
  if constexpr (kOutcome == Outcome::kProducts) {
    poolings.other.next = apart.other.plane(lane.n, lane.c) + column * apart.other.stride_w +
                          begin * apart.other.stride_h;
#pragma unroll
    for (int i = 0; i < kForwardAhead; ++i) {
      poolings.other.load(apart.other, begin + i < last, inside, i);
    }
  }
  int t = begin;
  // So many rows a round that no ring has to be moved; the rest one by one.
  constexpr int kRound = 2 * kReach + 1;
  for (; t + kRound <= last; t += kRound) {
#pragma unroll
    for (int u = 0; u < kRound; ++u) {
      take_row(t + u);
      poolings.give(out, apart, slots, lane, target, inside, t + u);
    }
    if constexpr (kOutcome >= Outcome::kMoments) poolings.hand_on();
  }
#pragma unroll 1
  for (; t < last; ++t) {
    take_row(t);
    poolings.give(out, apart, slots, lane, target, inside, t);
  }
#pragma unroll
  for (int u = 0; u < kReach; ++u) {
    if (t + u >= end) break;
    take_nothing(t + u);
    poolings.give(out, apart, slots, lane, target, inside, t + u);
  }
  if constexpr (kOutcome >= Outcome::kMoments) {
    write_found<kOutcome>(poolings, sizes, cut, slots, lane, apart);
  }
}

}  // namespace metapool::cuda
