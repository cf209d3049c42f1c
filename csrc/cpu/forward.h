// Forward: streams over the rows of x once. For each output row the averages are summed down the
// columns first and then along the row, the maxima along the rows first and then down.
#pragma once

#include "averages.h"
#include "maxima.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Forward {
 public:
  Forward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        in_(plan),
        averages_(plan, arena),
        maxima_(plan, false, kValue, 2 * plan.radius_h + 1, arena) {
    values_.allocate(arena, 2 * plan.radius_h + 1, in_.size());
    x_row_ = kValue ? arena.take<Acc>(in_.size()) : nullptr;
    zeros_ = arena.take<Acc>(plan.nones.count > 0 ? in_.out_size() : 0);
    out_row_ = arena.take<Acc>(in_.out_size());
    max_key_ = arena.take<Acc>(in_.out_size());
    max_value_ = kValue ? arena.take<Acc>(in_.out_size()) : nullptr;
    weights_ = arena.take<Acc>(static_cast<int64_t>(plan.num_candidates) * kLanes);
    scaled_weights_ = arena.take<Acc>(kLanes);
  }

  void run(const Task& task) {
    const Planes<kLanes> x(args_.x, plan_, task), values(args_.values, plan_, task),
        out(args_.out, plan_, task);
    load_weights<kLanes>(plan_, args_.weights, task, weights_);
    const auto out_shape = RowShape<kLanes>::plain(plan_.w_out);
    int64_t next = first_valid(task.row_begin * plan_.stride_h, plan_.radius_h);
    for (int64_t i = task.row_begin; i < task.row_end; ++i) {
      const int64_t center = i * plan_.stride_h;
      for (const int64_t last = last_valid(center, plan_.radius_h, plan_.h); next <= last; ++next) {
        load(x, values, next);
      }
      compute(center);
      store_row(out_shape, out, plan_.dtype, out_row_, args_.out.data, i);
    }
  }

 private:
  void load(const Planes<kLanes>& x, const Planes<kLanes>& values, int64_t line) {
    Acc* const row = values_[line];
    load_row(in_, values, plan_.dtype, args_.values.data, line, row);
    if (plan_.max.count == 0) return;
    replicate_edges(in_, row);
    if constexpr (kValue) {
      load_row(in_, x, plan_.dtype, args_.x.data, line, x_row_);
      replicate_edges(in_, x_row_);
    }
    maxima_.template load<false, kValue>(in_, line, kValue ? x_row_ : row, row);
  }

  void compute(int64_t center) {
    const int64_t size = in_.out_size();
    zero_row(out_row_, size);
    for (const int k : plan_.nones) {
      add_weighted<kLanes>(out_row_, weight(k), zeros_, size);  // NaN where the weight is
    }
    for (const int k : plan_.skips) {
      add_weighted<kLanes>(out_row_, weight(k), values_[center] + in_.tap(0), size);
    }
    if (plan_.avg.count > 0) add_averages(center);
    if (plan_.max.count > 0) add_maxima(center);
  }

  void add_averages(int64_t center) {
    averages_.for_each(values_, center, [&](const PoolItem& item, const Acc* sums, Acc area) {
      for (int lane = 0; lane < kLanes; ++lane) {
        scaled_weights_[lane] = weight(item.index)[lane] / area;
      }
      add_weighted<kLanes>(out_row_, scaled_weights_, sums, in_.out_size());
    });
  }

  void add_maxima(int64_t center) {
    const Maxima<Acc> acc{max_key_, nullptr, max_value_};
    int width_index = -1, reached_w = -1, reached_h = -1;
    for (const PoolItem& item : plan_.max) {
      if (item.radius_w != reached_w) {
        ++width_index;
        reached_w = item.radius_w;
        reached_h = -1;
      }
      maxima_.template extend<false, kValue>(plan_, acc, width_index, center, reached_h,
                                             item.radius_h);
      reached_h = item.radius_h;
      add_weighted<kLanes>(out_row_, weight(item.index), kValue ? acc.value : acc.key,
                           in_.out_size());
    }
  }

  const Acc* weight(int k) const { return weights_ + static_cast<int64_t>(k) * kLanes; }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<kLanes> in_;
  Averages<Acc, kLanes> averages_;
  HorizontalMaxima<Acc, kLanes> maxima_;
  RowRing<Acc> values_;
  Acc *x_row_, *zeros_, *out_row_, *max_key_, *max_value_, *weights_, *scaled_weights_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
