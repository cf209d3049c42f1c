// What a lane of backward does: it keeps what it needs of the last rows, hands the gradients of
// windows on, and gives rows back that are complete.
#pragma once

#include "averages.cuh"
#include "backward_shared.cuh"
#include "maxima.cuh"
#include "terms.cuh"

namespace metapool::cuda {

// Rows that are loaded before they are needed: memory takes longer than a row.
constexpr int kRowsAhead = 2;

// What a lane keeps of one column: of the last rows the maxima of each width, oldest first, the
// pixels, and what is due to the rows around the last from averages.
template <bool kAvg, bool kMax>
struct Column {
  Top rows3[kMax ? 3 : 1], rows5[kMax ? 5 : 1], rows7[kMax ? 7 : 1];
  float pixels[kAvg ? 7 : 1];
  float ready[kAvg ? 7 : 1];
};

template <int kRadius, bool kAvg, bool kMax>
METAPOOL_INLINE const auto& rows_of(const Column<kAvg, kMax>& column) {
  if constexpr (kRadius == 1) {
    return column.rows3;
  } else if constexpr (kRadius == 2) {
    return column.rows5;
  } else {
    return column.rows7;
  }
}

// The arguments of a call.
template <typename T>
struct Backward {
  Map<const T> grad_out, x;
  Weights<float> weights;
  Map<T> grad_x;  // without data where it is not wanted
  float* terms;   // null where the gradient of the weights is not wanted
  Terms of_terms;
};

template <typename T, bool kAvg, bool kMax, int kColumns, Access kAccess, bool kCareful>
struct LaneStream {
  static constexpr int kWidth = kColumns + 2 * kReach;
  using OwnRow = RawRow<T, kColumns, 0, kAccess>;

  const Sizes& sizes;
  const Cut& cut;
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
  float avg_weights[kAvgSlots], max_weights[kMaxSlots];
  float totals[kSlots] = {};  // of the gradient of the weights, in this round of rows
  float bottom = 0;           // not above any maximum, or NaN if one is

  // The place of a column, of those that windows of the lane reach, in a row that is kept at
  // `slot`.
  static METAPOOL_INLINE constexpr int place_of(int slot, int column) {
    return (slot % kSumRows * kWidth + column) * kLaneStride;
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

  METAPOOL_DEVICE int index_in_row(int number, int column) const {
    const int stride = kAccess == Access::kStrided ? column_stride : 1;
    return row + number * kRowFloats<kColumns> + column * stride;
  }

  // Writes a row's columns of this lane where the lanes beside it find them.
  METAPOOL_DEVICE void share_row(int number, const float (&from)[kColumns]) {
    if (!has_place) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) shared[index_in_row(number, v)] = from[v];
  }

  METAPOOL_DEVICE void read_row(int number, float (&to)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = shared[index_in_row(number, i - kReach)];
  }

  // The maxima along a row, one for each width.
  METAPOOL_DEVICE void maxima_along(const float (&row)[kWidth], int slot, int v,
                                    Top (&along)[kMaxSlots]) const {
    const int center = kReach + v;
    Top top{row[center], place_of(slot, center)};
#pragma unroll
    for (int d = 1; d <= kReach; ++d) {
      const int left = center - d, right = center + d;
      widen_window<kCareful>(top, {row[left], place_of(slot, left)}, inside >> left & 1,
                             {row[right], place_of(slot, right)});
      along[d - 1] = top;
    }
  }

  // The windows of one radius around a row: each hands its gradient to its maximum.
  template <int kRadius>
  METAPOOL_DEVICE void give_maxima(const Column<kAvg, kMax> (&columns)[kColumns],
                                   const float (&grads)[kColumns][kReach], int center) {
    if (!has_max(slots, kRadius) || !is_on_map(center)) return;
    Top tops[kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      tops[v] = top_of<kCareful>(rows_of<kRadius>(columns[v]), center - kRadius);
      if (!kCareful) bottom = lowest(bottom, tops[v].value);
      const float share = grads[v][kReach - kRadius] * max_weights[kRadius - 1];
      shared[sums + tops[v].place] += is_inside(v) ? share : 0.0f;
    }
    if (!is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const float term = grads[v][kReach - kRadius] * tops[v].value;
      totals[kAvgSlots + kRadius - 1] += is_inside(v) ? term : 0.0f;
    }
  }

