// Forward: streams over the lines of x once. One or two rows of the output at a time, the windows
// are combined down the columns into a few rows; then along the row, weighted and added up.
#pragma once

#include "weights.h"
#include "windows.h"
#include "winners.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Forward {
  using B = Block<Acc, kLanes>;
  using Lines = MapLines<Acc, kLanes>;

  static constexpr Acc kLowest = -static_cast<Acc>(__builtin_inf());
  // Poolings of one kind: their windows down the columns, in a row for each radius and output row.
  struct Columns {
    ColumnRows<Acc> rows;

    void allocate(Arena& arena, Span<PoolItem> items, int64_t size, Acc padding) {
      for (const PoolItem& item : items) {
        rows.radius = item.radius_h > rows.radius ? item.radius_h : rows.radius;
        for (Acc*& row : rows.out[item.radius_h]) {
          if (row == nullptr) row = arena.take_row<Acc>(size, padding);
        }
      }
    }
  };

 public:
  Forward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        winners_(plan, shape_, arena) {
    const int64_t lines = 2 * plan.radius_h + 2;
    values_.allocate(arena, lines, shape_.size, Acc(0));
    nans_.allocate(arena, lines, 1, false);
    sums_.allocate(arena, plan.avg, shape_.size, 0);
    if (kValue) {
      picked_.allocate(arena, 2 * plan.max.count, shape_.size, Acc(0));
    } else {
      maxima_.allocate(arena, plan.max, shape_.size, kLowest);
    }
    zeros_ = arena.take_row<Acc>(shape_.size, 0);
    x_row_ = kValue ? arena.take_row<Acc>(shape_.size, static_cast<Acc>(__builtin_nan("")))
                    : nullptr;
    out_row_ = arena.take_row<Acc>(2 * shape_.size, 0);
    staging_ = arena.take<Acc>(shape_.size);
  }

  void run(const Task& task, const Task& next) {
    const Lines x(args_.x, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines values(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines out(args_.out, plan_, plan_.h_out, plan_.w_out, plan_.stride_w, task, next);
    weights_.load(args_.weights, task);
    int64_t next_line = 0;
    for (int64_t i = task.row_begin; i < task.row_end;) {
      const int64_t center = i * plan_.stride_h;
      const int rows = plan_.stride_h == 1 && i + 1 < task.row_end ? 2 : 1;
      const int64_t first = first_valid(center, plan_.radius_h);
      const int64_t last = last_valid(center + rows - 1, plan_.radius_h, plan_.h);
      for (next_line = next_line > first ? next_line : first; next_line <= last; ++next_line) {
        load_line(x, values, next_line);
      }
      rows == 2 ? compute<2>(center) : compute<1>(center);
      for (int r = 0; r < rows; ++r) {
        out.store(shape_, i + r, out_row_ + r * shape_.size, staging_);
      }
      i += rows;
    }
  }

 private:
  void load_line(const Lines& x, const Lines& values, int64_t line) {
    Acc* const row = values_[line];
    values.load(shape_, line, row, staging_);
    if constexpr (kValue) {
      x.load(shape_, line, x_row_, staging_);
      winners_.load_line(line, x_row_, row);
    } else if (plan_.max.count > 0) {
      *nans_[line] = has_nan(shape_, row);
    }
  }

  // Computes kRows rows of the output around input row `center` in out_row_.
  template <int kRows>
  void compute(int64_t center) {
    const Acc* inside[2 * kMaxRadius + 2];   // with zeros beyond the map
    const Acc* clamped[2 * kMaxRadius + 2];  // with the map's edge beyond the map
    bool nan = false;
    const int radius = plan_.radius_h;
    for (int d = -radius; d < radius + kRows; ++d) {
      const int64_t line = center + d, valid = clamp_line(line, plan_.h);
      clamped[radius + d] = values_[valid];
      inside[radius + d] = line == valid ? values_[valid] : zeros_;
      nan |= *nans_[valid];
    }
    if constexpr (kValue) {
      winners_.template find<kRows>(center, [&](int m, int r, int64_t at, const auto& winners) METAPOOL_LAMBDA {
        for (int b = 0; b < B::kVectors; ++b) {
          store(picked_[2 * m + r] + at + b * B::kStep, winners[b].value);
        }
      });
    }
    if (plan_.avg.count > 0) {
      // What blocks write beyond the last column are sums of padding: zeros.
      column_windows<kRows>(shape_, inside + radius, sums_.rows, Sum{});
    }
    if (!kValue && plan_.max.count > 0) {
      if (nan) {
        column_windows<kRows>(shape_, clamped + radius, maxima_.rows, Maximum<true>{});
      } else {
        column_windows<kRows>(shape_, clamped + radius, maxima_.rows, Maximum<false>{});
      }
      for (int d = 0; d <= maxima_.rows.radius; ++d) {
        for (Acc* const row : maxima_.rows.out[d]) {
          if (row != nullptr) fill_overrun(row, shape_, kLowest);
        }
      }
    }
    nan ? mix<kRows, true>(center) : mix<kRows, false>(center);
  }

  // Adds up out_row_, one pooling after the other.
  template <int kRows, bool kNan>
  void mix(int64_t center) {
    const auto add = [&](const Acc* weight, const auto& pooled_at) METAPOOL_LAMBDA {
      shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
        for (int r = 0; r < kRows; ++r) {
          Acc* const out = out_row_ + r * shape_.size + at;
          B acc = B::load(out);
          const B pooled = pooled_at(r, at);
          for (int b = 0; b < B::kVectors; ++b) {
            acc.vector[b] += lane_values<kLanes>(weight, at, b) * pooled.vector[b];
          }
          acc.store(out);
        }
      });
    };
    start<kRows>(center);
    for (const PoolItem& item : plan_.avg) {
      Acc* const* const rows = sums_.rows.out[item.radius_h];
      with_radius<Acc>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
        add(weights_.average(item), [&](int r, int64_t at) METAPOOL_LAMBDA {
          B pooled = row_windows<kLanes>(rows[r] + at, radius, Sum{});
          weights_.divide(item, center + r, at, pooled);
          return pooled;
        });
      });
    }
    for (int m = 0; m < plan_.max.count; ++m) {
      const PoolItem& item = plan_.max.data[m];
      const Acc* const weight = weights_.weight(item.index);
      if constexpr (kValue) {
        add(weight, [&](int r, int64_t at) METAPOOL_LAMBDA {
          return B::load(picked_[2 * m + r] + at);
        });
      } else {
        Acc* const* const rows = maxima_.rows.out[item.radius_h];
        with_radius<Acc>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
          add(weight, [&](int r, int64_t at) METAPOOL_LAMBDA {
            return row_windows<kLanes>(rows[r] + at, radius, Maximum<kNan>{});
          });
        });
      }
    }
  }

  // Begins with what needs no windows.
  template <int kRows>
  void start(int64_t center) {
    shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
      for (int r = 0; r < kRows; ++r) {
        const Acc* const values = values_[center + r] + at;
        B acc;
        for (int b = 0; b < B::kVectors; ++b) {
          acc.vector[b] = lane_values<kLanes>(weights_.start(), at, b);
          if (plan_.skip < 0) continue;
          acc.vector[b] += lane_values<kLanes>(weights_.weight(plan_.skip), at, b) *
                           load(values + b * B::kStep);
        }
        acc.store(out_row_ + r * shape_.size + at);
      }
    });
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<Acc, kLanes> shape_;
  Weights<Acc, kLanes> weights_;
  Winners<Acc, kLanes, false, kValue> winners_;
  RowRing<Acc> values_, picked_;
  RowRing<bool> nans_;
  Columns sums_, maxima_;
  Acc *zeros_, *x_row_, *out_row_, *staging_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
