// What becomes of the poolings of a lane: they are mixed into rows of one map, or stay apart. An
// outcome takes for each column what windows hold of a new row, and then gives what is complete.
#pragma once

#include "averages.cuh"
#include "maxima.cuh"
#include "moments.cuh"

namespace metapool::cuda {

constexpr int kForwardThreads = 128;
// Rows that are loaded before they are needed: memory takes longer than a row.
constexpr int kForwardAhead = 2;

// What a call takes whose poolings are not mixed.
template <typename T>
struct Apart {
  // From a row of the first map to the row of its own that a slot then completes.
  int64_t places[kSlots];
  // Of products.
  Map<const T> other;
  // Of moments and products.
  Found* found;
  int64_t parts;
  int candidates;
};

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

// Their weighted sum: an output row gets something from the seven input rows around it.
template <typename T, Outcome kOutcome, int kColumns, Access kAccess>
struct Poolings {
  float avg_weights[kAvgSlots], max_weights[kMaxSlots], start;
  float ready[kColumns][2 * kReach + 1];  // the output rows around the last input row

  METAPOOL_DEVICE void begin(const Weights<float>& weights, const Weights<float>& constants,
                             const Slots& slots, const Lane& lane) {
    load_avg_weights(weights, slots, lane.n, lane.c, avg_weights);
    load_max_weights(weights, slots, lane.n, lane.c, max_weights);
    start = weight_of(weights, slots, kNoneSlot, lane.n, lane.c) * 0.0f;
    if (constants.data != nullptr) start += constants.at(lane.n, lane.c, 0);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      for (float& item : ready[v]) item = start;
    }
  }

  METAPOOL_DEVICE void next_row(int v) { push(ready[v], start); }

  METAPOOL_DEVICE void take_sums(const Slots& slots, int v, const float (&sums)[kAvgSlots]) {
    add_sums(sums, avg_weights, slots, ready[v]);
  }

  // Beyond the map there is nothing to add.
  METAPOOL_DEVICE void take_no_sums(const Slots&, int) {}

  METAPOOL_DEVICE void take_maxima(const Slots& slots, int v, const float (&tops)[kMaxSlots]) {
#pragma unroll
    for (int d = 1; d <= kReach; ++d) {
      if (has_max(slots, d)) ready[v][kReach - d] += max_weights[d - 1] * tops[d - 1];
    }
  }

  // Input row t has been taken.
  METAPOOL_DEVICE void give(const Map<T>& out, const Apart<T>&, const Slots&, const Lane& lane,
                            T* target, unsigned inside, int t) {
    const int o = t - kReach;
    if (!lane.is_on_map || o < lane.row_begin) return;
    float columns[kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) columns[v] = ready[v][0];
    store_row<kColumns, kReach, kAccess>(target + o * out.stride_h, out.stride_w, inside, columns);
  }
};

// What is complete of poolings that stay apart.
template <int kColumns>
struct Completed {
  SumRings rings[kColumns];
  float complete[kSlots][kColumns];  // with the last row

  METAPOOL_DEVICE void begin(const Weights<float>&, const Weights<float>&, const Slots&,
                             const Lane&) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      for (float& value : complete[slot]) value = 0;
    }
  }

  METAPOOL_DEVICE void next_row(int) {}

  METAPOOL_DEVICE void take_sums(const Slots&, int v, const float (&sums)[kAvgSlots]) {
    float averages[kAvgSlots];
    add_apart(rings[v], sums, averages);
#pragma unroll
    for (int d = 0; d < kAvgSlots; ++d) complete[d][v] = averages[d];
  }

  METAPOOL_DEVICE void take_no_sums(const Slots& slots, int v) {
    take_sums(slots, v, {0, 0, 0, 0});
  }

  METAPOOL_DEVICE void take_maxima(const Slots&, int v, const float (&tops)[kMaxSlots]) {
#pragma unroll
    for (int d = 0; d < kMaxSlots; ++d) complete[kAvgSlots + d][v] = tops[d];
  }

  // Whether row t has completed an output row of this lane.
  static METAPOOL_DEVICE bool completes(const Slots& slots, const Lane& lane, int slot, int t) {
    const int o = t - delay_of(slot);
    return slots.candidate[slot] >= 0 && o >= lane.row_begin && o < lane.row_end;
  }
};

// Each in a map of its own.
template <typename T, int kColumns, Access kAccess>
struct Poolings<T, Outcome::kStack, kColumns, kAccess> : Completed<kColumns> {
  METAPOOL_DEVICE void give(const Map<T>& out, const Apart<T>& apart, const Slots& slots,
                            const Lane& lane, T* target, unsigned inside, int t) {
    if (!lane.is_on_map) return;
    T* const row = target + t * out.stride_h;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!this->completes(slots, lane, slot, t)) continue;
      store_row<kColumns, kReach, kAccess>(row + apart.places[slot], out.stride_w, inside,
                                           this->complete[slot]);
    }
  }
};

}  // namespace metapool::cuda
