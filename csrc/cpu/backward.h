// Backward: streams over the rows of x and of grad_out once and pulls the gradient of each input
// row together, so nothing is scattered between tasks and the order of additions is fixed.
//
// Averages are their own adjoint but for the stride, which is undone first: grad_out is spread out
// with zeros between. The gradient of a weight is the product of grad_out with the pooled row,
// which is computed again: taken with the adjoint instead, as streamed_backward.h does where all is
// finite, NaN and infinities would spread. Maxima are found again, see winners.h: a gradient goes
// first to the line of the winner, then from wider to narrower windows as long as those have the
// same winner, then to its column.
#pragma once

#include "maps.h"
#include "moments.h"
#include "weights.h"
#include "windows.h"
#include "winners.h"

namespace metapool::cpu::METAPOOL_ISA {

template <typename Acc, int kLanes, bool kValue>
class Backward {
  using B = Block<Acc, kLanes>;
  using Lines = MapLines<Acc, kLanes>;

  static constexpr bool kUnroll = kLanes > 1 && sizeof(Acc) == sizeof(float) && !kValue;
  static constexpr int64_t kChainElements = kChain * kPackedLanes;  // of a row, for sixteen sums

 public:
  Backward(const Plan& plan, const BackwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        terms_(plan, arena),
        winners_(plan, shape_, plan.max.count > 0, arena),
        nested_(plan.count_include_pad && plan.form == Form::kMix),
        maps_(plan.form == Form::kMix ? 1 : plan.num_pools),
        exact_(plan.stride_w == 1 && shape_.padded_w == plan.w),
        chains_((plan.w * kLanes - 1) / kChainElements + 1),
        links_(chains_ > 1 ? kChain : (plan.w * kLanes - 1) / kPackedLanes + 1) {
    const Acc nan = static_cast<Acc>(__builtin_nan(""));
    const int64_t rows = 2 * plan.radius_h + 2, size = shape_.size;
    values_.allocate(arena, rows, size, nan);
    grads_.allocate(arena, rows * maps_, size, Acc(0));
    winner_lines_.allocate(arena, rows * plan.max.count, size, kNoWinner);
    sums_.allocate(arena, plan.avg, size, Acc(0));
    if (!nested_) scaled_.allocate(arena, 2 * plan.avg.count, size, Acc(0));
    routed_.allocate(arena, 2 * plan.max_widths.count, size, Acc(0));
    zeros_ = arena.take_row<Acc>(size, 0);
    x_row_ = kValue ? arena.take_row<Acc>(size, nan) : nullptr;
    other_row_ = maps_ < plan.pools.count ? arena.take_row<Acc>(size, 0) : nullptr;
    if (plan.form == Form::kMoments) shared_grads_ = arena.take_row<Acc>(2 * size, 0);
    grad_row_ = arena.take_row<Acc>(size, 0);
    outputs_ = arena.take_row<Acc>(size, 0);
    parts_ = arena.take_row<Acc>(2 * plan.num_pools * chains_ * kPackedLanes, 0);
    weight_sums_ = arena.take_row<double>(plan.num_pools * kPackedLanes, 0);
    if (arena.counts_only()) return;
    for (int64_t column = 0; column < plan.w; column += plan.stride_w) {
      fill_pixels(outputs_, shape_, column, column + 1, Acc(1));
    }
  }

  // share: [share_rows][num_pools], null where the gradient of the weights is not wanted.
  void run(const Task& task, const Task& next_task, Acc* share) {
    const Lines x(args_.x, plan_, plan_.h, plan_.w, 1, task, next_task);
    const Lines values(args_.values, plan_, plan_.h, plan_.w, 1, task, next_task);
    const Lines grad_out(args_.grad_out, plan_, plan_.h_out, plan_.w_out, plan_.stride_w, task,
                         next_task);
    const Lines grad_x(args_.grad_x, plan_, plan_.h, plan_.w, 1, task, next_task);
    task_ = &task;
    wants_weights_ = share != nullptr;
    weights_.load(args_.weights, task);
    if (plan_.form == Form::kMoments) terms_.load(args_, task);
    next_line_ = 0;
    int64_t next = output_from(task.row_begin - plan_.radius_h);
    for (int64_t line = task.row_begin; line < task.row_end;) {
      const int rows = line + 1 < task.row_end ? 2 : 1;
      while (next < plan_.h_out && next * plan_.stride_h < line + rows + plan_.radius_h) {
        // Pairs end where the pair of lines needs them to.
        const bool pair =
            plan_.stride_h == 1 && next % 2 == plan_.radius_h % 2 && next + 1 < plan_.h_out;
        pair ? load_outputs<2>(x, values, grad_out, next)
             : load_outputs<1>(x, values, grad_out, next);
        next += pair ? 2 : 1;
      }
      if (args_.grad_x.data != nullptr) {
        rows == 2 ? compute<2>(line, grad_x) : compute<1>(line, grad_x);
      }
      line += rows;
    }
    if (wants_weights_) finish_sums(share);
  }

 private:
  // The first output row whose centre is at or below input row `line`.
  int64_t output_from(int64_t line) const {
    return line <= 0 ? 0 : (line + plan_.stride_h - 1) / plan_.stride_h;
  }

  // Calls body(i) for each output row whose windows of this radius hold one of `rows` input rows
  // from `line` on.
  template <typename Body>
  METAPOOL_INLINE void for_each_output(int64_t line, int rows, int radius, Body body) const {
    for (int64_t i = output_from(line - radius);
         i < plan_.h_out && i * plan_.stride_h < line + rows + radius; ++i) {
      body(i);
    }
  }

  bool owns(int64_t center) const { return center >= task_->row_begin && center < task_->row_end; }

  void load_lines(const Lines& x, const Lines& values, int64_t first, int64_t last) {
    for (next_line_ = next_line_ > first ? next_line_ : first; next_line_ <= last; ++next_line_) {
      Acc* const row = values_[next_line_];
      values.load(next_line_, row + shape_.cell(0));
      if (plan_.max.count == 0) continue;
      if constexpr (kValue) {
        x.load(next_line_, x_row_ + shape_.cell(0));
      }
      winners_.load_line(next_line_, kValue ? x_row_ : row, row);
    }
  }

  // Loads row i of grad_out, number r of a pair, or of all maps that lie side by side: those of one
  // pooling are added up.
  void load_gradients(const Lines& grad_out, int64_t i, int r) {
    if (plan_.form == Form::kMix) return grad_out.load(i, grads_[i] + shape_.cell(0));
    if (plan_.form == Form::kMoments) {
      return grad_out.load(i, shared_grads(r) + shape_.cell(0));
    }
    for (int k = 0; k < plan_.pools.count; ++k) {
      if (plan_.pools.data[k] == plan_.none.index) continue;
      Acc* const row = grads_[i * maps_ + plan_.pools.data[k]];
      const bool first = is_first(plan_, k);
      grad_out.beside(k * args_.grad_out_stride_k)
          .load(i, (first ? row : other_row_) + shape_.cell(0));
      if (first) continue;
      shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
        for (int b = 0; b < B::kVectors; ++b) {
          const int64_t e = at + b * B::kStep;
          METAPOOL_ISA::store(row + e,
                              METAPOOL_ISA::load(row + e) + METAPOOL_ISA::load(other_row_ + e));
        }
      });
    }
  }

