// How a lane of backward streams down its columns: it keeps what it needs of the last rows, hands
// on what windows send, and gives rows back that are complete.
#pragma once

#include "averages.cuh"
#include "backward_lane.cuh"
#include "keys.cuh"

namespace metapool::cuda {

// Rows that are loaded before they are needed: memory takes longer than a row of few columns.
template <int kColumns>
constexpr int kRowsAhead = kColumns < 4 ? 2 : 1;

// Rows from the last one up to that of the windows of a slot which are looked at with it: those
// that it completes, but for the map itself, whose gradients are loaded one row later.
METAPOOL_INLINE constexpr int rows_behind(int slot) {
  return delay_of(slot) > 1 ? delay_of(slot) : 1;
}

// Gradients that a lane keeps of each column: of one map the last rows, oldest first; side by side
// of each slot those of the window that is looked at.
template <Form kForm>
constexpr int kGrads = kForm == Form::kStack ? kNoneSlot : kReach;

// What is kept of a column for averages: what those that are not complete hold so far, the last
// pixel and what is sent to rows by each width, oldest first, until nothing more comes to a row.
template <Form kForm>
struct OfAverages {
  SumRings sums;
  float pixel = 0;
  float sent[kReach][2 * kReach + 1] = {};
};

// In a mixture all are sent the same but for its weight: the last pixels, and what is due to the
// rows around the last.
template <>
struct OfAverages<Form::kMix> {
  float pixels[2 * kReach + 1] = {}, ready[2 * kReach + 1] = {};
};

// What a lane keeps of one column: of the last rows the maxima of each width, oldest first.
template <Form kForm, bool kMax, typename Peak>
struct Column {
  Peak rows3[kMax ? 3 : 1], rows5[kMax ? 5 : 1], rows7[kMax ? 7 : 1];
  float grads[kGrads<kForm>] = {};
  OfAverages<kForm> averages;

  METAPOOL_INLINE Column() {
    for (Peak& top : rows3) top = Peak::beyond();
    for (Peak& top : rows5) top = Peak::beyond();
    for (Peak& top : rows7) top = Peak::beyond();
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
    return grads[kForm == Form::kStack ? slot : kReach - rows_behind(slot)];
  }
};

template <typename T, Form kForm, bool kAvg, bool kMax, int kColumns, Access kAccess, bool kCareful>
struct BackwardStream : BackwardLane<T, kColumns, kAccess> {
  using Base = BackwardLane<T, kColumns, kAccess>;
  using Base::is_inside, Base::is_on_map, Base::is_counted, Base::place_of, Base::share_row;
  using Base::kWidth, Base::call, Base::slots, Base::inside, Base::lane, Base::shared, Base::sums;
  using Base::read_row, Base::clear_row, Base::collect;

  static constexpr bool kIsMix = kForm == Form::kMix, kIsStack = kForm == Form::kStack;
  static constexpr bool kReadsInput = kMax || !kIsStack;
  using Shared = BackwardShared<kForm, kAvg, kMax, kColumns>;
  using OwnRow = RawRow<T, kColumns, 0, kAccess>;
  // Fields take the value of each pooling out of its maximum, which keys hold less directly.
  static constexpr bool kKeyed = kMax && sizeof(T) == 2 && !kCareful && kForm != Form::kMoments;
  using Peak = std::conditional_t<kKeyed, Key<T>, Top>;
  static_assert(kSumRows * kWidth <= Key<T>::kPlaceMask + 1);
  static_assert(kMostStripRows + 4 * kReach + kSumRows < Key<T>::kMostRounds * kSumRows);
  using Columns = Column<kForm, kMax, Peak>[kColumns];

  Field<float> fields[kNoneSlot] = {};
  float totals[kSlots] = {};  // of the gradient of the weights, in this round of rows
  float bottom = 0;           // not above any maximum or, with keys, any pixel; NaN if one is
  int bits_of_round = 0;      // of keys

  // Whether something was met that is found again with care.
  METAPOOL_DEVICE bool is_special() const {
    return lane.is_on_map && (kKeyed ? bottom != bottom : !(bottom > -kInfinity<float>));
  }

  METAPOOL_DEVICE bool wants_terms() const { return kIsMix && call.terms != nullptr; }

  // What the lanes beside this one find of a pixel.
  static METAPOOL_DEVICE float shown(float pixel) {
    if constexpr (kKeyed) return float_of(Key<T>::of(pixel).number);
    return pixel;
  }

  // The same of what is beyond the map.
  static METAPOOL_DEVICE float shown_beyond() {
    if constexpr (kKeyed) return float_of(Key<T>::beyond().number);
    return kMax ? -kInfinity<float> : 0.0f;
  }

  // A pixel of a row, of those that windows of the lane reach.
  METAPOOL_DEVICE Peak peak_of(float shown, int slot, int column) const {
    if constexpr (kKeyed) {
      return {bits_of(shown) | bits_of_round | Base::number_in_round(slot, column)};
    } else {
      return {shown, place_of(slot, column)};
    }
  }

