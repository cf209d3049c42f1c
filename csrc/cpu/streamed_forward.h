// Forward for small square windows at stride 1 on packed rows: row by row with all poolings in
// registers, see streamed_rows.h. Rows lie here without padding. Small planes are converted as a
// whole.
#pragma once

#include "maps.h"
#include "streamed_rows.h"

namespace metapool::cpu::METAPOOL_ISA {

class StreamedForward {
  using Lines = MapLines<float, kPackedLanes>;

 public:
  StreamedForward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        scales_(plan, arena),
        average_radii_(streamed_set(plan.avg, kStreamedRadius)),
        maximum_radii_(streamed_set(plan.max, kStreamedRadius)),
        x_(plan, 2 * plan.radius_h + 1, arena) {
    row_weights_ = arena.take_row<float>((kStreamedRadius + 1) * kPackedLanes, 0);
    zeros_ = arena.take_row<float>(plan.w * kPackedLanes, 0);
    out_ = arena.take_row<float>((x_.whole() ? plan.h : 1) * plan.w * kPackedLanes, 0);
    if (!arena.counts_only()) prepare_rows();
  }

  // False where x has NaN or weights are not finite: then nothing can be said of `out`.
  bool run(const Task& task, const Task& next, double*) {
    const Lines x(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines out(args_.out, plan_, plan_.h, plan_.w, 1, task, next);
    weights_.load(args_.weights, task, args_.constants);
    if (!weights_.finite()) return false;
    x_.start(task, first_valid(task.row_begin, plan_.radius_h));
    bool nan = false;
    for (int64_t i = task.row_begin; i < task.row_end; ++i) {
      x_.load_to(last_valid(i, plan_.radius_h, plan_.h), x,
                 [&](const float* elements, int64_t size)
                     METAPOOL_LAMBDA { nan |= plan_.max.count > 0 && has_nan(elements, size); });
      if (nan) return false;
      float* const in_map = out.as_row(i);
      float* const row = x_.whole() ? out_ + i * plan_.w * kPackedLanes : out_;
      stream(i, in_map == nullptr ? row : in_map,
             in_map == nullptr ? kPackedLanes : out.pixel_stride());
      if (x_.whole()) {
        x.prefetch_next<false>(i);
        out.prefetch_next<true>(i);
      } else if (in_map == nullptr) {
        out.store(i, row);
      } else {
        out.prefetch_ahead<true>(i);
      }
    }
    if (x_.whole() && out.as_row(0) == nullptr) out.store_dense(0, plan_.h, out_);
    return true;
  }

 private:
  // What all rows share.
  void prepare_rows() {
    averages_.columns = maxima_.columns = plan_.w;
    averages_.start = weights_.start();
    if (plan_.skip.index >= 0) averages_.x_weights = weights_.of(plan_.skip);
    for (const PoolItem& item : plan_.avg) {
      averages_.column_scales[item.radius_w] = scales_.columns(item.radius_w);
    }
    // As far from an edge, columns are still in windows that reach beyond it.
    if (!plan_.count_include_pad) averages_.border = 2 * largest_radius(average_radii_);
    for (const PoolItem& item : plan_.max) maxima_.weights[item.radius_w] = weights_.of(item);
  }

  void stream(int64_t center, float* out, int64_t pitch) {
    for (int d = -plan_.radius_h; d <= plan_.radius_h; ++d) {
      const int64_t line = center + d, valid = clamp_line(line, plan_.h);
      maxima_.lines[kStreamedRadius + d] = x_[valid];
      averages_.lines[kStreamedRadius + d] = line == valid ? x_[valid] : zeros_;
    }
    if (plan_.skip.index >= 0) averages_.x = x_[center];
    for (const PoolItem& item : plan_.avg) {
      averages_.weights[item.radius_w] = weights_in_row(item, center);
    }
    with_set(average_radii_, [&](auto set) METAPOOL_LAMBDA {
      stream_averages_where<set, Scales::kOfOutputs, false>(!plan_.count_include_pad, averages_,
                                                            StoredRow(out, pitch, false));
    });
    with_set(maximum_radii_, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) stream_maxima<set>(maxima_, StoredRow(out, pitch, true));
    });
  }

  // The [16] of an average around row `center`.
  const float* weights_in_row(const PoolItem& item, int64_t center) const {
    const float* const weights = weights_.averages_of(item);
    if (plan_.count_include_pad) return weights;
    float* const scaled = row_weights_ + item.radius_h * kPackedLanes;
    const float scale = scales_.rows(item.radius_h)[center];
    for (int lane = 0; lane < kPackedLanes; ++lane) scaled[lane] = weights[lane] * scale;
    return scaled;
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<float, kPackedLanes> shape_;
  Weights<float, kPackedLanes> weights_;
  const BorderScales scales_;
  const int average_radii_, maximum_radii_;  // sets
  DenseLines x_;
  float *row_weights_, *zeros_, *out_;
  AverageRow averages_{};  // around the row at hand
  MaximumRow maxima_{};
};

}  // namespace metapool::cpu::METAPOOL_ISA
