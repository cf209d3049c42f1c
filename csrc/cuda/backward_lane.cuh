// What a lane of backward does: it keeps what it needs of the last rows, hands on what windows
// send, and gives rows back that are complete.
#pragma once

#include "averages.cuh"
#include "backward_shared.cuh"
#include "maxima.cuh"
#include "sent.cuh"
#include "terms.cuh"

namespace metapool::cuda {

// Rows that are loaded before they are needed: memory takes longer than a row.
constexpr int kRowsAhead = 2;

// Rows from the last one up to that of the windows of a slot which are looked at with it: those
// that it completes, but for the map itself, whose gradients are loaded one row later.
METAPOOL_INLINE constexpr int rows_behind(int slot) {
  return delay_of(slot) > 1 ? delay_of(slot) : 1;
}

// Gradients that a lane keeps of each column: of one map the last rows, oldest first, as many as
// averages of a mixture look at; side by side of each slot those of the windows that are looked at.
template <Form kForm, bool kAvg>
constexpr int kGrads = kForm == Form::kStack         ? kNoneSlot
                       : kForm == Form::kMix && kAvg ? 2 * kReach + 1
                                                     : kReach;

// From the last row to the one to which no average sends anything more.
template <Form kForm>
constexpr int kSentBehind = kForm == Form::kMix ? kReach + 1 : 2 * kReach;

// What a lane keeps of one column: of the last rows the maxima of each width, oldest first, and the
// gradients; of averages what those that are not complete hold so far, the last pixel and, unless
// all are sent the same, what each width is sent by row, oldest first.
template <Form kForm, bool kAvg, bool kMax>
struct Column {
  Top rows3[kMax ? 3 : 1], rows5[kMax ? 5 : 1], rows7[kMax ? 7 : 1];
  float grads[kGrads<kForm, kAvg>] = {};
  SumRings sums;
  float pixel = 0;
  float sent[kReach][2 * kReach + 1] = {};

  METAPOOL_INLINE Column() {
    for (Top& top : rows3) top = {-kInfinity<float>, 0};
    for (Top& top : rows5) top = {-kInfinity<float>, 0};
    for (Top& top : rows7) top = {-kInfinity<float>, 0};
  }

  template <int kRadius>
  METAPOOL_INLINE const auto& rows() const {
    if constexpr (kRadius == 1) {
      return rows3;
    } else if constexpr (kRadius == 2) {
      return rows5;
    } else {
      return rows7;
    }
  }

  // That of the window of a slot which is looked at.
  METAPOOL_INLINE float grad(int slot) const {
    return grads[kForm == Form::kStack ? slot : kGrads<kForm, kAvg> - rows_behind(slot)];
  }

  // What averages of one radius have sent to the row to which no one sends more, before it goes
  // along the row; `narrower` is that of the radius below.
  METAPOOL_INLINE float sent_down(int radius, float narrower) const {
    if constexpr (kForm == Form::kMix) {
      return narrower + (grads[kReach - radius] + grads[kReach + radius]);
    } else {
      float sum = 0;
#pragma unroll
      for (int i = 0; i <= 2 * radius; ++i) sum += sent[radius - 1][i];
      return sum;
    }
  }
};

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

template <typename T, Form kForm, bool kAvg, bool kMax, int kColumns, Access kAccess, bool kCareful>
struct LaneStream {
  static constexpr int kWidth = kColumns + 2 * kReach;
  static constexpr bool kIsMix = kForm == Form::kMix, kIsStack = kForm == Form::kStack;
  static constexpr bool kReadsInput = kMax || !kIsStack;
  using OwnRow = RawRow<T, kColumns, 0, kAccess>;
  using Columns = Column<kForm, kAvg, kMax>[kColumns];

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
  Field<float> fields[kNoneSlot] = {};
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

  METAPOOL_DEVICE bool wants_terms() const { return kIsMix && call.terms != nullptr; }

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

