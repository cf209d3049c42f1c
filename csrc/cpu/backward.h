// Backward: streams over the rows of x and of grad_out once and pulls the gradient of each input
// row together, so nothing is scattered between tasks and the order of additions is fixed.
//
// Averages are their own adjoint but for the stride: grad_out is summed down the columns, then
// spread along the row. The gradient of a weight is the product of grad_out with the pooled row,
// which is computed again: taken with the adjoint instead, NaN and infinities would spread.
// Maxima are selected again, with two small codes for the position of each winner: the row in its
// window and, in that row, the column. A gradient goes first to the row, then to the column.
#pragma once

#include "averages.h"
#include "maxima.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Backward {
 public:
  Backward(const Plan& plan, const BackwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        in_(plan),
        out_(RowShape<kLanes>::plain(plan.w_out)),
        averages_(plan, arena),
        maxima_(plan, true, kValue, 2 * plan.radius_h + 1, arena) {
    const int64_t grad_rows = 2 * plan.radius_h / plan.stride_h + 1;
    values_.allocate(arena, 2 * plan.radius_h + 1, in_.size());
    grads_.allocate(arena, grad_rows, out_.size());
    winner_rows_.allocate(arena, grad_rows * plan.max.count, out_.size());
    x_row_ = kValue ? arena.take<Acc>(in_.size()) : nullptr;
    column_sums_ = arena.take<Acc>(out_.size());
    scaled_ = arena.take<Acc>(out_.size());
    scales_ = arena.take<Acc>(in_.w_out);
    spread_ = arena.take<Acc>(in_.size());
    routed_ = arena.take<Acc>(out_.size());
    grad_row_ = arena.take<Acc>(in_.size());
    max_key_ = arena.take<Acc>(out_.size());
    max_value_ = kValue ? arena.take<Acc>(out_.size()) : nullptr;
    weights_ = arena.take<Acc>(static_cast<int64_t>(plan.num_candidates) * kLanes);
    scaled_weights_ = arena.take<Acc>(kLanes);
  }

  void run(const Task& task, double* weight_sums) {
    const Planes<kLanes> x(args_.x, plan_, task), values(args_.values, plan_, task),
        grad_out(args_.grad_out, plan_, task), grad_x(args_.grad_x, plan_, task);
    task_ = &task;
    weight_sums_ = weight_sums;
    load_weights<kLanes>(plan_, args_.weights, task, weights_);
    next_output_ = output_from(task.row_begin - plan_.radius_h);
    next_line_ = first_valid(next_output_ * plan_.stride_h, plan_.radius_h);
    if (next_line_ > task.row_begin) next_line_ = task.row_begin;
    for (int64_t line = task.row_begin; line < task.row_end; ++line) {
      while (next_output_ < plan_.h_out && next_output_ * plan_.stride_h <= line + plan_.radius_h) {
        load_until(x, values, last_valid(next_output_ * plan_.stride_h, plan_.radius_h, plan_.h));
        load_output(grad_out, next_output_++);
      }
      load_until(x, values, line);
      if (args_.grad_x.data == nullptr) continue;
      compute(line);
      store_row(in_, grad_x, plan_.dtype, grad_row_, args_.grad_x.data, line);
    }
  }

 private:
  // The first output row whose centre is at or below input row `line`.
  int64_t output_from(int64_t line) const {
    return line <= 0 ? 0 : (line + plan_.stride_h - 1) / plan_.stride_h;
  }

  void load_until(const Planes<kLanes>& x, const Planes<kLanes>& values, int64_t last) {
    for (; next_line_ <= last; ++next_line_) {
      Acc* const row = values_[next_line_];
      load_row(in_, values, plan_.dtype, args_.values.data, next_line_, row);
      if (plan_.max.count == 0) continue;
      replicate_edges(in_, row);
      if constexpr (kValue) {
        load_row(in_, x, plan_.dtype, args_.x.data, next_line_, x_row_);
        replicate_edges(in_, x_row_);
      }
      maxima_.template load<true, kValue>(in_, next_line_, kValue ? x_row_ : row, row);
    }
  }

  // Loads a row of grad_out and selects the maxima of its windows. Each output row is selected by
  // every task that needs it, but counted for the weights only by the one that owns its centre.
  void load_output(const Planes<kLanes>& grad_out, int64_t i) {
    const int64_t center = i * plan_.stride_h;
    const bool owned = center >= task_->row_begin && center < task_->row_end;
    Acc* const grads = grads_[i];
    load_row(out_, grad_out, plan_.dtype, args_.grad_out.data, i, grads);
    if (owned && weight_sums_ != nullptr) {
      averages_.for_each(values_, center, [&](const PoolItem& item, const Acc* sums, Acc area) {
        add_dot<kLanes>(weight_sum(item.index), 1.0 / static_cast<double>(area), sums, grads,
                        out_.size());
      });
      for (const int k : plan_.nones) {
        zero_row(routed_, out_.size());
        add_dot<kLanes>(weight_sum(k), 1.0, routed_, grads, out_.size());
      }
      for (const int k : plan_.skips) {
        add_dot<kLanes>(weight_sum(k), 1.0, values_[center] + in_.tap(0), grads, out_.size());
      }
    }
    int width_index = -1, reached_w = -1, reached_h = -1;
    for (int m = 0; m < plan_.max.count; ++m) {
      const PoolItem& item = plan_.max.data[m];
      const Maxima<Acc> acc{max_key_, winner_rows(i, m), max_value_};
      if (item.radius_w != reached_w) {
        ++width_index;
        reached_w = item.radius_w;
        reached_h = -1;
      } else {
        copy_row(acc.code, winner_rows(i, m - 1), out_.size());
      }
      maxima_.template extend<true, kValue>(plan_, acc, width_index, center, reached_h,
                                            item.radius_h);
      reached_h = item.radius_h;
      if (owned && weight_sums_ != nullptr) {
        add_dot<kLanes>(weight_sum(item.index), 1.0, kValue ? acc.value : acc.key, grads,
                        out_.size());
      }
    }
  }

  void compute(int64_t line) {
    zero_row(grad_row_, in_.size());
    for (const int k : plan_.skips) {
      add_weighted<kLanes>(grad_row_ + in_.cell(0), weight(k), grads_[line], out_.size());
    }
    if (plan_.max.count > 0) add_maxima(line);
    if (plan_.avg.count > 0) add_averages(line);
  }

  // Calls body(i) for each output row whose window of this radius holds input row `line` and
  // that of `reached` does not.
  template <typename Body>
  void for_each_output(int64_t line, int reached, int radius, Body body) const {
    for (int64_t i = output_from(line - radius);
         i < plan_.h_out && i * plan_.stride_h <= line + radius; ++i) {
      const int64_t distance = i * plan_.stride_h - line;
      if (distance < -reached || distance > reached) body(i);
    }
  }

  void add_averages(int64_t line) {
    int reached_h = -1, reached_w = -1;
    for (const PoolItem& item : plan_.avg) {
      if (item.radius_h != reached_h) {
        sum_columns(line, reached_h, item.radius_h);
        reached_h = item.radius_h;
        reached_w = -1;
      }
      if (plan_.count_include_pad) {
        spread(column_sums_, reached_w, item.radius_w);
        const int64_t area = (2 * item.radius_h + 1) * (2 * item.radius_w + 1);
        add_average(item.index, static_cast<Acc>(area));
      } else {
        for (int64_t j = 0; j < in_.w_out; ++j) {
          scales_[j] =
              Acc(1) / static_cast<Acc>(divisor(j * in_.step, item.radius_w, in_.w, false));
        }
        scale_pixels<kLanes>(scaled_, scales_, column_sums_, in_.w_out);
        spread(scaled_, -1, item.radius_w);
        add_average(item.index, Acc(1));
      }
      reached_w = item.radius_w;
    }
  }

  // Sums grad_out over the output rows around `line`. With count_include_pad the sums of a
  // smaller window are a part of them; without, each output row has its own divisor.
  void sum_columns(int64_t line, int reached, int radius) {
    const int64_t size = out_.size();
    if (!plan_.count_include_pad) reached = -1;
    if (reached < 0) zero_row(column_sums_, size);
    for_each_output(line, reached, radius, [&](int64_t i) {
      if (plan_.count_include_pad) {
        add_row(column_sums_, grads_[i], size);
      } else {
        const int64_t rows = divisor(i * plan_.stride_h, radius, plan_.h, false);
        add_multiple(column_sums_, Acc(1) / static_cast<Acc>(rows), grads_[i], size);
      }
    });
  }

  // Adds the row to every tap of its windows, from `reached` to `radius` columns each way.
  void spread(const Acc* row, int reached, int radius) {
    const int64_t size = out_.size();
    if (reached < 0) {
      zero_row(spread_, in_.size());
      add_row(spread_ + in_.tap(0), row, size);
    }
    for (int d = reached < 0 ? 1 : reached + 1; d <= radius; ++d) {
      add_row(spread_ + in_.tap(-d), row, size);
      add_row(spread_ + in_.tap(d), row, size);
    }
  }

  void add_average(int k, Acc area) {
    for (int lane = 0; lane < kLanes; ++lane) scaled_weights_[lane] = weight(k)[lane] / area;
    in_.for_each_run([&](int64_t offset, int64_t count) {
      add_weighted<kLanes>(grad_row_ + offset, scaled_weights_, spread_ + offset, count);
    });
  }

  void add_maxima(int64_t line) {
    const int64_t size = out_.size();
    for (int m = 0, width_index = 0; m < plan_.max.count; ++width_index) {
      const int radius_w = plan_.max.data[m].radius_w;
      zero_row(routed_, size);
      for (; m < plan_.max.count && plan_.max.data[m].radius_w == radius_w; ++m) {
        const PoolItem& item = plan_.max.data[m];
        for_each_output(line, -1, item.radius_h, [&](int64_t i) {
          add_weighted_where<kLanes>(routed_, weight(item.index), winner_rows(i, m),
                                     static_cast<Acc>(line - i * plan_.stride_h), grads_[i], size);
        });
      }
      const Acc* const columns = maxima_.codes(width_index, line);
      for (int d = -radius_w; d <= radius_w; ++d) {
        add_where(grad_row_ + in_.tap(d), columns, static_cast<Acc>(d), routed_, size);
      }
    }
    fold_edges(in_, grad_row_);
  }

  // For maximum `m` of output row i, the winners' rows relative to the windows' centre.
  Acc* winner_rows(int64_t i, int m) const { return winner_rows_[i * plan_.max.count + m]; }
  const Acc* weight(int k) const { return weights_ + static_cast<int64_t>(k) * kLanes; }
  double* weight_sum(int k) const { return weight_sums_ + static_cast<int64_t>(k) * kLanes; }

  const Plan& plan_;
  const BackwardArgs& args_;
  const RowShape<kLanes> in_, out_;
  Averages<Acc, kLanes> averages_;
  HorizontalMaxima<Acc, kLanes> maxima_;
  RowRing<Acc> values_, grads_, winner_rows_;
  Acc *x_row_, *column_sums_, *scaled_, *scales_, *spread_, *routed_, *grad_row_, *max_key_,
      *max_value_, *weights_, *scaled_weights_;
  const Task* task_ = nullptr;
  double* weight_sums_ = nullptr;  // [K][kLanes], null where they are not wanted
  int64_t next_line_ = 0, next_output_ = 0;
};

}  // namespace metapool::cpu::METAPOOL_ISA