  METAPOOL_DEVICE void give_averages(Column<kAvg, kMax> (&columns)[kColumns], int center,
                                     int slot) {
    if (!is_on_map(center)) return;
    float grads[kWidth], along[kColumns][kAvgSlots];
    read_row(2 + slot % 2, grads);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      sums_around(grads, kReach + v, along[v]);
      add_sums(along[v], avg_weights, slots, columns[v].ready);
    }
    if (!is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      // Of the windows that hold a pixel what they hold of it, which is the same sum.
      float down[kAvgSlots];
      sums_around(columns[v].pixels, kReach, down);
#pragma unroll
      for (int d = 0; d < kAvgSlots; ++d) {
        totals[d] += is_inside(v) ? along[v][d] * down[d] : 0.0f;
      }
    }
  }

  // Nothing times a gradient is NaN where that is not finite.
  METAPOOL_DEVICE void give_nothing(const float (&grads)[kColumns][kReach], int center) {
    if (slots.candidate[kNoneSlot] < 0 || !is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      totals[kNoneSlot] += is_inside(v) ? grads[v][kReach - 1] * 0.0f : 0.0f;
    }
  }

  // Keeps row t of the input, which lies in shared memory if there are maxima.
  METAPOOL_DEVICE void keep_row(Column<kAvg, kMax> (&columns)[kColumns],
                                const float (&own)[kColumns], int t, int slot) {
    float row[kWidth];
    if constexpr (kMax) {
      if (is_on_map(t)) read_row(slot % 2, row);
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      if constexpr (kAvg) push(columns[v].pixels, is_on_map(t) ? own[v] : 0.0f);
      if constexpr (kMax) {
        Top along[kMaxSlots];
        if (is_on_map(t)) {
          maxima_along(row, slot, v, along);
        } else {
          for (Top& top : along) top = {-kInfinity<float>, 0};
        }
        push(columns[v].rows3, along[0]);
        push(columns[v].rows5, along[1]);
        push(columns[v].rows7, along[2]);
      }
    }
  }