  // Row i of what is sent to a pooling.
  Acc* gradients_of(const PoolItem& item, int64_t i) const {
    return grads_[plan_.form == Form::kMix ? i : i * maps_ + item.index];
  }

  // Loads kRows rows of grad_out from row i on and finds the winners of their windows. A row is
  // loaded by every task that needs it, but counted for the weights only by the one that owns its
  // centre.
  template <int kRows>
  void load_outputs(const Lines& x, const Lines& values, const Lines& grad_out, int64_t i) {
    const int64_t center = i * plan_.stride_h;
    load_lines(x, values, first_valid(center, plan_.radius_h),
               last_valid(center + kRows - 1, plan_.radius_h, plan_.h));
    const bool sends = plan_.form == Form::kMoments;  // what depends on pooled rows
    bool counted[kRows];
    for (int r = 0; r < kRows; ++r) {
      load_gradients(grad_out, i + r, r);
      counted[r] = wants_weights_ && owns(center + r);
    }
    if (plan_.avg.count > 0 && (sends || counted[0] || counted[kRows - 1])) {
      sum_values<kRows>(center);
    }
    for (int r = 0; r < kRows; ++r) {
      if (sends) send_to_rows(center, r, i + r);
      if (counted[r]) add_pooled_rows(center, r, grads_[i + r]);
    }
    if (plan_.max.count > 0) {
      winners_.template find<kRows>(
          center, [&](int m, int r, int64_t at, const auto* winners) METAPOOL_LAMBDA {
            constexpr int kGroup = decltype(winners_)::kGroup, kStep = kVectorLanes<Acc>;
            Vec<Acc> pooled[kGroup];
            for (int v = 0; v < kGroup; ++v) {
              store_line(winner_lines(i + r, m) + at + v * kStep, at + v * kStep, winners[v].code);
              pooled[v] = winners[v].key;
              if constexpr (kValue) pooled[v] = winners[v].value;
            }
            if (sends) send<kGroup, kStep>(plan_.max.data[m], r, i + r, at, pooled);
            if (counted[r]) {
              add_products<kGroup, kStep>(plan_.max.data[m].index, r, at, pooled, grads_[i + r]);
            }
          });
    }
    if (!counted[0] && !counted[kRows - 1]) return;
    pending_ += links_;
    if (pending_ + links_ > kChain) flush();
  }

