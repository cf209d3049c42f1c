// Forward: streams over the rows of x once. One or two rows of the output at a time, the windows
// are combined down the columns into a few rows that stay in the first cache; then along the row,
// and weighted and added up in registers.
#pragma once

#include "weights.h"
#include "windows.h"
#include "winners.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Forward {
  using B = Block<Acc, kLanes>;

  static constexpr Acc kLowest = -static_cast<Acc>(__builtin_inf());

 public:
  Forward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        winners_(plan, shape_, arena) {
    values_.allocate(arena, 2 * plan.radius_h + 2, shape_.size, Acc(0));
    nans_.allocate(arena, 2 * plan.radius_h + 2, 1, false);
    sums_.allocate(arena, 2 * plan.avg_heights.count, shape_.size, Acc(0));
    maxima_.allocate(arena, 2 * (kValue ? plan.max.count : plan.max_heights.count), shape_.size,
                     kValue ? Acc(0) : kLowest);
    zeros_ = arena.take_row<Acc>(shape_.size, 0);
    x_row_ = kValue ? arena.take_row<Acc>(shape_.size, static_cast<Acc>(__builtin_nan(""))) : nullptr;
    out_row_ = arena.take_row<Acc>(shape_.size, 0);
    staging_ = arena.take<Acc>(shape_.size);
  }

  void run(const Task& task) {
    const Planes<kLanes> x(args_.x, plan_, task), values(args_.values, plan_, task),
        out(args_.out, plan_, task);
    weights_.load(args_.weights, task);
    int64_t next_line = 0;
    const auto load_until = [&](int64_t first, int64_t last) {
      for (next_line = next_line > first ? next_line : first; next_line <= last; ++next_line) {
        load_line(x, values, next_line);
      }
    };
    for (int64_t i = task.row_begin; i < task.row_end;) {
      const int64_t center = i * plan_.stride_h;
      const int rows = plan_.stride_h == 1 && i + 1 < task.row_end ? 2 : 1;
      load_until(first_valid(center, plan_.radius_h),
                 last_valid(center + rows - 1, plan_.radius_h, plan_.h));
      rows == 2 ? compute<2>(center, out, i) : compute<1>(center, out, i);
      i += rows;
    }
  }

 private:
  void load_line(const Planes<kLanes>& x, const Planes<kLanes>& values, int64_t line) {
    Acc* const row = values_[line];
    load_row(shape_, values, plan_.dtype, args_.values.data, line, plan_.w, 1, row, staging_);
    if constexpr (kValue) {
      load_row(shape_, x, plan_.dtype, args_.x.data, line, plan_.w, 1, x_row_, staging_);
      winners_.load_line(line, x_row_, row);
    } else if (plan_.max.count > 0) {
      *nans_[line] = has_nan(shape_, row);
    }
  }

  // Computes kRows rows from output row i on and stores them.
  template <int kRows>
  void compute(int64_t center, const Planes<kLanes>& out, int64_t i) {
    if (plan_.avg.count > 0) sum_columns<kRows>(center);
    bool nan = false;
    if (plan_.max.count > 0) {
      if constexpr (kValue) {
        winners_.template find<kRows>(center, [&](int m, int r, int64_t at, const auto& winners) {
          for (int b = 0; b < B::kVectors; ++b) {
            store(maxima_[m * kRows + r] + at + b * B::kStep, winners[b].value);
          }
        });
      } else {
        nan = find_maxima<kRows>(center);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      nan ? mix<kRows, true>(center, r) : mix<kRows, false>(center, r);
      store_row(shape_, out, plan_.dtype, out_row_, plan_.w_out, plan_.stride_w, args_.out.data,
                i + r, staging_);
    }
  }

  template <int kRows>
  void sum_columns(int64_t center) {
    const Acc* lines[2 * kMaxRadius + 2];
    const int radius = plan_.radius_h;
    for (int d = -radius; d <= radius + kRows - 1; ++d) {
      const int64_t line = center + d;
      lines[radius + d] = line >= 0 && line < plan_.h ? values_[line] : zeros_;
    }
    Acc* out[2 * (kMaxRadius + 1)];
    for (int row = 0; row < kRows * plan_.avg_heights.count; ++row) out[row] = sums_[row];
    column_windows<kRows>(shape_, lines + radius, plan_.avg_heights, out, Sum{});
    // What blocks wrote beyond the last column are sums of padding: zeros.
  }

  // Returns whether there is NaN among the rows.
  template <int kRows>
  bool find_maxima(int64_t center) {
    const Acc* lines[2 * kMaxRadius + 2];
    const int radius = plan_.radius_h;
    bool nan = false;
    for (int d = -radius; d <= radius + kRows - 1; ++d) {
      const int64_t line = clamp_line(center + d, plan_.h);
      lines[radius + d] = values_[line];
      nan |= *nans_[line];
    }
    Acc* out[2 * (kMaxRadius + 1)];
    const int rows = kRows * plan_.max_heights.count;
    for (int row = 0; row < rows; ++row) out[row] = maxima_[row];
    if (nan) {
      column_windows<kRows>(shape_, lines + radius, plan_.max_heights, out, Maximum<true>{});
    } else {
      column_windows<kRows>(shape_, lines + radius, plan_.max_heights, out, Maximum<false>{});
    }
    for (int row = 0; row < rows; ++row) {
      fill_overrun(maxima_[row], shape_, kLowest);
    }
    return nan;
  }

  // Adds everything up in out_row_.
  template <int kRows, bool kNan>
  void mix(int64_t center, int r) {
    const Acc* const values = values_[center + r];
    shape_.for_each_block([&](int64_t at) {
      B acc;
      for (int b = 0; b < B::kVectors; ++b) {
        acc.vector[b] = lane_values<kLanes>(weights_.start(), at, b);
      }
      const auto add = [&](const Acc* weight, const B& pooled) {
        for (int b = 0; b < B::kVectors; ++b) {
          acc.vector[b] += lane_values<kLanes>(weight, at, b) * pooled.vector[b];
        }
      };
      for (const int k : plan_.skips) add(weights_.weight(k), B::load(values + at));
      for (const PoolItem& item : plan_.avg) {
        B pooled = row_windows<kLanes>(sums_[item.height * kRows + r] + at, item.radius_w, Sum{});
        weights_.divide(item, center + r, at, pooled);
        add(weights_.average(item), pooled);
      }
      for (int m = 0; m < plan_.max.count; ++m) {
        const PoolItem& item = plan_.max.data[m];
        if constexpr (kValue) {
          add(weights_.weight(item.index), B::load(maxima_[m * kRows + r] + at));
        } else {
          add(weights_.weight(item.index),
              row_windows<kLanes>(maxima_[item.height * kRows + r] + at, item.radius_w,
                                  Maximum<kNan>{}));
        }
      }
      acc.store(out_row_ + at);
    });
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<Acc, kLanes> shape_;
  Weights<Acc, kLanes> weights_;
  Winners<Acc, kLanes, false, kValue> winners_;
  RowRing<Acc> values_, sums_, maxima_;
  RowRing<bool> nans_;
  Acc *zeros_, *x_row_, *out_row_, *staging_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