  METAPOOL_DEVICE void give_rows(Column<kAvg, kMax> (&columns)[kColumns],
                                 const float (&grads)[kColumns][kReach], int t, int slot) {
    if constexpr (kMax) {
      give_maxima<1>(columns, grads, t - 1);
      give_maxima<2>(columns, grads, t - 2);
      give_maxima<3>(columns, grads, t - 3);
    }
    if constexpr (kAvg) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) push(columns[v].ready, 0.0f);
      give_averages(columns, t - kReach, slot);
    }
    give_nothing(grads, t - 1);
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

  // Nothing more comes to this row; `found` has come from averages.
  METAPOOL_DEVICE void give_back(float (&found)[kColumns], T* to, int row_of_map, int slot) const {
    if (!lane.is_owner || !is_counted(row_of_map)) return;
    if constexpr (kMax) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) collect(slot, v, found[v]);
    }
    store_row<kColumns, kReach, kAccess>(to, call.grad_x.stride_w, inside, found);
  }

  // Where the next rows are in memory.
  struct Cursor {
    const T *x, *grad_out;
    T* grad_x;
  };

  METAPOOL_DEVICE Cursor cursor_at(int t) const {
    return {x + t * call.x.stride_h, grad_out + (t - 1) * call.grad_out.stride_h,
            grad_x + (t - kRowsAhead - 2 - 2 * kReach) * call.grad_x.stride_h};
  }

  METAPOOL_DEVICE void advance(Cursor& cursor) const {
    cursor.x = forget_origin(cursor.x + call.x.stride_h);
    cursor.grad_out = forget_origin(cursor.grad_out + call.grad_out.stride_h);
    cursor.grad_x = forget_origin(cursor.grad_x + call.grad_x.stride_h);
  }

  // The columns of this lane alone, of row t of the input and of the windows around the row before.
  struct Rows {
    OwnRow x, grad;
  };

  METAPOOL_DEVICE void load(const Cursor& cursor, int t, Rows& to) const {
    load_row(cursor.x, call.x.stride_w, is_on_map(t) ? inside >> kReach : 0, to.x);
    load_row(cursor.grad_out, call.grad_out.stride_w, is_on_map(t - 1) ? inside >> kReach : 0,
             to.grad);
  }

  METAPOOL_DEVICE void clear(Column<kAvg, kMax> (&columns)[kColumns]) {
    for (Column<kAvg, kMax>& column : columns) {
      for (Top& top : column.rows3) top = {-kInfinity<float>, 0};
      for (Top& top : column.rows5) top = {-kInfinity<float>, 0};
      for (Top& top : column.rows7) top = {-kInfinity<float>, 0};
      for (float& pixel : column.pixels) pixel = 0;
      for (float& sum : column.ready) sum = 0;
    }
  }

  METAPOOL_DEVICE void run() {
    Column<kAvg, kMax> columns[kColumns];
    clear(columns);
    float grads[kColumns][kReach] = {};  // of the last rows, oldest first
    float from_averages[kColumns] = {};  // to the row that is given back next
    const int begin = lane.row_begin > 2 * kReach ? lane.row_begin - 2 * kReach : 0;
    Cursor cursor = cursor_at(begin);
    Rows ahead[kRowsAhead];  // on their way
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
      load(cursor, begin + i, ahead[i]);
      advance(cursor);
    }
    // One row more than there are, for the last that is given back.
    for (int base = begin; base <= lane.row_end + 2 * kReach; base += kSumRows) {
// The careful run is rare: its code is kept small.
#pragma unroll(kCareful ? 1 : kSumRows)
      for (int u = 0; u < kSumRows; ++u) {
        const int t = base + u;
        float pixels[kColumns], grads_now[kColumns], oldest[kColumns];
        widen_row(ahead[0].x, pixels);
        widen_row(ahead[0].grad, grads_now);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          if (kMax && !OwnRow::is_inside(inside >> kReach, v)) pixels[v] = -kInfinity<float>;
          push(grads[v], grads_now[v]);
          oldest[v] = grads[v][0];
        }
        if constexpr (kMax) share_row(u % 2, pixels);
        if constexpr (kAvg) share_row(2 + u % 2, oldest);
        __syncthreads();
#pragma unroll
        for (int i = 0; i + 1 < kRowsAhead; ++i) ahead[i] = ahead[i + 1];
        load(cursor, t + kRowsAhead, ahead[kRowsAhead - 1]);
        advance(cursor);
        if (call.grad_x.data != nullptr) {
          give_back(from_averages, cursor.grad_x, t - 1 - 2 * kReach,
                    u - 1 - 2 * kReach + kSumRows);
          // What was read of this row, eight rows ago, was read before the barrier.
          if constexpr (kMax) clear_row(u);
        }
        keep_row(columns, pixels, t, u);
        give_rows(columns, grads, t, u);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) from_averages[v] = kAvg ? columns[v].ready[0] : 0.0f;
      }
      if (call.terms != nullptr) hand_on_totals();
    }
  }

  // What this thread has found for a slot in all rounds.
  METAPOOL_DEVICE double& found(int slot) const {
    return found_in<kColumns>(shared)[slot * kBackwardThreads + sums];
  }

  METAPOOL_DEVICE void hand_on_totals() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      found(slot) += totals[slot];
      totals[slot] = 0;
    }
  }
};

}  // namespace metapool::cuda