  // The windows of one radius around a row: what each sends goes to its maximum.
  template <int kRadius>
  METAPOOL_DEVICE void give_maxima(const Columns& columns, int t) {
    constexpr int kSlot = kAvgSlots + kRadius - 1;
    const int center = t - kRadius;
    if (!has_max(slots, kRadius) || !is_on_map(center)) return;
    Top tops[kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      tops[v] = top_of<kCareful>(columns[v].template rows<kRadius>(), center - kRadius);
      if (!kCareful) bottom = lowest(bottom, tops[v].value);
      const float share =
          sent<kForm>(fields[kSlot], columns[v].grad(kSlot), [&] { return tops[v].value; });
      shared[sums + tops[v].place] += is_inside(v) ? share : 0.0f;
    }
    if (!kIsMix || !is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      totals[kSlot] += is_inside(v) ? columns[v].grad(kSlot) * tops[v].value : 0.0f;
    }
  }

  // The windows of averages that are looked at with row t: their terms or, unless all are sent the
  // same, what they send to the rows that they hold.
  METAPOOL_DEVICE void look_at_averages(Columns& columns,
                                        const float (&averages)[kColumns][kAvgSlots], int t,
                                        int slot) {
#pragma unroll
    for (int d = 0; d < kAvgSlots; ++d) {
      const int center = t - rows_behind(d);
      if (!has_avg(slots, d) || (kIsMix && !is_counted(center))) continue;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const float grad = columns[v].grad(d), average = averages[v][d];
        if constexpr (kIsMix) {
          totals[d] += is_inside(v) ? grad * average : 0.0f;
          continue;
        }
        float share = sent<kForm>(fields[d], grad, [&] { return average; });
        if (!is_on_map(center) || !is_inside(v)) share = 0;
        if (d == 0) {
          shared[sums + place_of(slot + kSumRows - 1, kReach + v)] += share;
        } else {
          push(columns[v].sent[d - 1], share);
        }
      }
    }
  }

  // Averages of the windows that end with row t, and the pixel before that.
  METAPOOL_DEVICE void take_sums(Columns& columns, const float (&row)[kWidth], int t,
                                 float (&averages)[kColumns][kAvgSlots]) const {
    float there[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      there[i] = is_on_map(t) && (!kMax || inside >> i & 1) ? row[i] : 0.0f;
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      float along[kAvgSlots];
      sums_around(there, kReach + v, along);
      add_apart(columns[v].sums, along, averages[v]);
      averages[v][0] = columns[v].pixel;
      columns[v].pixel = along[0];
    }
  }

  // What averages send to the row to which they send no more goes along that row.
  METAPOOL_DEVICE void give_averages(const Columns& columns, int slot) {
    float given[kWidth] = {};
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      float down[kAvgSlots];
      down[0] = columns[v].grads[kReach];
#pragma unroll
      for (int d = 1; d <= kReach; ++d) down[d] = columns[v].sent_down(d, down[d - 1]);
      float share = 0;
#pragma unroll
      for (int d = kReach; d >= 0; --d) {
        if (has_avg(slots, d) && (d > 0 || kIsMix)) {
          share += down[d] * ((kIsMix ? fields[d].weight : 1.0f) * share_of_pixel<float>(d));
        }
        given[kReach + v - d] += share;
        if (d > 0) given[kReach + v + d] += share;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      shared[sums + place_of(slot + kSumRows - kSentBehind<kForm>, i)] += given[i];
    }
  }

  // Nothing times a gradient is NaN where that is not finite.
  METAPOOL_DEVICE void give_nothing(const Columns& columns, int center) {
    if (!kIsMix || slots.candidate[kNoneSlot] < 0 || !is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      totals[kNoneSlot] += is_inside(v) ? columns[v].grad(kNoneSlot) * 0.0f : 0.0f;
    }
  }