  METAPOOL_INLINE void store_line(int8_t* to, int64_t at, Code<Acc> code) const {
    if (plan_.stride_w != 1) {
      const Mask<Acc> is_output = load(outputs_ + at) != 0;
      code = is_output ? code : splat_code<Acc>(kNoWinner);
    }
    store_codes<Acc>(to, code);
  }

  // Zeros where a column is not the centre of an output: what is there may not even be a number.
  METAPOOL_INLINE Vec<Acc> of_outputs(Vec<Acc> pooled, int64_t at) const {
    if (exact_) return pooled;
    return load(outputs_ + at) != 0 ? pooled : Vec<Acc>{};
  }

  // Sums values down the columns.
  template <int kRows>
  void sum_values(int64_t center) {
    const Acc* lines[2 * kMaxRadius + 2];
    for (int d = -plan_.radius_h; d < plan_.radius_h + kRows; ++d) {
      const int64_t line = center + d;
      lines[plan_.radius_h + d] = line >= 0 && line < plan_.h ? values_[line] : zeros_;
    }
    sum_columns<kRows>(lines);
    sums_.fill_overruns(shape_, Acc(0));
  }

  template <int kRows>
  void sum_columns(const Acc* const* lines) {
    column_windows<kRows>(shape_, lines + plan_.radius_h, sums_, Sum{});
  }

