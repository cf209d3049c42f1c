// Forward: streams over the lines of x once. One or two rows of the output at a time, the windows
// are combined down the columns into a few rows; then along the row, weighted and added up.
#pragma once

#include "maps.h"
#include "weights.h"
#include "windows.h"
#include "winners.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Forward {
  using B = Block<Acc, kLanes>;
  using Lines = MapLines<Acc, kLanes>;

  static constexpr bool kUnroll = kLanes > 1 && sizeof(Acc) == sizeof(float) && !kValue;

  static constexpr Acc kLowest = -static_cast<Acc>(__builtin_inf());

 public:
  Forward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        winners_(plan, shape_, kValue, arena) {
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
    x_row_ =
        kValue ? arena.take_row<Acc>(shape_.size, static_cast<Acc>(__builtin_nan(""))) : nullptr;
    out_row_ = arena.take_row<Acc>(2 * shape_.size, 0);
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
        out.store(i + r, out_row_ + r * shape_.size + shape_.cell(0));
      }
      i += rows;
    }
  }

 private:
  void load_line(const Lines& x, const Lines& values, int64_t line) {
    Acc* const row = values_[line];
    values.load(line, row + shape_.cell(0));
    if constexpr (kValue) {
      x.load(line, x_row_ + shape_.cell(0));
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
      winners_.template find<kRows>(
          center, [&](int m, int r, int64_t at, const auto* winners) METAPOOL_LAMBDA {
            for (int v = 0; v < winners_.kGroup; ++v) {
              store(picked_[2 * m + r] + at + v * kVectorLanes<Acc>, winners[v].value);
            }
          });
    }
    if (plan_.avg.count > 0) {
      // What blocks write beyond the last column are sums of padding: zeros.
      column_windows<kRows>(shape_, inside + radius, sums_, Sum{});
    }
    if (!kValue && plan_.max.count > 0) {
      if (nan) {
        column_windows<kRows>(shape_, clamped + radius, maxima_, Maximum<true>{});
      } else {
        column_windows<kRows>(shape_, clamped + radius, maxima_, Maximum<false>{});
      }
      maxima_.fill_overruns(shape_, kLowest);
    }
    nan ? mix<kRows, true>(center) : mix<kRows, false>(center);
  }

  // Adds up out_row_, one pooling after the other.
  template <int kRows, bool kNan>
  void mix(int64_t center) {
    const auto for_each_output = [&](const auto& add_pooled) METAPOOL_LAMBDA {
      shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
        for (int r = 0; r < kRows; ++r) {
          B acc = B::load(out_row_ + r * shape_.size + at);
          add_pooled(r, at, acc);
          acc.store(out_row_ + r * shape_.size + at);
        }
      });
    };
    shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
      for (int r = 0; r < kRows; ++r) {
        B acc = weights_.start(at);
        weights_.add(plan_.skip, at, B::load(values_[center + r] + at), acc);
        acc.store(out_row_ + r * shape_.size + at);
      }
    });
    for (const PoolItem& item : plan_.avg) {
      Acc* const* const rows = sums_.out[item.radius_h];
      with_radius<kUnroll>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
        for_each_output([&](int r, int64_t at, B& acc) METAPOOL_LAMBDA {
          B sums = row_windows<kLanes>(rows[r] + at, radius, Sum{});
          weights_.divide(item, center + r, at, sums);
          weights_.add_average(item, at, sums, acc);
        });
      });
    }
    for (int m = 0; m < plan_.max.count; ++m) {
      const PoolItem& item = plan_.max.data[m];
      if constexpr (kValue) {
        for_each_output([&](int r, int64_t at, B& acc) METAPOOL_LAMBDA {
          weights_.add(item, at, B::load(picked_[2 * m + r] + at), acc);
        });
      } else {
        Acc* const* const rows = maxima_.out[item.radius_h];
        with_radius<kUnroll>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
          for_each_output([&](int r, int64_t at, B& acc) METAPOOL_LAMBDA {
            weights_.add(item, at, row_windows<kLanes>(rows[r] + at, radius, Maximum<kNan>{}), acc);
          });
        });
      }
    }
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<Acc, kLanes> shape_;
  Weights<Acc, kLanes> weights_;
  Winners<Acc, kLanes, false, kValue> winners_;
  RowRing<Acc> values_, picked_;
  RowRing<bool> nans_;
  ColumnRows<Acc> sums_, maxima_;
  Acc *zeros_, *x_row_, *out_row_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
