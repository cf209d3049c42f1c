// What a lane of backward has in shared memory, and what it is asked for: which of its columns and
// rows are on the map, the sums that it keeps for others, the rows that it shares with those beside
// it.
#pragma once

#include "backward_shared.cuh"
#include "sent.cuh"
#include "terms.cuh"

namespace metapool::cuda {

// The arguments of a call.
template <typename T>
struct Backward {
  Map<const T> grad_out, x;
  // From the row of gradients that all windows share to that of a slot, side by side.
  int64_t places[kNoneSlot];
  Fields<float> fields;
  Map<T> grad_x;  // without data where it is not wanted
  float* terms;   // null where the gradient of the weights is not wanted
  Terms of_terms;
};

template <typename T, int kColumns, Access kAccess>
struct BackwardLane {
  static constexpr int kWidth = kColumns + 2 * kReach;

  const Slots& slots;
  const Lane& lane;
  const Backward<T>& call;
  const T *grad_out, *x;  // of the first column of the lane
  T* grad_x;
  float* shared;
  int sums;                                       // of this lane: place i is at shared[sums + i]
  int neighbours[2 * kNeighbours<kColumns> + 1];  // those of these lanes
  int row;            // the first column of this lane in the first of the rows
  int column_stride;  // between columns there
  bool has_place;     // among the lanes that write rows
  int h;
  unsigned inside;

  // The number of a column, of those that windows of the lane reach, in a row that is kept at
  // `slot`: within a round of rows the later the smaller.
  static METAPOOL_INLINE constexpr int number_in_round(int slot, int column) {
    return (kSumRows - 1 - slot % kSumRows) * kWidth + kWidth - 1 - column;
  }

  // Its place in the sums.
  static METAPOOL_INLINE constexpr int place_of(int slot, int column) {
    return number_in_round(slot, column) * kLaneStride;
  }

  METAPOOL_DEVICE void clear_row(int slot) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared[sums + place_of(slot, i)] = 0;
  }

  // Of a lane on the map; what others find is dropped.
  METAPOOL_DEVICE bool is_inside(int v) const {
    return kAccess == Access::kVector || v == 0 || inside >> (kReach + v) & 1;
  }

  METAPOOL_DEVICE bool is_on_map(int row) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(h);
  }

  METAPOOL_DEVICE bool is_counted(int row) const {
    return static_cast<unsigned>(row - lane.row_begin) <
           static_cast<unsigned>(lane.row_end - lane.row_begin);
  }

  METAPOOL_DEVICE int index_in_row(int rows, int slot, int column) const {
    const int stride = kAccess == Access::kStrided ? column_stride : 1;
    return row + rows + slot % 2 * kRowFloats<kColumns> + column * stride;
  }

  // Writes this lane's columns of a row where the lanes beside it find them; `rows` is where the
  // two of that kind begin.
  METAPOOL_DEVICE void share_row(int rows, int slot, const float (&from)[kColumns]) {
    if (!has_place) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) shared[index_in_row(rows, slot, v)] = from[v];
  }

  METAPOOL_DEVICE void read_row(int rows, int slot, float (&to)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = shared[index_in_row(rows, slot, i - kReach)];
  }

  // The sums of a row for one column, of this lane and of those beside it.
  METAPOOL_DEVICE void collect(int slot, int v, float& sum) const {
#pragma unroll
    for (int k = -kNeighbours<kColumns>; k <= kNeighbours<kColumns>; ++k) {
      const int i = kReach + v - k * kColumns;
      if (i < 0 || i >= kWidth) continue;
      sum += shared[neighbours[kNeighbours<kColumns> + k] + place_of(slot, i)];
    }
  }
};

}  // namespace metapool::cuda