  // The maxima along a row, one for each width.
  METAPOOL_DEVICE void maxima_along(const float (&row)[kWidth], int slot, int v,
                                    Peak (&along)[kMaxSlots]) const {
    const int center = kReach + v;
    Peak top = peak_of(row[center], slot, center);
#pragma unroll
    for (int d = 1; d <= kReach; ++d) {
      const int left = center - d, right = center + d;
      widen_window<kCareful>(top, peak_of(row[left], slot, left), inside >> left & 1,
                             peak_of(row[right], slot, right));
      along[d - 1] = top;
    }
  }

  // The windows of one radius around a row: what each sends goes to its maximum.
  template <int kRadius>
  METAPOOL_DEVICE void give_maxima(const Columns& columns, int t) {
    constexpr int kSlot = kAvgSlots + kRadius - 1;
    const int center = t - kRadius;
    if (!has_max(slots, kRadius) || !is_on_map(center)) return;
    Peak tops[kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      tops[v] = top_of<kCareful>(columns[v].template rows<kRadius>(), center - kRadius);
      if (!kKeyed && !kCareful) bottom = lowest(bottom, tops[v].value());
      const float share =
          sent<kForm>(fields[kSlot], columns[v].grad(kSlot), [&] { return tops[v].value(); });
      shared[sums + tops[v].place()] += is_inside(v) ? share : 0.0f;
    }
    if (!wants_terms() || !is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      totals[kSlot] += is_inside(v) ? columns[v].grad(kSlot) * tops[v].value() : 0.0f;
    }
  }

  // Averages of a mixture around a row, whose gradients lie in shared memory.
  METAPOOL_DEVICE void give_mixed_averages(Columns& columns, int center, int slot) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v) push(columns[v].averages.ready, 0.0f);
    if (!is_on_map(center)) return;
    float grads[kWidth], along[kColumns][kAvgSlots], weights[kAvgSlots];
    read_row(Shared::kGrads, slot, grads);
#pragma unroll
    for (int d = 0; d < kAvgSlots; ++d) weights[d] = fields[d].weight * share_of_pixel<float>(d);
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      sums_around(grads, kReach + v, along[v]);
      add_sums(along[v], weights, slots, columns[v].averages.ready);
    }
    if (!wants_terms() || !is_counted(center)) return;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      // Of the windows that hold a pixel what they hold of it, which is the same sum.
      float down[kAvgSlots];
      sums_around(columns[v].averages.pixels, kReach, down);