  // Adds the products of a row of grad_out with all pooled rows but the maxima. Sums of averages
  // are not divided yet where padding counts, see flush().
  void add_pooled_rows(int64_t center, int r, const Acc* grads) {
    if (plan_.none.index >= 0) {
      shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
        const B zeros = B::zero();
        add_products<B::kVectors, B::kStep>(plan_.none.index, r, at, zeros.vector, grads);
      });
    }
    for_each_linear(center, r,
                    [&](const PoolItem& item, int64_t at, const B& pooled) METAPOOL_LAMBDA {
                      add_products<B::kVectors, B::kStep>(item.index, r, at, pooled.vector, grads);
                    });
  }

  // Calls body(item, at, block) for each block of the identity and of the sums of averages.
  template <typename Body>
  METAPOOL_INLINE void for_each_linear(int64_t center, int r, const Body& body) {
    if (plan_.skip.index >= 0) {
      const Acc* const values = values_[center + r];
      shape_.for_each_block([&](int64_t at)
                                METAPOOL_LAMBDA { body(plan_.skip, at, B::load(values + at)); });
    }
    for (const PoolItem& item : plan_.avg) {
      const Acc* const row = sums_.out[item.radius_h][r];
      with_radius<kUnroll>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
        shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
          B pooled = row_windows<kLanes>(row + at, radius, Sum{});
          weights_.divide(item, center + r, at, pooled);
          body(item, at, pooled);
        });
      });
    }
  }

  // Writes row i of what all poolings but the maxima are sent.
  void send_to_rows(int64_t center, int r, int64_t i) {
    for_each_linear(center, r, [&](const PoolItem& item, int64_t at, B pooled) METAPOOL_LAMBDA {
      if (item.index != plan_.skip.index) weights_.divide_by_area(item, pooled);
      send<B::kVectors, B::kStep>(item, r, i, at, pooled.vector);
    });
  }

  // Writes kCount vectors, kStep elements apart, of what a pooling is sent.
  template <int kCount, int kStep>
  METAPOOL_INLINE void send(const PoolItem& item, int r, int64_t i, int64_t at,
                            const Vec<Acc>* pooled) const {
    for (int v = 0; v < kCount; ++v) {
      const int64_t offset = at + v * kStep;
      const Vec<Acc> sent = terms_.sent(item, offset, load(shared_grads(r) + offset),
                                        pooled[v] + terms_.minus_shift(item, offset));
      store(gradients_of(item, i) + offset, of_outputs(sent, offset));
    }
  }

  // Adds the products of kCount vectors, kStep elements apart, to the sixteen sums of pooling k and
  // row r of a pair, always in the order of the columns.
  template <int kCount, int kStep>
  METAPOOL_INLINE void add_products(int k, int r, int64_t at, const Vec<Acc>* pooled,
                                    const Acc* grads) const {
    constexpr int kApart = kStep % kPackedLanes == 0 ? 1 : kPackedLanes / kVectorLanes<Acc>;
    constexpr int kSums = kApart < kCount ? kApart : kCount;
    Acc* const to = parts(k, r, (at - shape_.cell(0)) / kChainElements) + (at & (kPackedLanes - 1));
    Vec<Acc> sums[kSums];
    for (int s = 0; s < kSums; ++s) sums[s] = load(to + s * kVectorLanes<Acc>);
    for (int v = 0; v < kCount; ++v) {
      const int64_t offset = at + v * kStep;
      sums[v % kSums] += of_outputs(pooled[v], offset) * load(grads + offset);
    }
    for (int s = 0; s < kSums; ++s) store(to + s * kVectorLanes<Acc>, sums[s]);
  }

  // Moves the products on into the sums.
  void flush() {
    pending_ = 0;
    if (plan_.none.index >= 0) flush_one(plan_.none.index, 1);
    if (plan_.skip.index >= 0) flush_one(plan_.skip.index, 1);
    for (const PoolItem& item : plan_.max) flush_one(item.index, 1);
    for (const PoolItem& item : plan_.avg) {
      const int area = (2 * item.radius_h + 1) * (2 * item.radius_w + 1);
      flush_one(item.index, plan_.count_include_pad ? area : 1);
    }
  }

  void flush_one(int k, int area) {
    const double scale = 1.0 / area;
    double* const sums = weight_sums_ + k * kPackedLanes;
    for (int r = 0; r < 2; ++r) {
      for (int64_t chain = 0; chain < chains_; ++chain) {
        Acc* const part = parts(k, r, chain);
        for (int lane = 0; lane < kPackedLanes; ++lane) {
          sums[lane] += scale * static_cast<double>(part[lane]);
          part[lane] = 0;
        }
      }
    }
  }

  // Hands the sums over and begins new ones.
  void finish_sums(Acc* share) {
    if (pending_ > 0) flush();
    for (int k = 0; kLanes == 1 && k < plan_.num_pools; ++k) {
      double* const sums = weight_sums_ + k * kPackedLanes;
      for (int part = 1; part < kPackedLanes; ++part) sums[0] += sums[part];
    }
    write_share(plan_, *task_, weight_sums_, share);
    fill_row(weight_sums_, plan_.num_pools * kPackedLanes, 0.0);
  }

  // Computes kRows rows of grad_x from input row `line` on and stores them.
  template <int kRows>
  void compute(int64_t line, const Lines& grad_x) {
    if (plan_.avg.count > 0) sum_gradients<kRows>(line);
    if (plan_.max.count > 0) route_to_lines<kRows>(line);
    for (int r = 0; r < kRows; ++r) {
      collect(line, r);
      grad_x.store(line + r, grad_row_ + shape_.cell(0));
    }
  }

  // A pooling's row of gradients whose centre is on input row `line`; zeros where there is none.
  const Acc* gradients_at(const PoolItem& item, int64_t line) const {
    const bool is_output = item.index >= 0 && line >= 0 && line % plan_.stride_h == 0 &&
                           line / plan_.stride_h < plan_.h_out;
    return is_output ? gradients_of(item, line / plan_.stride_h) : zeros_;
  }

  // Sums grad_out down the columns; where padding does not count, each element divided by the
  // size of its window.
  template <int kRows>
  void sum_gradients(int64_t line) {
    if (nested_) {
      const Acc* lines[2 * kMaxRadius + 2];
      for (int d = -plan_.radius_h; d < plan_.radius_h + kRows; ++d) {
        lines[plan_.radius_h + d] = gradients_at(plan_.avg.data[0], line + d);
      }
      sum_columns<kRows>(lines);
      return;
    }
    for (int a = 0; a < plan_.avg.count; ++a) {
      const PoolItem& item = plan_.avg.data[a];
      for (int r = 0; r < kRows; ++r) {
        shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
          B sums = B::zero();
          for_each_output(line + r, 1, item.radius_h, [&](int64_t i) METAPOOL_LAMBDA {
            const int64_t count = divisor(i * plan_.stride_h, item.radius_h, plan_.h, false);
            const Acc rows = plan_.count_include_pad ? Acc(1) : static_cast<Acc>(count);
            const B grads = B::load(gradients_of(item, i) + at);
            for (int b = 0; b < B::kVectors; ++b) sums.vector[b] += grads.vector[b] / rows;
          });
          if (!plan_.count_include_pad) weights_.divide_columns(item, at, sums);
          sums.store(scaled_[2 * a + r] + at);
        });
      }
    }
  }

  // Sends the gradients of the maxima to the lines of their winners: routed_ receives, for each
  // width, what arrives at kRows lines from `line` on for winners that no narrower width has.
  template <int kRows>
  void route_to_lines(int64_t line) {
    int m = plan_.max.count - 1;
    for (int width = plan_.max_widths.count - 1; width >= 0; --width) {
      const bool widest = width + 1 == plan_.max_widths.count;
      Acc* routed[kRows];
      const Acc* wider[kRows] = {};
      const int8_t* codes[kRows] = {};
      for (int r = 0; r < kRows; ++r) {
        routed[r] = routed_[2 * width + r];
        if (widest) continue;
        wider[r] = routed_[2 * (width + 1) + r];
        codes[r] = winners_.columns(width + 1, line + r);
      }
      for (bool first = true; m >= 0 && plan_.max.data[m].radius_w == plan_.max_widths.data[width];
           --m) {
        shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
          B acc[kRows];
          for (int r = 0; r < kRows; ++r) {
            acc[r] = first ? B::zero() : B::load(routed[r] + at);
            if (first && !widest) add_where(acc[r], codes[r] + at, 0, B::load(wider[r] + at));
          }
          route_item<kRows>(line, m, at, acc);
          for (int r = 0; r < kRows; ++r) acc[r].store(routed[r] + at);
        });
        first = false;
      }
    }
  }

  template <int kRows>
  METAPOOL_INLINE void route_item(int64_t line, int m, int64_t at, B (&acc)[kRows]) {
    const PoolItem& item = plan_.max.data[m];
    for_each_output(line, kRows, item.radius_h, [&](int64_t i) METAPOOL_LAMBDA {
      const B grads = weights_.times(item, at, B::load(gradients_of(item, i) + at));
      const int8_t* const codes = winner_lines(i, m) + at;
      for (int r = 0; r < kRows; ++r) {
        const int64_t distance = i * plan_.stride_h - (line + r);
        if (distance < -item.radius_h || distance > item.radius_h) continue;
        add_where(acc[r], codes, line_code(line + r), grads);
      }
    });
  }

  METAPOOL_INLINE static void add_where(B& acc, const int8_t* codes, int code, const B& values) {
    for (int b = 0; b < B::kVectors; ++b) {
      acc.vector[b] += load_codes<Acc>(codes + b * B::kStep) == splat_code<Acc>(code)
                           ? values.vector[b]
                           : Vec<Acc>{};
    }
  }

  // Collects grad_row_ from everything that reaches it along its row, one pooling after the other.
  void collect(int64_t line, int r) {
    const auto add = [&](const auto& gradient_at) METAPOOL_LAMBDA {
      shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
        B acc = B::load(grad_row_ + at);
        gradient_at(at, acc);
        acc.store(grad_row_ + at);
      });
    };
    const Acc* const grads = gradients_at(plan_.skip, line + r);
    shape_.for_each_block([&](int64_t at) METAPOOL_LAMBDA {
      B acc = B::zero();
      weights_.add(plan_.skip, at, B::load(grads + at), acc);
      acc.store(grad_row_ + at);
    });
    for (int a = 0; a < plan_.avg.count; ++a) {
      const PoolItem& item = plan_.avg.data[a];
      const Acc* const row = nested_ ? sums_.out[item.radius_h][r] : scaled_[2 * a + r];
      with_radius<kUnroll>(item.radius_w, [&](auto radius) METAPOOL_LAMBDA {
        add([&](int64_t at, B& acc) METAPOOL_LAMBDA {
          weights_.add_average(item, at, row_windows<kLanes>(row + at, radius, Sum{}), acc);
        });
      });
    }
    for (int width = 0, reached = -1; width < plan_.max_widths.count; ++width) {
      const int8_t* const codes = winners_.columns(width, line + r);
      const Acc* const routed = routed_[2 * width + r];
      add([&](int64_t at, B& acc) METAPOOL_LAMBDA {
        if (width == 0) add_where(acc, codes + at, 0, B::load(routed + at));
        for (int d = reached < 0 ? 1 : reached + 1; d <= plan_.max_widths.data[width]; ++d) {
          const int64_t shift = d * kLanes;
          add_where(acc, codes + at + shift, -d, B::load(routed + at + shift));
          add_where(acc, codes + at - shift, d, B::load(routed + at - shift));
        }
      });
      reached = plan_.max_widths.data[width];
    }
  }

  // In Form::kMoments, a row of grad_out, number r of a pair.
  Acc* shared_grads(int r) const { return shared_grads_ + r * shape_.size; }

  // For maximum `m` of output row i, the codes of the winners' lines.
  int8_t* winner_lines(int64_t i, int m) const { return winner_lines_[i * plan_.max.count + m]; }

  // Sixteen sums of products for pooling k, row r of a pair and a piece of the row. The rows are
  // kept apart: the maxima of both are found together, vector by vector.
  Acc* parts(int k, int r, int64_t chain) const {
    return parts_ + ((2 * k + r) * chains_ + chain) * kPackedLanes;
  }

  const Plan& plan_;
  const BackwardArgs& args_;
  const RowShape<Acc, kLanes> shape_;
  Weights<Acc, kLanes> weights_;
  FieldTerms<Acc> terms_;
  Winners<Acc, kLanes, true, kValue> winners_;
  const bool nested_;   // windows of all averages are summed together, as they differ in size alone
  const int64_t maps_;  // of gradients: one, or one for each pooling
  const bool exact_;    // blocks hold no columns but those of outputs
  const int64_t chains_, links_;  // of a row's products with another, and how long each gets
  RowRing<Acc> values_, grads_, scaled_, routed_;
  ColumnRows<Acc> sums_;
  RowRing<int8_t> winner_lines_;
  Acc *zeros_, *x_row_, *other_row_, *grad_row_, *outputs_, *parts_, *shared_grads_ = nullptr;
  double* weight_sums_;  // [num_pools][16]
  const Task* task_ = nullptr;
  bool wants_weights_ = false;
  int64_t next_line_ = 0, pending_ = 0;
};

}  // namespace metapool::cpu::METAPOOL_ISA
