// Forward: streams over the lines of x once. One or two rows of the output at a time, the windows
// are combined down the columns into a few rows; then along the row. What becomes of the pooled
// rows is the form: weighted and added up into one, stored side by side, or counted.
#pragma once

#include <new>

#include "maps.h"
#include "moments.h"
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
        moments_(plan, args, arena),
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
    if (args.other.data != nullptr) {
      other_rows_ = arena.take_row<Acc>(2 * plan.w_out * kLanes, 0);
    }
    outs_ = arena.take<Lines>(count_outs());
  }

  // moments: [lanes][num_pools][2], where they are wanted.
  void run(const Task& task, const Task& next, double* moments) {
    const Lines x(args_.x, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines values(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines out(args_.out, plan_, plan_.h_out, plan_.w_out, plan_.stride_w, task, next);
    for (int k = 0; k < count_outs(); ++k) {
      new (outs_ + k) Lines(plan_.form == Form::kStack ? out.beside(k * args_.out_stride_k) : out);
    }
    weights_.load(args_.weights, task, args_.constants);
    const Lines other(args_.other, plan_, plan_.h_out, plan_.w_out, 1, task, next);
    if (moments != nullptr) moments_.start(task);
    int64_t next_line = 0;
    for (int64_t i = task.row_begin; i < task.row_end;) {
      const int64_t center = i * plan_.stride_h;
      const int rows = plan_.stride_h == 1 && i + 1 < task.row_end ? 2 : 1;
      const int64_t first = first_valid(center, plan_.radius_h);
      const int64_t last = last_valid(center + rows - 1, plan_.radius_h, plan_.h);
      for (next_line = next_line > first ? next_line : first; next_line <= last; ++next_line) {
        load_line(x, values, next_line);
      }
      for (int r = 0; args_.other.data != nullptr && r < rows; ++r) {
        other.load(i + r, other_row(r));
        moments_.add_other(other_row(r));
      }
      rows == 2 ? compute<2>(i) : compute<1>(i);
      i += rows;
    }
    if (moments != nullptr) moments_.finish(task, moments);
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

  // The map that is mixed into, or one for each candidate.
  int count_outs() const { return plan_.form == Form::kStack ? plan_.pools.count : 1; }

  // Computes kRows rows of the output from row i on.
  template <int kRows>
  void compute(int64_t i) {
    const int64_t center = i * plan_.stride_h;
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
    nan ? pool<kRows, true>(i) : pool<kRows, false>(i);
  }

  // Hands the pooled rows on, one pooling after the other.
  template <int kRows, bool kNan>
  void pool(int64_t i) {
    const int64_t center = i * plan_.stride_h;
    const bool mixes = plan_.form == Form::kMix;
    const auto value = [&](int r, int64_t at)
                           METAPOOL_LAMBDA { return B::load(values_[center + r] + at); };
    if (mixes) {
      for_each_output<kRows>([&](int r, int64_t at) METAPOOL_LAMBDA {
        B acc = weights_.start(at);
        weights_.add(plan_.skip, at, value(r, at), acc);
        return acc;
      });
    } else {
      put<kRows>(plan_.none, i, [](int, int64_t) METAPOOL_LAMBDA { return B::zero(); });
      put<kRows>(plan_.skip, i, value);
    }
    for (const PoolItem& item : plan_.avg) {
      Acc* const* const rows = sums_.out[item.radius_h];
      with_radius<kUnroll>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
        const auto sums_at = [&](int r, int64_t at) METAPOOL_LAMBDA {
          B sums = row_windows<kLanes>(rows[r] + at, radius, Sum{});
          weights_.divide(item, center + r, at, sums);
          return sums;
        };
        if (!mixes) {
          return put<kRows>(item, i, [&](int r, int64_t at) METAPOOL_LAMBDA {
            B sums = sums_at(r, at);
            weights_.divide_by_area(item, sums);
            return sums;
          });
        }
        for_each_output<kRows>([&](int r, int64_t at) METAPOOL_LAMBDA {
          B acc = B::load(out_row(r) + at);
          weights_.add_average(item, at, sums_at(r, at), acc);
          return acc;
        });
      });
    }
    const auto take = [&](const PoolItem& item, const auto& maximum_at) METAPOOL_LAMBDA {
      if (!mixes) return put<kRows>(item, i, maximum_at);
      for_each_output<kRows>([&](int r, int64_t at) METAPOOL_LAMBDA {
        B acc = B::load(out_row(r) + at);
        weights_.add(item, at, maximum_at(r, at), acc);
        return acc;
      });
    };
    for (int m = 0; m < plan_.max.count; ++m) {
      const PoolItem& item = plan_.max.data[m];
      if constexpr (kValue) {
        take(item,
             [&](int r, int64_t at) METAPOOL_LAMBDA { return B::load(picked_[2 * m + r] + at); });
      } else {
        Acc* const* const rows = maxima_.out[item.radius_h];
        with_radius<kUnroll>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
          take(item, [&](int r, int64_t at) METAPOOL_LAMBDA {
            return row_windows<kLanes>(rows[r] + at, radius, Maximum<kNan>{});
          });
        });
      }
    }
    if (mixes) store_rows<kRows>(outs_[0], i);
  }

  METAPOOL_INLINE Acc* out_row(int r) const { return out_row_ + r * shape_.size; }
  Acc* other_row(int r) const { return other_rows_ + r * plan_.w_out * kLanes; }

  // Writes block_at(r, at) for each block of kRows rows into out_row_.
  template <int kRows, typename BlockAt>
  METAPOOL_INLINE void for_each_output(const BlockAt& block_at) {
    shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
      for (int r = 0; r < kRows; ++r) block_at(r, at).store(out_row(r) + at);
    });
  }

  // Counts a pooling's rows, or stores them for each of its candidates, without a detour where a
  // map takes them as they are.
  template <int kRows, typename PooledAt>
  METAPOOL_INLINE void put(const PoolItem& item, int64_t i, const PooledAt& pooled_at) {
    if (plan_.form == Form::kMoments) {
      if (item.index < 0) return;
      for_each_output<kRows>(pooled_at);
      for (int r = 0; r < kRows; ++r) {
        moments_.add_row(item, out_row(r) + shape_.cell(0), other_row(r), plan_.stride_w);
      }
      return;
    }
    for (int k = 0; k < plan_.pools.count; ++k) {
      if (plan_.pools.data[k] != item.index) continue;
      if (kLanes > 1 && plan_.stride_w == 1 && outs_[k].as_row(i) != nullptr) {
        shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
          const int64_t column = at / kLanes - shape_.left, slot = at % kLanes;
          for (int r = 0; r < kRows; ++r) {
            const B pooled = pooled_at(r, at);
            Acc* const to = outs_[k].as_row(i + r) + slot;
            for (int b = 0; b < B::kVectors && column + b < shape_.w; ++b) {
              METAPOOL_ISA::store(to + (column + b) * outs_[k].pixel_stride(), pooled.vector[b]);
            }
          }
        });
        continue;
      }
      for_each_output<kRows>(pooled_at);
      store_rows<kRows>(outs_[k], i);
    }
  }

  template <int kRows>
  METAPOOL_NOINLINE void store_rows(const Lines& out, int64_t i) const {
    for (int r = 0; r < kRows; ++r) out.store(i + r, out_row(r) + shape_.cell(0));
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<Acc, kLanes> shape_;
  Weights<Acc, kLanes> weights_;
  Moments<Acc, kLanes> moments_;
  Winners<Acc, kLanes, false, kValue> winners_;
  RowRing<Acc> values_, picked_;
  RowRing<bool> nans_;
  ColumnRows<Acc> sums_, maxima_;
  Acc *zeros_, *x_row_, *out_row_, *other_rows_ = nullptr;
  Lines* outs_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
