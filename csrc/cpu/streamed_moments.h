// Moments of square windows at stride 1 on packed rows, and products with them, see pooled_rows.h.
#pragma once

#include "moments.h"
#include "pooled_rows.h"

namespace metapool::cpu::METAPOOL_ISA {

class StreamedMoments {
  using Lines = MapLines<float, kPackedLanes>;

 public:
  StreamedMoments(const Plan& plan, const ForwardArgs& args, Arena& arena)
      : plan_(plan),
        args_(args),
        moments_(plan, args, arena),
        scales_(plan, arena),
        rows_(plan, scales_, arena),
        x_(plan, 2 * plan.radius_h + 1, arena),
        other_(plan, 1, arena) {}

  // share: [lanes][num_pools][2]. False where x has NaN: then nothing can be said of it.
  bool run(const Task& task, const Task& next, double* share) {
    const Lines x(args_.x, plan_, plan_.h, plan_.w, 1, task, next);
    const Lines other(args_.other, plan_, plan_.h, plan_.w, 1, task, next);
    moments_.start(task);
    x_.start(task, first_valid(task.row_begin, plan_.radius_h));
    other_.start(task, task.row_begin);
    bool nan = false;
    for (int64_t i = task.row_begin; i < task.row_end; ++i) {
      x_.load_to(last_valid(i, plan_.radius_h, plan_.h), x,
                 [&](const float* elements, int64_t size)
                     METAPOOL_LAMBDA { nan |= plan_.max.count > 0 && has_nan(elements, size); });
      if (nan) return false;
      if (args_.other.data != nullptr) {
        other_.load_to(i, other, [](const float*, int64_t) {});
        moments_.add_other(other_[i]);
      }
      if (moments_.scouts() && i == task.row_begin) {
        add_row(i);
        rows_.for_each([&](const PoolItem& item) { moments_.forget(item); });
      }
      add_row(i);
      if (!x_.whole()) continue;
      x.prefetch_next<false>(i);
      if (args_.other.data != nullptr) other.prefetch_next<false>(i);
    }
    moments_.finish(task, share);
    return true;
  }

 private:
  void add_row(int64_t i) {
    moments_.with_other([&](auto has_other) {
      rows_.stream_all(
          x_, i, [&](const PoolItem& item) { return moments_.row<has_other>(item, other_[i]); });
    });
  }

  const Plan& plan_;
  const ForwardArgs& args_;
  Moments<float, kPackedLanes> moments_;
  const BorderScales scales_;
  PooledRows rows_;
  DenseLines x_, other_;
};

}  // namespace metapool::cpu::METAPOOL_ISA