  // Keeps row t of the input, which lies in shared memory.
  METAPOOL_DEVICE void keep_row(Columns& columns, int t, int slot) {
    float row[kWidth];
    if constexpr (kReadsInput) {
      if (is_on_map(t)) read_row(slot % 2, row);
    }
    if constexpr (kMax) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
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
    if constexpr (kAvg) {
      if (kIsMix && !wants_terms()) return;
      float averages[kColumns][kAvgSlots];
      if constexpr (!kIsStack) take_sums(columns, row, t, averages);
      look_at_averages(columns, averages, t, slot);
    }
  }

  METAPOOL_DEVICE void give_rows(const Columns& columns, int t, int slot) {
    if constexpr (kMax) {
      give_maxima<1>(columns, t);
      give_maxima<2>(columns, t);
      give_maxima<3>(columns, t);
    }
    if constexpr (kAvg) give_averages(columns, slot);
    give_nothing(columns, t - 1);
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

  // Nothing more comes to this row.
  METAPOOL_DEVICE void give_back(T* to, int row_of_map, int slot) const {
    if (!lane.is_owner || !is_counted(row_of_map)) return;
    float found[kColumns] = {};
#pragma unroll
    for (int v = 0; v < kColumns; ++v) collect(slot, v, found[v]);
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

  // The columns of this lane alone, of row t of the input and of the windows around the row before
  // or, side by side, around those that are looked at with row t.
  struct Rows {
    OwnRow x, grads[kIsStack ? kNoneSlot : 1];
  };

  METAPOOL_DEVICE void load(const Cursor& cursor, int t, Rows& to) const {
    const unsigned own = inside >> kReach;
    if constexpr (kReadsInput) {
      load_row(cursor.x, call.x.stride_w, is_on_map(t) ? own : 0, to.x);
    }
    if constexpr (kIsStack) {
#pragma unroll
      for (int slot = 0; slot < kNoneSlot; ++slot) {
        const bool is_there = slots.candidate[slot] >= 0 && is_on_map(t - rows_behind(slot));
        load_row(cursor.grad_out + call.places[slot], call.grad_out.stride_w, is_there ? own : 0,
                 to.grads[slot]);
      }
    } else {
      load_row(cursor.grad_out, call.grad_out.stride_w, is_on_map(t - 1) ? own : 0, to.grads[0]);
    }
  }

  // Takes what was loaded; the input goes where the lanes beside this one find it.
  METAPOOL_DEVICE void take(const Rows& rows, Columns& columns, int slot) {
    if constexpr (kReadsInput) {
      float pixels[kColumns];
      widen_row(rows.x, pixels);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        if (kMax && !OwnRow::is_inside(inside >> kReach, v)) pixels[v] = -kInfinity<float>;
      }
      share_row(slot % 2, pixels);
    }
#pragma unroll
    for (int i = 0; i < (kIsStack ? kNoneSlot : 1); ++i) {
      float grads[kColumns];
      widen_row(rows.grads[i], grads);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        if constexpr (kIsStack) {
          columns[v].grads[i] = grads[v];
        } else {
          push(columns[v].grads, grads[v]);
        }
      }
    }
  }

  METAPOOL_DEVICE void run() {
    Columns columns;
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
        take(ahead[0], columns, u);
        __syncthreads();
#pragma unroll
        for (int i = 0; i + 1 < kRowsAhead; ++i) ahead[i] = ahead[i + 1];
        load(cursor, t + kRowsAhead, ahead[kRowsAhead - 1]);
        advance(cursor);
        if (call.grad_x.data != nullptr) {
          give_back(cursor.grad_x, t - 1 - 2 * kReach, u - 1 - 2 * kReach + kSumRows);
          // What was read of this row, eight rows ago, was read before the barrier.
          clear_row(u);
        }
        keep_row(columns, t, u);
        give_rows(columns, t, u);
      }
      if (wants_terms()) hand_on_totals();
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
