// Backward of square windows of 3, 5 and 7 at stride 1, both gradients in one pass.
//
// When input row t has come, the windows around row t - 3 are complete. What averages give is the
// forward of the incoming gradient. The maximum of a window is found along rows first, then down
// the column, and carries its place along: in shared memory every lane has the sums of the last
// eight rows, over its own columns and those that its windows reach, and adds a window's gradient
// there. Row t - 6 is then complete: each column then takes what its own
// lane and the lanes beside it have for it. No two threads ever add to the same place. Rows of the
// maps go through shared memory too, as every lane needs the columns beside its own.
//
// The place is found by comparisons that are wrong for NaN, of which the last counts, and for
// windows of nothing but -Inf, which equals what is beyond the map. A block that has met them runs
// again, carefully.
#pragma once

#include "averages.cuh"
#include "maxima.cuh"
#include "terms.cuh"

namespace metapool::cuda {

constexpr int kBackwardThreads = 128;
// Rows whose sums a lane keeps: seven get something while the one before them is read.
constexpr int kSumRows = 8;
// Rows that are loaded before they are needed: memory takes longer than a row.
constexpr int kRowsAhead = 2;
// The sums of one place lie side by side for all lanes, and behind them are zeros, which stand for
// lanes that do not exist. A multiple of the banks, so that any places are free of conflicts.
constexpr int kLaneStride = kBackwardThreads + 32;
// Columns beyond the ends of a row in shared memory.
constexpr int kGuard = kReach + 1;

// Lanes that hand something to a lane, and those beside a tile that have to see the same as in the
// next one: its windows, and what these hold.
template <int kColumns>
constexpr int kNeighbours = (kReach + kColumns - 1) / kColumns;
template <int kColumns>
constexpr int kOverlap = (2 * kReach + kColumns - 1) / kColumns;

template <int kColumns>
constexpr int kSumFloats = kSumRows * (kColumns + 2 * kReach) * kLaneStride;

// A row of all planes of a block, with their guards: most where planes are no wider than a lane.
template <int kColumns>
constexpr int kRowFloats = kBackwardThreads * (kColumns + 2 * kGuard);

// The sums, and two rows of either map: one is read while the next is being written.
template <int kColumns>
constexpr int kRunFloats = kSumFloats<kColumns> + 4 * kRowFloats<kColumns>;

// Behind them in double what each thread has found of the gradient of the weights.
template <int kColumns>
constexpr int kBackwardShared = kRunFloats<kColumns> * static_cast<int>(sizeof(float)) +
                                kSlots * kBackwardThreads * static_cast<int>(sizeof(double));

template <int kColumns>
METAPOOL_DEVICE double* found_in(float* shared) {
  return reinterpret_cast<double*>(shared + kRunFloats<kColumns>);
}

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

// Writes so many copies of a number, all threads together.
template <int kCount>
METAPOOL_DEVICE void fill(float* to, float number) {
  constexpr int kAtOnce = 4 * kBackwardThreads;
  static_assert(kCount % kAtOnce == 0);
  const Vector<float, 4> numbers{number, number, number, number};
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    *reinterpret_cast<Vector<float, 4>*>(to + i + 4 * threadIdx.x) = numbers;
  }
}

// Fills sums with zeros and the guards of rows with what is beyond the map.
template <int kColumns, bool kMax>
METAPOOL_DEVICE void prepare_shared(float* shared) {
  constexpr int kTwoRows = 2 * kRowFloats<kColumns>;
  float* const rows = shared + kSumFloats<kColumns>;
  fill<kSumFloats<kColumns>>(shared, 0);
  fill<kTwoRows>(rows, kMax ? -kInfinity<float> : 0.0f);
  fill<kTwoRows>(rows + kTwoRows, 0);
  fill<2 * kSlots * kBackwardThreads>(rows + 2 * kTwoRows, 0);  // doubles
  __syncthreads();
}

template <typename T, bool kAvg, bool kMax, int kColumns, Access kAccess, bool kCareful>
METAPOOL_DEVICE bool run_stream(const Sizes& sizes, const Cut& cut, const Slots& slots,
                                const Lane& lane, const Backward<T>& call, float* shared) {
  using Lanes = LaneStream<T, kAvg, kMax, kColumns, kAccess, kCareful>;
  constexpr bool kAlongPlanes = kAccess == Access::kStrided;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = lane.group * kColumns;
  const bool has_place = lane.in_block < cut.planes && lane.in_plane < cut.lanes;
  const int first_column = (has_place ? lane.in_plane * kColumns : 0) + kGuard;
  const int in_block = has_place ? lane.in_block : 0;
  const int column_stride = kAlongPlanes ? cut.planes : 1;
  const int plane_stride = kAlongPlanes ? 1 : cut.lanes * kColumns + 2 * kGuard;
  Lanes stream{
      sizes,
      cut,
      slots,
      lane,
      call,
      call.grad_out.plane(lane.n, lane.c) + column * call.grad_out.stride_w,
      call.x.plane(lane.n, lane.c) + column * call.x.stride_w,
      call.grad_x.data == nullptr
          ? nullptr
          : call.grad_x.plane(lane.n, lane.c) + column * call.grad_x.stride_w,
      shared,
      forget_origin(thread),
      {},
      forget_origin(kSumFloats<kColumns> + in_block * plane_stride + first_column * column_stride),
      column_stride,
      has_place,
      static_cast<int>(sizes.h),
      columns_inside<kColumns, kReach>(lane, sizes.w)};
#pragma unroll
  for (int k = -kNeighbours<kColumns>; k <= kNeighbours<kColumns>; ++k) {
    const bool exists = lane.in_plane + k >= 0 && lane.in_plane + k < cut.lanes;
    stream.neighbours[kNeighbours<kColumns> + k] =
        forget_origin(exists ? thread + k * (kAlongPlanes ? cut.planes : 1) : kBackwardThreads);
  }
  load_avg_weights(call.weights, slots, lane.n, lane.c, stream.avg_weights);
  load_max_weights(call.weights, slots, lane.n, lane.c, stream.max_weights);
  if (!lane.is_on_map) {
    // The lanes beside it collect nothing from it, whatever the weights are.
    for (float& weight : stream.max_weights) weight = 0;
  }
  prepare_shared<kColumns, kMax>(shared);
  stream.run();
  if (call.terms != nullptr) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const double share = slot < kAvgSlots ? share_of_pixel<double>(slot) : 1.0;
      double& found = stream.found(slot);
      found = lane.is_owner ? found * share : 0.0;
    }
    write_terms<kBackwardThreads>(call.of_terms, slots, cut, lane, found_in<kColumns>(shared),
                                  call.terms);
  }
  return lane.is_on_map && !(stream.bottom > -kInfinity<float>);
}

template <typename T, bool kAvg, bool kMax, int kColumns, Access kAccess>
__global__ void __launch_bounds__(kBackwardThreads, kMax ? 2 : 3)
    streamed_bwd_kernel(const __grid_constant__ Sizes sizes, const __grid_constant__ Cut cut,
                        const __grid_constant__ Slots slots,
                        const __grid_constant__ Backward<T> call) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const Lane lane = lane_of(sizes, cut);
  const bool is_special =
      run_stream<T, kAvg, kMax, kColumns, kAccess, false>(sizes, cut, slots, lane, call, shared);
  if constexpr (kMax) {
    if (__syncthreads_or(is_special)) {
      run_stream<T, kAvg, kMax, kColumns, kAccess, true>(sizes, cut, slots, lane, call, shared);
    }
  }
}

}  // namespace metapool::cuda
