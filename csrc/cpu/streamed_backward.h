// Backward for square windows at stride 1 on packed rows, see streams.h: averages here, maxima in
// tree_maxima.h and scattered_maxima.h. A chunk of lines at a time, so that all of it stays in the
// second cache or nearly so. Products for the weights belong to the task that owns the row of
// grad_out, as in backward.h: strips of a plane may be left to either.
#pragma once

#include <new>

#include "moments.h"
#include "pooled_rows.h"
#include "scattered_maxima.h"
#include "tree_maxima.h"

namespace metapool::cpu::METAPOOL_ISA {

class StreamedBackward {
  using Lines = MapLines<float, kPackedLanes>;

  static constexpr int64_t kChunkBytes = 640 * 1024, kSmallestRing = 16;
  static constexpr int64_t kLargestRing = TreeMaxima::kMostSteps;
  static constexpr int kPendingRows = 8;  // whose parts are added up before they are handed on

 public:
  StreamedBackward(const Plan& plan, const BackwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        scales_(plan, arena),
        terms_(plan, arena),
        rows_(plan, scales_, arena),
        averages_(streamed_set(plan.avg, kStreamedRadius)),
        own_maps_(plan.form == Form::kStack ? plan.num_pools : 0),
        wants_x_(args.grad_x.data != nullptr),
        row_size_(plan.w * kPackedLanes),
        chunk_(lines_at_a_time(plan) - 3 * plan.radius_h),
        x_(plan, chunk_ + 3 * plan.radius_h, arena),
        grads_(plan, plan.form == Form::kStack ? 1 : chunk_ + 3 * plan.radius_h, arena),
        own_grads_(arena.take<DenseLines>(own_maps_)),
        trees_(plan, streamed_set(plan.max, kMaxRadius) & ~ScatteredMaxima::radii_of(plan),
               chunk_ + 2 * plan.radius_h, wants_x_, arena),
        scattered_(plan, chunk_ + 2 * plan.radius_h, wants_x_, arena) {
    for (int k = 0; k < own_maps_; ++k) {
      const DenseLines grads(plan, chunk_ + 3 * plan.radius_h, arena);
      if (!arena.counts_only()) new (own_grads_ + k) DenseLines(grads);
    }
    for (const PoolItem& item : plan.avg) {
      if (plan.form != Form::kMoments) continue;
      fields_[item.radius_w].allocate(arena, 2 * plan.radius_h + 1, row_size_, 0.0f);
    }
    zeros_ = arena.take_row<float>(row_size_, 0);
    unused_ = arena.take_row<float>(row_size_, 0);
    grad_x_ = arena.take_row<float>((x_.whole() ? plan.h : 1) * row_size_, 0);
    parts_ = arena.take_row<float>(plan.num_pools * kPackedLanes, 0);
    products_ = arena.take_row<double>(plan.num_pools * kPackedLanes, 0);
    if (!arena.counts_only()) prepare_row();
  }

  // A row points to what lies beside it.
  StreamedBackward(const StreamedBackward&) = delete;

  // share: [share_rows][num_pools], null where the gradient of the weights is not wanted. False
  // where anything is not finite: then nothing can be said of the results.
  bool run(const Task& task, const Task& next, float* share) {
    const Lines x(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines grad_out(args_.grad_out, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines grad_x(args_.grad_x, plan_, plan_.h, plan_.w, 1, task, next);
    wants_weights_ = share != nullptr;
    weights_.load(args_.weights, task);
    if (plan_.form == Form::kMoments) terms_.load(args_, task);
    if (!weights_.finite() || !terms_.finite()) return false;
    fill_row(parts_, plan_.num_pools * kPackedLanes, 0.0f);
    fill_row(products_, plan_.num_pools * kPackedLanes, 0.0);
    pending_rows_ = 0;

    const int radius = plan_.radius_h;
    const int64_t begin = first_valid(task.row_begin, 2 * radius);
    const int64_t end = last_valid(task.row_end - 1, 2 * radius, plan_.h) + 1;
    x_.start(task, begin);
    next_sent_ = first_valid(task.row_begin, radius);
    grads_.start(task, next_sent_);
    for (int k = 0; k < own_maps_; ++k) own_grads_[k].start(task, next_sent_);
    const int64_t last_grad = last_valid(task.row_end - 1, radius, plan_.h);
    // Rows of x beyond the task's have products with its rows of grad_out.
    int64_t row = first_valid(task.row_begin, radius);
    const int64_t last_row = last_grad + 1;
    bool finite = true;
    const auto check = [&](const float* elements, int64_t size)
                           METAPOOL_LAMBDA { finite &= all_finite(elements, size); };
    for (int64_t line = begin; line < end; line += chunk_) {
      const int64_t line_end = line + chunk_ < end ? line + chunk_ : end;
      x_.load_to(line_end - 1, x, check);
      load_gradients(line_end - 1 < last_grad ? line_end - 1 : last_grad, grad_out, check);
      if (!finite) return false;
      trees_.find_in_rows(line, line_end, x_);
      scattered_.find_in_rows(line, line_end, x_);
      const Chunk chunk{begin, line, line_end, end};
      for (const PoolItem& item : plan_.max) {
        const float* const weights = weights_.of(item);
        double* const products = wants_weights_ ? products_ + item.index * kPackedLanes : nullptr;
        const auto in_trees = [&](const auto& field) {
          trees_.route(item, task, chunk, gradients_of(item), field, products);
        };
        if (scattered_.handles(item)) {
          scattered_.route(item, task, chunk, gradients_of(item), weights, products);
        } else if (plan_.form == Form::kMoments) {
          in_trees(terms_.field(item));
        } else {
          in_trees(WeightedGradients(weights));
        }
      }
      const int64_t ready = line_end == end ? last_row : line_end - 2 * radius;
      for (; row < ready && row < last_row; ++row) {
        if (plan_.form != Form::kMix) send(row + radius < last_grad ? row + radius : last_grad);
        collect(row, task, x, grad_out, grad_x);
      }
    }
    if (x_.whole() && wants_x_ && grad_x.as_row(0) == nullptr) {
      grad_x.store_dense(0, plan_.h, grad_x_);
    }
    if (!wants_weights_) return true;
    flush_parts();
    for (const PoolItem& item : plan_.avg) {  // sums so far
      const int area = (2 * item.radius_h + 1) * (2 * item.radius_w + 1);
      double* const products = products_ + item.index * kPackedLanes;
      for (int lane = 0; lane < kPackedLanes; ++lane) products[lane] /= area;
    }
    write_share(plan_, task, products_, share);
    return true;
  }

 private:
  // A chunk ends where sums are handed on, so this must not depend on the instruction set.
  static int64_t lines_at_a_time(const Plan& plan) {
    int64_t lines = kLargestRing;
    const int64_t maps = plan.form == Form::kStack ? plan.num_pools : 1;
    const int64_t bytes = plan.w * kPackedLanes * sizeof(float) * (1 + maps + plan.max.count);
    const int64_t smallest = plan.radius_h > kStreamedRadius ? 2 * kSmallestRing : kSmallestRing;
    while (lines > smallest && lines * bytes > kChunkBytes) lines /= 2;
    return lines;
  }

  static bool all_finite(const float* from, int64_t size) {
    Mask<float> found{};
    for (int64_t e = 0; e < size; e += kVectorLanes<float>) {
      const Floats vector = load(from + e);
      found |= vector - vector != 0;
    }
    return !any<float>(found);
  }

  // What all rows of averages share.
  void prepare_row() {
    row_.columns = plan_.w;
    row_.row_scales = row_scales_;
    row_.products = &row_products_;
    for (const PoolItem& item : plan_.avg) {
      row_.weights[item.radius_w] = weights_.averages_of(item);
      row_.column_scales[item.radius_w] = scales_.columns(item.radius_w);
      row_products_.parts[item.radius_w] = parts_ + item.index * kPackedLanes;
      row_products_.products[item.radius_w] = products_ + item.index * kPackedLanes;
    }
    if (plan_.skip.index < 0) return;
    row_.x_weights = weights_.of(plan_.skip);
    row_products_.x_parts = parts_ + plan_.skip.index * kPackedLanes;
    row_products_.x_products = products_ + plan_.skip.index * kPackedLanes;
  }

  // The lines of grad_out, or of the map beside others that belongs to a pooling.
  const DenseLines& gradients_of(const PoolItem& item) const {
    return plan_.form == Form::kStack ? own_grads_[item.index] : grads_;
  }

  // A line of what an average is sent that is a map of its own, and then of what it sends back.
  float* own_line(const PoolItem& item, int64_t line) const {
    return plan_.form == Form::kStack ? own_grads_[item.index][line] : fields_[item.radius_w][line];
  }

  template <typename Check>
  void load_gradients(int64_t last, const Lines& grad_out, const Check& check) {
    if (plan_.form != Form::kStack) return grads_.load_to(last, grad_out, check);
    for (int k = 0; k < plan_.pools.count; ++k) {
      const int map = plan_.pools.data[k];
      if (map == plan_.none.index) continue;
      own_grads_[map].load_to(last, grad_out.beside(k * args_.grad_out_stride_k), check);
    }
  }

  // Spreads what averages are sent along the rows, up to line `last`, where these are maps of their
  // own. Fields come about here.
  void send(int64_t last) {
    for (; next_sent_ <= last; ++next_sent_) {
      const int64_t line = next_sent_;
      if (plan_.form == Form::kMoments) {
        rows_.stream_averages(x_, line, [&](const PoolItem& item) {
          return terms_.sent_row(item, grads_[line], own_line(item, line));
        });
      }
      const float* wider = nullptr;
      for (int a = plan_.avg.count - 1; a >= 0; --a) {
        const PoolItem& item = plan_.avg.data[a];
        float* const row = own_line(item, line);
        const int radius = item.radius_w, side = 2 * radius + 1;
        const float* const rows = scales_.rows(radius);
        const float weight =
            (rows == nullptr ? 1.0f : rows[line]) / static_cast<float>(side * side);
        with_set_of(radius, [&](auto set) METAPOOL_LAMBDA {
          spread_row<largest_radius(set)>(row, wider, weight, scales_.columns(radius), plan_.w);
        });
        wider = row;
      }
    }
  }

  // Adds the products of row i of x with the rows of grad_out that the task owns; for the task's
  // own rows of x, computes that of grad_x and stores it.
  void collect(int64_t i, const Task& task, const Lines& x, const Lines& grad_out,
               const Lines& grad_x) {
    const auto within = [&](int64_t begin, int64_t end) {
      return i - begin >= plan_.radius_h && end - i > plan_.radius_h;
    };
    const bool owned = i >= task.row_begin && i < task.row_end;
    // Near the edge of a strip, and beyond it, only some of the rows around are the task's.
    const bool alone = plan_.strips == 1 || within(task.row_begin, task.row_end);
    if (!alone && wants_weights_) {
      AverageRow products = averages_around(grads_, i, task.row_begin, task.row_end);
      if (!owned) products.x = nullptr;
      stream_radii<true>(products, StoredRow(unused_, kPackedLanes, false));
    }
    if (!owned) return;

    float* const in_map = wants_x_ ? grad_x.as_row(i) : nullptr;
    float* const row = x_.whole() ? grad_x_ + i * row_size_ : grad_x_;
    float* const out = in_map == nullptr ? row : in_map;
    const int64_t pitch = in_map == nullptr ? kPackedLanes : grad_x.pixel_stride();
    const bool scattered = scattered_.any();
    if (scattered) scattered_.store_row(i, out, pitch);
    const bool complete = scattered && averages_ == 0 && plan_.skip.index < 0;
    if (!complete && plan_.form == Form::kMix) {
      const AverageRow averages = averages_around(grads_, i, 0, plan_.h);
      const StoredRow to(out, pitch, scattered);
      alone&& wants_weights_ ? stream_radii<true>(averages, to) : stream_radii<false>(averages, to);
    } else if (!complete) {
      add_up_averages(i, StoredRow(out, pitch, scattered));
    }
    if (wants_x_) trees_.route_row(i, x_[i], out, pitch);

    if (x_.whole()) {
      x.prefetch_next<false>(i);
      grad_out.prefetch_next<false>(i);
      if (wants_x_) grad_x.prefetch_next<true>(i);
    } else if (wants_x_ && in_map == nullptr) {
      grad_x.store(i, row);
    } else if (wants_x_) {
      grad_x.prefetch_ahead<true>(i);
    }
  }

  // What identity and averages send back along row i, where they are sent maps of their own: of
  // lines some way off, that of the averages which reach so far.
  void add_up_averages(int64_t i, const StoredRow& to) {
    AverageRow row{};
    row.columns = plan_.w;
    if (plan_.skip.index >= 0) {
      row.x = gradients_of(plan_.skip)[i];
      if (plan_.form == Form::kMoments) {
        stream_pixels(x_[i], plan_.w, terms_.sent_row(plan_.skip, row.x, unused_));
        row.x = unused_;
      }
    }
    int narrower = -1;
    for (const PoolItem& item : plan_.avg) {
      for (int distance = narrower + 1; distance <= item.radius_w; ++distance) {
        for (const int64_t line : {i - distance, i + distance}) {
          const bool inside = line >= 0 && line < plan_.h;
          row.lines[kStreamedRadius + line - i] = inside ? own_line(item, line) : zeros_;
        }
      }
      narrower = item.radius_w;
    }
    if (narrower < 0) row.lines[kStreamedRadius] = zeros_;
    with_set_of(narrower < 0 ? 0 : narrower,
                [&](auto set) METAPOOL_LAMBDA { sum_rows<largest_radius(set)>(row, to); });
  }

  // Rows of a map of gradients around row i, those of [begin, end), with row i of x.
  AverageRow averages_around(const DenseLines& grads, int64_t i, int64_t begin, int64_t end) {
    AverageRow averages = row_;
    for (int d = -kStreamedRadius; d <= kStreamedRadius; ++d) {
      const bool inside = i + d >= begin && i + d < end;
      averages.lines[kStreamedRadius + d] = inside ? grads[i + d] : zeros_;
    }
    if (plan_.skip.index >= 0) averages.x = grads[i];
    if (scales_sources()) scale_around(i, averages);
    row_products_.other = x_[i];
    return averages;
  }

  bool scales_sources() const { return !plan_.count_include_pad; }

  // Where padding does not count: near the upper and the lower edge, lines are scaled throughout.
  void scale_around(int64_t i, AverageRow& averages) {
    for (const PoolItem& item : plan_.avg) {
      row_scales_[item.radius_w] = scales_.rows(item.radius_h) + i;
    }
    const int radius = largest_radius(averages_);
    const bool inside = i >= 2 * radius && plan_.h - i > 2 * radius;
    averages.border = inside ? radius : plan_.w;
  }

  template <bool kProducts>
  void stream_radii(const AverageRow& averages, const StoredRow& to) {
    with_set(averages_, [&](auto set) METAPOOL_LAMBDA {
      stream_averages_where<set, Scales::kOfSources, kProducts>(scales_sources(), averages, to);
    });
    if (kProducts && ++pending_rows_ == kPendingRows) flush_parts();
  }

  // Moves what is left of the rows' products on.
  void flush_parts() {
    pending_rows_ = 0;
    for (int k = 0; k < plan_.num_pools * kPackedLanes; ++k) {
      products_[k] += parts_[k];
      parts_[k] = 0;
    }
  }

  const Plan& plan_;
  const BackwardArgs& args_;
  const RowShape<float, kPackedLanes> shape_;
  Weights<float, kPackedLanes> weights_;
  const BorderScales scales_;
  FieldTerms<float> terms_;
  PooledRows rows_;
  const int averages_;  // their radii
  const int own_maps_;  // of gradients, where each pooling has one
  const bool wants_x_;
  bool wants_weights_ = false;
  const int64_t row_size_, chunk_;
  DenseLines x_;
  DenseLines grads_;  // of all poolings
  DenseLines* own_grads_;
  RowRing<float> fields_[kStreamedRadius + 1];  // in Form::kMoments, of averages by radius
  TreeMaxima trees_;
  ScatteredMaxima scattered_;
  float *zeros_, *unused_, *grad_x_;
  double* products_;  // of pooled rows with grad_out, [num_pools][16]
  float* parts_;      // the same of averages and identity, not yet handed on
  int64_t pending_rows_ = 0;
  int64_t next_sent_ = 0;  // see send()
  // Of the row of averages at hand.
  AverageRow row_{};
  RowProducts row_products_{};
  const float* row_scales_[kStreamedRadius + 1] = {};
};

}  // namespace metapool::cpu::METAPOOL_ISA