#pragma unroll
      for (int d = 0; d < kAvgSlots; ++d) {
        totals[d] += is_inside(v) ? along[v][d] * down[d] : 0.0f;
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
      add_apart(columns[v].averages.sums, along, averages[v]);
      averages[v][0] = columns[v].averages.pixel;
      columns[v].averages.pixel = along[0];
    }
  }

  // What each average that is looked at with row t sends to the rows that it holds.
  METAPOOL_DEVICE void send_averages(Columns& columns, const float (&averages)[kColumns][kAvgSlots],
                                     int t, int slot) {
#pragma unroll
    for (int d = 0; d < kAvgSlots; ++d) {
      if (!has_avg(slots, d)) continue;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        float share = sent<kForm>(fields[d], columns[v].grad(d), [&] { return averages[v][d]; });
        if (!is_on_map(t - rows_behind(d)) || !is_inside(v)) share = 0;
        if (d == 0) {
          shared[sums + place_of(slot + kSumRows - 1, kReach + v)] += share;
        } else {
          push(columns[v].averages.sent[d - 1], share);
        }
      }
    }
  }

  // The row to which averages send nothing more: what they have sent goes along it.
  METAPOOL_DEVICE void give_averages(const Columns& columns, int slot) {
    float given[kWidth] = {};
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      float share = 0;
#pragma unroll
      for (int d = kReach; d > 0; --d) {
        float down = 0;
#pragma unroll
        for (int i = 0; i <= 2 * d; ++i) down += columns[v].averages.sent[d - 1][i];
        if (has_avg(slots, d)) share += down * share_of_pixel<float>(d);
        given[kReach + v - d] += share;
        given[kReach + v + d] += share;
      }
      given[kReach + v] += share;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      shared[sums + place_of(slot + kSumRows - 2 * kReach, i)] += given[i];
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
    if constexpr (Shared::kHasInput) {
      if (is_on_map(t)) read_row(Shared::kInput, slot, row);
    }
    if constexpr (kMax) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        Peak along[kMaxSlots];
        if (is_on_map(t)) {
          maxima_along(row, slot, v, along);
        } else {
          for (Peak& top : along) top = Peak::beyond();
        }
        push(columns[v].rows3, along[0]);
        push(columns[v].rows5, along[1]);
        push(columns[v].rows7, along[2]);
      }
    }
    if constexpr (kAvg && !kIsMix) {
      float averages[kColumns][kAvgSlots];
      if constexpr (!kIsStack) take_sums(columns, row, t, averages);
      send_averages(columns, averages, t, slot);
      give_averages(columns, slot);
    }
  }

  METAPOOL_DEVICE void give_rows(Columns& columns, int t, int slot) {
    if constexpr (kMax) {
      give_maxima<1>(columns, t);
      give_maxima<2>(columns, t);
      give_maxima<3>(columns, t);
    }
    if constexpr (kAvg && kIsMix) give_mixed_averages(columns, t - kReach, slot);
    give_nothing(columns, t - 1);
  }

  // Nothing more comes to this row.
  METAPOOL_DEVICE void give_back(const Columns& columns, T* to, int row_of_map, int slot) const {
    if (!lane.is_owner || !is_counted(row_of_map)) return;
    float found[kColumns] = {};
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      if constexpr (kAvg && kIsMix) found[v] = columns[v].averages.ready[0];
      if constexpr (Shared::kHasSums) collect(slot, v, found[v]);
    }
    store_row<kColumns, kReach, kAccess>(to, call.grad_x.stride_w, inside, found);
  }

  // Where the next rows are in memory.
  struct Cursor {
    const T *x, *grad_out;
    T* grad_x;
  };

  METAPOOL_DEVICE Cursor cursor_at(int t) const {
    return {this->x + t * call.x.stride_h, this->grad_out + (t - 1) * call.grad_out.stride_h,
            this->grad_x + (t - kRowsAhead<kColumns> - 2 - 2 * kReach) * call.grad_x.stride_h};
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

  // Takes what was loaded; what the lanes beside this one need goes where they find it.
  METAPOOL_DEVICE void take(const Rows& rows, Columns& columns, int slot) {
    if constexpr (kReadsInput) {
      float pixels[kColumns], to_show[kColumns];
      widen_row(rows.x, pixels);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        if constexpr (kKeyed) bottom = lowest(bottom, pixels[v]);
        const bool is_there = !kMax || OwnRow::is_inside(inside >> kReach, v);
        to_show[v] = is_there ? shown(pixels[v]) : shown_beyond();
      }
      if constexpr (Shared::kHasInput) share_row(Shared::kInput, slot, to_show);
      if constexpr (kAvg && kIsMix) {
#pragma unroll
        for (int v = 0; v < kColumns; ++v) push(columns[v].averages.pixels, pixels[v]);
      }
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
    if constexpr (kAvg && kIsMix) {
      float oldest[kColumns];
#pragma unroll
      for (int v = 0; v < kColumns; ++v) oldest[v] = columns[v].grads[0];
      share_row(Shared::kGrads, slot, oldest);
    }
  }

  METAPOOL_DEVICE void run() {
    Columns columns;
    const int begin = lane.row_begin > 2 * kReach ? lane.row_begin - 2 * kReach : 0;
    Cursor cursor = cursor_at(begin);
    Rows ahead[kRowsAhead<kColumns>];  // on their way
#pragma unroll
    for (int i = 0; i < kRowsAhead<kColumns>; ++i) {
      load(cursor, begin + i, ahead[i]);
      advance(cursor);
    }
    // One row more than there are, for the last that is given back.
    for (int base = begin; base <= lane.row_end + 2 * kReach; base += kSumRows) {
      if constexpr (kKeyed) bits_of_round = Key<T>::bits_of_round((base - begin) / kSumRows);
// The careful run is rare: its code is kept small.
#pragma unroll(kCareful ? 1 : kSumRows)
      for (int u = 0; u < kSumRows; ++u) {
        const int t = base + u;
        take(ahead[0], columns, u);
        __syncthreads();
#pragma unroll
        for (int i = 0; i + 1 < kRowsAhead<kColumns>; ++i) ahead[i] = ahead[i + 1];
        load(cursor, t + kRowsAhead<kColumns>, ahead[kRowsAhead<kColumns> - 1]);
        advance(cursor);
        if (call.grad_x.data != nullptr) {
          give_back(columns, cursor.grad_x, t - 1 - 2 * kReach, u - 1 - 2 * kReach + kSumRows);
          // What was read of this row, eight rows ago, was read before the barrier.
          if constexpr (Shared::kHasSums) clear_row(u);
        }
        keep_row(columns, t, u);
        give_rows(columns, t, u);
      }
      if (wants_terms()) hand_on_totals();
    }
  }

  METAPOOL_DEVICE double* found_of_all() const {
    return reinterpret_cast<double*>(shared + Shared::kFound);
  }

  // What this thread has found for a slot in all rounds.
  METAPOOL_DEVICE double& found(int slot) const {
    return found_of_all()[slot * kBackwardThreads + sums];
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
