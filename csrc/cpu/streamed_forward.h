// Forward for small square windows at stride 1 on packed rows: row by row with all poolings in
// registers, see streams.h. Rows lie here without padding. Small planes are converted as a whole.
#pragma once

#include "streams.h"

namespace metapool::cpu::METAPOOL_ISA {

// The lines of a task's planes without padding: all of them where that is little, else a ring.
template <typename Acc>
class DenseLines {
 public:
  using Lines = MapLines<Acc, kPackedLanes>;

  // `at_least` lines are there at a time.
  DenseLines(const Plan& plan, int64_t at_least, Arena& arena)
      : whole_(plan.strips == 1 && plan.h * plan.w <= kWholePixels),
        h_(plan.h),
        row_size_(plan.w * kPackedLanes) {
    lines_.allocate(arena, whole_ ? plan.h : at_least, row_size_, Acc(0));
  }

  bool whole() const { return whole_; }
  METAPOOL_INLINE Acc* operator[](int64_t line) const { return lines_[line]; }

  // Before the first line of a task. Lanes that it leaves empty hold zeros, whatever ran before.
  void start(const Task& task, int64_t line) {
    next_ = line;
    if (task.lanes < kPackedLanes) lines_.fill(Acc(0));
  }

  // Loads what is missing up to `last`, and calls body(first row, elements) for it.
  template <typename Body>
  METAPOOL_INLINE void load_to(int64_t last, const Lines& map, Body body) {
    if (whole_ && next_ <= last) {
      map.load_dense(0, h_, lines_[0]);
      body(lines_[0], h_ * row_size_);
      next_ = h_;
    }
    for (; next_ <= last; ++next_) {
      map.load(next_, lines_[next_]);
      body(lines_[next_], row_size_);
    }
  }

 private:
  static constexpr int64_t kWholePixels = 1024;

  const bool whole_;
  const int64_t h_, row_size_;
  int64_t next_ = 0;
  RowRing<Acc> lines_;
};

template <typename Acc>
class StreamedForward {
  using Lines = MapLines<Acc, kPackedLanes>;

 public:
  StreamedForward(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        shape_(plan),
        weights_(plan, shape_, arena),
        averages_(streamed_set(plan.avg)),
        maxima_(streamed_set(plan.max)),
        x_(plan, 2 * plan.radius_h + 1, arena) {
    zeros_ = arena.take_row<Acc>(plan.w * kPackedLanes, 0);
    out_ = arena.take_row<Acc>((x_.whole() ? plan.h : 1) * plan.w * kPackedLanes, 0);
  }

  // False where x has NaN or weights are not finite: then nothing can be said of `out`.
  bool run(const Task& task, const Task& next) {
    const Lines x(args_.values, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines out(args_.out, plan_, plan_.h, plan_.w, 1, task, next);
    weights_.load(args_.weights, task);
    if (!weights_.finite()) return false;
    x_.start(task, first_valid(task.row_begin, plan_.radius_h));
    bool nan = false;
    for (int64_t i = task.row_begin; i < task.row_end; ++i) {
      x_.load_to(last_valid(i, plan_.radius_h, plan_.h), x,
                 [&](const Acc* elements, int64_t size) METAPOOL_LAMBDA {
                   nan |= plan_.max.count > 0 && has_nan(elements, size);
                 });
      if (nan) return false;
      Acc* const in_map = out.as_row(i);
      Acc* const row = x_.whole() ? out_ + i * plan_.w * kPackedLanes : out_;
      stream(i, in_map == nullptr ? row : in_map,
             in_map == nullptr ? kPackedLanes : out.pixel_stride());
      if (x_.whole()) {
        x.template prefetch_next<false>(i);
        out.template prefetch_next<true>(i);
      } else if (in_map == nullptr) {
        out.store(i, row);
      } else {
        out.template prefetch<true>(i + 3);
      }
    }
    if (x_.whole() && out.as_row(0) == nullptr) out.store_dense(0, plan_.h, out_);
    return true;
  }

 private:
  void stream(int64_t center, Acc* out, int64_t pitch) {
    AverageRow<Acc> averages{};
    MaximumRow<Acc> maxima{};
    for (int d = -plan_.radius_h; d <= plan_.radius_h; ++d) {
      const int64_t line = center + d, valid = clamp_line(line, plan_.h);
      maxima.lines[kStreamedRadius + d] = x_[valid];
      averages.lines[kStreamedRadius + d] = line == valid ? x_[valid] : zeros_;
    }
    if (plan_.skip.index >= 0) {
      averages.x = x_[center];
      averages.x_weights = weights_.of(plan_.skip);
    }
    for (const PoolItem& item : plan_.avg) {
      averages.weights[item.radius_w] = weights_.averages_of(item);
    }
    for (const PoolItem& item : plan_.max) maxima.weights[item.radius_w] = weights_.of(item);
    averages.out = maxima.out = out;
    averages.columns = maxima.columns = plan_.w;
    averages.pitch = maxima.pitch = pitch;
    with_set(averages_, [&](auto set) METAPOOL_LAMBDA { stream_averages<set, false>(averages); });
    with_set(maxima_, [&](auto set) METAPOOL_LAMBDA {
      if constexpr (set != 0) stream_maxima<set>(maxima);
    });
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  const RowShape<Acc, kPackedLanes> shape_;
  Weights<Acc, kPackedLanes> weights_;
  const int averages_, maxima_;  // sets of radii
  DenseLines<Acc> x_;
  Acc *zeros_, *out_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
